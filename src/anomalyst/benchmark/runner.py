"""Run the cells of a benchmark one by one; what is done already stays."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from anomalyst.benchmark.cells import Cell, Outcome, plan
from anomalyst.benchmark.config import BenchmarkConfig
from anomalyst.benchmark.generalist import Trainings, measure_generalist
from anomalyst.benchmark.kept import is_same, note_error, prepare, read_json
from anomalyst.benchmark.machine import Machine
from anomalyst.benchmark.tables import write_tables
from anomalyst.errors import InputError
from anomalyst.evaluation import Evaluation, evaluate
from anomalyst.features.cache import FeatureCache
from anomalyst.files import make_folder, replace_file
from anomalyst.training_setup import TrainingSetup
from anomalyst.types import Progress

_log = logging.getLogger(__name__)
_CACHE_BYTES = 64 * 2**30  # a bound: the disk is asked for what is used
_METRICS = "metrics.json"


def run_benchmark(
    config: BenchmarkConfig,
    folder: Path,
    machine: Machine | None = None,
    *,
    watch: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
    tell: Callable[[str], None] = _log.info,
) -> list[Outcome]:
    """Run all cells of a benchmark and keep its tables up to date after each.

    A failed cell does not stop the rest; see `run_cell` for what is not run again.

    Parameters
    ----------
    folder
        For the tables and features; each cell has a folder of its own in ``cells``, and a model
        that several of them stand on one in ``trained``.
    watch
        Opened around each cell; gives what is called as its work goes on.
    tell
        Called with a line on each cell.

    Raises
    ------
    InputError
        The data cannot be listed, or a folder cannot be made.
    """
    machine = machine or Machine()
    cells = plan(config)
    make_folder(folder / "cells")
    cache = FeatureCache(machine.feature_cache or folder / "features", _CACHE_BYTES)
    trainings = Trainings(folder / "trained", machine, cache)
    outcomes = [Outcome(cell) for cell in cells]
    for number, cell in enumerate(cells):
        with watch() as progress:
            home = folder / "cells" / cell.name
            outcome = run_cell(cell, home, machine, cache, trainings, progress)
        outcomes[number] = outcome
        tell(f"{number + 1}/{len(cells)} {cell.label}: {outcome.text}")
        write_tables(config, outcomes, folder)
    return outcomes


def run_cell(
    cell: Cell,
    home: Path,
    machine: Machine,
    cache: FeatureCache,
    trainings: Trainings,
    progress: Progress | None = None,
) -> Outcome:
    """Make and measure one model in its folder, and return what came of it, an error too.

    One with a ``metrics.json`` of the same configuration is not run again, and one that was stopped
    while training goes on from its checkpoint.
    """
    known = read_json(home / _METRICS) if is_same(cell, home) else None
    if isinstance(known, dict):
        return Outcome(cell, known)
    began = time.perf_counter()
    try:
        setup = prepare(cell, home)
        if cell.generalist:
            found = measure_generalist(cell, cell.generalist, trainings, progress)
        else:
            found = _measure(cell, setup, machine, cache, progress)
        if found.errors:  # figures of fewer images cannot stand beside the others
            raise InputError(f"{len(found.errors)} test image(s) left out: {found.errors[0]}")
        replace_file(home / _METRICS, json.dumps(found.metrics, indent=2).encode())
        setup.finish()
    except Exception as error:  # whatever a cell dies of, the others can live
        return Outcome(cell, None, note_error(error, home), time.perf_counter() - began)
    return Outcome(cell, found.metrics, None, time.perf_counter() - began)


def _measure(
    cell: Cell,
    setup: TrainingSetup,
    machine: Machine,
    cache: FeatureCache,
    progress: Progress | None,
) -> Evaluation:
    """Make the cell's model, judge its test images, and return what came out."""
    detector = machine.detector(cell.method, cell.arguments, cell.seed, cache)
    if cell.setting == "zero-shot" and not detector.method.judges_unseen:
        raise InputError(
            f"{cell.method} with these options judges only what it was trained on: zero-shot needs "
            "others, of inp-former the option score: prototypes, else zero_shot: true"
        )
    detector.fit(
        cell.train.train, shots=cell.shots, calibration=0, training=setup, progress=progress
    )
    detector.setting = cell.setting
    return evaluate(detector, cell.test, eval_size=cell.eval_size, progress=progress)
