"""Residuals: what tells patches from their nearest normal ones, and which of them are a defect."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.methods.memory_bank import nearest_cosine, nearest_inner_product, to_patches

_STANDS_OUT = 0.95  # quantile of the healthy patches' S_n, above which a defect's patch is mined


class Mined(NamedTuple):
    """Patches ``[N, C]`` of one abnormal reference, their residuals, and which are which ``[N]``.

    ``kept`` are mined; ``inside`` the mask; ``healthy`` a patch or more away from it.
    """

    patches: Tensor
    residuals: Tensor
    kept: Tensor
    inside: Tensor
    healthy: Tensor


def mined(
    maps: Tensor, coverage: Tensor, normal: Tensor, unit: Tensor, matching: str, standing_out: bool
) -> Mined:
    """Return what a map ``[C, h, w]`` with its defect's coverage ``[h, w]`` gives to mine.

    With ``standing_out``, only patches whose S_n is above the 95 % quantile of the healthy ones',
    or the single highest.
    """
    patches = to_patches(maps[None])
    distance, residual = nearest_normal(patches, normal, unit, matching)
    inside = (coverage > 0).flatten()
    if not inside.any():  # the defect was too small, or lies outside what is looked at
        inside[distance.argmax()] = True
    near = functional.max_pool2d((coverage > 0).float()[None], 3, 1, 1) > 0
    healthy = ~near.flatten()
    kept = inside
    if standing_out:
        calm = distance[healthy] if healthy.any() else distance
        kept = inside & (distance > calm.quantile(_STANDS_OUT))
        if not kept.any():
            kept = torch.zeros_like(inside)
            kept[distance.masked_fill(~inside, -1).argmax()] = True
    return Mined(patches, residual, kept, inside, healthy)


@torch.no_grad()
def nearest_normal(
    patches: Tensor, bank: Tensor, unit: Tensor, matching: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """Return S_n ``[N]`` in [0, 1] of patches ``[N, C]``, and their residuals ``[N, C]``.

    ``unit`` is the bank ``[M, C]`` at unit length. Ties go to the lowest row.
    """
    distance, row = nearest_cosine(functional.normalize(patches, dim=1), unit)
    if matching == "inner-product":
        row = nearest_inner_product(patches, bank)
    return distance.clamp(min=0) / 2, patches - bank[row]


def shifted_pooling(mask: Tensor, patch: int) -> Tensor:
    """Return which patches ``[h, w]`` the authors' code calls anomalous for a mask ``[H, W]``.

    A convolution with padding 1: patch (r, c) covers pixel rows ``patch * r - 1`` and on, and the
    last row and column of the image are never seen.
    """
    pooled = functional.max_pool2d(mask[None, None].float(), patch, patch, padding=1)
    return pooled[0, 0, : mask.shape[0] // patch, : mask.shape[1] // patch]
