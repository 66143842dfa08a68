"""What gradient steps are fed with: feature maps of training images, cached where they can be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anomalyst.bundle import ReferenceRecord
from anomalyst.data.images import read_file, read_mask
from anomalyst.data.masks import Box, Ignored, shows
from anomalyst.data.transforms import Preprocess
from anomalyst.engine import Engine
from anomalyst.enrolment import record_of
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureArray
from anomalyst.inference import Item, Part, by_shape, network_inputs, read_batches, read_item
from anomalyst.methods.views import View
from anomalyst.tiling import Tile
from anomalyst.types import BoolArray, ByteArray, Progress, Sample

_READ = 8


class Place(NamedTuple):
    """Where the network's input of an image lies on it.

    Attributes
    ----------
    size
        Original (height, width) of the image, in pixels.
    box
        (top, left, height, width) of what the input covers, in the image's pixels.
    input
        (height, width) of the input.
    ignored
        What of the image counts for nothing.
    """

    size: tuple[int, int]
    box: Box
    input: tuple[int, int]
    ignored: Ignored | None

    @classmethod
    def of(cls, item: Item) -> Place:
        """Return that of a good item."""
        assert item.tensor is not None
        return cls(item.size, item.box, (item.tensor.shape[1], item.tensor.shape[2]), item.ignored)

    def counted(self, mask: BoolArray) -> BoolArray:
        """Return the part of an image's mask that is not ignored."""
        return mask if self.ignored is None else self.ignored.left_of(mask)


class TrainingFeatures:
    """Feature maps of every view of every training image, by number.

    With a cache on the engine, one pass computes them all and later reads come from its mapped
    files; without one, each read decodes the image and runs the backbone again.

    Parameters
    ----------
    samples
        Training images; image ``n`` in view ``v`` has number ``n * len(views) + v``. Where images
        are looked at in tiles, ``samples`` are those, of abnormal images the ones that show the
        defect.

    Raises
    ------
    InputError
        An image cannot be read: with a cache at once, else when its turn comes.
    """

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[Sample],
        views: Sequence[View],
        progress: Progress | None = None,
    ) -> None:
        self.engine = engine
        self.samples: list[Sample] = list(samples)
        self._images = list(samples)
        self.views = tuple(views)
        self._records: list[ReferenceRecord] = []
        self._places: dict[int, Place] = {}
        self._keys: list[str] = []
        if engine.preprocess.tiling is not None:
            self._fill_tiles(progress)
        elif engine.cache is not None:
            self._fill(progress)

    def __len__(self) -> int:
        return len(self.samples) * len(self.views)

    @property
    def records(self) -> list[ReferenceRecord]:
        """Name and SHA-256 of every image."""
        return self._records or [
            ReferenceRecord(
                name=sample.path.name, sha256=hashlib.sha256(read_file(sample.path)).hexdigest()
            )
            for sample in self._images
        ]

    def place(self, number: int) -> Place:
        """Return where the network's input of an image lies on it."""
        image = number // len(self.views)
        if image not in self._places:
            sample = self.samples[image]
            item = read_item(sample, str(sample.path), self.engine.preprocess)
            _require_good([item])
            self._places[image] = Place.of(item)
        return self._places[image]

    def fetch(self, numbers: Sequence[int], step: int = 0) -> list[list[Tensor]]:
        """Return the maps of those numbers, in one batch for each shape of map, at any step.

        Within a batch the order of ``numbers`` is kept. The maps are plain tensors, ready for
        autograd.
        """
        if self.engine.cache is None:
            return self._compute(numbers)
        groups: dict[tuple[int, ...], list[list[FeatureArray]]] = {}
        for number in numbers:
            entry = self.engine.cache.get(self._keys[number])
            if entry is None:  # evicted by a bound that is smaller than the training set
                return self._compute(numbers)
            groups.setdefault(entry[0].shape, []).append(entry)
        return [self.engine.stack(same) for same in groups.values()]

    def _fill(self, progress: Progress | None) -> None:
        done = 0
        for items in read_batches(self.samples, self.engine.preprocess, _READ):
            _require_good(items)
            self._records += [record_of(item) for item in items]
            self._places |= {done + k: Place.of(item) for k, item in enumerate(items)}
            self._cache(items)
            done += len(items)
            if progress:
                progress("features", done, len(self.samples))

    def _cache(self, items: Sequence[Item]) -> None:
        """Compute every view of items and remember under which names the cache keeps them."""
        keys = [self.engine.cache_keys(items, view) for view in self.views]
        self._keys += [key for of_item in zip(*keys, strict=True) for key in of_item]
        for same in by_shape(items):
            for view in self.views:
                self.engine.features([items[p] for p in same], view)

    def _fill_tiles(self, progress: Progress | None) -> None:
        """Find the tiles of every image; with a cache compute them too, while it is decoded."""
        engine, self.samples = self.engine, []
        for done, (item,) in enumerate(read_batches(self._images, engine.preprocess, 1)):
            _require_good([item])
            self._records.append(record_of(item))
            for tiles, parts in network_inputs(item, engine.preprocess):
                self._add_tiles(self._images[done], tiles, parts)
            if progress:
                progress("features", done + 1, len(self._images))

    def _add_tiles(
        self, sample: Sample, tiles: Sequence[Tile | None], parts: Sequence[Item]
    ) -> None:
        """Take in tiles of one image, of an abnormal one those that show the defect."""
        places = [Place.of(part) for part in parts]
        marked = None
        if sample.label == 1 and sample.mask is not None:
            marked = places[0].counted(read_mask(sample.mask, places[0].size, sample.path))
        step, kept = self.engine.preprocess.multiple, list[Item]()
        for tile, part, place in zip(tiles, parts, places, strict=True):
            grid = place.input[0] // step, place.input[1] // step
            if marked is None or shows(marked, place.box, grid):
                self._places[len(self.samples)] = place
                self.samples.append(Part(**vars(sample), tile=tile))
                kept.append(part)
        if self.engine.cache is not None and kept:
            self._cache(kept)

    def _compute(self, numbers: Sequence[int]) -> list[list[Tensor]]:
        """Read those images again and run the backbone; equal shapes and views go together."""
        count = len(self.views)
        samples = [self.samples[number // count] for number in numbers]
        items = [
            item for batch in read_batches(samples, self.engine.preprocess, _READ) for item in batch
        ]
        _require_good(items)
        maps: dict[int, list[Tensor]] = {}
        for same in by_shape(items):
            for v, view in enumerate(self.views):
                at = [p for p in same if numbers[p] % count == v]
                if at:
                    found = self.engine.features([items[p] for p in at], view)
                    maps |= {p: [m[row] for m in found] for row, p in enumerate(at)}
        return [
            [_stack(layer) for layer in zip(*(maps[p] for p in same), strict=True)]
            for same in by_shape(items)
        ]


def read_pixels(sample: Sample, preprocess: Preprocess) -> tuple[Item, ByteArray]:
    """Return a training image and its pixels at the size of the network's input.

    Raises
    ------
    InputError
        It cannot be read.
    """
    item = read_item(sample, str(sample.path), preprocess)
    _require_good([item])
    assert item.tensor is not None
    return item, preprocess.pixels(item.tensor)


def _require_good(items: Sequence[Item]) -> None:
    for item in items:
        if item.error:
            raise InputError(f"training image: {item.error}")


def _stack(maps: Sequence[Tensor]) -> Tensor:
    """Stack maps of the frozen backbone as a plain tensor: autograd takes no inference tensor."""
    return torch.stack([single.clone() for single in maps])
