"""The cells of a benchmark: one model each, with all that its figures depend on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from anomalyst.benchmark.config import ONE_EACH, BenchmarkConfig
from anomalyst.data.layouts import Dataset, load_together
from anomalyst.errors import InputError
from anomalyst.types import Sample


@dataclass(frozen=True)
class Cell:
    """One model to be made and measured.

    Attributes
    ----------
    shots
        References a category, None for all.
    category
        The one that the model is for, None for a joint model.
    arguments
        Of the `Detector`, less the seed and what does not change a figure.
    folders
        Of the training and of the test data.
    """

    method: str
    variant: str
    setting: str
    shots: int | None
    seed: int
    category: str | None
    eval_size: int | None
    arguments: Mapping[str, Any]
    folders: tuple[Sequence[Path], Sequence[Path]]
    train: Dataset
    test: Dataset

    @property
    def label(self) -> str:
        """The cell in words."""
        shots = f"{self.shots} shot" + "s" * (self.shots != 1) if self.shots else None
        variant = None if self.variant == "default" else self.variant
        parts = (self.method, variant, shots, f"seed {self.seed}", self.category)
        return ", ".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """The name of its folder; no two cells of a benchmark have one in common."""
        shots = f"{self.shots}-shot" if self.shots else None
        variant = None if self.variant == "default" else _file_name(self.variant)
        category = self.category and _file_name(self.category)
        parts = (self.method, variant, shots, f"seed-{self.seed}", category)
        return "+".join(part for part in parts if part)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Everything that its figures depend on, ready for JSON."""
        train, test = ([str(path.resolve()) for path in paths] for paths in self.folders)
        return {
            "method": self.method,
            "variant": self.variant,
            "setting": self.setting,
            "shots": self.shots,
            "seed": self.seed,
            "eval_size": self.eval_size or "original",
            "detector": json.loads(json.dumps(self.arguments, default=str)),
            "data": {"folders": train, "categories": list(self.train.categories)},
            "test": {"folders": test, "categories": list(self.test.categories)},
            "files": _digest([*self.train.train, *self.test.test]),
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of the configuration."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: the content of its ``metrics.json``, or an error, or nothing yet."""

    cell: Cell
    metrics: dict[str, Any] | None = None
    error: str | None = None
    seconds: float | None = None
    """None where it was done before."""

    @property
    def text(self) -> str:
        """The outcome in words."""
        if self.error is not None:
            return f"error: {self.error}"
        if self.metrics is None:
            return "not yet"
        return "done before" if self.seconds is None else f"{self.seconds:.0f} s"


def plan(config: BenchmarkConfig) -> list[Cell]:
    """Return the cells: methods, their variants, shots, seeds and categories, the last fastest.

    Raises
    ------
    InputError
        The data cannot be listed, lacks a category, or has no test images.
    """
    parts = list(_parts(config))
    for _, _, test in parts:
        if not test.test:
            names = ", ".join(test.categories)
            raise InputError(f"{test.root}: no test images of {names} to measure on")
    folders = (config.data, config.test or config.data)
    cells = []
    for method, variant in product(config.methods, config.variants):
        arguments = config.arguments(method, variant)
        for shots, seed, part in product(config.shots or (None,), config.seeds, parts):
            chosen = (method, variant.name, config.setting, shots, seed, part[0])
            cells.append(Cell(*chosen, config.eval_size, arguments, folders, *part[1:]))
    return cells


def _parts(config: BenchmarkConfig) -> Iterator[tuple[str | None, Dataset, Dataset]]:
    """Yield category, training data and test data of each model to be made."""
    train = load_together(config.data)
    test = load_together(config.test) if config.test else train
    if config.categories:
        test = test.only(config.categories)
        if config.setting != "zero-shot":  # there they say what is tested
            train = train.only(config.categories)
    if config.setting not in ONE_EACH:
        yield None, train, test
        return
    for name in train.categories:
        yield name, train.only([name]), test.only([name])


def _file_name(part: str) -> str:
    """Return a part of a folder's name; characters left out are made up for by a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", part)[:60].strip("-")
    return part if part == plain else f"{plain}-{hashlib.sha256(part.encode()).hexdigest()[:6]}"


def _digest(samples: Sequence[Sample]) -> str:
    """Return a hash of the images' categories, paths and sizes in bytes; none is opened."""
    digest = hashlib.sha256()
    for sample in samples:
        size = sample.path.stat().st_size if sample.path.exists() else None
        digest.update(f"{sample.category} {sample.path.resolve()} {size}\n".encode())
    return digest.hexdigest()
