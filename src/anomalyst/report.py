"""One HTML file that shows how a detector did: figures, verdicts and pictures, nothing to fetch."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from anomalyst.files import replace_file
from anomalyst.metrics import ImageResult, PixelResult, binary_metrics
from anomalyst.overlay import REGION_COLOUR, TRUTH_COLOUR, colour_bar, heat_overlay
from anomalyst.report_figures import curve_plot, score_histogram
from anomalyst.scoring import Calibration, Decision, normals_needed
from anomalyst.types import BoolArray, ByteArray, Region, ScoreMap, Verdict

_SHORT_SIDE = 320
_STRIP_SIDE = 112
_STRIP_GAP = 3
_JPEG_QUALITY = 80
_GROUP = 8  # images of each of the three groups
_NOT_DEFINED = "\N{EN DASH}"
# Title, axes, right end, and the metrics whose curves it holds.
_PLOTS = (
    (
        "ROC",
        "false-positive rate",
        "true-positive rate",
        1.0,
        {"i_auroc": "image AUROC", "p_auroc": "pixel AUROC"},
    ),
    ("PR", "recall", "precision", 1.0, {"i_ap": "image AP", "p_ap": "pixel AP"}),
    ("PRO", "pixel false-positive rate", "mean region overlap", 0.3, {"aupro": "AUPRO"}),
)


@dataclass(frozen=True)
class ReportImage:
    """One test image with what the detector said of it.

    Attributes
    ----------
    path
        As it is to be shown: short and without private folders.
    label
        0 normal, 1 anomalous.
    defect
        The defect's name, ``good`` for a normal image.
    score
        Raw image score, higher is more anomalous.
    p_value, verdict
        None when the detector is not calibrated for the category.
    picture, overlay
        JPEG or PNG files from `illustrate`; needed only for the images that `gallery` names.
    attention
        A JPEG file from `attention_strip`; None where the method has none to show.
    has_mask
        Whether the overlay outlines a ground truth.
    """

    path: str
    label: int
    defect: str
    score: float
    p_value: float | None = None
    verdict: Verdict | None = None
    picture: bytes | None = None
    overlay: bytes | None = None
    attention: bytes | None = None
    has_mask: bool = False


@dataclass(frozen=True)
class CategoryReport:
    """The results of one category.

    Attributes
    ----------
    images
        All its test images, in any order.
    image_result, pixel_result
        From `ImageMetrics` and `PixelMetrics`; ``pixel_result`` is None where there are no masks.
    unit
        The unit of the heat maps, as given to `illustrate`.
    calibration
        None when the detector is not calibrated for the category.
    decision
        The levels that the verdicts were made with.
    """

    name: str
    images: Sequence[ReportImage]
    image_result: ImageResult
    pixel_result: PixelResult | None
    unit: float
    calibration: Calibration | None = None
    decision: Decision = field(default_factory=Decision)

    @property
    def metrics(self) -> dict[str, float | None]:
        """The values under the names that ``metrics.json`` uses."""
        pixel = {} if self.pixel_result is None else self.pixel_result.metrics()
        return {**self.image_result.metrics(), **pixel}


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes
    ----------
    mean
        Mean over the categories under the names of ``metrics.json``; a missing one is undefined.
    provenance
        What a reader needs to make the report again, in this order: command, bundle hash, data,
        versions, machine, date, and so on.
    notes
        What a reader must know to judge the figures, a sentence each.
    """

    title: str
    categories: Sequence[CategoryReport]
    mean: Mapping[str, float | None]
    provenance: Mapping[str, str]
    notes: Sequence[str] = ()


class Gallery(NamedTuple):
    """Indices of the images to show: the worst first, then typical ones. They do not overlap."""

    normal: tuple[int, ...]
    anomalous: tuple[int, ...]
    typical: tuple[int, ...]


def gallery(images: Sequence[ReportImage]) -> Gallery:
    """Choose the images of one category that a report shows, at most 24.

    Normal images with the highest scores, anomalous images with the lowest, and then, a defect in
    turn, those nearest to the median score of their defect (detected ones where verdicts exist).
    """
    ranked = sorted(range(len(images)), key=lambda i: images[i].score)
    normal = [i for i in reversed(ranked) if images[i].label == 0][:_GROUP]
    anomalous = [i for i in ranked if images[i].label == 1]
    lowest, rest = anomalous[:_GROUP], anomalous[_GROUP:]
    queues: dict[str, list[int]] = {}
    for i in rest:
        if images[i].verdict != "ok":
            queues.setdefault(images[i].defect, []).append(i)
    typical: list[int] = []
    for defect in sorted(queues):
        scores = [image.score for image in images if image.label and image.defect == defect]
        median = float(np.median(scores))
        queues[defect].sort(key=lambda i: abs(images[i].score - median))
    while len(typical) < _GROUP and any(queues.values()):
        typical += [queues[defect].pop(0) for defect in sorted(queues) if queues[defect]]
    return Gallery(tuple(normal), tuple(lowest), tuple(typical[:_GROUP]))


def thumbnail(image: ByteArray, short_side: int = _SHORT_SIDE) -> ByteArray:
    """Return uint8 ``[H, W, 3]`` reduced to a short side of at most so many pixels."""
    height, width = image.shape[:2]
    scale = min(1.0, short_side / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def jpeg(image: ByteArray) -> bytes:
    """Return uint8 ``[H, W, 3]`` as a JPEG file."""
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return file.getvalue()


def illustrate(
    image: ByteArray,
    score_map: ScoreMap,
    unit: float,
    regions: Sequence[Region],
    mask: BoolArray | None = None,
) -> tuple[bytes, bytes]:
    """Return ``picture`` and ``overlay`` of a `ReportImage`, reduced to the report's size.

    ``image`` is uint8 ``[H, W, 3]`` of the original size, as are the regions and the mask
    ``[H, W]``; ``unit`` is that of `heat_overlay`.
    """
    small = thumbnail(image)
    height, width = small.shape[:2]
    scale_y, scale_x = height / image.shape[0], width / image.shape[1]
    scaled = []
    for region in regions:
        x, y, box_width, box_height = region.bbox
        left, right = int(x * scale_x), int(np.ceil((x + box_width) * scale_x))
        top, bottom = int(y * scale_y), int(np.ceil((y + box_height) * scale_y))
        scaled.append(Region((left, top, right - left, bottom - top), region.area, region.score))
    truth = None
    if mask is not None:  # a pixel counts when any part of it is defect: small defects stay
        share = Image.fromarray(mask).convert("L").resize((width, height), Image.Resampling.BOX)
        truth = np.asarray(share) > 0
    overlay = heat_overlay(small, score_map.at(height, width), unit, scaled, truth)
    return jpeg(small), jpeg(overlay)


def attention_strip(image: ByteArray, maps: Sequence[ScoreMap]) -> bytes:
    """Return the image under each of the maps, side by side, as a JPEG file.

    Each map is coloured up to its own maximum: it shows where the method looked, and is no score.
    ``image`` is uint8 ``[H, W, 3]`` of the original size.
    """
    small = thumbnail(image, _STRIP_SIDE)
    height, width = small.shape[:2]
    gap = np.full((height, _STRIP_GAP, 3), 255, dtype=np.uint8)
    parts: list[ByteArray] = []
    for single in maps:
        full = single.at(height, width)
        peak = float(full.max())
        parts += [gap, heat_overlay(small, full, peak / 2, ()) if peak > 0 else small]
    return jpeg(np.concatenate(parts[1:], axis=1))


def write_report(path: Path, report: ReportData) -> None:
    """Write the report as one self-contained HTML file, whole or not at all."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        metric=_metric, figures=_figures, percent=_percent, data_uri=_data_uri, rgb=_rgb
    )
    template = resources.files("anomalyst").joinpath("report.html").read_text(encoding="utf-8")
    views = [_view(category, f"c{i}") for i, category in enumerate(report.categories, 1)]
    page = environment.from_string(template).render(
        report=report,
        categories=views,
        totals=_totals(views),
        region_colour=REGION_COLOUR,
        truth_colour=TRUTH_COLOUR,
        dash=_NOT_DEFINED,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names that are no valid Unicode must not cost the whole report.
    replace_file(path, page.encode("utf-8", errors="replace"))


class _Counts(NamedTuple):
    """Images of one kind by verdict; all zero but ``images`` when there are no verdicts."""

    images: int
    ok: int
    review: int
    ng: int

    @classmethod
    def of(cls, images: Sequence[ReportImage]) -> _Counts:
        verdicts = Counter(image.verdict for image in images)
        return cls(len(images), verdicts["ok"], verdicts["review"], verdicts["ng"])


@dataclass(frozen=True)
class _Defect:
    name: str
    counts: _Counts
    auroc: float | None


@dataclass(frozen=True)
class _Figure:
    svg: str
    caption: str


@dataclass(frozen=True)
class _View:
    """One category as the template needs it."""

    anchor: str
    source: CategoryReport
    normal: _Counts
    anomalous: _Counts
    defects: tuple[_Defect, ...]
    figures: tuple[_Figure, ...]
    groups: Mapping[str, tuple[ReportImage, ...]]
    levels: Mapping[str, float | None]
    needed: Mapping[str, int]
    pixel_threshold: float | None
    bar: bytes
    ticks: tuple[tuple[float, str], ...]

    @property
    def calibrated(self) -> bool:
        return self.source.calibration is not None


def _view(category: CategoryReport, anchor: str) -> _View:
    normal = [image for image in category.images if image.label == 0]
    anomalous = [image for image in category.images if image.label == 1]
    calibration, decision = category.calibration, category.decision
    alphas = {"review": decision.alpha_review, "ng": decision.alpha}
    levels = {name: calibration.threshold(a) if calibration else None for name, a in alphas.items()}
    strip, ticks = colour_bar(category.unit)
    file = BytesIO()
    Image.fromarray(strip).save(file, "PNG")
    return _View(
        anchor=anchor,
        source=category,
        normal=_Counts.of(normal),
        anomalous=_Counts.of(anomalous),
        defects=_defects(normal, anomalous),
        figures=_plots(category, normal, anomalous, levels, anchor) if category.images else (),
        groups={
            group: tuple(category.images[i] for i in indices)
            for group, indices in gallery(category.images)._asdict().items()
        },
        levels=levels,
        needed={name: normals_needed(alpha) for name, alpha in alphas.items()},
        pixel_threshold=calibration.pixel_threshold(decision) if calibration else None,
        bar=file.getvalue(),
        ticks=ticks,
    )


def _defects(
    normal: Sequence[ReportImage], anomalous: Sequence[ReportImage]
) -> tuple[_Defect, ...]:
    """Return each defect's verdicts, and its image AUROC against all normal images."""
    rows = []
    for name in sorted({image.defect for image in anomalous}):
        of_defect = [image for image in anomalous if image.defect == name]
        both = [*normal, *of_defect]
        scores, labels = [image.score for image in both], [image.label for image in both]
        auroc = binary_metrics(scores, labels)["auroc"]
        rows.append(_Defect(name, _Counts.of(of_defect), auroc))
    return tuple(rows)


def _plots(
    category: CategoryReport,
    normal: Sequence[ReportImage],
    anomalous: Sequence[ReportImage],
    levels: Mapping[str, float | None],
    anchor: str,
) -> tuple[_Figure, ...]:
    """Return the histogram of scores, then the ROC, PR and PRO plots as far as they are defined."""
    thresholds = [(name, level) for name, level in levels.items() if level is not None]
    svg = score_histogram(
        [image.score for image in normal],
        [image.score for image in anomalous],
        thresholds,
        name=f"{anchor}-scores",
    )
    lines = [f"{name} above {level:.4g}" for name, level in thresholds] or ["no thresholds"]
    figures = [_Figure(svg, f"Image scores of the test images; {', '.join(lines)}.")]
    image, pixel = category.image_result, category.pixel_result
    curves = {"i_auroc": image.roc, "i_ap": image.pr}
    if pixel is not None:
        curves |= {"p_auroc": pixel.roc, "p_ap": pixel.pr, "aupro": pixel.pro}
    for kind, x_label, y_label, x_limit, keys in _PLOTS:
        drawn = [
            (f"{label} {_metric(category.metrics[key])}", curves[key])
            for key, label in keys.items()
            if key in curves and len(curves[key])
        ]
        if drawn:
            svg = curve_plot(
                drawn, x_label=x_label, y_label=y_label, x_limit=x_limit, name=f"{anchor}-{kind}"
            )
            caption = f"{kind} curve: {', '.join(text for text, _ in drawn)}."
            figures.append(_Figure(svg, caption))
    return tuple(figures)


def _totals(views: Sequence[_View]) -> tuple[_Counts, _Counts]:
    """Return normal and anomalous counts over the calibrated categories."""
    sums = []
    for kind in ("normal", "anomalous"):
        rows = [getattr(view, kind) for view in views if view.calibrated]
        sums.append(_Counts(*(sum(row[i] for row in rows) for i in range(4))))
    return sums[0], sums[1]


def _metric(value: float | None) -> str:
    return _NOT_DEFINED if value is None else f"{value:.3f}"


def _figures(value: float | None, digits: int = 4) -> str:
    return _NOT_DEFINED if value is None else f"{value:.{digits}g}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}\N{NO-BREAK SPACE}%"


def _rgb(colour: tuple[int, int, int]) -> str:
    return "rgb({} {} {})".format(*colour)


def _data_uri(content: bytes) -> str:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(content).decode()}"
