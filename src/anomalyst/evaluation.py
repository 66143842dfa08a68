"""Judge a test set and measure: ``metrics.json`` and the report."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anomalyst.bundle import now, package_versions
from anomalyst.data.images import read_mask
from anomalyst.data.layouts import Dataset
from anomalyst.data.masks import mask_at
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.files import replace_file
from anomalyst.metrics import (
    ImageMetrics,
    ImageResult,
    PixelMetrics,
    PixelResult,
    binary_metrics,
)
from anomalyst.promises import belonging
from anomalyst.types import BoolArray, FloatArray, Prediction, Progress, Sample, ScoreMap

METRICS = ("i_auroc", "i_ap", "i_f1max", "p_auroc", "p_ap", "p_f1max", "aupro")
EVAL_SIZE = 256


@dataclass
class CategoryEvaluation:
    """One category's test images and what came out; ``pixels`` is None where there are no masks."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    image_metrics: ImageMetrics = field(default_factory=ImageMetrics)
    pixel_metrics: PixelMetrics = field(default_factory=PixelMetrics)
    masks: int = 0

    @cached_property
    def image(self) -> ImageResult:
        """Image-level metrics, once every image was added."""
        return self.image_metrics.result()

    @cached_property
    def pixel(self) -> PixelResult | None:
        """Pixel-level metrics, once every image was added."""
        return self.pixel_metrics.result() if self.masks else None

    @property
    def figures(self) -> dict[str, Any]:
        """Numbers of images and every metric, None where it is not defined."""
        labels = [sample.label for sample in self.samples]
        values: dict[str, Any] = dict.fromkeys(METRICS)
        values |= self.image.metrics() | (self.pixel.metrics() if self.pixel else {})
        return {"n_normal": labels.count(0), "n_anomalous": labels.count(1), **values}

    def add(self, sample: Sample, prediction: Prediction, eval_size: int | None) -> None:
        """Take in one judged image; a mask that cannot be read raises `InputError`."""
        score_map = prediction.score_map
        if score_map is None or prediction.score is None:
            raise ValueError("only judged images can be added")
        mask = None if sample.mask is None else read_mask(sample.mask, score_map.size, sample.path)
        self.samples.append(sample)
        self.predictions.append(prediction)
        self.image_metrics.update(prediction.score, int(sample.label == 1))
        if sample.label == 1 and mask is None:
            return  # where its defect is, nobody knows: no pixel of it counts
        self.masks += mask is not None
        group = None if sample.label == 0 else defect_name(sample)
        values, defects, ignored = _at_eval_size(score_map, mask, eval_size)
        self.pixel_metrics.update(values, defects, group, ignored)

    @property
    def defects(self) -> dict[str, dict[str, Any]]:
        """Each type of defect's number of images and metrics beside all normal images."""
        scores: dict[str | None, list[float]] = {None: []}
        for sample, prediction in zip(self.samples, self.predictions, strict=True):
            name = None if sample.label == 0 else defect_name(sample)
            if prediction.score is not None:
                scores.setdefault(name, []).append(prediction.score)
        normal = scores.pop(None)
        return {
            name: self._figures_of(name, found, normal) for name, found in scores.items() if name
        }

    def _figures_of(
        self, defect: str, scores: Sequence[float], normal: Sequence[float]
    ) -> dict[str, Any]:
        labels = [1] * len(scores) + [0] * len(normal)
        image = binary_metrics([*scores, *normal], labels)
        pixel = self.pixel_metrics.result_of(defect) if self.masks else None
        values: dict[str, Any] = dict.fromkeys(METRICS)
        values |= {f"i_{key}": value for key, value in image.items()}
        values |= pixel.metrics() if pixel else {}
        return {"n_normal": len(normal), "n_anomalous": len(scores), **values}


def defect_name(sample: Sample) -> str:
    """Return the type of an anomalous sample's defect, ``defect`` where it has no name."""
    return sample.defect or "defect"


def _at_eval_size(
    score_map: ScoreMap, mask: BoolArray | None, eval_size: int | None
) -> tuple[FloatArray, BoolArray | None, BoolArray | None]:
    """Return map, mask and what is ignored of the part that was seen, at the evaluation size."""
    top, left, height, width = (round(edge) for edge in score_map.box)
    seen = ScoreMap(
        score_map.values, (height, width), score_map.sigma, (0.0, 0.0, float(height), float(width))
    )
    size = (height, width) if eval_size is None else (eval_size, eval_size)
    box = (top, left, height, width)
    if mask is not None:
        mask = mask_at(mask, box, size)  # as the papers resize their masks
    ignored = None if score_map.ignored is None else score_map.ignored.at(box, size)
    return seen.at(*size), mask, ignored


@dataclass
class Evaluation:
    """All categories' results, and the content of ``metrics.json``."""

    categories: dict[str, CategoryEvaluation]
    metrics: dict[str, Any]
    errors: list[str]


@dataclass
class Judged:
    """Test images judged so far, by one detector or by several in turn.

    Attributes
    ----------
    total
        Number of images that there will be.
    """

    eval_size: int | None
    total: int
    categories: dict[str, CategoryEvaluation] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0

    def add(
        self, detector: Detector, samples: Sequence[Sample], progress: Progress | None = None
    ) -> None:
        """Judge images; those that the detector has as references or was made on do not count."""
        for name in dict.fromkeys(sample.category or "" for sample in samples):
            self.categories.setdefault(name, CategoryEvaluation(name))
        known = set(detector.image_hashes)
        predictions = detector.predict(samples)
        for sample in samples:
            began = time.perf_counter()
            prediction = next(predictions)
            self.seconds += time.perf_counter() - began
            try:
                if prediction.error is not None:
                    raise InputError(prediction.error)
                if prediction.sha256 not in known:
                    self.categories[sample.category or ""].add(sample, prediction, self.eval_size)
            except InputError as error:
                self.errors.append(str(error))
            self.images += 1
            if progress:
                progress("evaluate", self.images, self.total)

    def result(self, detector: Detector) -> Evaluation:
        """Measure, and say that ``detector`` did it."""
        return Evaluation(self.categories, _summary(detector, self), self.errors)


def evaluate(
    detector: Detector,
    data: Dataset,
    *,
    eval_size: int | None = EVAL_SIZE,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge the test images of the detector's categories and measure.

    Images that the detector has as references, or was calibrated on, do not count.

    Parameters
    ----------
    eval_size
        Side in pixels at which maps and masks are compared, 256 as in the papers; None compares
        at each image's original size.
    progress
        Called with the stage, the images done and the images in all.

    Returns
    -------
    Evaluation
        A bad image or mask is left out of the metrics and named in ``errors``.

    Raises
    ------
    InputError
        There are no test images, or none of the detector's categories.
    """
    if not data.test:
        raise InputError(
            f"{data.root}: no test images; put them into test/good and test/DEFECT, or good and "
            "bad (see the layouts in the documentation)"
        )
    samples = belonging(detector, data, data.test)
    judged = Judged(eval_size, len(samples))
    judged.add(detector, samples, progress)
    return judged.result(detector)


def _summary(detector: Detector, judged: Judged) -> dict[str, Any]:
    """Return the content of ``metrics.json``."""
    rows: dict[str, dict[str, Any]] = {}
    for name, category in judged.categories.items():
        rows[name] = category.figures
        if category.pixel and not category.pixel.exact:
            rows[name]["pixel_error_bound"] = vars(category.pixel.error_bound)
    backbone = detector.engine.backbone
    return {
        "method": detector.spec.name,
        "options": detector.method.options.model_dump(),
        "backbone": backbone.spec.id,
        "layers": list(backbone.layers),
        "weights_sha256": backbone.weights_sha256,
        "image_size": detector.engine.preprocess.image_size,
        "eval_size": judged.eval_size or "original",
        "setting": detector.setting,
        "shots": detector.shots,
        "seed": detector.seed,
        "categories": rows,
        "mean": mean_metrics(list(rows.values())),
        "defects": {name: category.defects for name, category in judged.categories.items()},
        "seconds": {"train": 0.0, "enroll": 0.0, **detector.seconds, "predict": judged.seconds},
        "images_per_second": judged.images / judged.seconds,
        "peak_rss_mb": peak_rss_mb(),
        "environment": environment(),
    }


def mean_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return each figure's mean over the categories that have it, None where none has."""
    mean: dict[str, float | None] = {}
    for key in ("n_normal", "n_anomalous", *METRICS):
        values = [row[key] for row in rows if row[key] is not None]
        mean[key] = float(np.mean(values)) if values else None
    return mean


def peak_rss_mb() -> float | None:
    """Return this process's peak resident memory in MB; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there starts from the peak of the parent process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024 / 1e6  # "kB" there are KiB
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def forget_peak_rss() -> None:
    """Let the peak of `peak_rss_mb` start from now; elsewhere than on Linux it stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def environment() -> dict[str, Any]:
    """Return what a measured figure depends on beside the data."""
    import torch

    return {
        "date": now(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **package_versions(),
    }


def write_metrics(evaluation: Evaluation, folder: Path) -> Path:
    """Write ``metrics.json`` into a folder, made if needed, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    replace_file(path, json.dumps(evaluation.metrics, indent=2).encode())
    return path
