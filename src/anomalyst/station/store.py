"""Pictures and maps by the SHA-256 of their content, outside any folder that is served.

What `Store.put` has returned is on the disk: the file is flushed before it takes its name, and its
folder after.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from anomalyst.files import is_disk_full, replace_file
from anomalyst.station.database import DiskFull
from anomalyst.station.refusals import Refusal


class Store:
    """Files in a folder of 256 folders, named by their content's hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("??/.*.partial"):  # of a station that was killed
            left.unlink(missing_ok=True)

    def put(self, content: bytes) -> str:
        """Keep a content and return its hash; known ones are not written again.

        Raises
        ------
        DiskFull
            Nothing was kept.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self.path(digest)
        try:
            if not path.exists():
                self._write(path, content)
            _sync(path.parent)  # also where another thread has written it just now
        except OSError as error:
            if is_disk_full(error):
                raise DiskFull("the disk has no room for pictures") from error
            raise Refusal(503, f"pictures cannot be stored ({error.strerror})") from error
        return digest

    def get(self, digest: str) -> bytes:
        """Return the content of a hash; a `Refusal` (404) where it is gone, or was altered."""
        try:
            content = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise Refusal(404, f"{digest[:12]}...: this picture is not in the store") from None
        except OSError as error:
            raise Refusal(503, f"pictures cannot be read ({error.strerror})") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise Refusal(404, f"{digest[:12]}...: this picture's file was altered (SHA-256)")
        return content

    def has(self, digest: str) -> bool:
        """Tell whether there is a content of that hash."""
        return self.path(digest).is_file()

    def path(self, digest: str) -> Path:
        """Return where a content of that hash lies."""
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"not a SHA-256: {digest!r}")
        return self.folder / digest[:2] / digest

    def _write(self, path: Path, content: bytes) -> None:
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
            _sync(self.folder)
        replace_file(path, content)


def _sync(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    if os.name == "nt":  # cannot be opened there, and needs not
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
