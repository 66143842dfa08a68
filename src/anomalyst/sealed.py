"""A folder, or a zip of it, whose manifest seals itself and names every other file by SHA-256.

Bundles and exported bundles are both that. numpy is not needed here, torch least of all.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from anomalyst.errors import InputError

# What a damaged folder or zip makes its readers raise; an encrypted zip is a RuntimeError.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
    OSError,
    EOFError,
    RuntimeError,
)
Read = Callable[[str], bytes]
_Model = TypeVar("_Model", bound=BaseModel)


def sealed(content: Mapping[str, Any]) -> bytes:
    """Return a manifest as JSON that carries the hash of its own content."""
    return json.dumps({**content, "seal": _seal(content)}, indent=2).encode()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def unsealed(path: Path, file: str, text: bytes, model: type[_Model], newest: int) -> _Model:
    """Return the manifest that `sealed` wrote as ``path``/``file``, checked.

    Raises
    ------
    InputError
        Altered, of a schema above ``newest``, or not what ``model`` describes.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}/{file}: not JSON ({error}); copy the bundle again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > newest:
        raise InputError(
            f"{path}: bundle of schema {version}, this anomalyst reads up to {newest}; "
            "upgrade with: pip install -U anomalyst"
        )
    if not isinstance(raw, dict) or raw.pop("seal", None) != _seal(raw):
        raise InputError(f"{path}/{file} was altered (SHA-256 differs); copy the bundle again")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}/{file}: {where}: {first['msg']}") from None


def file_reader(path: Path, manifest: str) -> Read:
    """Return what reads one file of a folder or zip by its name; ``manifest`` is at its root.

    It raises KeyError or FileNotFoundError with the name of a file that is missing.
    """
    return _zip_reader(path, manifest) if path.is_file() else _folder_reader(path, manifest)


def _folder_reader(path: Path, manifest: str) -> Read:
    def read(name: str) -> bytes:
        if Path(name).name != name:
            raise InputError(f"{path}: {manifest} names a file outside the bundle: {name!r}")
        if not (path / name).is_file():
            raise FileNotFoundError(name)
        return (path / name).read_bytes()

    return read


def _zip_reader(path: Path, manifest: str) -> Read:
    """Return the reader of a zip, also of one whose files lie in a folder of its own."""
    archive = zipfile.ZipFile(path)
    inside = [name for name in archive.namelist() if name.endswith(f"/{manifest}")]
    prefix = inside[0].removesuffix(manifest) if len(inside) == 1 else ""
    return lambda name: archive.read(prefix + name)
