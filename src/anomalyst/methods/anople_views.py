"""What AnoPLe's steps see: an image as a whole and in quarters, with and without pseudo-anomalies.

At the size of the network's input the whole image; at twice that size its four quadrants, one
network's input each. A pseudo-anomaly is either made in the pixels, before the views are cut, or
left to the network, which then puts noise into the tokens that a mask marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from anomalyst.training_data import read_pixels
from anomalyst.types import BoolArray, ByteArray

if TYPE_CHECKING:
    from anomalyst.methods.synthesis import Synthesizer
    from anomalyst.training_data import TrainingFeatures

_Pixel = TypeVar("_Pixel", np.uint8, np.bool_)

VIEWS = 5
_REMEMBERED = 256  # decoded images: at 480 x 480 about 180 MB
_NOISE_SHARE = (0.01, 0.3)  # of the patches that latent noise covers
_NOISE_BOXES = 3


class Views:
    """Training images by number, each in ``count`` views and once more with a pseudo-anomaly.

    Parameters
    ----------
    count
        5: the whole and its quadrants; 1: the whole alone.
    pixels
        Share of images whose pseudo-anomaly is made in the pixels; the others' is latent noise.
    """

    def __init__(
        self,
        features: TrainingFeatures,
        synthesizer: Synthesizer,
        count: int,
        pixels: float,
        seed: int,
    ) -> None:
        self._samples = features.samples
        self._synthesizer = synthesizer
        self._count = count
        self._pixels = pixels
        self._seed = seed
        self._plain = features.engine.preprocess
        self._patch = self._plain.multiple
        self._device = features.engine.device
        self._large = self._plain.doubled
        self._decoded: dict[int, tuple[ByteArray, BoolArray | None]] = {}
        self.categories = list(dict.fromkeys(sample.category or "" for sample in self._samples))

    def __len__(self) -> int:
        return len(self._samples)

    def fetch(self, numbers: Sequence[int], step: int) -> list[list[Tensor]]:
        """Return for each shape of image the parts of one step.

        Normal views and those with a pseudo-anomaly ``[B, V, 3, h, w]``, masks of the latter
        ``[B, V, h, w]`` with 1 at the pseudo-anomaly, patches to put noise into ``[B, V, h', w']``,
        and the position ``[B]`` in ``categories``.
        """
        made = [self._make(number, step) for number in numbers]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, parts in enumerate(made):
            shapes.setdefault(parts[0].shape, []).append(place)
        return [
            [
                torch.stack(part).to(self._device)
                for part in zip(*(made[p] for p in same), strict=True)
            ]
            for same in shapes.values()
        ]

    def _make(self, number: int, step: int) -> list[Tensor]:
        rng = np.random.default_rng([self._seed, step, number])
        sample = self._samples[number]
        clean, hidden = self._read(number)
        in_pixels = rng.random() < self._pixels
        pseudo, mask = (
            self._synthesizer(clean, rng, sample.category)
            if in_pixels
            else (clean, np.zeros(clean.shape[:2], dtype=bool))
        )
        if hidden is not None:
            mask = mask & ~hidden
        masks = quarters(mask, shrunk_mask(mask))[: self._count]
        grid = masks[0].shape[0] // self._patch, masks[0].shape[1] // self._patch
        noise = np.zeros((self._count, *grid), dtype=bool)
        if not in_pixels:
            noise = np.stack([noise_boxes(grid, rng) for _ in range(self._count)])
            masks = list(noise.repeat(self._patch, 1).repeat(self._patch, 2))
        return [
            self._tensors(clean, hidden),
            self._tensors(pseudo, hidden),
            torch.from_numpy(np.stack(masks)).float(),
            torch.from_numpy(noise).float(),
            torch.tensor(self.categories.index(sample.category or "")),
        ]

    def _read(self, number: int) -> tuple[ByteArray, BoolArray | None]:
        """Return an image at twice the size of the network's input, and what of it is ignored."""
        if number not in self._decoded:
            item, pixels = read_pixels(self._samples[number], self._large)
            if len(self._decoded) >= _REMEMBERED:
                self._decoded.pop(next(iter(self._decoded)))
            self._decoded[number] = pixels, item.hidden(*pixels.shape[:2])
        return self._decoded[number]

    def _tensors(self, image: ByteArray, hidden: BoolArray | None) -> Tensor:
        """Return an image's views ``[V, 3, h, w]``, 0 where it is ignored."""
        height, width = image.shape[:2]
        whole = Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
        views = quarters(image, np.asarray(whole))[: self._count]
        tensors = torch.from_numpy(np.stack([self._plain.normalized(view) for view in views]))
        if hidden is not None:
            blank = quarters(hidden, hidden[1::2, 1::2])[: self._count]
            tensors *= torch.from_numpy(~np.stack(blank))[:, None]
        return tensors


def quarters(large: npt.NDArray[_Pixel], whole: npt.NDArray[_Pixel]) -> list[npt.NDArray[_Pixel]]:
    """Return the whole ``[h, w, ...]`` and the quadrants of ``large`` ``[2 h, 2 w, ...]``."""
    height, width = whole.shape[:2]
    return [
        whole,
        large[:height, :width],
        large[:height, width:],
        large[height:, :width],
        large[height:, width:],
    ]


def shrunk_mask(mask: BoolArray) -> BoolArray:
    """Return a mask ``[2 h, 2 w]`` at half its size, marked where any of the four pixels is."""
    height, width = mask.shape
    # (2 h, 2 w) -> (h, 2, w, 2) -> (h, w)
    return np.asarray(mask.reshape(height // 2, 2, width // 2, 2).any(axis=(1, 3)), dtype=bool)


def noise_boxes(grid: tuple[int, int], rng: np.random.Generator) -> BoolArray:
    """Return patches ``[h', w']`` in one to three boxes, 1 to 30 % of them in all, one at least."""
    mask = np.zeros(grid, dtype=bool)
    boxes = int(rng.integers(1, _NOISE_BOXES, endpoint=True))
    for _ in range(boxes):
        area = rng.uniform(*_NOISE_SHARE) * mask.size / boxes
        stretch = np.exp(rng.uniform(-0.7, 0.7))
        sides = [
            int(np.clip(round(np.sqrt(area) * factor), 1, side))
            for factor, side in zip((stretch, 1 / stretch), grid, strict=True)
        ]
        top, left = (
            int(rng.integers(0, s - k, endpoint=True)) for s, k in zip(grid, sides, strict=True)
        )
        mask[top : top + sides[0], left : left + sides[1]] = True
    return mask
