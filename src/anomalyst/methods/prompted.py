"""What OneNIP's steps see: images, pseudo-anomalies of them with masks, and prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomalyst.errors import InputError
from anomalyst.inference import Item, by_shape
from anomalyst.methods.prompt_decoders import resized
from anomalyst.methods.views import PLAIN
from anomalyst.retrieval import describe
from anomalyst.training_data import read_pixels

if TYPE_CHECKING:
    from anomalyst.methods.synthesis import Synthesizer
    from anomalyst.training_data import TrainingFeatures
    from anomalyst.types import BoolArray, ByteArray

_STATISTICS = 512  # images that the channels' statistics are taken of
_LOOKED_AT = 16  # images on which some pseudo-anomaly must show
_AFTER_ALL_STEPS = 2**40


class Prompted:
    """Training images by number, each with a pseudo-anomaly of it and a prompt of its category.

    Parameters
    ----------
    synthesizer
        Makes the pseudo-anomalies; None makes none, and the images themselves stand for them.
    pool
        Pseudo-anomalies an image, each made when first drawn and its features cached; 0 makes a
        fresh one for every step, which costs a pass of the backbone each.
    draw
        ``random`` prompts of the category, its ``fixed`` first image, or the ``nearest`` one by
        similarity that is another image.
    """

    def __init__(
        self,
        features: TrainingFeatures,
        synthesizer: Synthesizer | None,
        pool: int,
        draw: str,
        seed: int,
    ) -> None:
        self._features = features
        self._synthesizer = synthesizer
        self._pool = pool
        self._draw = draw
        self._seed = seed
        self._masks: dict[tuple[int, ...], tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]] = {}
        self._members: dict[str | None, list[int]] = {}
        for number, sample in enumerate(features.samples):
            self._members.setdefault(sample.category, []).append(number)
        self._nearest = self._find_nearest() if draw == "nearest" else {}

    def __len__(self) -> int:
        return len(self._features.samples)

    def fetch(self, numbers: Sequence[int], step: int) -> list[list[Tensor]]:
        """Return for each shape of map: maps, pseudo-anomalies' maps, masks and prompts' maps.

        Maps are ``[B, C, h, w]`` and masks ``[B, H, W]``, 1 at the pseudo-anomaly, at the size of
        the network's input. All draws depend on the seed, the step and the image alone.
        """
        return self._parts(numbers, step, self._pool)

    def held_out(self, count: int, batch: int) -> Iterator[list[Tensor]]:
        """Yield parts as `fetch` does, of about ``count`` images, pseudo-anomalies never seen."""
        every = max(len(self) // count, 1)
        numbers = range(0, len(self), every)
        for first in range(0, len(numbers), batch):
            yield from self._parts(numbers[first : first + batch], _AFTER_ALL_STEPS, 0)

    def require_visible(self) -> None:
        """Raise if of a sample of images no pseudo-anomaly shows."""
        every = -(-len(self) // _LOOKED_AT)
        numbers = range(0, len(self), every)
        made = (self._make(self._seeds(number, _AFTER_ALL_STEPS, 0)) for number in numbers)
        if self._synthesizer is not None and not any(mask.any() for _, mask in made):
            raise InputError(
                f"no pseudo-anomaly shows on any of {len(numbers)} training images (recipe "
                f"{self._synthesizer.recipe}): look at them with `anomalyst pseudo-anomalies` and "
                "choose another recipe, or leave out foreground"
            )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``[C]`` of the channels over the training images."""
        every = -(-len(self) // _STATISTICS)
        sums = [_moments(self._maps(number)) for number in range(0, len(self), every)]
        counts, firsts, seconds = zip(*sums, strict=True)
        count = sum(counts)
        mean = torch.stack(firsts).sum(0) / count
        variance = torch.stack(seconds).sum(0) / count - mean.square()
        return mean.float(), variance.clamp(min=0).sqrt().float()

    # ---- one step -------------------------------------------------------------------------------

    def _parts(self, numbers: Sequence[int], step: int, pool: int) -> list[list[Tensor]]:
        clean = [self._maps(number) for number in numbers]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, maps in enumerate(clean):
            shapes.setdefault(tuple(maps.shape), []).append(place)
        changed = self._pseudo(numbers, step, pool)
        parts = []
        for places in shapes.values():
            maps = torch.cat([clean[p] for p in places])
            pseudo = torch.cat([changed[p][0] for p in places])
            masks = torch.stack([changed[p][1] for p in places]).float()
            prompts = [self._prompt(numbers[p], step, maps.shape[-2:]) for p in places]
            parts.append([maps, pseudo, masks, torch.cat(prompts)])
        return parts

    def _maps(self, number: int) -> Tensor:
        return self._features.fetch([number])[0][0]

    def _prompt(self, number: int, step: int, grid: Sequence[int]) -> Tensor:
        members = self._members[self._features.samples[number].category]
        if self._draw == "random":
            rng = np.random.default_rng([self._seed, step, number])
            chosen = members[rng.integers(len(members))]
        else:
            chosen = self._nearest.get(number, members[0])
        return resized(self._maps(chosen), grid)

    def _find_nearest(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for members in self._members.values():
            unit = torch.cat([describe([self._maps(number)]) for number in members])
            similar = (unit @ unit.T).fill_diagonal_(-1)
            nearest = similar.argmax(1).tolist()
            found |= {number: members[k] for number, k in zip(members, nearest, strict=True)}
        return found

    # ---- pseudo-anomalies -----------------------------------------------------------------------

    def _pseudo(self, numbers: Sequence[int], step: int, pool: int) -> list[tuple[Tensor, Tensor]]:
        """Return maps ``[1, C, h, w]`` and mask ``[H, W]`` of a pseudo-anomaly of each image."""
        if self._synthesizer is None:
            return [self._untouched(number) for number in numbers]
        seeds = [self._seeds(number, step, pool) for number in numbers]
        found = {key: kept for key in seeds if (kept := self._kept(key)) is not None}
        fresh = {key: self._make(key) for key in seeds if key not in found}
        engine = self._features.engine
        if pool and engine.cache is not None:
            self._keep(fresh)
        else:
            engine = replace(engine, cache=None)  # what is never drawn again is not kept
        items, keys = [item for item, _ in fresh.values()], list(fresh)
        for same in by_shape(items):
            maps = engine.features([items[k] for k in same])[0].clone()  # as autograd wants it
            found |= {keys[k]: (maps[row][None], fresh[keys[k]][1]) for row, k in enumerate(same)}
        return [
            (maps, torch.from_numpy(mask).to(maps.device))
            for maps, mask in (found[key] for key in seeds)
        ]

    def _seeds(self, number: int, step: int, pool: int) -> tuple[int, ...]:
        """Return the image and what else it is drawn by: its place in the pool, or the step."""
        if not pool:
            return number, self._seed, step, 0
        drawn = np.random.default_rng([self._seed, step, number, 1]).integers(pool)
        return number, self._seed, int(drawn)

    def _make(self, seeds: tuple[int, ...]) -> tuple[Item, BoolArray]:
        """Return a pseudo-anomaly as if it had been read, and its mask."""
        assert self._synthesizer is not None
        rng = np.random.default_rng(seeds)
        plain, pixels = self._read(seeds[0])
        source = None
        if self._synthesizer.recipe == "nsa":
            members = self._members[plain.category]
            others = [number for number in members if number != seeds[0]] or members
            source = self._read(int(rng.choice(others)))[1]
        image, mask = self._synthesizer(pixels, rng, plain.category, source)
        tensor = self._features.engine.preprocess.normalized(image)
        if (hidden := plain.hidden(*mask.shape)) is not None:
            tensor[:, hidden], mask = 0, mask & ~hidden
        content = f"resized {image.shape} {hashlib.sha256(image.tobytes()).hexdigest()}"
        return replace(plain, tensor=tensor, sha256=content), mask

    def _read(self, number: int) -> tuple[Item, ByteArray]:
        """Return an image and its pixels at the size of the network's input."""
        return read_pixels(self._features.samples[number], self._features.engine.preprocess)

    def _keep(self, made: dict[tuple[int, ...], tuple[Item, BoolArray]]) -> None:
        """Remember the masks, packed, and under which names the cache has the features."""
        for seeds, (item, mask) in made.items():
            (key,) = self._features.engine.cache_keys([item], PLAIN)
            self._masks[seeds] = key, mask.shape, np.packbits(mask)

    def _kept(self, seeds: tuple[int, ...]) -> tuple[Tensor, BoolArray] | None:
        """Return what was made of those seeds before, unless its features were evicted."""
        cache = self._features.engine.cache
        if seeds not in self._masks or cache is None:
            return None
        key, shape, bits = self._masks[seeds]
        entry = cache.get(key)
        if entry is None:
            return None
        mask = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
        return self._features.engine.stack([entry])[0], mask

    def _untouched(self, number: int) -> tuple[Tensor, Tensor]:
        engine = self._features.engine
        size = self._features.place(number).input
        return self._maps(number), torch.zeros(size, device=engine.device)


def _moments(maps: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the number of patches of maps ``[1, C, h, w]``, their sum and sum of squares."""
    patches = maps[0].flatten(1).double()
    return float(patches.shape[1]), patches.sum(1), patches.square().sum(1)
