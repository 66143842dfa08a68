"""The exported bundle: what `anomalyst export` writes and the runtime reads. No torch.

A folder, or a ``.zip`` of it: one graph, the references that are fed into it for each category,
the descriptors that tell a category, and ``exported.json``, which seals itself and names every
other file by SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes

from anomalyst.bundle import MANIFEST as BUNDLE_MANIFEST
from anomalyst.bundle import BackboneRecord
from anomalyst.errors import InputError
from anomalyst.files import replace_file
from anomalyst.sealed import UNREADABLE, Read, file_reader, sealed, unsealed

SCHEMA_VERSION = 1
MANIFEST = "exported.json"
REFERENCES = "references.safetensors"
RETRIEVAL = "retrieval.safetensors"
FRAME = "frame.safetensors"
PARITY = "parity.json"
Format = Literal["onnx", "openvino"]
MODEL_FILES: dict[Format, tuple[str, ...]] = {
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
}
"""The graph's files by format; together they hold its weights too."""

Array = npt.NDArray[Any]
_MEND = "copy it again, or export the bundle again"


class ExportedCategory(BaseModel):
    """What the runtime knows of one category.

    ``references`` maps an input of the graph to a tensor of ``references.safetensors``;
    ``n_normal`` and ``n_abnormal`` count the images behind them.
    """

    model_config = ConfigDict(extra="forbid")
    references: dict[str, str] = {}
    heat_unit: float
    calibration_scores: list[float] = []
    calibration_maxima: list[float] = []
    calibration_sha256: list[str] = []
    reference_sha256: list[str] = []
    n_normal: int = 0
    n_abnormal: int = 0


class Exported(BaseModel):
    """The content of ``exported.json``.

    ``size`` is the only (height, width) of the network's input that the graph takes, None for any.
    ``grows`` are the inputs that the runtime can enroll by: all references, or none.
    ``sigma`` smooths the map, in pixels of that input; ``heat_unit`` is the method's own, for
    categories without one. ``source`` is the SHA-256 of the bundle's manifest, ``versions`` the
    packages that exported it.
    """

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    format: Format
    int8: bool = False
    method: str
    options: dict[str, Any] = {}
    backbone: BackboneRecord
    preprocess: dict[str, Any]
    size: tuple[int, int] | None = None
    grows: list[str] = []
    needs_category: bool
    needs_class_name: bool = False
    judges_unseen: bool = False
    sigma: float
    heat_unit: float
    alpha: float
    alpha_review: float
    categories: dict[str, ExportedCategory]
    source: str = ""
    versions: dict[str, str] = {}
    created: str = ""
    sha256: dict[str, str] = {}


@dataclass(frozen=True)
class Export:
    """An exported bundle, read and checked.

    Attributes
    ----------
    model
        The graph's files, in the order of `MODEL_FILES`.
    references
        Tensors by the names that the manifest gives them.
    retrieval
        Descriptors ``[n, C]`` of each category's references.
    frame
        Ignore mask and golden patch, where images are framed by them.
    """

    manifest: Exported
    model: tuple[bytes, ...]
    references: dict[str, Array]
    retrieval: dict[str, Array]
    frame: dict[str, Array] = field(default_factory=dict)


def is_export(path: Path) -> bool:
    """Tell whether a folder or zip has the manifest of an exported bundle."""
    if not path.is_file():
        return (path / MANIFEST).is_file()
    try:
        return bool(file_reader(path, MANIFEST)(MANIFEST))
    except (KeyError, *UNREADABLE):
        return False


def is_meant_as_export(path: Path) -> bool:
    """Tell whether a folder or zip is an exported bundle, or one that lost its manifest."""
    graphs = [path / names[0] for names in MODEL_FILES.values()]
    return is_export(path) or any(graph.is_file() for graph in graphs)


def read_export(path: Path) -> Export:
    """Return an exported bundle, every hash verified.

    Raises
    ------
    InputError
        Not an exported bundle, a file missing or altered, or written by a newer anomalyst.
    """
    manifest, blobs = read_files(path)
    try:
        model = tuple(blobs[name] for name in MODEL_FILES[manifest.format])
        references = tensors_from_bytes(blobs[REFERENCES]) if REFERENCES in blobs else {}
        retrieval = tensors_from_bytes(blobs[RETRIEVAL]) if RETRIEVAL in blobs else {}
        frame = tensors_from_bytes(blobs[FRAME]) if FRAME in blobs else {}
    except KeyError as error:
        raise InputError(f"{path}: not a whole export, {error} is missing; {_MEND}") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as an export ({error}); {_MEND}") from None
    return Export(manifest, model, references, retrieval, frame)


def read_files(path: Path) -> tuple[Exported, dict[str, bytes]]:
    """Return the manifest and the other files of an exported bundle; raises as `read_export`."""
    if not path.exists():
        raise InputError(
            f"{path}: no such exported bundle; make one with: anomalyst export BUNDLE -o {path}"
        )
    try:
        read = file_reader(path, MANIFEST)
        manifest = _manifest(path, read)
        blobs = {name: _checked(path, name, read(name), manifest) for name in manifest.sha256}
    except (KeyError, FileNotFoundError) as error:
        raise InputError(f"{path}: not a whole export, {error} is missing; {_MEND}") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as an export ({error}); {_MEND}") from None
    return manifest, blobs


def _manifest(path: Path, read: Read) -> Exported:
    try:
        text = read(MANIFEST)
    except (KeyError, FileNotFoundError):
        if path.is_dir() and (path / BUNDLE_MANIFEST).is_file():
            raise InputError(
                f"{path} is a bundle, no export of one; "
                f"make that with: anomalyst export {path} -o DIR"
            ) from None
        raise
    return unsealed(path, MANIFEST, text, Exported, SCHEMA_VERSION)


def _checked(path: Path, name: str, blob: bytes, manifest: Exported) -> bytes:
    if hashlib.sha256(blob).hexdigest() != manifest.sha256[name]:
        raise InputError(f"{path}: {name} was altered (SHA-256 differs); {_MEND}")
    return blob


def tensor_file(arrays: Mapping[str, Array]) -> bytes:
    """Return tensors as the content of a ``.safetensors`` file."""
    return tensors_to_bytes({name: np.asarray(each, order="C") for name, each in arrays.items()})


def check_destination(path: Path) -> None:
    """Raise `InputError` where an export would overwrite something that is none."""
    if path.suffix == ".zip":
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file for the .zip")
        if path.exists() and not is_export(path):
            raise InputError(f"{path} is a zip of something else: name a new file")
    elif path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: name a folder (or a .zip) for the export")
    elif path.is_dir() and any(path.iterdir()) and not is_export(path):
        raise InputError(f"{path} holds other files and no {MANIFEST}: name a new folder")


def write_export(path: Path, manifest: Exported, files: Mapping[str, bytes]) -> None:
    """Write an exported bundle whole or not at all, in place of one that is there.

    ``files`` are all but the manifest, which gets their hashes here.

    Raises
    ------
    InputError
        The place holds something else, or cannot be written.
    """
    check_destination(path)
    manifest.sha256 = {name: hashlib.sha256(blob).hexdigest() for name, blob in files.items()}
    content = {**files, MANIFEST: sealed(manifest.model_dump(mode="json"))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
                for name, blob in content.items():
                    archive.writestr(name, blob)
            replace_file(path, packed.getvalue())
        else:
            _replace_folder(path, content)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write the export ({error.strerror or error}); "
            "choose a folder with room that you may write to"
        ) from error


def _replace_folder(path: Path, content: Mapping[str, bytes]) -> None:
    """Write a folder beside its place, and let it take the name once it is whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    former = path.with_name(f".{path.name}.{os.getpid()}.former")
    try:
        fresh.mkdir()
        for name, blob in content.items():
            replace_file(fresh / name, blob)
        if path.exists():
            path.rename(former)
        fresh.rename(path)
    except OSError:
        if former.exists() and not path.exists():
            former.rename(path)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
