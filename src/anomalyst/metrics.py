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
from anomalyst.types import BoolArray

Curve = npt.NDArray[np.float64]
_Counts = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint32]
_PackedKeys = npt.NDArray[np.uint64]
_Scores: TypeAlias = "Sequence[float] | npt.NDArray[np.floating[Any]]"
_Labels: TypeAlias = "Sequence[int] | npt.NDArray[Any]"

_CURVE_POINTS = 500
# Sign, exponent and 13 bits of mantissa: bins 2^-13 wide relative to the score, 96 MiB in all.
_BIN_BITS = 22
_BLOCK_PIXELS = 2**20


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
    tally = _tally_of(scores, labels)
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
        tally = _tally_of(self._scores, self._labels)
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
    size (96 MiB) and the result says how far it can be off.

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
        self._store: _Pixels | _Histogram = _Pixels()

    @property
    def nbytes(self) -> int:
        """Bytes held for the pixels so far."""
        return self._store.nbytes

    def update(
        self, score_map: npt.NDArray[np.floating[Any]], mask: BoolArray | None = None
    ) -> None:
        """Add an image: raw scores ``[H, W]`` and the mask of its defects, None for a normal image.

        Scores of other types are rounded to float32. Raises `InputError` for scores that are not
        finite as float32, and for a mask of another shape or type.
        """
        keys = _keys(score_map)
        if mask is not None and mask.shape != keys.shape:
            raise InputError(
                f"mask has shape {mask.shape} but the score map {keys.shape}: resize one of them"
            )
        if mask is None:
            normal, defect = keys.ravel(), np.zeros(0, dtype=np.uint64)
        else:
            labels, _ = label_regions(mask)
            normal, defect = keys[~mask], _pack(keys[mask], labels[mask])
        if isinstance(self._store, _Pixels) and (
            self._store.count + keys.size > self._max_exact_pixels
        ):
            self._store = self._store.fold()
        self._store.add(normal, defect)

    def result(self) -> PixelResult:
        """Return the metrics of the images so far; more may be added afterwards."""
        tally, weights = self._store.tally()
        roc, pr, pro = _roc(tally), _pr(tally), _pro(tally, weights)
        shown = _cut(pro, self._limit)
        exact = isinstance(self._store, _Pixels)
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


@dataclass(frozen=True)
class _Tally:
    """What is met going down the distinct scores of positives.

    ``positives`` counts the positives at each score, ``above`` the normals of a higher score and
    ``reached`` the normals of that score or higher; int64 ``[k]``. ``normals`` counts all normals.
    """

    positives: _Counts
    above: _Counts
    reached: _Counts
    normals: int


class _Pixels:
    """Keeps the ordered bits of every score; a defect pixel's lie over its region's area."""

    def __init__(self) -> None:
        self._normal: list[_Keys] = [np.zeros(0, dtype=np.uint32)]
        self._defect: list[_PackedKeys] = [np.zeros(0, dtype=np.uint64)]
        self.count = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._normal) + sum(part.nbytes for part in self._defect)

    def add(self, normal: _Keys, defect: _PackedKeys) -> None:
        self._normal.append(normal)
        self._defect.append(defect)
        self.count += len(normal) + len(defect)

    def tally(self) -> tuple[_Tally, Curve]:
        """Return the tally and each score's sum of ``1 / area``."""
        normal = np.concatenate(self._normal)
        # Areas break ties, so that no sum depends on the order of the images.
        defect = np.sort(np.concatenate(self._defect))
        self._normal, self._defect = [normal], [defect]
        keys, areas = _unpack(defect)
        starts = _group_starts(keys)
        if not len(starts):
            return _tally(keys, starts, normal), np.zeros(0)
        close, apart = _settle(normal, keys[starts])
        near = _tally(keys, starts, close)
        above, reached = near.above + apart, near.reached + apart
        tally = _Tally(near.positives, above, reached, len(normal))
        return tally, np.add.reduceat(1.0 / areas, starts)[::-1]

    def fold(self) -> _Histogram:
        """Return a histogram of the pixels; this object is empty afterwards."""
        histogram = _Histogram()
        while self._normal:
            normal, defect = self._normal.pop(), self._defect.pop()
            for start in range(0, max(len(normal), len(defect)), _BLOCK_PIXELS):
                part = slice(start, start + _BLOCK_PIXELS)
                histogram.add(normal[part], defect[part])
        return histogram


class _Histogram:
    """Counts pixels by the top bits of their scores; a bin counts as one score."""

    def __init__(self) -> None:
        self._normals = np.zeros(2**_BIN_BITS, dtype=np.int64)
        self._positives = np.zeros(2**_BIN_BITS, dtype=np.int64)
        self._weights = np.zeros(2**_BIN_BITS, dtype=np.float64)

    @property
    def nbytes(self) -> int:
        return self._normals.nbytes + self._positives.nbytes + self._weights.nbytes

    def add(self, normal: _Keys, defect: _PackedKeys) -> None:
        keys, areas = _unpack(defect)
        bins = _bins(keys)
        np.add.at(self._normals, _bins(normal), 1)
        np.add.at(self._positives, bins, 1)
        np.add.at(self._weights, bins, 1.0 / areas)

    def tally(self) -> tuple[_Tally, Curve]:
        """Return the tally and each bin's sum of ``1 / area``."""
        bins = np.flatnonzero(self._positives)[::-1]
        at_or_below = np.cumsum(self._normals)
        normals = int(at_or_below[-1])
        above = normals - at_or_below[bins]
        tally = _Tally(self._positives[bins], above, above + self._normals[bins], normals)
        return tally, self._weights[bins]


def _keys(score_map: npt.NDArray[np.floating[Any]]) -> _Keys:
    """Return integers in the order of the float32 scores, equal where the scores are equal."""
    if score_map.ndim != 2 or score_map.dtype.kind != "f":
        raise InputError(
            f"score map has shape {score_map.shape} and type {score_map.dtype}: "
            "give a float array [height, width]"
        )
    with np.errstate(over="ignore"):
        values = score_map.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        y, x = np.unravel_index(int(finite.argmin()), finite.shape)
        raise InputError(
            f"score map holds {score_map[y, x]} at row {y}, column {x}: "
            "scores must be finite and within float32, mend what makes them"
        )
    values += np.float32(0)  # -0.0 becomes 0.0, which it equals
    bits = values.view(np.uint32)
    negative = (bits >> 31).astype(np.bool_)
    return np.where(negative, ~bits, bits | np.uint32(1 << 31))


def _pack(keys: _Keys, labels: npt.NDArray[np.int32]) -> _PackedKeys:
    """Return each defect pixel's key in the upper half and its region's area in the lower."""
    areas = np.bincount(labels)[labels].astype(np.uint64)
    packed: _PackedKeys = (keys.astype(np.uint64) << np.uint64(32)) | areas
    return packed


def _settle(normal: _Keys, levels: _Keys) -> tuple[_Keys, _Counts]:
    """Return the normals near a level, sorted, and how many others lie above each level.

    Sorting all normals would be most of the work. Where no level shares a normal's bin of their
    range, the bin alone tells how many levels it passes. ``levels`` ascend, the counts go down.
    """
    low, span = levels[0], int(levels[-1] - levels[0]) + 1
    shift = np.uint32(max(span.bit_length() - _BIN_BITS, 0))
    level_bins = (levels - low) >> shift
    last_bin = level_bins[-1] + np.uint32(1)
    in_bin = np.bincount(level_bins, minlength=int(last_bin) + 1)
    near = len(levels) + 1
    passed = np.where(in_bin > 0, near, np.cumsum(in_bin)).astype(np.int32)
    counts = np.zeros(near + 1, dtype=np.int64)
    close = []
    for start in range(0, len(normal), _BLOCK_PIXELS):
        block = normal[start : start + _BLOCK_PIXELS]
        block = block[block >= low]
        passes = passed[np.minimum((block - low) >> shift, last_bin)]
        counts += np.bincount(passes, minlength=near + 1)
        close.append(block[passes == near])
    above = np.cumsum(counts[near - 1 : 0 : -1])
    return np.sort(np.concatenate([*close, normal[:0]])), above


def _unpack(defect: _PackedKeys) -> tuple[_Keys, _Keys]:
    return (defect >> np.uint64(32)).astype(np.uint32), defect.astype(np.uint32)


def _bins(keys: _Keys) -> npt.NDArray[np.intp]:
    bins: npt.NDArray[np.intp] = (keys >> np.uint32(32 - _BIN_BITS)).astype(np.intp)
    return bins


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


def _tally_of(scores: _Scores, labels: _Labels) -> _Tally:
    values, classes = _checked(scores, labels)
    positives = np.sort(values[classes == 1])
    return _tally(positives, _group_starts(positives), np.sort(values[classes == 0]))


def _group_starts(ascending: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return where each run of equal values begins."""
    return np.flatnonzero(np.append(len(ascending) > 0, ascending[1:] != ascending[:-1]))


def _tally(
    positives: npt.NDArray[Any], starts: npt.NDArray[np.intp], normals: npt.NDArray[Any]
) -> _Tally:
    """Count for ascending scores of positives, in groups that begin at ``starts``, and normals."""
    scores = positives[starts]
    return _Tally(
        positives=np.diff(np.append(starts, len(positives)))[::-1],
        above=(len(normals) - np.searchsorted(normals, scores, side="right"))[::-1],
        reached=(len(normals) - np.searchsorted(normals, scores, side="left"))[::-1],
        normals=len(normals),
    )


def _roc(tally: _Tally) -> Curve:
    found = np.cumsum(tally.positives)
    return _against_fpr(tally, found / max(int(tally.positives.sum()), 1))


def _pro(tally: _Tally, weights: Curve) -> Curve:
    # The weights of one region sum to 1, so that the total is the number of regions.
    covered = np.cumsum(weights)
    return _against_fpr(tally, covered / covered[-1:])


def _against_fpr(tally: _Tally, gained: Curve) -> Curve:
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


def _pr(tally: _Tally) -> Curve:
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


def _average_precision(tally: _Tally) -> float | None:
    if not len(tally.positives):
        return None
    found = np.cumsum(tally.positives)
    return float(np.sum(tally.positives * (found / (found + tally.reached))) / found[-1])


def _f1max(tally: _Tally) -> float | None:
    if not len(tally.positives):
        return None
    found = np.cumsum(tally.positives)
    return float(np.max(2 * found / (found[-1] + found + tally.reached)))


def _error_bound(tally: _Tally, roc: Curve, pro: Curve, limit: float) -> ErrorBound:
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
