"""Episodes: small tasks drawn from a source domain, as a generalist meets them later."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomalyst.data.images import read_mask
from anomalyst.data.masks import network_mask, patch_coverage
from anomalyst.errors import InputError
from anomalyst.methods.memory_bank import resize_like
from anomalyst.types import BoolArray

if TYPE_CHECKING:
    from anomalyst.training_data import TrainingFeatures


class Episode(NamedTuple):
    """References of one product and images of it to judge.

    Attributes
    ----------
    normals
        Feature maps ``[C, h, w]`` of the normal references.
    abnormals
        Maps ``[C, h, w]`` of abnormal references, each with its defect's coverage of the patches
        ``[h, w]`` and its mask as below.
    queries
        Maps of the images to judge, none among the references.
    masks
        Of each query at the size of the network's input, float ``[H, W]`` of 0 and 1.
    """

    normals: list[Tensor]
    abnormals: list[tuple[Tensor, Tensor, Tensor]]
    queries: list[Tensor]
    masks: list[Tensor]


@dataclass(frozen=True)
class Draw:
    """How an episode is drawn.

    Attributes
    ----------
    normals, abnormals
        References: so many, or with ``varied`` any number from 1 to that.
    varied
        Draw the numbers of references, and let half of the abnormal queries have any type of
        defect, as in use. Else each has the type of the references, as the authors draw.
    pair
        Judge a normal and an abnormal query in each episode; else one of the two by a fair coin.
    """

    normals: int
    abnormals: int
    varied: bool
    pair: bool


class Episodes:
    """``count`` episodes over the training images of a source domain, each fixed by its number.

    Class, then type of defect, then images are drawn evenly, as the authors draw them; queries are
    never among the references.

    Raises
    ------
    InputError
        No category has a type of defect with enough masked images and enough normal ones.
    """

    def __init__(self, features: TrainingFeatures, count: int, draw: Draw, seed: int) -> None:
        self._features = features
        self._count = count
        self._draw = draw
        self._seed = seed
        self._normal: dict[str, list[int]] = {}
        self._abnormal: dict[str, dict[str, list[int]]] = {}
        for number, sample in enumerate(features.samples):
            category, defect = sample.category or "", sample.defect or ""
            if sample.label == 0:
                self._normal.setdefault(category, []).append(number)
            elif sample.mask is not None:
                types = self._abnormal.setdefault(category, {})
                types.setdefault(defect, []).append(number)
        self._types = self._usable()
        self._coverage: dict[int, Tensor] = {}
        self._masks: dict[int, Tensor] = {}

    def _usable(self) -> list[tuple[str, list[str]]]:
        """Return the categories, each with the defects, that references can be drawn from."""
        found = []
        for category, types in sorted(self._abnormal.items()):
            if len(self._normal.get(category, [])) <= self._draw.normals:
                continue
            names = [name for name in sorted(types) if len(types[name]) > self._draw.abnormals]
            if names:
                found.append((category, names))
        if not found:
            raise InputError(
                f"episodes need a category with more than {self._draw.normals} normal images and "
                f"more than {self._draw.abnormals} images of one defect with masks; the source has "
                "none: give such a data set, or fewer references (options normals, abnormals)"
            )
        return found

    def __len__(self) -> int:
        return self._count

    def fetch(self, numbers: Sequence[int]) -> list[list[list[Episode]]]:
        """Return the episodes of those numbers, as one part of a step."""
        return [[[self._make(number) for number in numbers]]]

    def _make(self, number: int) -> Episode:
        rng = random.Random(f"{self._seed}/{number}")
        draw = self._draw
        category, names = rng.choice(self._types)
        types = self._abnormal[category]
        defect = rng.choice(names)
        k1 = rng.randint(1, draw.normals) if draw.varied else draw.normals
        k2 = rng.randint(1, draw.abnormals) if draw.varied else draw.abnormals
        *abnormals, bad = rng.sample(types[defect], k2 + 1)
        if draw.varied and rng.random() < 0.5:
            other = rng.choice(sorted(types))
            bad = rng.choice([n for n in types[other] if n not in abnormals] or [bad])
        *normals, good = rng.sample(self._normal[category], k1 + 1)
        queries = [good, bad] if draw.pair else [rng.choice([good, bad])]
        return Episode(
            normals=[self._map(n) for n in normals],
            abnormals=[self._reference(n) for n in abnormals],
            queries=[self._map(n) for n in queries],
            masks=[self._mask(n) for n in queries],
        )

    def _map(self, number: int) -> Tensor:
        return resize_like(self._features.fetch([number])[0])[0]

    def _reference(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        maps = self._map(number)
        grid = (maps.shape[-2], maps.shape[-1])
        if number not in self._coverage:
            size = self._features.size(number)
            box = self._features.engine.preprocess.box(*size)
            share = patch_coverage(self._marked(number), box, grid)
            self._coverage[number] = torch.from_numpy(share)
        return maps, self._coverage[number].to(maps.device), self._mask(number)

    def _mask(self, number: int) -> Tensor:
        """Return the mask of an image at the size of the network's input, 0 if it is normal."""
        engine = self._features.engine
        if number not in self._masks:
            size = self._features.size(number)
            target = engine.preprocess.output_size(*size)
            marked = np.zeros(target, dtype=bool)
            if self._features.samples[number].label == 1:
                box = engine.preprocess.box(*size)
                marked = network_mask(self._marked(number), box, target)
            self._masks[number] = torch.from_numpy(marked)
        return self._masks[number].to(engine.device).float()

    def _marked(self, number: int) -> BoolArray:
        sample = self._features.samples[number]
        if sample.mask is None:
            raise ValueError(f"{sample.path} has no mask")
        marked = read_mask(sample.mask, self._features.size(number), sample.path)
        if not marked.any():
            raise InputError(
                f"{sample.mask}: marks no pixel; mark the defect, or take the image out"
            )
        return marked
