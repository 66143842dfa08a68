"""What the station answers instead of a result: a status and one clear line."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from anomalyst.data.images import reason
from anomalyst.errors import InputError
from anomalyst.files import is_disk_full
from anomalyst.station.database import DatabaseGone, DiskFull

_log = logging.getLogger(__name__)


class Refusal(Exception):
    """An answer of ``status`` with ``{"error": message, **more}``.

    ``retry`` is the number of seconds after which asking again makes sense.
    """

    def __init__(self, status: int, message: str, *, retry: int | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry = retry
        self.more = more


def refused(refusal: Refusal) -> JSONResponse:
    """Return a refusal as a response."""
    headers = {} if refusal.retry is None else {"Retry-After": str(refusal.retry)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": refusal.message, **refusal.more}, refusal.status, headers)


def as_refusal(error: BaseException) -> Refusal:
    """Return what is answered to an error; one that nobody foresaw is ours (500), and logged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, DiskFull):
        return Refusal(507, f"{error}: nothing was stored; make room and send it again")
    if isinstance(error, DatabaseGone):
        return Refusal(503, f"{error}: nothing was stored; send it again", retry=5)
    if isinstance(error, InputError):
        return Refusal(422, str(error))
    if isinstance(error, ClientDisconnect):
        return Refusal(400, "the connection was closed before the body came")
    if is_disk_full(error):
        return Refusal(507, "the disk is full: nothing was stored; make room and send it again")
    _log.error("internal error", exc_info=error)
    return Refusal(500, f"internal error, our fault: {type(error).__name__}: {_words(error)}")


def answer_errors(app: FastAPI) -> None:
    """Let an app answer every error with ``{"error": ...}``."""
    for kind in (Refusal, DiskFull, DatabaseGone, InputError, ClientDisconnect, OSError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)


async def _answer(_: Request, error: Exception) -> JSONResponse:
    return refused(as_refusal(error))


async def _answer_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    made = refused(Refusal(error.status_code, str(error.detail)))
    made.headers.update(error.headers or {})
    return made


async def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return refused(Refusal(422, f"{where}: {first['msg']}"))


def _words(error: BaseException) -> str:
    return reason(error) if isinstance(error, Exception) else ""
