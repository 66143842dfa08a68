"""Bodies of requests: a picture, several of them, a bundle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from anomalyst.station.refusals import Refusal

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_KINDS = ("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp")


def _form(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    described = {"type": "object", "properties": {name: schema}, "required": [name]}
    return {"multipart/form-data": {"schema": described}}


_FILE = {"type": "string", "format": "binary"}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            **dict.fromkeys((*_KINDS, "application/octet-stream"), _BINARY),
            **_form("image", _FILE),
        },
    }
}
IMAGES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": _form("images", {"type": "array", "items": _FILE, "minItems": 1}),
    }
}
BUNDLE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": dict.fromkeys(("application/zip", "application/octet-stream"), _BINARY),
    }
}


async def picture_of(request: Request, limit: int) -> tuple[bytes, str]:
    """Return bytes and name (empty without one) of the picture that a request carries.

    Raises
    ------
    Refusal
        400, 413, 415: none, too large, or a body of another kind.
    """
    kind = _kind(request)
    if kind == "multipart/form-data":
        async with _parsed(request, files=1) as form:
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise Refusal(400, "the form has no file 'image'")
            return await file.read(), file.filename or ""
    if not (kind.startswith("image/") or kind == "application/octet-stream"):
        raise Refusal(
            415,
            f"Content-Type {kind or 'missing'}: send the picture's bytes as image/png, image/jpeg, "
            "... or application/octet-stream, or a multipart form with the file 'image'",
        )
    parts, size = list[bytes](), 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > limit:
            raise Refusal(413, f"the picture is over the limit of {limit >> 20} MiB")
    if not size:
        raise Refusal(400, "the body is empty: send the picture's bytes")
    return b"".join(parts), ""


@asynccontextmanager
async def pictures_of(request: Request, most: int) -> AsyncIterator[list[UploadFile]]:
    """Yield the files ``images`` of a request's form."""
    if _kind(request) != "multipart/form-data":
        raise Refusal(415, "send a multipart form with files 'images'")
    async with _parsed(request, files=most) as form:
        files = [file for file in form.getlist("images") if isinstance(file, UploadFile)]
        if not files:
            raise Refusal(400, "the form has no files 'images'")
        yield files


async def bundle_of(request: Request, folder: Path) -> Path:
    """Write a request's body into a new file of a folder, as it comes, and return its path."""
    if _kind(request) not in ("application/zip", "application/octet-stream"):
        raise Refusal(415, "send the bundle's .zip as application/zip")
    handle, name = tempfile.mkstemp(suffix=".zip", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            async for part in request.stream():
                await run_in_threadpool(file.write, part)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


@asynccontextmanager
async def _parsed(request: Request, files: int) -> AsyncIterator[FormData]:
    try:
        form = await request.form(max_files=files, max_fields=16)
    except (ValueError, LookupError) as error:
        raise Refusal(400, f"the form cannot be read ({error})") from None
    try:
        yield form
    finally:
        await form.close()


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
