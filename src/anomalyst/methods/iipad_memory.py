"""IIPAD's category-aware memory: normal images, found again by their object tokens alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PATCHES = ("patches0", "patches1")  # of the two memory layers


class Entries(NamedTuple):
    """What is kept of n normal images, all of unit length.

    Attributes
    ----------
    objects
        Z ``[n, M, d]``.
    prompts
        e^n and e^a ``[n, 2, d]``.
    patches
        G ``[n, R, C]`` of each memory layer.
    """

    objects: Tensor
    prompts: Tensor
    patches: Sequence[Tensor]

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """Return them in one. Images with fewer patches repeat their first: no maximum changes."""
        return cls(
            torch.cat([part.objects for part in parts]),
            torch.cat([part.prompts for part in parts]),
            [_padded(layer) for layer in zip(*(part.patches for part in parts), strict=True)],
        )


def _padded(parts: Sequence[Tensor]) -> Tensor:
    most = max(part.shape[1] for part in parts)
    return torch.cat(
        [
            torch.cat([part, part[:, :1].expand(-1, most - part.shape[1], -1)], dim=1)
            for part in parts
        ]
    )


class Memory:
    """Normal images by category; whoever searches knows none.

    Parameters
    ----------
    ordered
        Whether object token k of one image answers to token k of another.
    """

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered
        self._kept: dict[str, Entries] = {}
        self._all: Entries | None = None

    def add(self, category: str, parts: Sequence[Entries]) -> None:
        """Add images to a category."""
        known = [self._kept[category]] if category in self._kept else []
        self._kept[category] = Entries.joined([*known, *parts])
        self._all = None

    @property
    def shots(self) -> int:
        """Images of the category that has most, K; 0 without any."""
        return max((len(kept.objects) for kept in self._kept.values()), default=0)

    @property
    def all(self) -> Entries:
        """The images of all categories, at least one."""
        if self._all is None:
            self._all = Entries.joined(list(self._kept.values()))
        return self._all

    def retrieve(self, objects: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return rows of `all` ``[B, k]`` most like Z ``[B, M, d]``, and how alike they are."""
        alike = similarity(objects, self.all.objects, self.ordered)
        found = alike.topk(min(count, alike.shape[1]), dim=1)
        return found.indices, found.values

    def references(self) -> dict[str, Tensor]:
        """Return `all` by name."""
        objects, prompts, patches = self.all
        return {"objects": objects, "prompts": prompts} | dict(zip(_PATCHES, patches, strict=True))

    def take(self, references: Mapping[str, Tensor]) -> None:
        """Let ``references`` be `all`; `shots` stays what it was."""
        patches = [references[part] for part in _PATCHES]
        self._all = Entries(references["objects"], references["prompts"], patches)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything kept, by part and category."""
        named: dict[str, Tensor] = {}
        for category, kept in self._kept.items():
            named |= {f"objects.{category}": kept.objects, f"prompts.{category}": kept.prompts}
            named |= {f"{k}.{category}": x for k, x in zip(_PATCHES, kept.patches, strict=True)}
        return named

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned; other names are passed over."""
        start = "objects."
        categories = [name.removeprefix(start) for name in tensors if name.startswith(start)]
        self._kept = {
            name: Entries(
                tensors[f"objects.{name}"],
                tensors[f"prompts.{name}"],
                [tensors[f"{part}.{name}"] for part in _PATCHES],
            )
            for name in categories
        }
        self._all = None


def similarity(queries: Tensor, kept: Tensor, ordered: bool) -> Tensor:
    """Return the mean cosine ``[B, n]`` of tokens ``[B, M, d]`` and ``[n, M, d]``, all unit.

    Token by token, or, where they have no order, each with the one most like it.
    """
    if ordered:
        return queries.flatten(1) @ kept.flatten(1).T / queries.shape[1]
    alike = torch.einsum("bmd,nkd->bnmk", queries, kept)
    return (alike.amax(-1).mean(-1) + alike.amax(-2).mean(-1)) / 2


def visual_map(patches: Sequence[Tensor], bank: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return A^v ``[B, R]`` (eq. 17): the distance to the nearest patch of each image's ``rows``.

    Parameters
    ----------
    patches
        G ``[B, R, C]`` of each memory layer, unit length.
    bank
        G ``[N, R', C]`` of each memory layer.
    rows
        Images of the bank ``[B, k]``.
    """
    total = torch.zeros(patches[0].shape[:2], device=rows.device)
    for mine, kept in zip(patches, bank, strict=True):
        best = torch.full_like(total, -torch.inf)
        for images in rows.T:  # one retrieved image after the other: their patches fill memory
            best = torch.maximum(best, (mine @ kept[images].mT).amax(-1))
        total = total + (1 - best) / 2
    return total
