"""Image-level and pixel-level AUROC, AP, F1-max and AUPRO on raw scores of any range.

AUPRO (Bergmann et al., *The MVTec Anomaly Detection Dataset*, IJCV 2021) is the area under the
per-region overlap against the false-positive rate. The overlap at a threshold is the mean over
ground-truth regions of their covered fraction, which equals the sum of ``1 / (region area x number
of regions)`` over the defect pixels at or above the threshold. So every defect pixel carries a
weight, and one sort gives all four metrics.

Only scores of positives matter as thresholds: between two of them the curves run level.
Equal scores count as one threshold. Counts are int64 and sums float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from anomalyst.components import label_regions
from anomalyst.errors import InputError
from anomalyst.pixel_store import (
    Curve,
    Histogram,
    Pixels,
    Tally,
    group_starts,
    pack_defects,
    score_keys,
    tally_of,
)
from anomalyst.types import BoolArray

_Scores: TypeAlias = "Sequence[float] | npt.NDArray[np.floating[Any]]"
_Labels: TypeAlias = "Sequence[int] | npt.NDArray[Any]"

_CURVE_POINTS = 500


@dataclass(frozen=True, eq=False)
class ImageResult:
    """Image-level metrics in [0, 1]; None where the labels leave a metric undefined.

    AUROC needs both classes, AP and F1-max at least one anomalous image.
    ``roc`` holds (false-positive rate, true-positive rate) and ``pr`` (recall, precision), float64
    ``[n, 2]`` with at most about 500 points, empty where undefined.
    """

    auroc: float | None
    ap: float | None
    f1max: float | None
    roc: Curve
    pr: Curve

    def metrics(self) -> dict[str, float | None]:
        """Return the values under the names that ``metrics.json`` uses."""
        return {"i_auroc": self.auroc, "i_ap": self.ap, "i_f1max": self.f1max}


@dataclass(frozen=True)
class ErrorBound:
    """How far each metric can be from its exact value; 0 while the result is exact."""

    auroc: float = 0.0
    ap: float = 0.0
    f1max: float = 0.0
    aupro: float = 0.0


@dataclass(frozen=True, eq=False)
class PixelResult:
    """Pixel-level metrics in [0, 1]; None where the masks leave a metric undefined.

    AUROC and AUPRO need normal and defect pixels, AP and F1-max at least one defect pixel.
    ``roc`` and ``pr`` are as in `ImageResult`; ``pro`` holds (false-positive rate, overlap) up to
    the limit. ``exact`` tells whether every score was kept; ``error_bound`` holds otherwise.
    """

    auroc: float | None
    ap: float | None
    f1max: float | None
    aupro: float | None
    exact: bool
    error_bound: ErrorBound
    roc: Curve
    pr: Curve
    pro: Curve

    def metrics(self) -> dict[str, float | None]:
        """Return the values under the names that ``metrics.json`` uses."""
        return {
            "p_auroc": self.auroc,
            "p_ap": self.ap,
            "p_f1max": self.f1max,
            "aupro": self.aupro,
        }


def binary_metrics(scores: _Scores, labels: _Labels) -> dict[str, float | None]:
    """Return ``auroc``, ``ap`` and ``f1max`` of scores whose labels are 0 (normal) or 1.

    Equal to scikit-learn's ``roc_auc_score``, ``average_precision_score`` and the largest F1 of
    ``precision_recall_curve``; None where undefined, see `ImageResult`.
    """
    tally = _tally(scores, labels)
    return {
        "auroc": _area(_roc(tally), 1.0),
        "ap": _average_precision(tally),
        "f1max": _f1max(tally),
    }


class ImageMetrics:
    """Gathers one score and one label per image."""

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._labels: list[int] = []

    def update(self, score: float, label: int) -> None:
        """Add an image; ``label`` is 0 (normal) or 1 (anomalous), the score any finite number."""
        _checked([score], [label])
        self._scores.append(score)
        self._labels.append(label)

    def result(self) -> ImageResult:
        """Return the metrics of the images so far."""
        tally = _tally(self._scores, self._labels)
        roc, pr = _roc(tally), _pr(tally)
        return ImageResult(
            auroc=_area(roc, 1.0),
            ap=_average_precision(tally),
            f1max=_f1max(tally),
            roc=_thin(roc, roc.sum(axis=1)),
            pr=_thin(pr, pr[:, 0]),
        )


class PixelMetrics:
    """Gathers score maps and ground-truth masks, image by image, in any order.

    Exact while at most ``max_exact_pixels`` pixels are held (4 bytes a normal pixel, 8 a defect
    pixel, and as much again while `result` joins them). Beyond, all go into a histogram of fixed
    size (96 MiB) and the result says how far it can be off; it no longer tells groups apart.

    Parameters
    ----------
    aupro_limit
        False-positive rate in (0, 1] up to which the overlap is integrated.
    """

    def __init__(self, *, aupro_limit: float = 0.3, max_exact_pixels: int = 2**26) -> None:
        if not 0 < aupro_limit <= 1:
            raise InputError(f"aupro_limit is {aupro_limit}: give a rate above 0 and at most 1")
        self._limit = aupro_limit
        self._max_exact_pixels = max_exact_pixels
        self._groups: dict[str | None, Pixels] = {}
        self._histogram: Histogram | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held for the pixels so far."""
        folded = self._histogram.nbytes if self._histogram else 0
        return folded + sum(pixels.nbytes for pixels in self._groups.values())

    def update(
        self,
        score_map: npt.NDArray[np.floating[Any]],
        mask: BoolArray | None = None,
        group: str | None = None,
        ignored: BoolArray | None = None,
    ) -> None:
        """Add an image: raw scores ``[H, W]`` and the mask of its defects, None for a normal image.

        Images of a ``group``, such as a type of defect, can be measured apart from other groups;
        pixels that are ``ignored`` count for nothing. Scores of other types are rounded to float32.
        Raises `InputError` for scores not finite as float32, and a mask of another shape or type.
        """
        keys = score_keys(score_map)
        if mask is not None and mask.shape != keys.shape:
            raise InputError(
                f"mask has shape {mask.shape} but the score map {keys.shape}: resize one of them"
            )
        counted = np.ones(keys.shape, dtype=bool) if ignored is None else ~ignored
        if mask is None:
            normal, defect = keys[counted], np.zeros(0, dtype=np.uint64)
        else:
            labels, _ = label_regions(mask & counted)
            normal = keys[counted & ~mask]
            defect = pack_defects(keys[labels > 0], labels[labels > 0])
        held = sum(pixels.count for pixels in self._groups.values())
        if self._histogram is None and held + keys.size > self._max_exact_pixels:
            self._fold()
        store = self._histogram or self._groups.setdefault(group, Pixels())
        store.add(normal, defect)

    def _fold(self) -> None:
        self._histogram = Histogram()
        for pixels in self._groups.values():
            pixels.fold(self._histogram)
        self._groups.clear()

    def result(self) -> PixelResult:
        """Return the metrics of the images so far; more may be added afterwards."""
        return self._result(self._histogram or Pixels.joined(list(self._groups.values())))

    def result_of(self, group: str) -> PixelResult | None:
        """Return the metrics of the images of one group and of those of none.

        None where the pixels went into the histogram, or no image of the group was added.
        """
        if group not in self._groups:
            return None
        return self._result(
            Pixels.joined([self._groups[key] for key in (None, group) if key in self._groups])
        )

    def _result(self, store: Pixels | Histogram) -> PixelResult:
        tally, weights = store.tally()
        roc, pr, pro = _roc(tally), _pr(tally), _pro(tally, weights)
        shown = _cut(pro, self._limit)
        exact = isinstance(store, Pixels)
        return PixelResult(
            auroc=_area(roc, 1.0),
            ap=_average_precision(tally),
            f1max=_f1max(tally),
            aupro=_area(pro, self._limit),
            exact=exact,
            error_bound=ErrorBound() if exact else _error_bound(tally, roc, pro, self._limit),
            roc=_thin(roc, roc.sum(axis=1)),
            pr=_thin(pr, pr[:, 0]),
            pro=_thin(shown, shown.sum(axis=1)),
        )


def _checked(scores: _Scores, labels: _Labels) -> tuple[Curve, npt.NDArray[Any]]:
    values, classes = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != classes.shape:
        raise InputError(
            f"scores have shape {values.shape} and labels {classes.shape}: give one label a score"
        )
    unknown = ~np.isin(classes, (0, 1))
    if unknown.any():
        raise InputError(
            f"label {classes[unknown][0]} is unknown: mend it to 0 (normal) or 1 (anomalous)"
        )
    broken = ~np.isfinite(values)
    if broken.any():
        raise InputError(f"score {values[broken][0]} is not finite: mend what makes it")
    return values, classes


def _tally(scores: _Scores, labels: _Labels) -> Tally:
    values, classes = _checked(scores, labels)
    positives = np.sort(values[classes == 1])
    return tally_of(positives, group_starts(positives), np.sort(values[classes == 0]))


def _roc(tally: Tally) -> Curve:
    found = np.cumsum(tally.positives)
    return _against_fpr(tally, found / max(int(tally.positives.sum()), 1))


def _pro(tally: Tally, weights: Curve) -> Curve:
    # The weights of one region sum to 1, so that the total is the number of regions.
    covered = np.cumsum(weights)
    return _against_fpr(tally, covered / covered[-1:])


def _against_fpr(tally: Tally, gained: Curve) -> Curve:
    """Return the corners of the curve of ``gained`` against the false-positive rate."""
    if not tally.normals or not len(gained):
        return np.zeros((0, 2))
    curve = np.zeros((2 * len(gained) + 2, 2))
    curve[1:-1:2, 0] = tally.above
    curve[2:-1:2, 0] = tally.reached
    curve[-1, 0] = tally.normals
    curve[:, 0] /= tally.normals
    curve[2::2, 1] = gained
    curve[3::2, 1] = gained
    return curve


def _pr(tally: Tally) -> Curve:
    """Return (recall, precision) from the highest threshold down, without a made-up first point."""
    found = np.cumsum(tally.positives)
    return np.column_stack((found / found[-1:], found / (found + tally.reached)))


def _cut(curve: Curve, limit: float) -> Curve:
    """Return the curve up to a false-positive rate, its last point interpolated."""
    count = int(np.searchsorted(curve[:, 0], limit, side="right"))
    if count == len(curve):
        return curve
    (x0, y0), (x1, y1) = curve[count - 1], curve[count]
    return np.vstack((curve[:count], (limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0))))


def _thin(curve: Curve, progress: Curve) -> Curve:
    """Return points of the curve about evenly spaced in ``progress``, which never falls."""
    if len(curve) <= _CURVE_POINTS:
        return curve
    marks = np.linspace(progress[0], progress[-1], _CURVE_POINTS)
    chosen = np.minimum(np.searchsorted(progress, marks), len(curve) - 1)
    thinned: Curve = curve[np.unique(np.append(chosen, len(curve) - 1))]
    return thinned


def _area(curve: Curve, limit: float) -> float | None:
    """Return the mean height of the curve up to a false-positive rate, by trapezoids."""
    if not len(curve):
        return None
    x, y = _cut(curve, limit).T
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / (2 * limit))


def _average_precision(tally: Tally) -> float | None:
    if not len(tally.positives):
        return None
    found = np.cumsum(tally.positives)
    return float(np.sum(tally.positives * (found / (found + tally.reached))) / found[-1])


def _f1max(tally: Tally) -> float | None:
    if not len(tally.positives):
        return None
    found = np.cumsum(tally.positives)
    return float(np.max(2 * found / (found[-1] + found + tally.reached)))


def _error_bound(tally: Tally, roc: Curve, pro: Curve, limit: float) -> ErrorBound:
    """Bound the errors by the best and the worst order of the scores inside every bin."""
    # Best: all positives of a bin before its normals.
    best = replace(tally, reached=tally.above)
    ap, best_ap = _average_precision(tally) or 0.0, _average_precision(best) or 0.0
    # Worst: all normals first. With r = `reached`, the sum of 1 - r / (r + rank) over the ranks of
    # the bin's positives is at least what the integral over the ranks gives.
    found = np.cumsum(tally.positives)
    first = np.maximum(found - tally.positives + tally.reached, 1)
    losses = tally.reached * np.log1p(tally.positives / first)
    worst_ap = float(np.sum(tally.positives - losses)) / max(int(tally.positives.sum()), 1)
    return ErrorBound(
        auroc=_area_error(roc, 1.0),
        ap=max(best_ap - ap, ap - worst_ap),
        # A bin's lowest score is a threshold that exists: the exact value is never lower.
        f1max=(_f1max(best) or 0.0) - (_f1max(tally) or 0.0),
        aupro=_area_error(pro, limit),
    )


def _area_error(curve: Curve, limit: float) -> float:
    """Bound what `_area` is off when the curve may take any rising path between its corners."""
    area = _area(curve, limit)
    if area is None:
        return 0.0
    widths = np.diff(np.minimum(curve[:, 0], limit)) / limit
    lowest, highest = widths @ curve[:-1, 1], widths @ curve[1:, 1]
    return float(max(highest - area, area - lowest))
