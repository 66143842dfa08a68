"""What a preview made, kept on the disk under a token until it is saved or grows old."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalyst.files import is_disk_full, replace_file
from anomalyst.station.database import DiskFull
from anomalyst.station.refusals import Refusal
from anomalyst.station.settings import Settings

if TYPE_CHECKING:
    from anomalyst.detector import Detector

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22}")
_KEPT = 4
_SECONDS = 24 * 3600
_FACTS = "draft.json"


def new(settings: Settings, detector: Detector) -> Path:
    """Write a bundle into a draft of its own, and return the draft's folder; its name is the token.

    Raises
    ------
    DiskFull
        Nothing was kept.
    """
    place = _home(settings)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        folder = place / secrets.token_urlsafe(16)
        folder.mkdir()
        detector.save(bundle(folder))
    except Exception as error:
        if is_disk_full(error):
            raise DiskFull("the disk has no room for a preview") from error
        raise
    return folder


def bundle(folder: Path) -> Path:
    """Return where a draft's bundle lies."""
    return folder / "bundle"


def note(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write down what a draft is; without this it cannot be found."""
    replace_file(folder / _FACTS, json.dumps(facts).encode())


def find(settings: Settings, token: str) -> tuple[Path, dict[str, Any]]:
    """Return a draft's folder and what was noted of it.

    Raises
    ------
    Refusal
        404: there is none, or no more.
    """
    folder = _home(settings) / token
    if not _TOKEN.fullmatch(token) or not (folder / _FACTS).is_file():
        raise Refusal(404, "this preview is gone: preview again, then save")
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_bytes())
    return folder, facts


def drop(folder: Path) -> None:
    """Forget a draft."""
    shutil.rmtree(folder, ignore_errors=True)


def _home(settings: Settings) -> Path:
    return settings.data / "drafts"


def _sweep(place: Path) -> None:
    """Forget drafts that are old, and all but the newest."""
    found = sorted(place.iterdir(), key=lambda folder: -folder.stat().st_mtime)
    for number, folder in enumerate(found):
        if number >= _KEPT - 1 or folder.stat().st_mtime < time.time() - _SECONDS:
            drop(folder)
