"""Run the cells of a benchmark one by one; what is done already stays."""

from __future__ import annotations

import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalyst.benchmark.cells import Cell, Outcome, plan
from anomalyst.benchmark.config import BenchmarkConfig
from anomalyst.benchmark.tables import write_tables
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import evaluate
from anomalyst.features.cache import FeatureCache
from anomalyst.files import make_folder, replace_file
from anomalyst.training_setup import CHECKPOINT, TrainingSetup
from anomalyst.types import Progress

_log = logging.getLogger(__name__)
_CACHE_BYTES = 64 * 2**30  # a bound: the disk is asked for what is used
_METRICS = "metrics.json"
_CELL = "cell.json"
_ERROR = "error.txt"
_TRAINING = "training"


@dataclass(frozen=True)
class Machine:
    """What the cells run on, which changes no figure beyond rounding.

    Attributes
    ----------
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    offline
        Forbid downloads.
    feature_cache
        Folder for the frozen features of all cells; by default ``features`` among the results.
    """

    device: str = "auto"
    offline: bool = False
    feature_cache: Path | None = None


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
        For the tables and features; each cell has a folder of its own in ``cells``.
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
    outcomes = [Outcome(cell) for cell in cells]
    for number, cell in enumerate(cells):
        with watch() as progress:
            outcome = run_cell(cell, folder / "cells" / cell.name, machine, cache, progress)
        outcomes[number] = outcome
        tell(f"{number + 1}/{len(cells)} {cell.label}: {outcome.text}")
        write_tables(config, outcomes, folder)
    return outcomes


def run_cell(
    cell: Cell,
    home: Path,
    machine: Machine,
    cache: FeatureCache,
    progress: Progress | None = None,
) -> Outcome:
    """Make and measure one model in its folder, and return what came of it, an error too.

    One with a ``metrics.json`` of the same configuration is not run again, and one that was stopped
    while training goes on from its checkpoint.
    """
    known = _read_json(home / _METRICS) if _same(cell, home) else None
    if isinstance(known, dict):
        return Outcome(cell, known)
    began = time.perf_counter()
    try:
        setup = _prepare(cell, home)
        metrics = _measure(cell, setup, machine, cache, progress)
        replace_file(home / _METRICS, json.dumps(metrics, indent=2).encode())
        setup.finish()
    except Exception as error:  # whatever a cell dies of, the others can live
        ours = not isinstance(error, InputError)
        text = f"{type(error).__name__}: {error}" if ours else str(error)
        if home.is_dir():
            kept = traceback.format_exc() if ours else f"{text}\n"
            replace_file(home / _ERROR, kept.encode())
        return Outcome(cell, None, " ".join(text.split()), time.perf_counter() - began)
    return Outcome(cell, metrics, None, time.perf_counter() - began)


def _prepare(cell: Cell, home: Path) -> TrainingSetup:
    """Empty the cell's folder, unless a training of the same cell was stopped in it."""
    training = home / _TRAINING
    stopped = _same(cell, home) and not (home / _ERROR).exists()
    resume = stopped and (training / CHECKPOINT).exists()
    if not resume:
        if home.exists():
            shutil.rmtree(home)
        make_folder(home)
        content = {"sha256": cell.sha256, "configuration": cell.configuration}
        replace_file(home / _CELL, json.dumps(content, indent=2).encode())
    return TrainingSetup(training, resume=resume)


def _measure(
    cell: Cell,
    setup: TrainingSetup,
    machine: Machine,
    cache: FeatureCache,
    progress: Progress | None,
) -> dict[str, Any]:
    """Make the cell's model, judge its test images, and return what came out."""
    detector = Detector(
        cell.method,
        **cell.arguments,
        seed=cell.seed,
        device=machine.device,
        offline=machine.offline,
        feature_cache=cache,
    )
    if cell.setting == "zero-shot" and not detector.method.judges_unseen:
        raise InputError(
            f"{cell.method} with these options judges only what it was trained on: zero-shot needs "
            "others, of inp-former the option score: prototypes"
        )
    detector.fit(
        cell.train.train, shots=cell.shots, calibration=0, training=setup, progress=progress
    )
    detector.setting = cell.setting
    found = evaluate(detector, cell.test, eval_size=cell.eval_size, progress=progress)
    if found.errors:  # figures of fewer images cannot stand beside the others
        raise InputError(f"{len(found.errors)} test image(s) left out: {found.errors[0]}")
    return found.metrics


def _same(cell: Cell, home: Path) -> bool:
    known = _read_json(home / _CELL)
    return isinstance(known, dict) and known.get("sha256") == cell.sha256


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
