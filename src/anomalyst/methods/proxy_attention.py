"""Attention of a few proxies to the patches of an image, and the position codes of its keys."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt

import torch
from torch import Tensor, nn


class ProxyAttention(nn.Module):
    """Multi-head attention of few queries to many tokens, then ``LN(query + attention)``.

    The token side of the projections is folded into the queries and the output:
    ``q (W_k x)^T = (q W_k) x^T`` and ``A (W_v x) = W_v (A x)``, so that no token is projected. A
    bias of the keys would add the same to all of a query's logits: it has no effect and no
    gradient.
    """

    def __init__(self, width: int, heads: int, null_token: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.in_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_bias = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.null = nn.Parameter(torch.zeros(2, width)) if null_token else None
        for weight in (self.in_weight, self.out.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return new queries ``[B, M, C]`` and the logits ``[B, heads, M, N]`` of the tokens.

        ``queries`` are ``[B, M, C]``, ``keys`` and ``values`` ``[B, N, C]``.
        """
        batch, count, width = queries.shape
        w_q, w_k, w_v = self.in_weight.chunk(3)
        b_q, _, b_v = self.in_bias.chunk(3)
        head = width // self.heads
        q = (queries @ w_q.T + b_q).view(batch, count, self.heads, head)
        folded = torch.einsum("bmhd,hdc->bhmc", q, w_k.view(self.heads, head, width))
        flat = folded.flatten(1, 2) / sqrt(head)  # (B, heads * M, C)
        logits = flat @ keys.transpose(1, 2)  # (B, heads * M, N)
        if self.null is None:
            read = logits.softmax(-1) @ values  # (B, heads * M, C)
        else:
            nothing = (flat @ self.null[0]).unsqueeze(-1)
            weight = torch.cat([logits, nothing], dim=-1).softmax(-1)
            read = weight[..., :-1] @ values + weight[..., -1:] * self.null[1]
        read = read.view(batch, self.heads, count, width)
        out = torch.einsum("bhmc,hdc->bmhd", read, w_v.view(self.heads, head, width))
        fresh: Tensor = self.norm(queries + self.out(out.flatten(2) + b_v))
        return fresh, logits.view(batch, self.heads, count, -1)


def grid_places(height: int, width: int) -> Tensor:
    """Return (row, column) of each patch, counted from 1 and as shares of 2 pi, ``[h * w, 2]``."""
    rows = torch.arange(1, height + 1) / (height + 1e-6)
    columns = torch.arange(1, width + 1) / (width + 1e-6)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return 2 * pi * torch.stack(grid, dim=-1).flatten(0, 1)


def masked_places(defect: Tensor) -> Tensor:
    """Return places that count only patches outside a defect ``[h, w]``, as the authors' code."""
    outside = (~defect).float()
    rows, columns = outside.cumsum(0), outside.cumsum(1)
    rows = rows / (rows[-1:] + 1e-6)
    columns = columns / (columns[:, -1:] + 1e-6)
    return 2 * pi * torch.stack([rows, columns], dim=-1).flatten(0, 1)


def position_code(places: Tensor, width: int) -> Tensor:
    """Return the sine code ``[N, width]`` of places ``[N, 2]``: half for rows, half for columns."""
    half = width // 2
    channel = torch.arange(half, device=places.device)
    frequency = 10_000.0 ** (-2 * (channel // 2) / half)
    angle = places[..., None] * frequency  # (N, 2, half)
    code = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return code.flatten(1)


def reference_codes(kind: str, covers: Sequence[Tensor], width: int) -> list[Tensor]:
    """Return the codes ``[N, width]`` for the patches of each abnormal reference.

    Parameters
    ----------
    kind
        ``none``, ``grid``, or ``masked`` as in the authors' code: counted outside the defect, and
        with several references handed out image by image, while patches go row by row.
    covers
        Coverage ``[h, w]`` of each.
    """
    if kind == "none":
        return [cover.new_zeros(1, width) for cover in covers]
    if kind == "grid":
        places = [grid_places(*cover.shape).to(cover) for cover in covers]
        return [position_code(each, width) for each in places]
    places = [masked_places(cover > 0) for cover in covers]
    if len({each.shape for each in places}) == 1:
        mixed = torch.stack(places).transpose(0, 1).reshape(len(places), -1, 2)
        places = list(mixed.unbind())
    return [position_code(each, width) for each in places]
