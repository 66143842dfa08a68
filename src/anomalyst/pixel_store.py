"""What the pixel-level metrics keep of the score maps: every score's bits, or a histogram of them.

Scores become integers in the order of the float32 values; a defect pixel's stand over the area of
its region. Only scores of positives matter as thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anomalyst.errors import InputError

Curve = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint32]
PackedKeys = npt.NDArray[np.uint64]

# Sign, exponent and 13 bits of mantissa: bins 2^-13 wide relative to the score, 96 MiB in all.
_BIN_BITS = 22
_BLOCK_PIXELS = 2**20


@dataclass(frozen=True)
class Tally:
    """What is met going down the distinct scores of positives.

    ``positives`` counts the positives at each score, ``above`` the normals of a higher score and
    ``reached`` the normals of that score or higher; int64 ``[k]``. ``normals`` counts all normals.
    """

    positives: Counts
    above: Counts
    reached: Counts
    normals: int


class Pixels:
    """Keeps the ordered bits of every score; a defect pixel's lie over its region's area."""

    def __init__(self) -> None:
        self._normal: list[Keys] = [np.zeros(0, dtype=np.uint32)]
        self._defect: list[PackedKeys] = [np.zeros(0, dtype=np.uint64)]
        self.count = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._normal) + sum(part.nbytes for part in self._defect)

    def add(self, normal: Keys, defect: PackedKeys) -> None:
        self._normal.append(normal)
        self._defect.append(defect)
        self.count += len(normal) + len(defect)

    def tally(self) -> tuple[Tally, Curve]:
        """Return the tally and each score's sum of ``1 / area``."""
        normal = np.concatenate(self._normal)
        # Areas break ties, so that no sum depends on the order of the images.
        defect = np.sort(np.concatenate(self._defect))
        self._normal, self._defect = [normal], [defect]
        keys, areas = _unpack(defect)
        starts = group_starts(keys)
        if not len(starts):
            return tally_of(keys, starts, normal), np.zeros(0)
        close, apart = _settle(normal, keys[starts])
        near = tally_of(keys, starts, close)
        above, reached = near.above + apart, near.reached + apart
        tally = Tally(near.positives, above, reached, len(normal))
        return tally, np.add.reduceat(1.0 / areas, starts)[::-1]

    @staticmethod
    def joined(stores: Sequence[Pixels]) -> Pixels:
        """Return one of all their pixels, which share the memory."""
        both = Pixels()
        for store in stores:
            both._normal += store._normal
            both._defect += store._defect
            both.count += store.count
        return both

    def fold(self, histogram: Histogram) -> None:
        """Move the pixels into a histogram; this object is empty afterwards."""
        while self._normal:
            normal, defect = self._normal.pop(), self._defect.pop()
            for start in range(0, max(len(normal), len(defect)), _BLOCK_PIXELS):
                part = slice(start, start + _BLOCK_PIXELS)
                histogram.add(normal[part], defect[part])


class Histogram:
    """Counts pixels by the top bits of their scores; a bin counts as one score."""

    def __init__(self) -> None:
        self._normals = np.zeros(2**_BIN_BITS, dtype=np.int64)
        self._positives = np.zeros(2**_BIN_BITS, dtype=np.int64)
        self._weights = np.zeros(2**_BIN_BITS, dtype=np.float64)

    @property
    def nbytes(self) -> int:
        return self._normals.nbytes + self._positives.nbytes + self._weights.nbytes

    def add(self, normal: Keys, defect: PackedKeys) -> None:
        keys, areas = _unpack(defect)
        bins = _bins(keys)
        np.add.at(self._normals, _bins(normal), 1)
        np.add.at(self._positives, bins, 1)
        np.add.at(self._weights, bins, 1.0 / areas)

    def tally(self) -> tuple[Tally, Curve]:
        """Return the tally and each bin's sum of ``1 / area``."""
        bins = np.flatnonzero(self._positives)[::-1]
        at_or_below = np.cumsum(self._normals)
        normals = int(at_or_below[-1])
        above = normals - at_or_below[bins]
        tally = Tally(self._positives[bins], above, above + self._normals[bins], normals)
        return tally, self._weights[bins]


def score_keys(score_map: npt.NDArray[np.floating[Any]]) -> Keys:
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


def pack_defects(keys: Keys, labels: npt.NDArray[np.int32]) -> PackedKeys:
    """Return each defect pixel's key in the upper half and its region's area in the lower."""
    areas = np.bincount(labels)[labels].astype(np.uint64)
    packed: PackedKeys = (keys.astype(np.uint64) << np.uint64(32)) | areas
    return packed


def _settle(normal: Keys, levels: Keys) -> tuple[Keys, Counts]:
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


def _unpack(defect: PackedKeys) -> tuple[Keys, Keys]:
    return (defect >> np.uint64(32)).astype(np.uint32), defect.astype(np.uint32)


def _bins(keys: Keys) -> npt.NDArray[np.intp]:
    bins: npt.NDArray[np.intp] = (keys >> np.uint32(32 - _BIN_BITS)).astype(np.intp)
    return bins


def group_starts(ascending: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return where each run of equal values begins."""
    return np.flatnonzero(np.append(len(ascending) > 0, ascending[1:] != ascending[:-1]))


def tally_of(
    positives: npt.NDArray[Any], starts: npt.NDArray[np.intp], normals: npt.NDArray[Any]
) -> Tally:
    """Count for ascending scores of positives, in groups that begin at ``starts``, and normals."""
    scores = positives[starts]
    return Tally(
        positives=np.diff(np.append(starts, len(positives)))[::-1],
        above=(len(normals) - np.searchsorted(normals, scores, side="right"))[::-1],
        reached=(len(normals) - np.searchsorted(normals, scores, side="left"))[::-1],
        normals=len(normals),
    )
