"""The station's own copies of bundles: ``DIR/recipes/SHA256``, whole and checked, never changed.

The hash is that of the manifest, which names the hash of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from anomalyst.bundle import MANIFEST, read_bundle
from anomalyst.errors import InputError
from anomalyst.files import is_disk_full, replace_file
from anomalyst.runtime.exported import MANIFEST as EXPORTED
from anomalyst.runtime.exported import is_meant_as_export, read_export
from anomalyst.scoring import Calibration, Decision, normals_needed
from anomalyst.sealed import UNREADABLE, file_reader
from anomalyst.station.database import DiskFull
from anomalyst.station.settings import Settings

Kind = Literal["bundle", "export"]
_MANIFESTS: dict[str, str] = {"bundle": MANIFEST, "export": EXPORTED}
_MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Kept:
    """A bundle in the station's folder."""

    sha256: str
    kind: Kind
    method: str


def bundle_folder(settings: Settings, sha256: str) -> Path:
    """Return the folder of a kept bundle."""
    return settings.data / "recipes" / sha256


def keep_bundle(settings: Settings, path: Path) -> Kept:
    """Check every file of a bundle or export, folder or ``.zip``, and copy it.

    Raises
    ------
    InputError
        Not a bundle, or a file of it is missing or altered.
    DiskFull
        Nothing was kept.
    """
    _refuse_bombs(path)
    kind: Kind = "export" if is_meant_as_export(path) else "bundle"
    manifest = read_export(path).manifest if kind == "export" else read_bundle(path)[0]
    read = file_reader(path, _MANIFESTS[kind])
    content = read(_MANIFESTS[kind])
    kept = Kept(hashlib.sha256(content).hexdigest(), kind, manifest.method)
    names = [*manifest.sha256]
    if wrong := [name for name in names if Path(name).name != name or name.startswith(".")]:
        raise InputError(f"{path}: it names a file outside the bundle: {wrong[0]!r}")
    place = bundle_folder(settings, kept.sha256)
    if (place / _MANIFESTS[kind]).is_file():
        return kept
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
    try:
        for name in names:
            replace_file(partial / name, read(name))
        replace_file(partial / _MANIFESTS[kind], content)
        if not place.exists():  # else another upload of the same was quicker
            os.replace(partial, place)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull("the disk has no room for the bundle") from error
        raise InputError(f"{place.parent}: cannot keep the bundle ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kept


def _refuse_bombs(path: Path) -> None:
    """Raise where a zip would unpack to more than any bundle holds."""
    if not path.is_file():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except UNREADABLE as error:
        raise InputError(f"{path.name}: no .zip of a bundle ({error})") from None
    if size > _MOST_BYTES:
        raise InputError(f"{path.name}: unpacks to {size >> 30} GiB, more than any bundle holds")


def manifest_of(settings: Settings, sha256: str, kind: str) -> dict[str, Any]:
    """Return a kept bundle's manifest as plain JSON; it was checked when it was kept."""
    return _manifest(bundle_folder(settings, sha256) / _MANIFESTS[kind])


@lru_cache(maxsize=256)
def _manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def categories_of(settings: Settings, sha256: str, kind: str) -> list[dict[str, Any]]:
    """Return what a bundle knows of each category, and how many normal images are missing.

    ``needed_for`` maps the false-reject rates ``alpha`` and ``alpha_review`` to the number of
    normal images that a calibration must get beyond those that it has.
    """
    manifest = manifest_of(settings, sha256, kind)
    rows = []
    for name, known in manifest["categories"].items():
        count = len(known["calibration_scores"])
        levels = (manifest["alpha"], manifest["alpha_review"])
        bundled = kind == "bundle"
        rows.append(
            {
                "name": name,
                "calibrated": count > 0,
                "n_normal": len(known["references"]) if bundled else known["n_normal"],
                "n_abnormal": len(known["abnormal"]) if bundled else known["n_abnormal"],
                "n_calibration": count,
                "needed_for": {f"{a:g}": max(0, normals_needed(a) - count) for a in levels},
            }
        )
    return rows


def reference_hashes(settings: Settings, sha256: str, kind: str, category: str) -> set[str]:
    """Return the hashes of a category's normal references; an export does not know them."""
    if kind != "bundle":
        return set()
    known = manifest_of(settings, sha256, kind)["categories"].get(category)
    return {each["sha256"] for each in known["references"]} if known else set()


def promise_of(
    settings: Settings, sha256: str, kind: str
) -> tuple[dict[str, Calibration], Decision]:
    """Return a kept bundle's calibration by category, and its false-reject rates."""
    return _promise(bundle_folder(settings, sha256) / _MANIFESTS[kind])


@lru_cache(maxsize=256)
def _promise(path: Path) -> tuple[dict[str, Calibration], Decision]:
    manifest = _manifest(path)
    calibration = {
        name: Calibration.of(
            known["calibration_scores"], known["calibration_maxima"], known["calibration_sha256"]
        )
        for name, known in manifest["categories"].items()
        if known["calibration_scores"]
    }
    return calibration, Decision(manifest["alpha"], manifest["alpha_review"])
