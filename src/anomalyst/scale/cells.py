"""The cells of a benchmark as tasks on Ray: the same folders and figures as without it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from anomalyst.benchmark.cells import Cell, Outcome
from anomalyst.benchmark.runner import Engine, Workshop
from anomalyst.scale.cluster import connect

_RETRIES = 3  # of a task whose worker died; it goes on from its checkpoint


def on_ray(address: str | None = None, *, cpus: int = 1, gpus: float = 0.0) -> Engine:
    """Return the engine that runs the cells on a cluster, as many at a time as it has room for.

    The benchmark's folder, the data and the weights must lie under the same paths on all machines.

    Parameters
    ----------
    address
        Of the cluster; None starts one on this machine.
    cpus, gpus
        What a cell needs; ``gpus`` may be a fraction.
    """

    def run(cells: Sequence[Cell], workshop: Workshop) -> Iterator[tuple[int, Outcome]]:
        with connect(address):
            place = replace(workshop, folder=workshop.folder.resolve())
            yield from _run(cells, place, cpus, gpus)

    return run


def _run(
    cells: Sequence[Cell], workshop: Workshop, cpus: int, gpus: float
) -> Iterator[tuple[int, Outcome]]:
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)
    train: Any = task(_train)
    make: Any = task(_make)
    stored = ray.put(list(cells))  # once: the cells share their lists of images
    place = (workshop, os.getcwd(), cpus)
    trainings: dict[str, Any] = {}
    first: dict[str, Any] = {}
    waiting: dict[Any, int] = {}
    for number, cell in enumerate(cells):
        training = cell.generalist and cell.generalist.training
        if training and training.sha256 not in trainings:
            trainings[training.sha256] = train.remote(*place, training)
        failed = trainings[training.sha256] if training else None
        key = _features_of(cell)
        ref = make.remote(*place, stored, number, failed, first.get(key))
        first.setdefault(key, ref)
        waiting[ref] = number
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(done[0])
        yield number, _outcome(cells[number], done[0])


def _features_of(cell: Cell) -> str:
    """Return a name for what cells have in common that look at the same frozen features.

    The first of them is run before the others, which find the features in the cache then.
    """
    arguments = {key: value for key, value in cell.arguments.items() if key != "options"}
    folders = [[str(path) for path in paths] for paths in cell.folders]
    return json.dumps([cell.method, cell.category, folders, arguments], default=str)


def _outcome(cell: Cell, ref: Any) -> Outcome:
    import ray

    try:
        metrics, error, seconds = ray.get(ref)
    except ray.exceptions.RayTaskError as failed:  # a cell's own failure is an outcome
        raise failed.cause from None
    except ray.exceptions.RayError as lost:
        why = str(lost).splitlines()[0]
        return Outcome(cell, None, f"its worker was lost {_RETRIES + 1} times: {why}", 0.0)
    return Outcome(cell, metrics, error, seconds)


def _settle(folder: str, cpus: int) -> None:
    """Make the worker's process like the one that was asked: its folder, its share of threads."""
    import torch

    os.chdir(folder)
    torch.set_num_threads(cpus)


def _train(workshop: Workshop, folder: str, cpus: int, training: Any) -> str | None:
    _settle(folder, cpus)
    return workshop.train(training)


def _make(
    workshop: Workshop,
    folder: str,
    cpus: int,
    cells: Sequence[Cell],
    number: int,
    failed: str | None,
    _first: object,
) -> tuple[dict[str, Any] | None, str | None, float | None]:
    """Run a cell; ``_first`` is there to be waited for."""
    _settle(folder, cpus)
    if failed:
        return None, failed, 0.0
    outcome = workshop.run(cells[number])
    return outcome.metrics, outcome.error, outcome.seconds
