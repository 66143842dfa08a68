"""Exact nearest-neighbour search over patch features, and the banks that methods keep a category.

Shared by the memory-bank methods: PatchCore searches by Euclidean distance, AnomalyDINO by cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.errors import unknown

# Rows of queries and of the bank that one matrix product takes: it then stays under 17 MB, near the
# processor, whatever the sizes.
_BLOCK = 2048
_WIDE = 16384  # the same in an exported graph


def to_patches(feature_map: Tensor) -> Tensor:
    """Return the rows ``[B * h * w, C]`` of feature maps ``[B, C, h, w]``, image by image."""
    return feature_map.flatten(2).transpose(1, 2).reshape(-1, feature_map.shape[1])


def to_map(patches: Tensor, like: Tensor) -> Tensor:
    """Return per-patch values ``[B * h * w]`` as maps ``[B, h, w]`` on the grid of ``like``."""
    return patches.reshape(like.shape[0], *like.shape[-2:])


def nearest_cosine(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``1 - max cos`` ``[N]`` in [0, 2] and the bank row ``[N]``; all rows of unit length.

    Ties go to the lowest row.
    """
    best, index = _blocked_max(queries, bank, None)
    return 1 - best, index


def nearest_inner_product(queries: Tensor, bank: Tensor) -> Tensor:
    """Return the bank row ``[N]`` of the largest inner product; ties go to the lowest."""
    return _blocked_max(queries, bank, None)[1]


def nearest_euclidean(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance ``[N]`` to the nearest bank row, and that row ``[N]``.

    The search uses ``|b|^2 - 2 q.b``; the winner's distance is then taken from the difference
    itself, so that a query that is in the bank gets exactly 0.
    """
    _, index = _blocked_max(queries, bank, -0.5 * bank.square().sum(1))
    return (queries - bank[index]).norm(dim=1), index


def _blocked_max(queries: Tensor, bank: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return max and argmax over bank rows b of ``q . b + offset_b``, a block at a time."""
    if torch.compiler.is_compiling():
        return _best_of(queries, bank, offset)
    found = [_best_of(some, bank, offset) for some in torch.split(queries, _BLOCK)]
    best, index = zip(*found, strict=True)
    return torch.cat(best), torch.cat(index)


def _best_of(queries: Tensor, bank: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    best = queries.new_full((queries.shape[0],), -torch.inf)
    index = torch.zeros_like(best, dtype=torch.long)
    for start, end in pairwise(_cuts(bank.shape[0])):
        block, bias = bank[start:end], None if offset is None else offset[start:end]
        if bias is not None and torch.compiler.is_compiling():  # int8 graphs take no such bias
            product = queries @ block.T + bias
        else:
            product = functional.linear(queries, block, bias)  # (N, C) (block, C) -> (N, block)
        value, column = product.max(dim=1)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, column + start, index)
    return best, index


def _cuts(rows: int) -> list[int]:
    """Return where blocks of a bank begin, and where the last one ends.

    A graph has as many blocks for every bank that it takes, the last one longer: few, as it copies
    each.
    """
    if not torch.compiler.is_compiling():
        return [*range(0, rows, _BLOCK), rows]
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    starts = [0]
    while statically_known_true(rows >= starts[-1] + 2 * _WIDE):  # of a symbol, its least value
        starts.append(starts[-1] + _WIDE)
    return [*starts, rows]


def in_one_piece(rows: int) -> bool:
    """Tell whether a graph searches a bank of so many rows whole, and so one of any length."""
    return rows < 2 * _WIDE


class Banks:
    """One matrix of reference patches ``[M, C]`` a category."""

    def __init__(self) -> None:
        self._banks: dict[str, Tensor] = {}
        self._joint: Tensor | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """The enrolled categories, in order of enrolment."""
        return tuple(self._banks)

    def add(self, category: str, patches: Tensor) -> None:
        """Append patches ``[M, C]`` to the category's bank."""
        kept = [self._banks[category]] if category in self._banks else []
        self._banks[category] = torch.cat([*kept, patches])
        self._joint = None

    def __getitem__(self, category: str | None) -> Tensor:
        if category is None or category not in self._banks:
            raise unknown("category", category or "", self._banks)
        return self._banks[category]

    @property
    def joint(self) -> Tensor | None:
        """The patches of all categories, None without any."""
        if self._joint is None and self._banks:
            self._joint = torch.cat(list(self._banks.values()))
        return self._joint

    def tensors(self) -> dict[str, Tensor]:
        """Return the banks by category, for the bundle."""
        return dict(self._banks)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all banks."""
        self._banks = dict(tensors)
        self._joint = None


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Return the mean ``[B]`` of the highest ``floor(share * N)`` of N patches, at least one."""
    flat = maps.flatten(1)
    count = torch.sym_max(torch.sym_int(flat.shape[1] * share), 1)
    return flat.topk(count, dim=1).values.mean(dim=1)


def resize_like(feature_maps: Sequence[Tensor]) -> Tensor:
    """Bring maps of several layers to the first one's grid and stack them ``[B, sum C, h, w]``."""
    grid = feature_maps[0].shape[-2:]
    same = [
        maps
        if maps.shape[-2:] == grid
        else functional.interpolate(maps, grid, mode="bilinear", align_corners=False)
        for maps in feature_maps
    ]
    return same[0] if len(same) == 1 else torch.cat(same, dim=1)
