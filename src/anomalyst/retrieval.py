"""Which category an image belongs to, when nobody says: the one of the most similar reference.

Importing this loads no torch: `describe` makes descriptors of feature maps, and the runtime gets
them from its graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from anomalyst.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

SAME_PRODUCT = 0.75
"""Cosine to the nearest reference under which an image hardly shows the same product, measured in
docs/benchmarks.md."""

# References remembered a category: plenty to tell products apart, little to search.
_REMEMBERED = 64


class CategoryIndex:
    """One descriptor ``[C]`` a reference; an image takes the category of its nearest by cosine."""

    def __init__(self, descriptors: Mapping[str, FloatArray] | None = None) -> None:
        self._descriptors: dict[str, FloatArray] = dict(descriptors or {})

    def __len__(self) -> int:
        return len(self._descriptors)

    def add(self, category: str, features: Sequence[Tensor]) -> None:
        """Remember references by their feature maps ``[B, C, h, w]``, the last layer's."""
        self.remember(category, described(features))

    def remember(self, category: str, fresh: FloatArray) -> None:
        """Remember references by their descriptors ``[B, C]``."""
        if category in self._descriptors:
            fresh = np.concatenate([self._descriptors[category], fresh])
        self._descriptors[category] = fresh[:_REMEMBERED]

    def lookup(self, features: Sequence[Tensor]) -> list[str | None]:
        """Return the category of every image in a batch, None without any reference."""
        return [nearest(each) for each in self.similarities(features)]

    def similarities(self, features: Sequence[Tensor]) -> list[dict[str, float]]:
        """Return for each image of a batch its cosine to every category's nearest reference."""
        return self.compare(described(features))

    def compare(self, queries: FloatArray) -> list[dict[str, float]]:
        """Return what `similarities` does, of descriptors ``[B, C]``."""
        best = {n: (queries @ kept.T).max(axis=1) for n, kept in self._descriptors.items()}
        return [{name: float(best[name][k]) for name in best} for k in range(len(queries))]

    @property
    def descriptors(self) -> Mapping[str, FloatArray]:
        """The descriptors ``[n, C]`` by category."""
        return self._descriptors

    def tensors(self) -> dict[str, Tensor]:
        """Return the descriptors by category, for the bundle."""
        import torch

        return {name: torch.from_numpy(kept) for name, kept in self._descriptors.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self._descriptors = {name: kept.detach().cpu().numpy() for name, kept in tensors.items()}


def nearest(similar: Mapping[str, float]) -> str | None:
    """Return the most similar category, None where there is none."""
    return max(similar, key=lambda name: similar[name]) if similar else None


def mistaken(category: str, similar: Mapping[str, float]) -> str | None:
    """Say what else an image looks like, None where it may well be of the category.

    Neither defects nor another view make it that unlike its own references.
    """
    own = similar.get(category)
    if own is None or own >= SAME_PRODUCT:
        return None
    likely = max(similar, key=lambda name: similar[name])
    if likely == category:
        return f"unlike all references of {category!r} (similarity {own:.2f})"
    return f"like {likely!r} (similarity {similar[likely]:.2f}), not {category!r} ({own:.2f})"


def describe(features: Sequence[Tensor]) -> Tensor:
    """Return one unit vector ``[B, C]`` an image: the mean of its unit-length patches."""
    from torch.nn import functional

    patches = functional.normalize(features[-1].flatten(2), dim=1)  # (B, C, N)
    return functional.normalize(patches.mean(dim=2), dim=1)


def pooled(descriptors: Sequence[FloatArray]) -> FloatArray:
    """Return the descriptor ``[1, C]`` of an image from those of its parts ``[n, C]``."""
    parts = np.concatenate(descriptors)
    if len(parts) == 1 or not parts.shape[1]:
        return parts[:1]
    mean = parts.mean(axis=0, keepdims=True)
    found: FloatArray = mean / np.linalg.norm(mean).clip(min=1e-12)
    return found


def described(features: Sequence[Tensor]) -> FloatArray:
    """Return `describe` as an array."""
    found: FloatArray = describe(features).detach().cpu().numpy()
    return found
