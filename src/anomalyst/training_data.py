"""What gradient steps are fed with: feature maps of training images, cached where they can be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from anomalyst.bundle import ReferenceRecord
from anomalyst.data.images import read_file, read_image
from anomalyst.data.transforms import Preprocess
from anomalyst.engine import Engine
from anomalyst.enrolment import record_of
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureArray
from anomalyst.inference import Item, by_shape, read_batches, read_item
from anomalyst.methods.views import View
from anomalyst.types import ByteArray, Progress, Sample

_READ = 8


class TrainingFeatures:
    """Feature maps of every view of every training image, by number.

    With a cache on the engine, one pass computes them all and later reads come from its mapped
    files; without one, each read decodes the image and runs the backbone again.

    Parameters
    ----------
    samples
        Training images; image ``n`` in view ``v`` has number ``n * len(views) + v``.

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
        self.samples = list(samples)
        self.views = tuple(views)
        self._records: list[ReferenceRecord] = []
        self._sizes: dict[int, tuple[int, int]] = {}
        self._keys: list[str] = []
        if engine.cache is not None:
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
            for sample in self.samples
        ]

    def size(self, number: int) -> tuple[int, int]:
        """Return the original (height, width) of an image, in pixels."""
        image = number // len(self.views)
        if image not in self._sizes:
            pixels = read_image(self.samples[image].path)
            self._sizes[image] = (pixels.shape[0], pixels.shape[1])
        return self._sizes[image]

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
            keys = [self.engine.cache_keys(items, view) for view in self.views]
            self._keys += [key for of_item in zip(*keys, strict=True) for key in of_item]
            self._records += [record_of(item) for item in items]
            self._sizes |= {done + k: item.size for k, item in enumerate(items)}
            for same in by_shape(items):
                for view in self.views:
                    self.engine.features([items[p] for p in same], view)
            done += len(items)
            if progress:
                progress("features", done, len(self.samples))

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
