"""Episodes: small tasks drawn from a source domain, as a generalist meets them later."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anomalyst.data.images import read_mask
from anomalyst.data.masks import defect_on_grids
from anomalyst.errors import InputError
from anomalyst.methods.memory_bank import resize_like

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
        self._defects: dict[int, tuple[Tensor, Tensor]] = {}

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

    def fetch(self, numbers: Sequence[int], step: int = 0) -> list[list[list[Episode]]]:
        """Return the episodes of those numbers, as one part of a step, the same at any step."""
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
            abnormals=[(self._map(n), *self._defect(n)) for n in abnormals],
            queries=[self._map(n) for n in queries],
            masks=[self._mask(n) for n in queries],
        )

    def _map(self, number: int) -> Tensor:
        return resize_like(self._features.fetch([number])[0])[0]

    def _mask(self, number: int) -> Tensor:
        """Return the mask of an image at the size of the network's input, 0 if it is normal."""
        if self._features.samples[number].label == 1:
            return self._defect(number)[1]
        device = self._features.engine.device
        return torch.zeros(self._features.place(number).input, device=device)

    def _defect(self, number: int) -> tuple[Tensor, Tensor]:
        """Return an abnormal image's coverage of the patches and its mask, read from disk once."""
        if number not in self._defects:
            self._defects[number] = self._read(number)
        coverage, mask = self._defects[number]
        device = self._features.engine.device
        return coverage.to(device), mask.to(device).float()

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        sample, place = self._features.samples[number], self._features.place(number)
        if sample.mask is None:
            raise ValueError(f"{sample.path} has no mask")
        marked = place.counted(read_mask(sample.mask, place.size, sample.path))
        if not marked.any():
            raise InputError(
                f"{sample.mask}: marks no pixel that counts; mark the defect, or take the image out"
            )
        height, width = self._map(number).shape[-2:]
        grids = place.box, (height, width), place.input
        coverage, mask = defect_on_grids(marked, *grids, sample.path)
        return torch.from_numpy(coverage), torch.from_numpy(mask)
