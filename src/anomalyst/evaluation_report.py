"""From an evaluation to ``report.html``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from anomalyst.bundle import bundle_hash
from anomalyst.data.images import read_image, read_mask
from anomalyst.data.layouts import Dataset
from anomalyst.detector import Detector
from anomalyst.evaluation import CategoryEvaluation, Evaluation
from anomalyst.inference import read_item
from anomalyst.promises import describe
from anomalyst.report import (
    CategoryReport,
    ReportData,
    ReportImage,
    attention_strip,
    gallery,
    illustrate,
    write_report,
)
from anomalyst.types import Prediction, Sample, ScoreMap


def write_evaluation_report(
    evaluation: Evaluation, detector: Detector, folder: Path, *, source: Path, data: Dataset
) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    ``source`` is the bundle that was measured, ``data`` what it was measured on.
    """
    report = ReportData(
        title=f"{detector.spec.name} on {data.root.name}",
        categories=[
            _category(result, detector, data.root) for result in evaluation.categories.values()
        ],
        mean=evaluation.metrics["mean"],
        provenance=_provenance(evaluation, detector, source, data),
        notes=_notes(evaluation, detector),
    )
    path = folder / "report.html"
    write_report(path, report)
    return path


def _category(result: CategoryEvaluation, detector: Detector, root: Path) -> CategoryReport:
    unit = detector.heat_unit(result.name)
    pairs = list(zip(result.samples, result.predictions, strict=True))
    images = [_image(sample, prediction, root) for sample, prediction in pairs]
    shown = gallery(images)
    for k in (*shown.normal, *shown.anomalous, *shown.typical):
        images[k] = _with_pictures(images[k], *pairs[k], unit, detector)
    return CategoryReport(
        name=result.name,
        images=images,
        image_result=result.image,
        pixel_result=result.pixel,
        unit=unit,
        calibration=detector.calibration.get(result.name),
        decision=detector.decision,
    )


def _image(sample: Sample, prediction: Prediction, root: Path) -> ReportImage:
    label = int(sample.label == 1)
    return ReportImage(
        path=_short(sample.path, root),
        label=label,
        defect=sample.defect or ("defect" if label else "good"),
        score=prediction.score if prediction.score is not None else float("nan"),
        p_value=prediction.p_value,
        verdict=prediction.verdict,
        has_mask=sample.mask is not None,
    )


def _short(path: Path, root: Path) -> str:
    """Return the path below the data set's folder, or whole where it lies elsewhere."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _with_pictures(
    image: ReportImage, sample: Sample, prediction: Prediction, unit: float, detector: Detector
) -> ReportImage:
    if prediction.score_map is None:
        return image
    size = prediction.score_map.size
    pixels = read_image(sample.path)
    picture, overlay = illustrate(
        pixels,
        prediction.score_map,
        unit,
        prediction.regions,
        None if sample.mask is None else read_mask(sample.mask, size),
    )
    seen = _attention(sample, prediction.score_map, detector)
    attention = None if seen is None else attention_strip(pixels, seen)
    return replace(image, picture=picture, overlay=overlay, attention=attention)


def _attention(
    sample: Sample, score_map: ScoreMap, detector: Detector
) -> tuple[ScoreMap, ...] | None:
    """Return what the method looked at in an image, None where it does not say: in tiles never."""
    if not detector.method.explains or detector.engine.preprocess.tiling is not None:
        return None
    item = read_item(sample.path, str(sample.path), detector.engine.preprocess)
    if item.tensor is None:
        return None
    maps = detector.method.attention_maps(detector.engine.features([item]))
    return tuple(replace(score_map, values=values) for values in maps[0].cpu().numpy())


def _provenance(
    evaluation: Evaluation, detector: Detector, source: Path, data: Dataset
) -> dict[str, str]:
    environment = dict(evaluation.metrics["environment"])
    preprocess = detector.engine.preprocess
    references = ", ".join(f"{name} {len(kept)}" for name, kept in detector.references.items())
    seconds = evaluation.metrics["seconds"]
    return {
        "Command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "Bundle": f"{source} (SHA-256 {bundle_hash(source)})",
        "Method": f"{detector.spec.name} {detector.method.options.model_dump()}",
        "Backbone": (
            f"{detector.engine.backbone.spec.id}, layers {list(detector.engine.backbone.layers)}, "
            f"weights SHA-256 {detector.engine.backbone.weights_sha256}"
        ),
        "Preprocessing": f"short side {preprocess.image_size} px, {preprocess.to_dict()}",
        "Setting": f"{detector.setting}, shots {detector.shots}, seed {detector.seed}",
        "References": f"{references} (fingerprint {detector.fingerprint})",
        "Data": f"{data.root} (layout {data.layout})",
        "Maps compared at": f"{evaluation.metrics['eval_size']} px",
        "Date": str(environment.pop("date")),
        "Machine": ", ".join(f"{key} {value}" for key, value in environment.items()),
        "Time": (
            f"training {seconds['train']:.1f} s, enrolment {seconds['enroll']:.1f} s, "
            f"prediction {seconds['predict']:.1f} s "
            f"({evaluation.metrics['images_per_second']:.1f} images a second)"
        ),
    }


def _notes(evaluation: Evaluation, detector: Detector) -> list[str]:
    notes = describe(detector, evaluation.categories)
    unread = len(evaluation.errors)
    if unread:
        notes.append(f"{unread} images could not be read and count for nothing.")
    return notes
