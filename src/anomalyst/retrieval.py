"""Which category an image belongs to, when nobody says: the one of the most similar reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

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

    def lookup(self, features: Sequence[Tensor]) -> list[str] | list[None]:
        """Return the category of every image in a batch, None without any reference."""
        queries = describe(features)
        names = list(self._descriptors)
        if not names:
            return [None] * len(queries)
        best = torch.stack(
            [(queries @ self._descriptors[name].T).max(dim=1).values for name in names]
        )  # (categories, B)
        return [names[k] for k in best.argmax(dim=0).tolist()]

    def similarities(self, features: Sequence[Tensor]) -> dict[str, float]:
        """Return for each category the cosine of one image to its nearest reference."""
        query = describe(features)[0]
        return {name: float((kept @ query).max()) for name, kept in self._descriptors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the descriptors by category, for the bundle."""
        return dict(self._descriptors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self._descriptors = dict(tensors)


def describe(features: Sequence[Tensor]) -> Tensor:
    """Return one unit vector ``[B, C]`` an image: the mean of its unit-length patches."""
    patches = functional.normalize(features[-1].flatten(2), dim=1)  # (B, C, N)
    return functional.normalize(patches.mean(dim=2), dim=1)
