"""Frozen features on disk: memory-mapped, half precision, bounded, safe between processes.

One safetensors file an entry, so that any tool can look inside; its checksum is in its header.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from anomalyst.errors import InputError
from anomalyst.files import replace_file

FeatureArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]

_TYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_HEADER_BYTES = 8
_ABANDONED_SECONDS = 3600.0
# Nothing else is ever removed: the folder that the user names may hold files of their own.
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PARTIAL = re.compile(r"\.\d+-\d+\.partial")


class FeatureCache:
    """Feature maps by what made them: image, preprocessing, weights, layers and view.

    Parameters
    ----------
    folder
        Made if missing; several processes may share it.
    max_bytes
        Bound of the files' sizes; the least recently used entries go first.

    Attributes
    ----------
    hits, misses
        Of this object's `get`.

    Raises
    ------
    InputError
        The folder cannot be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 4 * 2**30) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._bytes: int | None = None
        self._written = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    @staticmethod
    def key(
        image_sha256: str,
        transform: str,
        weights_sha256: str,
        layers: Sequence[int],
        view: str = "image",
    ) -> str:
        """Return the name of an entry.

        Parameters
        ----------
        image_sha256
            Of the image's content.
        transform
            Every setting of the preprocessing, in words.
        view
            How the image was changed after preprocessing, in words.
        """
        parts = json.dumps([image_sha256, transform, weights_sha256, list(layers), view])
        return hashlib.sha256(parts.encode()).hexdigest()

    def get(self, key: str) -> list[FeatureArray] | None:
        """Return an entry's arrays, read-only and memory-mapped, or None.

        A damaged entry is removed and counts as none.
        """
        path = self._path(key)
        found: list[FeatureArray] | None = None
        try:
            found = _read(path)
            os.utime(path)
        except (FileNotFoundError, PermissionError):
            # Not there, just evicted, or somebody else's: what could be read is good all the same.
            pass
        except (ValueError, KeyError, TypeError):
            _remove(path)
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: str, arrays: Sequence[npt.NDArray[Any]]) -> list[FeatureArray]:
        """Store feature maps and return them as `get` will: rounded to half precision.

        A map with a value beyond half precision's range (65504) is kept in single precision.

        Raises
        ------
        InputError
            The folder cannot be written, or its disk is full.
        """
        rounded = [_halve(array) for array in arrays]
        size = sum(array.nbytes for array in rounded)
        if size > self.max_bytes:
            return rounded
        try:
            self._write(self._path(key), rounded)
            self._bound(size)
        except OSError as error:
            raise self._unwritable(error) from None
        return rounded

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _write(self, path: Path, arrays: Sequence[FeatureArray]) -> None:
        path.parent.mkdir(exist_ok=True)
        named = {str(tap): array for tap, array in enumerate(arrays)}
        try:
            replace_file(path, save(named, {"crc32": _checksum(arrays)}))
        except PermissionError:
            # Windows replaces no file that is mapped; one of this name holds the same anyway.
            if not path.exists():
                raise

    def _bound(self, added: int) -> None:
        """Keep the folder under the bound, looking at it only now and then.

        Other processes write too: after every sixteenth of the bound it is measured anew.
        """
        self._written += added
        if (
            self._bytes is None
            or self._bytes + self._written > self.max_bytes
            or self._written > self.max_bytes / 16
        ):
            self._bytes = self._evict()
            self._written = 0

    def _evict(self) -> int:
        """Where the bound is broken, remove the oldest down to nine tenths; return the size."""
        entries = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if _ENTRY.fullmatch(path.name):
                entries.append((status.st_mtime_ns, status.st_size, path))
            elif (
                _PARTIAL.fullmatch(path.name) and time.time() - status.st_mtime > _ABANDONED_SECONDS
            ):
                _remove(path)
        total = sum(size for _, size, _ in entries)
        if total <= self.max_bytes:
            return total
        for _, size, path in sorted(entries):
            if total <= self.max_bytes * 0.9:
                break
            if _remove(path):
                total -= size
        return total

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder}: cannot keep features there ({error.strerror or error}); "
            "give another folder, or none"
        )


def _remove(path: Path) -> bool:
    """Remove a file, and say whether it is gone: Windows keeps one that somebody has mapped."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def _halve(array: npt.NDArray[Any]) -> FeatureArray:
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(array, dtype=np.float16)
    if np.isfinite(half).all():
        return half
    return np.ascontiguousarray(array, dtype=np.float32)


def _checksum(arrays: Sequence[FeatureArray]) -> str:
    value = 0
    for array in arrays:
        value = zlib.crc32(array.data, value)
    return str(value)


def _read(path: Path) -> list[FeatureArray]:
    """Return the arrays of a file in safetensors' layout, in order, as views of the mapped file.

    Raises
    ------
    ValueError, KeyError, TypeError
        The file is not whole.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r")
    start = _HEADER_BYTES + int.from_bytes(content[:_HEADER_BYTES].tobytes(), "little")
    header = json.loads(content[_HEADER_BYTES:start].tobytes())
    arrays: list[FeatureArray] = []
    for tap in range(len(header) - 1):
        entry = header[str(tap)]
        begin, end = entry["data_offsets"]
        kind = _TYPES[entry["dtype"]]
        arrays.append(content[start + begin : start + end].view(kind).reshape(entry["shape"]))
    if _checksum(arrays) != header["__metadata__"]["crc32"]:
        raise ValueError(f"{path}: damaged")
    return arrays
