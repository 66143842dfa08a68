"""Connected regions of a mask in numpy alone: the torch-free runtime has no scipy.

Works on horizontal runs of pixels, of which an image has far fewer than pixels, and joins them by
union-find over whole arrays: no Python loop over pixels or runs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from anomalyst.errors import InputError
from anomalyst.types import BoolArray

LabelArray = npt.NDArray[np.int32]
_IndexArray = npt.NDArray[np.intp]


class Runs(NamedTuple):
    """Horizontal runs of a mask's pixels, row by row, and the region that each belongs to."""

    row: _IndexArray
    left: _IndexArray
    right: _IndexArray
    """Exclusive."""
    region: _IndexArray
    """0 to ``total`` - 1, in the order in which a row-by-row reading meets them."""
    total: int
    """How many regions there are."""


def find_runs(mask: BoolArray) -> Runs:
    """Return the runs of a mask ``[H, W]``; regions touch by an edge or a corner.

    Raises
    ------
    InputError
        It is no mask.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise InputError(
            f"mask has shape {mask.shape} and type {mask.dtype}: give a bool array [height, width]"
        )
    # One False column at the left keeps runs of neighbouring rows apart once flattened.
    stride = mask.shape[1] + 1
    padded = np.zeros(mask.shape[0] * stride + 1, dtype=np.bool_)
    padded[:-1].reshape(mask.shape[0], stride)[:, 1:] = mask
    edges = np.flatnonzero(padded[1:] != padded[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]

    roots = _roots(len(starts), *_touching(starts, ends, stride))
    is_root = roots == np.arange(len(roots))
    row = starts // stride
    before = row * stride + 1
    return Runs(
        row=row,
        left=starts - before,
        right=ends - before,
        region=np.cumsum(is_root)[roots] - 1,
        total=int(np.count_nonzero(is_root)),
    )


def label_regions(mask: BoolArray) -> tuple[LabelArray, int]:
    """Return the regions of a mask that touch by an edge or a corner, and how many they are.

    Parameters
    ----------
    mask
        ``[H, W]``.

    Returns
    -------
    labels, count
        int32 ``[H, W]``: 0 outside the mask, 1 to ``count`` inside, numbered in the order in which
        a row-by-row reading meets them (as ``scipy.ndimage.label`` with a 3x3 structure does).
    """
    runs = find_runs(mask)
    labels = np.zeros(mask.shape, dtype=np.int32)
    labels[mask] = np.repeat(runs.region + 1, runs.right - runs.left)
    return labels, runs.total


def _touching(
    starts: _IndexArray, ends: _IndexArray, stride: int
) -> tuple[_IndexArray, _IndexArray]:
    """Return every pair (run, run of the row below) that touches, ``ends`` being exclusive."""
    # Shifted down by one row, the runs above touch [start, end) when they overlap or abut it.
    first = np.searchsorted(ends + stride, starts, side="left")
    last = np.searchsorted(starts + stride, ends, side="right")
    counts = last - first
    lower = np.repeat(np.arange(len(starts)), counts)
    offsets = np.arange(len(lower)) - np.repeat(np.cumsum(counts) - counts, counts)
    return first[lower] + offsets, lower


def _roots(count: int, left: _IndexArray, right: _IndexArray) -> _IndexArray:
    """Return for each of ``count`` runs the first run that it is joined with by the pairs."""
    parents = np.arange(count)
    while len(left):
        # Each root hooks to its smallest neighbour; indices only fall, so that no cycle can form,
        # and two rounds at least halve the roots that still have a neighbour.
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))
        while True:
            grandparents = parents[parents]
            if np.array_equal(grandparents, parents):
                break
            parents = grandparents
        left, right = parents[left], parents[right]
        apart = left != right
        left, right = left[apart], right[apart]
    return parents
