"""Encoder and decoders that reconstruct features from a normal prompt: OneNIP's, and UniAD's.

Gao, ECCV 2024, arXiv 2505.09264; You et al., NeurIPS 2022, arXiv 2206.03687. All tokens are
``[B, L, d]`` in row order, attention is standard multi-head attention with position code P added to
queries and keys, layer norm follows each residual, and M, added to logits, the neighbour mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


def neighbour_mask(grid: tuple[int, int]) -> Tensor | None:
    """Return what hides tokens from each other, ``[L, L]``, in a grid of L = h w patches.

    Minus infinity within ``(h // 2) // 2`` rows and ``(w // 2) // 2`` columns, a patch itself
    included, else 0: a patch can only be rebuilt from what lies further away. None for a single
    patch.
    """
    height, width = grid
    if isinstance(height, int) and height * width == 1:
        return None  # it has no neighbours, and nothing else to look at
    rows, columns = torch.arange(height), torch.arange(width)
    near_rows = (rows[:, None] - rows).abs() <= height // 2 // 2
    near_columns = (columns[:, None] - columns).abs() <= width // 2 // 2
    near = near_rows[:, None, :, None] & near_columns[:, None]  # (h, w, h, w)
    # Not bool, of which attention would make this anew in every layer.
    return torch.where(near, -torch.inf, 0.0).reshape(height * width, height * width)


def resized(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Return maps ``[B, C, h, w]`` on another grid, corners upon corners."""
    sizes = (*maps.shape[-2:], *grid)
    if all(isinstance(size, int) for size in sizes) and sizes[:2] == sizes[2:]:
        return maps  # of a graph's symbols nobody knows whether they are the same
    return functional.interpolate(maps, tuple(grid), mode="bilinear", align_corners=True)


def cell_means(maps: Tensor, stride: int, count: int) -> Tensor:
    """Return the means ``[B, count h, count w]`` of maps ``[B, stride h, stride w]``.

    Those of adaptive average pooling, whose windows repeat with each patch of ``stride`` pixels.
    """
    windows = maps.new_zeros(count, stride)
    for k in range(count):
        first, end = k * stride // count, -(-(k + 1) * stride // count)
        windows[k, first:end] = 1 / (end - first)
    batch, _, width = maps.shape
    rows = windows @ maps.reshape(batch, -1, stride, width)  # (B, h, count, stride w)
    rows = rows.reshape(batch, -1, width // stride, stride)
    return (rows @ windows.T).flatten(2)  # (B, count h, w, count) -> (B, count h, count w)


class PositionCode(nn.Module):
    """A learned code P ``[L, d]``: half from the column, then half from the row.

    A grid of another size than the tables takes values between theirs.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.rand(side, width // 2))
        self.column = nn.Parameter(torch.rand(side, width // 2))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        rows = _resampled(self.row, height)[:, None].expand(-1, width, -1)
        columns = _resampled(self.column, width)[None].expand(height, -1, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def _resampled(table: Tensor, length: int) -> Tensor:
    if isinstance(length, int) and len(table) == length:
        return table
    lines = functional.interpolate(table.T[None], length, mode="linear", align_corners=True)
    return lines[0].T


class Attention(nn.Module):
    """Multi-head attention over batches ``[B, L, d]``, without the weights that nobody reads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        # Written out, as torch's own call keeps the projections from `QuickLinears`.
        own = self.attn
        shares = zip((q, k, v), own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3), strict=True)
        asking, asked, told = (
            functional.linear(*each)
            .reshape(q.shape[0], -1, own.num_heads, own.head_dim)
            .transpose(1, 2)
            for each in shares
        )  # (B, L, d) -> (B, heads, L, d / heads)
        # Of another type than the query's, torch takes a mask, and reads it wrong.
        mask = None if mask is None else mask.to(asking.dtype)
        drop = own.dropout if self.training else 0.0
        read = functional.scaled_dot_product_attention(asking, asked, told, mask, drop)
        found: Tensor = own.out_proj(read.transpose(1, 2).flatten(2))
        return found


class Mlp(nn.Module):
    """Two linear layers with ReLU between, and dropout of what lies between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.rise = nn.Linear(width, hidden)
        self.fall = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fall(self.drop(functional.relu(self.rise(x))))
        return out


class EncoderLayer(nn.Module):
    """``x = LN(x + A(x + P, x + P, x; M)); x = LN(x + MLP(x))``."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.mlp = Mlp(width, hidden, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, code: Tensor, mask: Tensor | None) -> Tensor:
        placed = x + code
        x = self.norm1(x + self.drop(self.attention(placed, placed, x, mask)))
        out: Tensor = self.norm2(x + self.drop(self.mlp(x)))
        return out


class Decoder(Protocol):
    """Target tokens x and prompt tokens p, encoded, to rebuilt tokens, all ``[B, L, d]``."""

    def __call__(
        self, x: Tensor, prompt: Tensor, grid: tuple[int, int], code: Tensor, mask: Tensor | None
    ) -> Tensor: ...


class BidirectionalLayer(nn.Module):
    """The prompt reads the target, then the target reads the prompt (OneNIP, eq. 3).

    With ``legacy``, the code behind the published figures: the target gets the prompt's MLP output,
    position by position, and what its own attention finds is thrown away.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, legacy: bool) -> None:
        super().__init__()
        self.legacy = legacy
        self.prompt_reads = Attention(width, heads, dropout)
        # Several processes wait for the gradient of all that is not frozen.
        self.target_reads = Attention(width, heads, dropout).requires_grad_(not legacy)
        self.mlp = Mlp(width, hidden, 0.0)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, p: Tensor, x: Tensor, code: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        p = self.norm1(p + self.drop(self.prompt_reads(p + code, x + code, x, mask)))
        inner = self.mlp(p)
        p = self.norm2(p + self.drop(inner))
        read = inner if self.legacy else self.target_reads(x + code, p + code, p, mask)
        return p, self.norm3(x + self.drop(read))


class BidirectionalDecoder(nn.Module):
    """OneNIP's: layers, then an unmasked attention of the prompt's tokens to the target's.

    The prompt's stream is what comes out: the target's own values reach it by attention only.
    """

    def __init__(
        self, depth: int, width: int, heads: int, hidden: int, dropout: float, legacy: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BidirectionalLayer(width, heads, hidden, dropout, legacy) for _ in range(depth)
        )
        self.last = Attention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, prompt: Tensor, grid: tuple[int, int], code: Tensor, mask: Tensor | None
    ) -> Tensor:
        p = prompt
        for layer in self.layers:
            p, x = layer(p, x, code, mask)
        out: Tensor = self.norm(p + self.drop(self.last(p + code, x + code, x)))
        return out


class QueryDecoder(nn.Module):
    """UniAD's: each layer asks the encoded target, then the last answer, with queries of its own.

    With ``static``, the paper's one-way ablation: the encoded prompt takes the place of every
    layer's learned queries.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        static: bool,
        side: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QueryLayer(width, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        # UniAD starts all layers as copies of one.
        self.queries = (
            None
            if static
            else nn.Parameter(torch.randn(1, width, side, side).repeat(depth, 1, 1, 1))
        )

    def forward(
        self, x: Tensor, prompt: Tensor, grid: tuple[int, int], code: Tensor, mask: Tensor | None
    ) -> Tensor:
        out = x
        for number, layer in enumerate(self.layers):
            asked = prompt if self.queries is None else self._queries(number, grid)
            out = layer(asked, x, out, code, mask)
        rebuilt: Tensor = self.norm(out)
        return rebuilt

    def _queries(self, number: int, grid: tuple[int, int]) -> Tensor:
        assert self.queries is not None
        table = resized(self.queries[number : number + 1], grid)
        return table.flatten(2).transpose(1, 2)  # (1, d, h, w) -> (1, L, d)


class QueryLayer(nn.Module):
    """Queries t to memory x, then to the last output o, then an MLP; residual and norm each."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ask_memory = Attention(width, heads, dropout)
        self.ask_output = Attention(width, heads, dropout)
        self.mlp = Mlp(width, hidden, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, t: Tensor, x: Tensor, o: Tensor, code: Tensor, mask: Tensor | None) -> Tensor:
        t = t.expand(x.shape[0], -1, -1)
        t = self.norm1(t + self.drop(self.ask_memory(t + code, x + code, x, mask)))
        t = self.norm2(t + self.drop(self.ask_output(t + code, o + code, o, mask)))
        out: Tensor = self.norm3(t + self.drop(self.mlp(t)))
        return out
