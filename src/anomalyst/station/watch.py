"""Watched folders: every picture that a camera puts there is inspected, each content once.

What was inspected is in the database with the inspection, in one transaction: a station that is
killed goes on where it was. A file counts once its size and time stand still between two looks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from anomalyst.data.images import IMAGE_SUFFIXES
from anomalyst.errors import InputError
from anomalyst.station.database import DatabaseGone, DiskFull
from anomalyst.station.inspections import (
    Incoming,
    Target,
    count,
    fault_of,
    incoming,
    stored,
    submit,
    target_of,
    unreadable,
    write,
)
from anomalyst.station.judges import Judged
from anomalyst.station.recipes import find_recipe
from anomalyst.station.refusals import Refusal
from anomalyst.station.schemas import WatchAnswer
from anomalyst.station.tables import Recipe, Watch, Watched

if TYPE_CHECKING:
    from anomalyst.station.core import Station

_log = logging.getLogger(__name__)
_TOGETHER = 8
_ACTOR = "watch"
_Seen = tuple[int, int]  # size, time of the last change in nanoseconds


@dataclass(frozen=True)
class _File:
    """A file that stands still."""

    folder: str
    name: str
    seen: _Seen

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name


class Watcher:
    """One thread that looks at all watched folders again and again."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self._wake = threading.Event()
        self._stopping = False
        self._done: dict[str, dict[str, _Seen]] = {}
        self._last: dict[str, dict[str, _Seen]] = {}
        self._errors: dict[str, str] = {}
        self._thread = threading.Thread(target=self._work, name="watching", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """End after the files in hand."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, folder: Path, recipe: str | None, category: str | None, actor: str) -> Watch:
        """Watch a folder from now on, or with another recipe."""
        if "\0" in str(folder) or not folder.is_dir():
            raise InputError(f"{folder}: no such folder to watch")
        place = folder.resolve()
        own = self._station.settings.data.resolve()
        if place == own or own in place.parents or place in own.parents:
            raise InputError(f"{folder}: holds the station's own files, which it cannot watch")
        with self._station.database.change(actor) as change:
            chosen = find_recipe(change.session, recipe)
            query = select(Watch).where(Watch.folder == str(place))
            found = change.session.scalars(query).first()
            if found is None:
                found = Watch(folder=str(place), created_by=actor)
                change.session.add(found)
            found.recipe_id, found.category = chosen.id, category
            change.record("watch.add", f"watch:{place}", recipe=chosen.name, category=category)
        return found

    def remove(self, folder: str, actor: str) -> None:
        """Stop watching a folder; what it was known to hold stays known."""
        with self._station.database.change(actor) as change:
            found = change.session.scalars(select(Watch).where(Watch.folder == folder)).first()
            if found is None:
                raise Refusal(404, f"{folder!r} is not watched")
            change.session.delete(found)
            change.record("watch.remove", f"watch:{folder}")

    def folders(self) -> list[WatchAnswer]:
        """Return the watched folders, how many files of each were inspected, and what is wrong."""
        counted = (
            select(Watched.folder, func.count().label("n")).group_by(Watched.folder).subquery()
        )
        query = (
            select(Watch, Recipe.name, func.coalesce(counted.c.n, 0))
            .join(Recipe, Recipe.id == Watch.recipe_id)
            .outerjoin(counted, counted.c.folder == Watch.folder)
            .order_by(Watch.id)
        )
        with self._station.database.read() as session:
            rows = session.execute(query).all()
        return [
            WatchAnswer(
                folder=row.folder,
                recipe=recipe,
                category=row.category,
                created_by=row.created_by,
                created_at=row.created_at,
                inspected=inspected,
                error=self._errors.get(row.folder),
            )
            for row, recipe, inspected in rows
        ]

    # ---- on the watching thread -----------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping:
            try:
                self.look()
            except (DatabaseGone, DiskFull, Refusal) as error:
                self._station.metrics.watch_errors.inc()
                _log.warning("watching goes on later: %s", error)
            except Exception:
                self._station.metrics.watch_errors.inc()
                _log.exception("watching goes on later: internal error, our fault")
            self._wake.wait(self._station.settings.watch_seconds)

    def look(self) -> None:
        """Look at every watched folder once, and inspect what stands still and is new."""
        with self._station.database.read() as session:
            watches = session.scalars(select(Watch).order_by(Watch.id)).all()
            recipes = {row.id: row.name for row in session.scalars(select(Recipe))}
        for watch in watches:
            self._look_into(watch, recipes[watch.recipe_id])

    def _look_into(self, watch: Watch, recipe: str) -> None:
        done = self._known(watch.folder)
        try:
            present = dict(_files(watch.folder))
        except OSError as error:
            self._errors[watch.folder] = f"cannot be read ({error.strerror})"
            return
        self._errors.pop(watch.folder, None)
        for name in [name for name in present if not name.isprintable()]:
            del present[name]
            self._errors[watch.folder] = f"{name!a}: left out, its name cannot be shown"
        last, self._last[watch.folder] = self._last.get(watch.folder, {}), present
        still = [
            _File(watch.folder, name, seen)
            for name, seen in present.items()
            if last.get(name) == seen and done.get(name) != seen
        ]
        still.sort(key=lambda file: (file.seen[1], file.name))
        for first in range(0, len(still), _TOGETHER):
            if self._stopping:
                return
            with self._station.database.read() as session:
                target = target_of(session, recipe)
            self._inspect(still[first : first + _TOGETHER], target, watch)

    def _known(self, folder: str) -> dict[str, _Seen]:
        """Return size and time of the files of a folder that were inspected before."""
        if folder not in self._done:
            columns = (Watched.name, Watched.bytes, Watched.modified_ns)
            query = select(*columns).where(Watched.folder == folder).order_by(Watched.id)
            with self._station.database.read() as session:
                rows = session.execute(query).all()
            self._done[folder] = {name: (size, time) for name, size, time in rows}
        return self._done[folder]

    def _inspect(self, files: list[_File], target: Target, watch: Watch) -> None:
        """Let some files be judged together, and store each."""
        waiting: list[tuple[_File, str, Incoming | str, Future[Judged] | None]] = []
        for file in files:
            read = self._read(file)
            if read is None:  # still being written, or gone
                continue
            digest, content = read
            if self._is_known(file, digest):
                self._done[file.folder][file.name] = file.seen
                continue
            if isinstance(content, str):
                waiting.append((file, digest, content, None))
                continue
            try:
                picture = incoming(
                    self._station, content, file.name, source="watch", category=watch.category
                )
                waiting.append((file, digest, picture, submit(self._station, target, picture)))
            except InputError as error:
                waiting.append((file, digest, str(error), None))
            except Refusal:
                break  # the queue is full: what is left waits for the next look
        for each in waiting:
            self._store(target, *each)

    def _store(
        self,
        target: Target,
        file: _File,
        digest: str,
        picture: Incoming | str,
        result: Future[Judged] | None,
    ) -> None:
        """Store what was found of a file, or why nothing could be, and that it was seen."""
        known, judged, words = None, None, str(picture)
        if result is not None and isinstance(picture, Incoming):
            try:
                known, judged = picture, result.result()
            except InputError as error:  # of the recipe, not of this picture
                self._errors[file.folder] = str(error)
                return
            words = fault_of(picture, judged.prediction.error or "")
        if known is None or judged is None or words:
            known, made = None, unreadable(target, file.name, words, digest, _ACTOR)
        else:
            made = stored(self._station, target, known, judged, _ACTOR)
        try:
            with self._station.database.change(_ACTOR) as change:
                write(change, made, known, judged)
                change.session.add(
                    Watched(
                        folder=file.folder,
                        name=file.name,
                        image_sha256=digest,
                        bytes=file.seen[0],
                        modified_ns=file.seen[1],
                        inspection_id=made.id,
                    )
                )
        except IntegrityError:
            _log.info("%s: was inspected already", file.path)
        else:
            count(self._station, target, made, known)
        self._done[file.folder][file.name] = file.seen

    def _read(self, file: _File) -> tuple[str, bytes | str] | None:
        """Return a file's hash and content, or what is wrong with it; None to look again later."""
        limit = self._station.settings.max_image
        digest, parts, size = hashlib.sha256(), list[bytes](), 0
        try:
            with file.path.open("rb") as stream:
                while part := stream.read(1 << 20):
                    digest.update(part)
                    size += len(part)
                    if size <= limit:
                        parts.append(part)
                found = os.fstat(stream.fileno())
        except OSError as error:
            self._errors[file.folder] = f"{file.name}: cannot be read ({error.strerror})"
            return None
        if (found.st_size, found.st_mtime_ns) != file.seen or size != found.st_size:
            return None
        if size > limit:
            return digest.hexdigest(), f"{file.name}: over the limit of {limit >> 20} MiB a picture"
        return digest.hexdigest(), b"".join(parts)

    def _is_known(self, file: _File, digest: str) -> bool:
        """Tell whether that file was inspected with that very content: only its time changed."""
        query = select(Watched.id).where(
            Watched.folder == file.folder,
            Watched.name == file.name,
            Watched.image_sha256 == digest,
        )
        with self._station.database.read() as session:
            return session.scalars(query).first() is not None


def _files(folder: str, below: str = "") -> Iterator[tuple[str, _Seen]]:
    """Yield name and state of every picture in a folder and those in it; links are not followed."""
    with os.scandir(Path(folder) / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder, name)
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # taken away meanwhile
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield name, (found.st_size, found.st_mtime_ns)
