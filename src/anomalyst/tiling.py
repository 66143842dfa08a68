"""High resolution for every method: overlapping tiles of an image, and their maps as one.

numpy only. No method knows of it: what it gets are images, whether they are whole or tiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from anomalyst.errors import InputError
from anomalyst.types import FloatArray

OVERLAP = 0.25


class Tile(NamedTuple):
    """Where a tile lies on the network's view of a whole image, in patches."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """How an image is looked at in tiles.

    Attributes
    ----------
    side
        Side of a tile in pixels of the network's input; an image that is shorter gets one tile.
    overlap
        Least share of a tile that its neighbour sees too.
    overview
        Look at the whole image as well, with a short side of ``side``: what only shows from afar,
        such as a missing part, shows there.

    Raises
    ------
    InputError
        Values that mean nothing.
    """

    side: int
    overlap: float = OVERLAP
    overview: bool = False

    def __post_init__(self) -> None:
        if self.side < 1:
            raise InputError(f"tile {self.side}: give a side in pixels, such as 448")
        if not 0 <= self.overlap < 1:
            raise InputError(
                f"overlap {self.overlap}: give a share of a tile from 0 on and under 1, such as "
                f"{OVERLAP}"
            )

    def tiles(self, rows: int, columns: int, patch: int) -> list[Tile]:
        """Return the tiles of a grid of patches, each ``patch`` pixels wide, row by row."""
        side = self.side // patch
        height, width = min(side, rows), min(side, columns)
        return [
            Tile(top, left, height, width)
            for top in self._starts(rows, height)
            for left in self._starts(columns, width)
        ]

    def _starts(self, length: int, side: int) -> list[int]:
        """Return where the tiles along an axis begin: as few as it takes, evenly spread."""
        step = max(side - ceil(side * self.overlap), 1)
        gaps = ceil((length - side) / step)
        return [round(k * (length - side) / gaps) for k in range(gaps)] + [length - side]


def blended(
    grid: tuple[int, int], tiles: Iterable[tuple[Tile, npt.NDArray[np.floating]]], lowest: float
) -> FloatArray:
    """Return the maps of tiles as one, each counting less and less towards its tile's border.

    Parameters
    ----------
    grid
        (h, w) of the whole image, in patches.
    tiles
        Each tile with its map ``[h', w']``, all of them with as many values a patch.
    lowest
        What stands where no tile lies.
    """
    total = weight = np.zeros(0)
    for tile, values in tiles:
        scale, rest = divmod(values.shape[0], tile.height)
        if rest or values.shape != (tile.height * scale, tile.width * scale):
            raise ValueError(f"a map {values.shape} does not lie on the patches of {tile}")
        if not total.size:
            total, weight = np.zeros((2, grid[0] * scale, grid[1] * scale))
        window = _ramp(values.shape[0])[:, None] * _ramp(values.shape[1])
        rows = slice(tile.top * scale, (tile.top + tile.height) * scale)
        columns = slice(tile.left * scale, (tile.left + tile.width) * scale)
        total[rows, columns] += window * values
        weight[rows, columns] += window
    found = np.full(total.shape, lowest)
    np.divide(total, weight, out=found, where=weight > 0)
    return found.astype(np.float32)


def _ramp(length: int) -> npt.NDArray[np.float64]:
    """Return weights that fall from the middle to both ends in a line, never to 0."""
    place = np.arange(length) + 0.5
    weights: npt.NDArray[np.float64] = np.minimum(place, length - place)
    return weights
