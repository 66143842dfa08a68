"""The station: its database, store, judges and watcher, opened together and closed together."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from sqlalchemy import func, select

from anomalyst.errors import InputError
from anomalyst.station.bundles import Kept, keep_bundle
from anomalyst.station.database import Database, DatabaseGone
from anomalyst.station.judges import Judges
from anomalyst.station.keys import any_key
from anomalyst.station.limits import Buckets
from anomalyst.station.metrics import Metrics
from anomalyst.station.recipes import (
    activate,
    active_version,
    add_version,
    find_recipe,
    get_or_add_recipe,
    name_of_path,
    same_version,
)
from anomalyst.station.refusals import Refusal
from anomalyst.station.settings import Settings
from anomalyst.station.store import Store
from anomalyst.station.tables import AuditRow, Recipe
from anomalyst.station.verdicts import Thresholds

_log = logging.getLogger(__name__)
Check = Callable[["Station", str, Kept, Thresholds | None], None]
"""Raises a `Refusal` (409) where a recipe, by name, must not change to a bundle and thresholds."""

_GIVEN = "given to `anomalyst serve`"
STATION = "station"
"""The actor of what nobody asked for: start-up, watched folders."""


class Station:
    """Everything that a request needs, opened by the settings.

    Raises
    ------
    InputError
        The folder or database cannot be used, a bundle is none, or the host asks for a key.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.checks: list[Check] = []
        self._lock = _lock_folder(settings.data)
        try:
            self.database = Database(settings.database_url, settings.data / "audit.head")
            self._require_key()
            self._warn_of_lost_rows()
            self.store = Store(settings.data / "pictures")
            self.uploads = _emptied(settings.data / "uploads")
            self.judges = Judges(settings)
            self.metrics = Metrics(self.judges)
            self.buckets = Buckets(settings.rate, settings.burst)
            self.failures = Buckets(0.5, 20)
            self._waiting: list[tuple[str, Kept]] = []
            names = [self._take_in(path) for path in settings.bundles]
            from anomalyst.station.watch import Watcher

            self.watcher = Watcher(self)
            for folder in settings.watch:
                self.watcher.add(folder, names[0] if names else None, None, STATION)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start judging and watching; the active models are loaded first thing."""
        self.judges.start()
        for name, kept in self._waiting:
            self._let_judge(name, kept)
        self.judges.run(self._load_active)
        self.watcher.start()

    def close(self) -> None:
        """Stop all threads and close the database."""
        if hasattr(self, "watcher"):
            self.watcher.stop()
        if hasattr(self, "judges"):
            self.judges.stop()
        if hasattr(self, "database"):
            self.database.close()
        self._lock.close()

    def check_change(self, recipe: str, kept: Kept, thresholds: Thresholds | None) -> None:
        """Raise a `Refusal` where a recipe must not change to a bundle and thresholds."""
        for check in self.checks:
            check(self, recipe, kept, thresholds)

    def _require_key(self) -> None:
        with self.database.read() as session:
            if not self.settings.loopback and not any_key(session, active=True):
                raise InputError(
                    f"--host {self.settings.host} lets other machines in, and no key is set: make "
                    "one with `anomalyst key add NAME --role engineer`, or leave --host out"
                )

    def _warn_of_lost_rows(self) -> None:
        known = self.database.witness.read() if self.database.witness else None
        with self.database.read() as session:
            last = session.scalar(select(func.max(AuditRow.seq))) or 0
        if known is not None and known[0] > last:
            _log.warning(
                "the audit log ends at %d, and has ended at %d before: was an older database put "
                "in place? See `anomalyst audit verify`",
                last,
                known[0],
            )

    def _take_in(self, path: Path) -> str:
        """Make a recipe of a bundle, or a new version; one that is known changes nothing.

        A recipe that judges already goes over to it only once the golden samples were asked.
        """
        name, kept = name_of_path(path), keep_bundle(self.settings, path)
        with self.database.read() as session:
            found = session.scalars(select(Recipe).where(Recipe.name == name)).first()
            if found is not None and same_version(session, found, kept) is not None:
                return name
        with self.database.change(STATION) as change:
            recipe = get_or_add_recipe(change, name)
            add_version(change, recipe, kept, note=_GIVEN, make_active=found is None)
        if found is not None:
            self._waiting.append((name, kept))
        return name

    def _let_judge(self, name: str, kept: Kept) -> None:
        """Make a version that `serve` was given the active one, unless that breaks something."""
        try:
            self.check_change(name, kept, None)
        except Refusal as refusal:
            _log.warning("recipe %s: the bundle given is not used: %s", name, refusal.message)
            return
        with self.database.change(STATION) as change:
            recipe = find_recipe(change.session, name)
            version = same_version(change.session, recipe, kept)
            assert version is not None
            activate(change, recipe, version, _GIVEN)
            number = version.number
        _log.warning("recipe %s: version %d, the bundle given, judges from now on", name, number)

    def _load_active(self) -> None:
        """Load the models that judge; one that cannot be is told now, not at the first part."""
        with suppress(DatabaseGone), self.database.read() as session:
            recipes = session.scalars(select(Recipe).order_by(Recipe.id)).all()
            versions = [(r.name, active_version(session, r)) for r in recipes[:4]]
            for name, version in versions:
                try:
                    self.judges.judge(version.bundle_sha256, version.kind)
                except InputError as error:
                    _log.warning("recipe %s cannot judge: %s", name, error)


def _emptied(folder: Path) -> Path:
    """Return a folder for what is being uploaded, without what a killed station left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lock_folder(folder: Path) -> IO[bytes]:
    """Make the station's folder, and hold it against a second station."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "station.lock").open("ab")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be the station's folder ({error.strerror}); name another (--data)"
        ) from None
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(
                f"{folder}: another station (maybe process {_owner(folder)}) works in it; stop "
                "that one, or name another folder (--data)"
            ) from None
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file


def _owner(folder: Path) -> str:
    return (folder / "station.lock").read_text(errors="replace")[:20] or "unknown"
