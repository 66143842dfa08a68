"""Writing a file so that readers see the old content or the new, never a part."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, and take the name in one step.

    Raises
    ------
    OSError
        No room, or the folder cannot be written; what was there before still is.
    """
    # Named by process and thread, not by the file: the longest legal file name must work too.
    partial = path.parent / f".{os.getpid()}-{threading.get_ident()}.partial"
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
