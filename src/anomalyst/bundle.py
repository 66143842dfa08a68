"""The bundle: one folder, or one zip of it, that holds a whole detector.

``bundle.json`` (the manifest) names every other file with its SHA-256 and seals itself with one.
Tensor files carry part of their hash in the name, so a new state is written beside the old one and
becomes the bundle in the one instant in which ``bundle.json`` is replaced: killed at any moment,
the folder is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes

from anomalyst.errors import InputError
from anomalyst.files import replace_file
from anomalyst.sealed import UNREADABLE, file_reader, sealed, unsealed

SCHEMA_VERSION = 3
MANIFEST = "bundle.json"
Arrays = Mapping[str, npt.NDArray[Any]]

_PACKAGES = ("anomalyst", "numpy", "pillow", "torch", "timm", "open-clip-torch")


class BackboneRecord(BaseModel):
    """Which frozen features the detector stands on."""

    model_config = ConfigDict(extra="forbid")
    id: str
    layers: tuple[int, ...]
    weights_sha256: str


class ReferenceRecord(BaseModel):
    """One enrolled reference: its file name and the SHA-256 of its content."""

    model_config = ConfigDict(extra="forbid")
    name: str
    sha256: str


class AbnormalRecord(ReferenceRecord):
    """One enrolled abnormal reference; ``mask`` tells whether its mask was given or found."""

    mask: Literal["given", "found"]


class CategoryRecord(BaseModel):
    """What the detector knows of one category."""

    model_config = ConfigDict(extra="forbid")
    references: list[ReferenceRecord] = []
    abnormal: list[AbnormalRecord] = []
    calibration_scores: list[float] = []
    calibration_maxima: list[float] = []
    calibration_sha256: list[str] = []


class Manifest(BaseModel):
    """The content of ``bundle.json``."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    method: str
    options: dict[str, Any]
    seed: int
    backbone: BackboneRecord
    preprocess: dict[str, Any]
    alpha: float
    alpha_review: float
    categories: dict[str, CategoryRecord]
    trained_on: list[ReferenceRecord] = []
    setting: str
    shots: int | None
    data_fingerprint: str
    seconds: dict[str, float]
    versions: dict[str, str]
    created: str
    files: dict[str, str] = {}
    """Part (``backbone``, ``method``, ...) -> file name; the hash of each is in ``sha256``."""
    sha256: dict[str, str] = {}


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """Return the time in UTC, ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_bundle(path: Path, manifest: Manifest, parts: Mapping[str, Arrays]) -> None:
    """Write a bundle, replacing the one that is there, as a folder or (``.zip``) as one file.

    Raises
    ------
    InputError
        The folder holds something else, or cannot be written.
    """
    check_destination(path)
    blobs = {}
    for part, arrays in parts.items():
        blob = tensors_to_bytes(
            {key: np.asarray(value, order="C") for key, value in arrays.items()}
        )
        digest = hashlib.sha256(blob).hexdigest()
        name = f"{part}-{digest[:12]}.safetensors"
        manifest.files[part], manifest.sha256[name] = name, digest
        blobs[name] = blob
    text = sealed(manifest.model_dump(mode="json"))
    try:
        if path.suffix == ".zip":
            _write_zip(path, {MANIFEST: text, **blobs})
        else:
            _write_folder(path, text, blobs)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write the bundle ({error.strerror or error}); "
            "choose a folder with room that you may write to"
        ) from error


def check_destination(path: Path) -> None:
    """Raise `InputError` where a bundle would overwrite something that is none."""
    if path.suffix == ".zip":
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file for the .zip")
        if path.exists() and not _is_bundle_zip(path):
            raise InputError(f"{path} is a zip of something else: name a new file")
    elif path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: name a folder (or a .zip) for the bundle")
    elif path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).exists():
        raise InputError(f"{path} holds other files and no {MANIFEST}: name a new folder")


def _is_bundle_zip(path: Path) -> bool:
    try:
        return bool(file_reader(path, MANIFEST)(MANIFEST))
    except (KeyError, *UNREADABLE):
        return False


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, blob in files.items():
            archive.writestr(name, blob)
    replace_file(path, packed.getvalue())


def _write_folder(path: Path, manifest: bytes, blobs: Mapping[str, bytes]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    former = _named_files(path)
    for name, blob in blobs.items():
        # The name carries the hash, but a file that was damaged since must be written anew.
        if not (path / name).exists() or (path / name).read_bytes() != blob:
            replace_file(path / name, blob)
    replace_file(path / MANIFEST, manifest)
    for name in former - set(blobs):
        (path / name).unlink(missing_ok=True)


def _named_files(path: Path) -> set[str]:
    """Return the tensor files that the manifest now in a folder names; none if it is damaged."""
    try:
        named = json.loads((path / MANIFEST).read_bytes())["files"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in named if isinstance(name, str) and Path(name).name == name}


def read_bundle(path: Path) -> tuple[Manifest, dict[str, dict[str, npt.NDArray[Any]]]]:
    """Return the manifest and the tensors of every part, hashes verified.

    Raises
    ------
    InputError
        Not a bundle, a file missing or altered, or written by a newer anomalyst.
    """
    if not path.exists():
        raise InputError(f"{path}: no such bundle; make one with: anomalyst fit METHOD DATA -o DIR")
    try:
        read = file_reader(path, MANIFEST)
        manifest = unsealed(path, MANIFEST, read(MANIFEST), Manifest, SCHEMA_VERSION)
        parts = {}
        for part, name in manifest.files.items():
            blob = read(name)
            if hashlib.sha256(blob).hexdigest() != manifest.sha256.get(name):
                raise InputError(f"{path}: {name} was altered (SHA-256 differs); copy it again")
            parts[part] = tensors_from_bytes(blob)
    except (KeyError, FileNotFoundError) as error:
        raise InputError(f"{path}: not a whole bundle, {error} is missing; copy it again") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as a bundle ({error}); copy it again") from None
    return manifest, parts


def bundle_hash(path: Path) -> str:
    """Return the SHA-256 of the manifest, which fixes every other file: the bundle's identity."""
    return hashlib.sha256(file_reader(path, MANIFEST)(MANIFEST)).hexdigest()
