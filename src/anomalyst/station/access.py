"""Who asks, what they may do, and requests that a browser was tricked into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalyst.station.core import Station
from anomalyst.station.keys import ROLES, Role, any_key, find_key
from anomalyst.station.limits import too_often
from anomalyst.station.refusals import Refusal, refused
from anomalyst.station.settings import Settings, is_loopback

_Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
_Header = Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))]

POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_SAFE = {"GET", "HEAD", "OPTIONS"}


@dataclass(frozen=True)
class Caller:
    """Who asks; ``open`` says that no key is needed here."""

    name: str
    role: Role
    open: bool = False

    def require(self, role: Role) -> Caller:
        """Return the caller, or refuse (403) one whose role does not suffice."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise Refusal(403, f"{self.name} is {_a(self.role)}, and this needs {_a(role)}")
        return self


def _a(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def here(request: Request) -> Station:
    """Return the station that is asked."""
    station: Station = request.app.state.station
    return station


StationHere = Annotated[Station, Depends(here)]


def caller_of(request: Request, station: StationHere, bearer: _Bearer, header: _Header) -> Caller:
    """Return who asks: by a key, or where none was ever made, anybody at this machine."""
    address = request.client.host if request.client else ""
    token = bearer.credentials if bearer else header
    with station.database.read() as session:
        if token is not None:
            key = find_key(session, token)
            if key is None:
                if not station.failures.take(address):
                    raise too_often(10)
                raise Refusal(401, "this key is unknown or was revoked")
            found = Caller(key.name, _role(key.role))
        elif not any_key(session) and station.settings.loopback and is_loopback(address):
            found = Caller("local", "engineer", open=True)
        else:
            raise Refusal(401, "send a key: Authorization: Bearer KEY, or X-API-Key: KEY")
    if not station.buckets.take(f"{found.name} {address}"):
        raise too_often()
    return found


def _role(name: str) -> Role:
    return next(role for role in ROLES if role == name)


def _viewer(caller: Annotated[Caller, Depends(caller_of)]) -> Caller:
    return caller.require("viewer")


def _operator(caller: Annotated[Caller, Depends(caller_of)]) -> Caller:
    return caller.require("operator")


def _engineer(caller: Annotated[Caller, Depends(caller_of)]) -> Caller:
    return caller.require("engineer")


Viewer = Annotated[Caller, Depends(_viewer)]
Operator = Annotated[Caller, Depends(_operator)]
Engineer = Annotated[Caller, Depends(_engineer)]


class Gate:
    """Refuses what only a foreign page would send, and tells browsers what not to do.

    A name that an attacker lets point to 127.0.0.1 is refused by its ``Host``; a change that a page
    from elsewhere asks for, by its ``Origin``.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.setdefault("Content-Security-Policy", POLICY)
                answer["X-Content-Type-Options"] = "nosniff"
                answer["Referrer-Policy"] = "no-referrer"
                answer["Cross-Origin-Resource-Policy"] = "same-origin"
                answer.setdefault("Cache-Control", "no-store")
            await send(message)

        if (refusal := self._refusal(scope["method"], headers)) is not None:
            await refused(refusal)(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _refusal(self, method: str, headers: Headers) -> Refusal | None:
        host = headers.get("host", "")
        name = _host_name(host)
        if self._settings.loopback and (name is None or not is_loopback(name)):
            return Refusal(400, "this station answers to localhost only: open http://127.0.0.1")
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if method not in _SAFE and (foreign or headers.get("sec-fetch-site") == "cross-site"):
            return Refusal(403, "a page from elsewhere may not change anything here")
        return None


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
