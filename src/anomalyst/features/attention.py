"""The attention of open_clip's transformers, written out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class ClipAttention(nn.Module):
    """Multi-head attention over batches ``[B, L, C]``, in place of torch's own module.

    That one computes its projections where `QuickLinears` cannot reach them, and an image at a
    time: more than half of a CLIP's time on a processor. Tensors, and their names, stay.
    """

    def __init__(self, given: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = given.num_heads
        self.in_proj_weight = given.in_proj_weight  # (3 C, C)
        self.in_proj_bias = given.in_proj_bias
        self.out_proj = given.out_proj

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of tokens, each ``[B, heads, L, C / heads]``."""
        query, key, value = self._heads(tokens, 0, 3)
        return query, key, value

    def join(self, mixed: Tensor) -> Tensor:
        """Return ``[B, L, C]`` of what the heads read, ``[B, heads, L, C / heads]``."""
        joined: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return joined

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return what tokens ``[B, M, C]`` read of others ``[B, L, C]``, as open_clip asks for it.

        The mask ``[M, L]`` is added to the logits. Weights are not given, and ``key`` is ``value``.
        """
        assert key is value and not need_weights
        if query is key:
            heads = self.split(query)
        else:
            asking, (asked, told) = self._heads(query, 0, 1)[0], self._heads(key, 1, 3)
            heads = asking, asked, told
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask)
        return self.join(mixed), None

    def _heads(self, tokens: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Return some of query, key and value by their numbers."""
        rows = slice(first * tokens.shape[2], last * tokens.shape[2])
        joint = functional.linear(tokens, self.in_proj_weight[rows], self.in_proj_bias[rows])
        parts = joint.view(*tokens.shape[:2], last - first, self.num_heads, -1)
        return parts.permute(2, 0, 3, 1, 4).unbind()


def write_out(blocks: Iterable[Any]) -> None:
    """Put `ClipAttention` into those of open_clip's blocks that have torch's."""
    for block in blocks:
        if type(block.attn) is nn.MultiheadAttention:
            block.attn = ClipAttention(block.attn)
