"""Masks of defects on the patch grid of a network, and at the size of its input."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from anomalyst.errors import InputError
from anomalyst.types import BoolArray, FloatArray

Box = tuple[float, float, float, float]
_Table = npt.NDArray[np.float64]


def patch_coverage(mask: BoolArray, box: Box, grid: tuple[int, int]) -> FloatArray:
    """Return the share of each patch that a mask covers, float32 ``[h, w]`` in [0, 1].

    Areas are exact (patch edges may fall between pixels), so that no defect is too small to count.

    Parameters
    ----------
    mask
        ``[H, W]``, at the size of the original image.
    box
        (top, left, height, width) of what the grid covers, in pixels of the original image.
    grid
        (h, w) in patches.
    """
    top, left, height, width = box
    above, before = max(int(top), 0), max(int(left), 0)  # of the mask, only what the box takes
    mask = mask[above : ceil(top + height), before : ceil(left + width)]
    top, left = top - above, left - before
    area = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    area[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    rows = np.linspace(top, top + height, grid[0] + 1)
    columns = np.linspace(left, left + width, grid[1] + 1)
    below = _between(_between(area, rows).T, columns).T  # area above and left of each corner
    covered = np.diff(np.diff(below, axis=0), axis=1)
    share = covered * (grid[0] * grid[1] / (height * width))
    share[share < 1e-9] = 0  # traces of rounding
    clipped: FloatArray = share.clip(0, 1).astype(np.float32)
    return clipped


def network_mask(mask: BoolArray, box: Box, size: tuple[int, int]) -> BoolArray:
    """Return `mask_at`, or where that skips a small defect, the pixels that it covers most."""
    seen = mask_at(mask, box, size)
    if seen.any():
        return seen
    share = patch_coverage(mask, box, size)
    fullest: BoolArray = (share > 0) & (share >= share.max())
    return fullest


def defect_on_grids(
    mask: BoolArray, box: Box, grid: tuple[int, int], size: tuple[int, int], name: object
) -> tuple[FloatArray, BoolArray]:
    """Return `patch_coverage` on a grid and `network_mask` at a size of one image's defect.

    Raises
    ------
    InputError
        The defect of the image ``name`` lies outside the box.
    """
    coverage = patch_coverage(mask, box, grid)
    if not coverage.any():
        raise outside(name)
    return coverage, network_mask(mask, box, size)


def shows(mask: BoolArray, box: Box, grid: tuple[int, int]) -> bool:
    """Tell whether a mask covers anything of any patch of a grid."""
    return bool(patch_coverage(mask, box, grid).any())


def outside(name: object) -> InputError:
    """Return the error of a defect that is not looked at."""
    return InputError(
        f"{name}: its defect lies outside the part of the image that is looked at "
        "(the preset crops the border, or the region leaves it out); leave the image out, or "
        "look at more"
    )


def _between(table: _Table, places: _Table) -> _Table:
    """Return the rows of a table at fractional places."""
    places = places.clip(0, len(table) - 1)
    low = np.minimum(places.astype(int), len(table) - 2)
    part = (places - low)[:, None]
    found: _Table = table[low] * (1 - part) + table[low + 1] * part
    return found


def mask_at(mask: BoolArray, box: Box, size: tuple[int, int]) -> BoolArray:
    """Return the part of a mask in a box at another size, by nearest neighbour at pixel centres."""
    top, left, height, width = box
    rows = (top + (np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
    columns = (left + (np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
    found: BoolArray = mask[np.ix_(rows, columns)]
    return found


@dataclass(frozen=True, eq=False)
class Ignored:
    """What does not count of one image.

    Attributes
    ----------
    mask
        ``[h, w]`` over the whole image, at any resolution; beyond its border it goes on unchanged.
    size
        (height, width) of the image, in pixels.
    shift
        How far down and right the mask is moved, in pixels of the image.
    """

    mask: BoolArray
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    def at(self, box: Box, size: tuple[int, int]) -> BoolArray:
        """Return the part of the mask in a box of the image at another size, as `mask_at` does."""
        rows, columns = (
            _nearest(box[k], box[2 + k], size[k], self.shift[k], self.mask.shape[k] / self.size[k])
            .clip(0, self.mask.shape[k] - 1)
            .astype(int)
            for k in (0, 1)
        )
        found: BoolArray = self.mask[np.ix_(rows, columns)]
        return found

    def left_of(self, mask: BoolArray) -> BoolArray:
        """Return the part of an image's own mask ``[H, W]`` that is not ignored."""
        height, width = self.size
        return mask & ~self.at((0.0, 0.0, float(height), float(width)), self.size)


def _nearest(start: float, extent: float, count: int, shift: int, scale: float) -> _Table:
    """Return at which place of a mask each of ``count`` pixel centres lies along one axis."""
    centres = start + (np.arange(count) + 0.5) * extent / count
    places: _Table = np.floor((centres - shift) * scale)
    return places
