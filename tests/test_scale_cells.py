"""The cells of a benchmark on a Ray cluster: the same results, whatever becomes of the workers."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anomalyst.benchmark.cells import Cell, Outcome
from anomalyst.benchmark.config import Benchmark
from anomalyst.benchmark.reading import load_benchmark
from anomalyst.benchmark.runner import Workshop, run_benchmark
from anomalyst.errors import InputError
from anomalyst.evaluation import METRICS
from anomalyst.types import Progress
from conftest import TINY, write_yaml

pytest.importorskip("ray")
from anomalyst.scale.cells import _features_of, on_ray


@dataclass(frozen=True)
class Doomed(Workshop):
    """A place where the process dies once, in the middle of a cell's work."""

    def run(self, cell: Cell, progress: Progress | None = None) -> Outcome:
        mark = self.folder / "died"
        if cell.seed == 1 and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(cell, progress)


@pytest.fixture
def benchmark(make_parts: Callable[..., Path], tmp_path: Path, tiny_weights: str) -> Benchmark:
    """Two categories, two seeds; one of the four models cannot be made."""
    data = make_parts(("across", "down"), good=3)
    min((data / "down" / "train" / "good").iterdir()).unlink()
    values = {
        "title": "Ray",
        "method": "anomaly-dino",
        "setting": "few-shot",
        "data": str(data),
        "shots": [1, 3],
        "seeds": [0, 1],
        "backbone": TINY,
        "weights": tiny_weights,
        "image_size": 96,
    }
    return load_benchmark(write_yaml(tmp_path / "ray.yaml", values))


def figures(outcomes: list[Outcome]) -> list[Any]:
    """Every cell's name, metrics of every category, and error."""
    found = []
    for outcome in outcomes:
        rows = (outcome.metrics or {"categories": {}})["categories"]
        kept = {name: {key: row[key] for key in METRICS} for name, row in rows.items()}
        found.append((outcome.cell.name, kept, outcome.error))
    return found


def test_a_lost_worker_changes_nothing(
    benchmark: Benchmark, tmp_path: Path, two_nodes: None
) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    plain = run_benchmark(benchmark, tmp_path / "plain")
    told: list[str] = []
    engine = on_ray()

    def doomed(cells: Any, workshop: Workshop) -> Any:
        return engine(cells, Doomed(workshop.folder, workshop.machine))

    outcomes = run_benchmark(benchmark, tmp_path / "ray", engine=doomed, tell=told.append)
    dead = int((tmp_path / "ray" / "died").read_text())
    assert dead != os.getpid()
    assert figures(outcomes) == figures(plain)
    failed = [outcome for outcome in outcomes if outcome.error]
    assert len(failed) == 2 and all("3 shots of 'down'" in str(o.error) for o in failed)
    assert len(told) == 8 and told[0].startswith("1/8 ") and told[-1].startswith("8/8 ")
    for name in ("results.md", "results.csv"):
        assert (tmp_path / "ray" / name).exists()
    again = run_benchmark(benchmark, tmp_path / "ray", engine=on_ray())
    assert figures(again) == figures(plain)
    assert [o.seconds is None for o in again] == [not o.error for o in again]


def test_a_full_disk_on_a_worker_ends_the_run(
    benchmark: Benchmark, tmp_path: Path, two_nodes: None
) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    engine = on_ray()

    def full(cells: Any, workshop: Workshop) -> Any:
        return engine(cells, Full(workshop.folder, workshop.machine))

    with pytest.raises(InputError, match="the disk is full"):
        run_benchmark(benchmark, tmp_path / "out", engine=full)


@dataclass(frozen=True)
class Full(Workshop):
    """A place without room."""

    def run(self, cell: Cell, progress: Progress | None = None) -> Outcome:
        raise InputError(f"{self.folder}: the disk is full")


def test_models_that_look_at_the_same_images_wait_for_the_first(benchmark: Benchmark) -> None:
    from anomalyst.benchmark.cells import plan

    keys = [_features_of(cell) for cell in plan(benchmark.parts[0])]
    assert len(set(keys)) == 2  # one a category, whatever the shots and seeds
    assert json.loads(keys[0])[:2] == ["anomaly-dino", "across"]
