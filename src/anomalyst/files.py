"""Writing a file so that readers see the old content or the new, never a part."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from anomalyst.errors import InputError


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


def make_folder(path: Path) -> None:
    """Make a folder for results, before the work and not after it.

    Raises
    ------
    InputError
        It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: no folder for results can be made there ({error.strerror}); name another"
        ) from None


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an error is, or came of, a disk without room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
