"""One image in tiles, as the glance that `judging` asks: torch and the runtime share it.

numpy only. A few tiles at a time go through the network and only their small maps stay, so memory
does not grow with the image. What is asked before the category is known, its likeness to each,
needs all tiles: they are scored on the way as what they look like, and once more only if the image
turns out to be another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from anomalyst.inference import Item, network_inputs
from anomalyst.retrieval import nearest, pooled
from anomalyst.scoring import upsampled
from anomalyst.tiling import Tile, blended
from anomalyst.types import FloatArray

if TYPE_CHECKING:
    from anomalyst.judging import Judge

_Scored = tuple[FloatArray, list[float]]


class TiledGlance:
    """A good item in tiles; ``likely`` is its category, where that is known."""

    def __init__(self, judge: Judge, item: Item, likely: str | None) -> None:
        self._judge = judge
        self._item = item
        self._likely = likely
        self._descriptor: FloatArray | None = None
        self._scored: tuple[str | None, _Scored] | None = None

    def descriptors(self) -> FloatArray:
        """Return that of the whole image ``[1, C]``, the mean of its parts'."""
        if self._descriptor is None:
            self._pass(self._likely, guessing=True)
        assert self._descriptor is not None
        return self._descriptor

    def score(self, at: Sequence[int], category: str | None) -> _Scored:
        """Return the blended map ``[1, h, w]`` and the largest score of any part."""
        if self._scored is None or self._scored[0] != category:
            self._pass(category, guessing=False)
        assert self._scored is not None
        return self._scored[1]

    def _pass(self, category: str | None, guessing: bool) -> None:
        """Look at every part; while ``guessing``, the scores may come to nothing."""
        described: list[FloatArray] = []
        maps: list[tuple[Tile | None, FloatArray]] = []
        scores: list[float] = []
        for tiles, items in network_inputs(self._item, self._judge.preprocess):
            seen = self._judge.look(items, category)
            described.append(seen.descriptors())
            if guessing:
                category = category or self._guess(described)
                if not self._scores_as(category):
                    continue
            found = seen.score(range(len(items)), category)
            maps += zip(tiles, found[0], strict=True)
            scores += found[1]
        self._descriptor = pooled(described)
        if scores:
            self._scored = category, (self._joined(maps)[None], [max(scores)])

    def _guess(self, described: Sequence[FloatArray]) -> str | None:
        """Return the category that the parts so far look like, or the only one there is."""
        (similar,) = self._judge.compare(pooled(described))
        only = self._judge.categories
        return nearest(similar) or (only[0] if len(only) == 1 else None)

    def _scores_as(self, category: str | None) -> bool:
        """Tell whether images can be scored as that category."""
        if category is None:
            return not (self._judge.needs_category or self._judge.needs_name)
        return self._judge.knows(category)

    def _joined(self, maps: Sequence[tuple[Tile | None, FloatArray]]) -> FloatArray:
        """Return the maps of all parts as one."""
        assert self._item.tensor is not None
        step = self._judge.preprocess.multiple
        grid = self._item.tensor.shape[1] // step, self._item.tensor.shape[2] // step
        lowest = min(float(values.min()) for _, values in maps)
        found = blended(grid, [(t, values) for t, values in maps if t is not None], lowest)
        for tile, values in maps:
            if tile is None:
                found = np.maximum(found, upsampled(values, *found.shape))
        return found
