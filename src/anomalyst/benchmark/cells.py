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
from typing import Any, ClassVar

from anomalyst.benchmark.config import ONE_EACH, SHIPPED_BUNDLE, UNSEEN, BenchmarkConfig
from anomalyst.bundle import read_bundle
from anomalyst.data.layouts import Dataset, load_together
from anomalyst.errors import InputError
from anomalyst.methods.base import find_method
from anomalyst.training_setup import FULL, Precision
from anomalyst.types import Sample


@dataclass(frozen=True)
class SourceTraining:
    """A training on a source domain, whose weights many cells stand on.

    Attributes
    ----------
    arguments
        Of the `Detector`, as of a `Cell`.
    """

    record: ClassVar[str] = "training.json"
    method: str
    arguments: Mapping[str, Any]
    seed: int
    folders: Sequence[Path]
    data: Dataset
    precision: Precision = FULL

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All images of the source, normal and abnormal."""
        return self.data.train + self.data.test

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Everything that the weights depend on, ready for JSON."""
        return {
            "method": self.method,
            "seed": self.seed,
            "detector": _plain(self.arguments),
            "data": _described(self.folders, self.data),
            "files": _digest(self.samples),
            **_reduced(self.precision),
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of the configuration."""
        return _hash(self.configuration)


@dataclass(frozen=True)
class Generalist:
    """What a cell of the setting ``generalist`` has beside the rest.

    Attributes
    ----------
    abnormal
        Abnormal references a category.
    by_type
        Whether each defect type is judged with abnormal references of its own.
    bundle
        Which trained bundle the cell stands on instead of ``training``; both are None for a method
        without gradient steps.
    contents
        Tells that bundle from every other one.
    at_test
        Options laid over those that it was trained with.
    """

    abnormal: int
    by_type: bool
    training: SourceTraining | None
    bundle: str | None
    contents: Mapping[str, str] | None
    at_test: Mapping[str, Any]

    @property
    def configuration(self) -> dict[str, Any]:
        """All that a figure depends on, ready for JSON."""
        return {
            "abnormal": self.abnormal,
            "references": "type" if self.by_type else "category",
            "training": self.training.configuration if self.training else self.contents,
            "at_test": _plain(self.at_test),
        }


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
    train
        What is learned from; for ``generalist`` the target, which the references are drawn from.
    part
        Of the benchmark, empty where it has only one.
    """

    record: ClassVar[str] = "cell.json"
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
    generalist: Generalist | None = None
    precision: Precision = FULL
    part: str = ""

    @property
    def abnormal(self) -> int | None:
        """Abnormal references a category, None where the setting knows none."""
        return None if self.generalist is None else self.generalist.abnormal

    @property
    def label(self) -> str:
        """The cell in words."""
        shots = f"{self.shots} shot" + "s" * (self.shots != 1) if self.shots else None
        variant = None if self.variant == "default" else self.variant
        abnormal = f"{self.abnormal} abnormal" if self.generalist else None
        made = (self.method, variant, shots, abnormal, f"seed {self.seed}", self.category)
        words = ", ".join(part for part in made if part)
        return f"{self.part}: {words}" if self.part else words

    @property
    def name(self) -> str:
        """The name of its folder; no two cells of a benchmark have one in common."""
        shots = f"{self.shots}-shot" if self.shots else None
        variant = None if self.variant == "default" else _file_name(self.variant)
        category = self.category and _file_name(self.category)
        abnormal = f"{self.abnormal}-abnormal" if self.generalist else None
        part = self.part and _file_name(self.part)
        parts = (part, self.method, variant, shots, abnormal, f"seed-{self.seed}", category)
        return "+".join(part for part in parts if part)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Everything that its figures depend on, ready for JSON."""
        return {
            "method": self.method,
            "variant": self.variant,
            "setting": self.setting,
            "shots": self.shots,
            "seed": self.seed,
            "eval_size": self.eval_size or "original",
            "detector": _plain(self.arguments),
            "data": _described(self.folders[0], self.train),
            "test": _described(self.folders[1], self.test),
            "files": _digest([*self.train.train, *self.test.test]),
            **(self.generalist.configuration if self.generalist else {}),
            **_reduced(self.precision),
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of the configuration."""
        return _hash(self.configuration)


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
    if config.setting == "generalist":
        return list(_generalist_cells(config))
    parts = list(_parts(config))
    for _, _, test in parts:
        _require_test(test)
    folders = (config.data, config.test or config.data)
    cells = []
    for method, variant in product(config.methods, config.variants):
        arguments = config.arguments(method, variant)
        for shots, seed, part in product(config.shots or (None,), config.seeds, parts):
            chosen = (method, variant.name, config.setting, shots, seed, part[0])
            more = (config.eval_size, arguments, folders, *part[1:])
            cells.append(Cell(*chosen, *more, precision=config.precision, part=config.name))
    return cells


def _parts(config: BenchmarkConfig) -> Iterator[tuple[str | None, Dataset, Dataset]]:
    """Yield category, training data and test data of each model to be made."""
    train = load_together(config.data or config.test)  # untrained zero-shot has no source
    test = load_together(config.test) if config.test else train
    if config.categories:
        test = test.only(config.categories)
        if config.setting not in UNSEEN:  # there they say what is tested
            train = train.only(config.categories)
    if config.setting not in ONE_EACH:
        yield None, train, test
        return
    others = config.setting == "leave-one-out"
    if others and len(train.categories) < 2:
        raise InputError(f"{train.root}: leave-one-out needs two categories or more")
    for name in test.categories:
        learned = [other for other in train.categories if (other == name) != others]
        yield name, train.only(learned), test.only([name])


def _require_test(data: Dataset) -> None:
    if not data.test:
        names = ", ".join(data.categories)
        raise InputError(f"{data.root}: no test images of {names} to measure on")


def _generalist_cells(config: BenchmarkConfig) -> Iterator[Cell]:
    """Yield the cells over all test categories; those of a method and variant share a training."""
    target = load_together(config.test)
    if config.categories:
        target = target.only(config.categories)
    _require_test(target)
    source = load_together(config.data) if config.data else None
    contents = _contents(config.bundle) if config.bundle else None
    for method, variant in product(config.methods, config.variants):
        spec = find_method(method)
        training, bundle = None, config.bundle if spec.trains_on else None
        arguments = {} if bundle else config.arguments(method, variant)
        if spec.trains_on and source:
            learned = (arguments, config.seeds[0], config.data, source, config.precision)
            training = SourceTraining(method, *learned)
        for shots, abnormal, seed in product(config.shots, config.counts_of(method), config.seeds):
            more = Generalist(
                abnormal or 0,
                bool(abnormal) and config.references == "type",
                training,
                bundle,
                contents if bundle else None,
                variant.at_test,
            )
            chosen = (method, variant.name, config.setting, shots, seed, None, config.eval_size)
            folders = (config.test, config.test)
            yield Cell(*chosen, arguments, folders, target, target, more, part=config.name)


def _contents(bundle: str) -> Mapping[str, str]:
    """Return what tells a bundle from every other one."""
    if bundle == SHIPPED_BUNDLE:
        from anomalyst.generalist import model_card

        return {"model card": _hash(model_card())}
    return read_bundle(Path(bundle).expanduser())[0].sha256


def _reduced(precision: Precision) -> dict[str, str]:
    """Return the entry of a precision below the full one, which needs none."""
    return {} if precision == FULL else {"precision": precision}


def _plain(values: Mapping[str, Any]) -> Any:
    """Return settings as they come out of JSON."""
    return json.loads(json.dumps(values, default=str))


def _described(folders: Sequence[Path], data: Dataset) -> dict[str, list[str]]:
    return {
        "folders": [str(path.resolve()) for path in folders],
        "categories": list(data.categories),
    }


def _hash(configuration: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


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
