"""Which category an image belongs to, when nobody says: the one of the most similar reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

SAME_PRODUCT = 0.75
"""Cosine to the nearest reference under which an image hardly shows the same product, measured in
docs/benchmarks.md."""

# References remembered a category: plenty to tell products apart, little to search.
_REMEMBERED = 64


class CategoryIndex:
    """One descriptor a reference; an image takes the category of its nearest by cosine."""

    def __init__(self) -> None:
        self._descriptors: dict[str, Tensor] = {}

    def add(self, category: str, features: Sequence[Tensor]) -> None:
        """Remember references by their feature maps ``[B, C, h, w]``, the last layer's."""
        fresh = describe(features)
        if category in self._descriptors:
            fresh = torch.cat([self._descriptors[category], fresh])
        self._descriptors[category] = fresh[:_REMEMBERED]

    def lookup(self, features: Sequence[Tensor]) -> list[str | None]:
        """Return the category of every image in a batch, None without any reference."""
        found = self.similarities(features)
        return [max(each, key=lambda name: each[name]) if each else None for each in found]

    def similarities(self, features: Sequence[Tensor]) -> list[dict[str, float]]:
        """Return for each image of a batch its cosine to every category's nearest reference."""
        queries = describe(features)
        best = {n: (queries @ kept.T).amax(1).tolist() for n, kept in self._descriptors.items()}
        return [{name: best[name][k] for name in best} for k in range(len(queries))]

    def tensors(self) -> dict[str, Tensor]:
        """Return the descriptors by category, for the bundle."""
        return dict(self._descriptors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self._descriptors = dict(tensors)


def mistaken(category: str, similar: Mapping[str, float]) -> str | None:
    """Say what else an image looks like, None where it may well be of the category.

    Neither defects nor another view make it that unlike its own references.
    """
    own = similar.get(category)
    if own is None or own >= SAME_PRODUCT:
        return None
    nearest = max(similar, key=lambda name: similar[name])
    if nearest == category:
        return f"unlike all references of {category!r} (similarity {own:.2f})"
    return f"like {nearest!r} (similarity {similar[nearest]:.2f}), not {category!r} ({own:.2f})"


def describe(features: Sequence[Tensor]) -> Tensor:
    """Return one unit vector ``[B, C]`` an image: the mean of its unit-length patches."""
    patches = functional.normalize(features[-1].flatten(2), dim=1)  # (B, C, N)
    return functional.normalize(patches.mean(dim=2), dim=1)
