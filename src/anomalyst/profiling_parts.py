"""Made-up products to profile on: smooth textures, a defect with its mask, names CLIP can read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from anomalyst.types import BoolArray, ByteArray, Sample

_WORDS = ("bottle", "screw", "cable", "capsule", "carpet", "zipper", "leather", "toothbrush")
_COARSE = 5  # colours along a side, between which the texture runs smoothly
_BAD = 10_000  # numbers of defective images start here: none is a good one's


@dataclass(frozen=True)
class Parts:
    """Square images of several products, each fixed by the seed, the product and its number.

    Products differ in colours and where they lie, images of one in noise and a little in colour.
    """

    side: int
    seed: int = 0

    @staticmethod
    def names(count: int) -> list[str]:
        """Return so many names, the first ones plain words."""
        known = len(_WORDS)
        again = [f" {k // known + 1}" if k >= known else "" for k in range(count)]
        return [f"{_WORDS[k % known]}{again[k]}" for k in range(count)]

    def good(self, product: int, number: int) -> ByteArray:
        """Return a normal image, uint8 ``[side, side, 3]``."""
        base = np.random.default_rng([self.seed, product]).uniform(60, 200, (_COARSE, _COARSE, 3))
        rng = np.random.default_rng([self.seed, product, number])
        coarse = (base + rng.normal(0, 4, base.shape)).astype(np.uint8)
        size = (self.side, self.side)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        noisy: ByteArray = (smooth + rng.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)
        return noisy

    def bad(self, product: int, number: int) -> tuple[ByteArray, BoolArray]:
        """Return an image with an ellipse of opposite colours, and its mask ``[side, side]``."""
        image = self.good(product, _BAD + number)
        rng = np.random.default_rng([self.seed, product, _BAD + number, 1])
        centre = rng.uniform(0.3, 0.7, 2) * self.side
        radii = np.maximum(rng.uniform(0.06, 0.14, 2) * self.side, 1.0)
        rows, columns = np.ogrid[: self.side, : self.side]
        away = ((rows + 0.5 - centre[0]) / radii[0]) ** 2
        mask: BoolArray = away + ((columns + 0.5 - centre[1]) / radii[1]) ** 2 <= 1
        image[mask] = 255 - image[mask]
        return image, mask

    def write(self, folder: Path, products: int, good: int, bad: int = 0) -> list[Sample]:
        """Write so many images of each product as files, masks too, and return what they are."""
        samples = []
        for product, name in enumerate(self.names(products)):
            place = folder / name
            place.mkdir(parents=True)
            for number in range(good):
                path = place / f"good-{number:03d}.png"
                Image.fromarray(self.good(product, number)).save(path)
                samples.append(Sample(path, name, 0, "good"))
            for number in range(bad):
                path, masked = place / f"bad-{number:03d}.png", place / f"mask-{number:03d}.png"
                image, mask = self.bad(product, number)
                Image.fromarray(image).save(path)
                Image.fromarray(mask).save(masked)
                samples.append(Sample(path, name, 1, "spot", masked))
        return samples
