"""The setting ``generalist``: trained once on a source, then references of each target category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalyst.benchmark.cells import Cell, Generalist, SourceTraining
from anomalyst.benchmark.config import SHIPPED_BUNDLE
from anomalyst.benchmark.kept import is_same, note_error, prepare
from anomalyst.benchmark.machine import Machine
from anomalyst.benchmark.references import Task, draw_tasks
from anomalyst.bundle import MANIFEST
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import CategoryEvaluation, Evaluation, Judged, mean_metrics
from anomalyst.features.cache import FeatureCache
from anomalyst.types import Progress, References

PARTS = ("same", "other")  # of the defects: of a type among the abnormal references', or not
_BUNDLE = "bundle"


class Trainings:
    """Models trained on a source: each once, kept in a folder as a bundle for many cells."""

    def __init__(self, folder: Path, machine: Machine, cache: FeatureCache) -> None:
        self.folder = folder
        self.machine = machine
        self.cache = cache
        self._failed: dict[str, Exception] = {}

    def start(self, cell: Cell, more: Generalist, progress: Progress | None) -> Detector:
        """Return the detector that knows no product yet, after its training if need be."""
        if more.training:
            path = self.bundle(more.training, progress)
            return self._load(path, more.at_test)
        if more.bundle:
            return self._given(cell.method, more.bundle)
        return self.machine.detector(cell.method, cell.arguments, cell.seed, self.cache)

    def _load(self, path: Path, options: Mapping[str, Any]) -> Detector:
        return Detector.load(
            path, device=self.machine.device, feature_cache=self.cache, options=options
        )

    def _given(self, method: str, bundle: str) -> Detector:
        if bundle == SHIPPED_BUNDLE:
            from anomalyst.generalist import load_generalist

            found = load_generalist(device=self.machine.device, feature_cache=self.cache)
        else:
            found = self._load(Path(bundle).expanduser(), {})
        if found.spec.name != method or found.references:
            kind = "with products enrolled" if found.references else "and no product"
            raise InputError(
                f"bundle: {bundle} is of {found.spec.name} {kind}; name one of {method} that was "
                "trained and knows no product"
            )
        return found

    def bundle(self, training: SourceTraining, progress: Progress | None) -> Path:
        """Return the trained bundle; a training that failed in this run is not tried again.

        Raises
        ------
        Exception
            Whatever the training failed of.
        """
        home = self.folder / training.sha256[:16]
        bundle = home / _BUNDLE
        if is_same(training, home) and (bundle / MANIFEST).exists():
            return bundle
        if training.sha256 in self._failed:
            raise self._failed[training.sha256]
        setup = prepare(training, home)
        try:
            detector = self.machine.detector(
                training.method, training.arguments, training.seed, self.cache
            )
            detector.fit(training.samples, calibration=0, training=setup, progress=progress)
            detector.save(bundle)
        except Exception as error:
            note_error(error, home)
            self._failed[training.sha256] = error
            raise
        setup.finish()
        return bundle


def measure_generalist(
    cell: Cell, more: Generalist, trainings: Trainings, progress: Progress | None
) -> Evaluation:
    """Enroll the references of every category, judge its test images, and measure."""
    tasks = draw_tasks(cell.test, cell.shots or 1, more.abnormal, cell.seed, more.by_type)
    start = trainings.start(cell, more, progress)
    judged = Judged(cell.eval_size, sum(len(task.queries) for task in tasks))
    detector, seconds = start, start.seconds
    for task in tasks:
        if start.trains_apart:
            detector = _unenrolled(start)
        detector.seconds = seconds
        for drawn in task.references:
            abnormal = [(sample, sample.mask) for sample in drawn.abnormal]
            detector.enroll(drawn.category, drawn.normal, abnormal)
        judged.add(detector, task.queries, progress)
        seconds = detector.seconds
    detector.setting, detector.shots = cell.setting, cell.shots
    found = judged.result(detector)
    found.metrics |= {
        "seed": cell.seed,
        "abnormal": more.abnormal,
        "references": _names(tasks),
    }
    if more.abnormal and not more.by_type:
        drawn_for = {drawn.category: drawn for task in tasks for drawn in task.references}
        found.metrics["by_reference"] = by_reference(found.categories, drawn_for, cell.eval_size)
    return found


def _unenrolled(trained: Detector) -> Detector:
    """Return another detector of the same backbone and trained weights, without any reference."""
    twin = Detector(
        trained.spec.name, options=trained.options, seed=trained.seed, device=trained.device
    )
    tensors = {"method": trained.method.tensors(), "retrieval": trained.index.tensors()}
    twin.restore(trained.engine, tensors)
    twin.trained_on = trained.trained_on
    return twin


def _names(tasks: Sequence[Task]) -> dict[str, dict[str, list[str]]]:
    """Return folder and file name of each reference, by category and by kind."""
    names: dict[str, dict[str, list[str]]] = {}
    for drawn in (references for task in tasks for references in task.references):
        kinds = names.setdefault(drawn.category, {"normal": [], "abnormal": []})
        for kind, samples in (("normal", drawn.normal), ("abnormal", drawn.abnormal)):
            found = ["/".join(sample.path.parts[-2:]) for sample in samples]
            kinds[kind] += [name for name in found if name not in kinds[kind]]
    return names


def by_reference(
    categories: Mapping[str, CategoryEvaluation],
    references: Mapping[str, References],
    eval_size: int | None,
) -> dict[str, dict[str, float | None]]:
    """Return the mean metrics on known types of defects and on others, normal images in both.

    A category counts in the means for which it has defects.
    """
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for name, judged in categories.items():
        known = {sample.defect for sample in references[name].abnormal}
        for part, kept in rows.items():
            found = CategoryEvaluation(name)
            for sample, prediction in zip(judged.samples, judged.predictions, strict=True):
                if sample.label != 1 or (sample.defect in known) == (part == "same"):
                    found.add(sample, prediction, eval_size)
            if any(sample.label == 1 for sample in found.samples):
                kept.append(found.figures)
    return {part: mean_metrics(kept) for part, kept in rows.items()}
