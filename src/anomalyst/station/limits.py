"""What a caller may send, and how often: bodies, pixels, names, requests a second."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from math import ceil
from typing import Annotated

from fastapi import HTTPException
from pydantic import AfterValidator, StringConstraints
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalyst.data.images import header_size
from anomalyst.errors import InputError
from anomalyst.station.refusals import Refusal, refused
from anomalyst.station.settings import MIB, Settings


def _plain(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters")
    return text


Short = Annotated[str, StringConstraints(max_length=200), AfterValidator(_plain)]
"""A name or number that somebody gives: one line."""


def _lines(text: str) -> str:
    if not text.replace("\n", "").replace("\t", "").isprintable():
        raise ValueError("only printable characters and line ends")
    return text


Note = Annotated[str, StringConstraints(max_length=2000), AfterValidator(_lines)]
"""A reason or note: some lines."""


def shown_name(name: str) -> str:
    """Return a file's name as text that is safe to show; a path of it is never used."""
    name = name if name.isprintable() else ascii(name)
    return name[-255:]


def check_pixels(content: bytes, name: str, limit: int) -> None:
    """Raise `InputError` where a picture's header cannot be read or tells of too many pixels."""
    height, width = header_size(content, name)
    if height * width > limit:
        raise InputError(
            f"{name}: {width}x{height} is {ceil(height * width / 1e5) / 10:g} megapixels, over the "
            f"limit of {limit / 1e6:g}; cut it into smaller images"
        )


class Buckets:
    """A token bucket for each caller: ``rate`` requests a second, ``burst`` at once."""

    _MOST = 10_000

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: str) -> bool:
        """Take a token of a caller's; False where none is left."""
        moment = time.monotonic()
        with self._lock:
            left, last = self._left.pop(caller, (self._burst, moment))
            left = min(self._burst, left + (moment - last) * self._rate)
            allowed = left >= 1
            self._left[caller] = (left - 1 if allowed else left, moment)
            if len(self._left) > self._MOST:
                self._left.popitem(last=False)
        return allowed


class BodyLimit:
    """Refuses a body that is too large as soon as that is known: by its length or as it comes.

    Only an upload of a bundle may be larger than a batch of pictures; single pictures are measured
    where they are read. All bodies that are being read share ``max_buffered``.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._buffered = 0  # the event loop is one thread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        limit, kept = self._limit(scope["path"]), self._kept(scope["path"])
        said = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        too_large = Refusal(413, f"the body is over the limit of {limit / MIB:g} MiB")
        held, over = 0, said.isdigit() and int(said) > limit

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and (over or message["status"] == 413):
                # What else the caller sends is not wanted: the connection ends with the answer.
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if over:
            await refused(too_large)(scope, receive, closing)
            return

        async def measured() -> Message:
            nonlocal held, over
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self._buffered += size if kept else 0
            if over := held > limit:
                raise HTTPException(413, too_large.message)
            if over := kept and self._buffered > self._settings.max_buffered:
                raise HTTPException(503, "too much is being sent: send it again")
            return message

        try:
            await self._app(scope, measured, closing)
        finally:
            self._buffered -= held if kept else 0

    def _limit(self, path: str) -> int:
        if path.endswith("/recipes"):
            return self._settings.max_recipe
        if path.endswith("/inspections/batch"):
            return self._settings.max_batch
        return self._settings.max_image + (MIB if path.endswith("/inspections") else 0)

    def _kept(self, path: str) -> bool:
        """Tell whether bodies are held in memory; an uploaded bundle goes to a file."""
        return not path.endswith("/recipes")


def too_often(retry: int = 1) -> Refusal:
    """Return the refusal of a caller who asks too often."""
    return Refusal(429, "too many requests: wait a second", retry=retry)
