"""Run the cells of a benchmark; what is done already stays."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from anomalyst.benchmark.cells import Cell, Outcome, SourceTraining, plan
from anomalyst.benchmark.config import UNSEEN, Benchmark
from anomalyst.benchmark.generalist import Trainings, measure_generalist
from anomalyst.benchmark.kept import is_same, note_error, prepare, read_json
from anomalyst.benchmark.machine import Machine
from anomalyst.benchmark.results import write_page, write_tables
from anomalyst.errors import InputError
from anomalyst.evaluation import Evaluation, evaluate, forget_peak_rss
from anomalyst.features.cache import FeatureCache
from anomalyst.files import is_disk_full, make_folder, replace_file
from anomalyst.training_setup import TrainingSetup
from anomalyst.types import Progress

_log = logging.getLogger(__name__)
_CACHE_BYTES = 64 * 2**30  # a bound: the disk is asked for what is used
_METRICS = "metrics.json"
_TABLES_SHARE = 50  # tables are written anew once the work since took so many times as long
Watch = Callable[[], AbstractContextManager[Progress | None]]


@dataclass(frozen=True)
class Workshop:
    """Where the cells of a benchmark are made: its folder, and what it runs on.

    Each cell has a folder of its own in ``cells``, and a model that several of them stand on one
    in ``trained``; the frozen features of all are in ``features``. Several processes may work in
    one at once, each on other cells.
    """

    folder: Path
    machine: Machine

    @cached_property
    def cache(self) -> FeatureCache:
        """The frozen features of all cells."""
        return FeatureCache(self.machine.feature_cache or self.folder / "features", _CACHE_BYTES)

    @cached_property
    def trainings(self) -> Trainings:
        """The models that several cells stand on."""
        return Trainings(self.folder / "trained", self.machine, self.cache)

    def train(self, training: SourceTraining) -> str | None:
        """Make a model that several cells stand on; return in words why it could not be made."""
        try:
            self.trainings.bundle(training, None)
        except Exception as error:
            _stop_if_full(error, self.folder)
            return f"{error}"
        return None

    def run(self, cell: Cell, progress: Progress | None = None) -> Outcome:
        """Make and measure one model in its folder, and return what came of it, an error too.

        One with a ``metrics.json`` of the same configuration is not run again, and one that was
        stopped while training goes on from its checkpoint.

        Raises
        ------
        InputError
            The disk is full: no other cell could be kept either.
        """
        home = self.folder / "cells" / cell.name
        known = read_json(home / _METRICS) if is_same(cell, home) else None
        if isinstance(known, dict):
            return Outcome(cell, known)
        began = time.perf_counter()
        forget_peak_rss()  # of the cells before it
        try:
            setup = prepare(cell, home)
            if cell.generalist:
                found = measure_generalist(cell, cell.generalist, self.trainings, progress)
            else:
                found = self._measure(cell, setup, progress)
            if found.errors:  # figures of fewer images cannot stand beside the others
                raise InputError(f"{len(found.errors)} test image(s) left out: {found.errors[0]}")
            replace_file(home / _METRICS, json.dumps(found.metrics, indent=2).encode())
            setup.finish()
        except Exception as error:  # whatever a cell dies of, the others can live
            _stop_if_full(error, home)
            return Outcome(cell, None, note_error(error, home), time.perf_counter() - began)
        return Outcome(cell, found.metrics, None, time.perf_counter() - began)

    def _measure(self, cell: Cell, setup: TrainingSetup, progress: Progress | None) -> Evaluation:
        """Make the cell's model, judge its test images, and return what came out."""
        detector = self.machine.detector(cell.method, cell.arguments, cell.seed, self.cache)
        if cell.setting in UNSEEN and not detector.method.judges_unseen:
            raise InputError(
                f"{cell.method} with these options judges only what it was trained on: "
                f"{cell.setting} needs others, of inp-former the option score: prototypes, else "
                "zero_shot: true"
            )
        detector.fit(
            cell.train.train, shots=cell.shots, calibration=0, training=setup, progress=progress
        )
        detector.setting = cell.setting
        return evaluate(detector, cell.test, eval_size=cell.eval_size, progress=progress)


class Engine(Protocol):
    """How the cells are run: yields each one's place among them and what came of it."""

    def __call__(
        self, cells: Sequence[Cell], workshop: Workshop, /
    ) -> Iterable[tuple[int, Outcome]]: ...


def one_by_one(watch: Watch = nullcontext) -> Engine:
    """Return the engine that runs the cells in this process, in order.

    Parameters
    ----------
    watch
        Opened around each cell; gives what is called as its work goes on.
    """

    def run(cells: Sequence[Cell], workshop: Workshop) -> Iterator[tuple[int, Outcome]]:
        for place, cell in enumerate(cells):
            with watch() as progress:
                outcome = workshop.run(cell, progress)
            yield place, outcome

    return run


def run_benchmark(
    benchmark: Benchmark,
    folder: Path,
    machine: Machine | None = None,
    *,
    engine: Engine | None = None,
    tell: Callable[[str], None] = _log.info,
) -> list[Outcome]:
    """Run all cells of a benchmark and keep its tables up to date.

    A failed cell does not stop the rest; see `Workshop.run` for what is not run again.

    Parameters
    ----------
    folder
        For the tables, the cells and the features.
    engine
        By default `one_by_one`.
    tell
        Called with a line on each cell.

    Raises
    ------
    InputError
        The data cannot be listed, a folder cannot be made, another run writes into it, or the disk
        is full.
    """
    workshop = Workshop(folder, machine or Machine())
    cells = [cell for part in benchmark.parts for cell in plan(part)]
    make_folder(folder / "cells")
    outcomes = [Outcome(cell) for cell in cells]
    tables = _Tables(benchmark, outcomes, folder)
    with _alone_in(folder):
        try:
            done = (engine or one_by_one())(cells, workshop)
            for number, (place, outcome) in enumerate(done, 1):
                outcomes[place] = outcome
                tell(f"{number}/{len(cells)} {outcome.cell.label}: {outcome.text}")
                tables.refresh()
        finally:
            tables.finish()
    return outcomes


class _Tables:
    """Writes the tables often enough to be looked at, and seldom enough to cost next to nothing."""

    def __init__(self, benchmark: Benchmark, outcomes: Sequence[Outcome], folder: Path) -> None:
        self._given = (benchmark, outcomes, folder)
        self._due = 0.0

    def refresh(self) -> None:
        began = time.perf_counter()
        if began < self._due:
            return
        with _room_in(self._given[2]):
            write_tables(*self._given)
        ended = time.perf_counter()
        self._due = ended + _TABLES_SHARE * (ended - began)

    def finish(self) -> None:
        with _room_in(self._given[2]):
            write_tables(*self._given)
            write_page(*self._given)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuse a second run into a folder; the operating system frees it if this process dies."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{folder}: another benchmark is running there: wait for it or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _room_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _stop_if_full(error, folder)
        raise


def _stop_if_full(error: Exception, folder: Path) -> None:
    if is_disk_full(error):
        raise InputError(
            f"{folder}: the disk is full: make room and run the same command again, it goes on "
            "where it was"
        ) from error
