"""Object tokens: an image as M tokens that CLIP's text tower can read, from several sources.

IIPAD (Lv, Su, Xu, ICLR 2025) takes them from BLIP-Diffusion's Q-Former. The others stand in where
that is not at hand; they need no weights beside CLIP's, and give its own image features, brought to
the length of a word.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.features.backbones import OPENAI_CLIP
from anomalyst.features.clip import ClipTower
from anomalyst.features.qformer import QFormer

_TOKENS = 16  # M of the paper
_ROUNDS = 10  # of k-means


class Seen(NamedTuple):
    """What the image tower makes of a batch.

    ``images`` ``[B, 3, H, W]`` are normalised for it, ``entering`` and ``leaving``
    ``[B, 1 + N, C]`` the last block's tokens, CLS first, ``cls`` ``[B, D]`` is in the joint space.
    """

    images: Tensor
    entering: Tensor
    leaving: Tensor
    cls: Tensor


class ObjectTokens(Protocol):
    """A source of object tokens."""

    @property
    def count(self) -> int:
        """M."""

    @property
    def ordered(self) -> bool:
        """Whether token k of one image answers to token k of another."""

    def __call__(self, tower: ClipTower, seen: Seen) -> Tensor:
        """Return tokens ``[B, M, d]`` as wide as the text tower's."""


class _OfClip:
    """Brings what CLIP's image tower gives to the mean length of its word embeddings."""

    def __init__(self) -> None:
        self._length: float | None = None

    def _as_words(self, tower: ClipTower, tokens: Tensor) -> Tensor:
        if self._length is None:
            table: Tensor = tower.model.token_embedding.weight  # type: ignore[union-attr,assignment]
            self._length = float(table.norm(dim=1).mean())
        return functional.normalize(tokens, dim=-1) * self._length


class HeadTokens(_OfClip):
    """One token a head of the last block: the mean patch by the attention that CLS pays there."""

    ordered = True

    def __init__(self, tower: ClipTower) -> None:
        super().__init__()
        self.count = int(tower.blocks[-1].attn.num_heads)

    def __call__(self, tower: ClipTower, seen: Seen) -> Tensor:
        block = tower.blocks[-1]
        weights = block.attn.in_proj_weight.chunk(3)
        biases = block.attn.in_proj_bias.chunk(3)
        read = block.ln_1(seen.entering)
        query = functional.linear(read[:, :1], weights[0], biases[0])
        key = functional.linear(read[:, 1:], weights[1], biases[1])
        # (B, L, C) -> (B, heads, L, d)
        query, key = (x.reshape(*x.shape[:2], self.count, -1).transpose(1, 2) for x in (query, key))
        share = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0]  # (B, heads, N)
        return self._as_words(tower, tower.project(share @ seen.leaving[:, 1:]))


class ClusterTokens(_OfClip):
    """The centres of the patches' clusters in the joint space, the one nearest to CLS first.

    Spherical k-means from the farthest points, the first of them the patch most like CLS.
    """

    count = _TOKENS
    ordered = False

    def __call__(self, tower: ClipTower, seen: Seen) -> Tensor:
        patches = functional.normalize(tower.project(seen.leaving[:, 1:]), dim=-1)
        cls = functional.normalize(seen.cls, dim=-1)[:, :, None]  # (B, D, 1)
        centres = self._farthest(patches, (patches @ cls)[:, :, 0].argmax(1))
        for _ in range(_ROUNDS):
            nearest = (patches @ centres.mT).argmax(-1)  # (B, N)
            members = functional.one_hot(nearest, self.count).to(patches)  # (B, N, M)
            mean = functional.normalize(members.mT @ patches, dim=-1)
            filled = members.sum(1)[:, :, None] > 0
            centres = torch.where(filled, mean, centres)
        order = (centres @ cls)[:, :, 0].argsort(dim=1, descending=True)
        return self._as_words(tower, centres.gather(1, order[:, :, None].expand_as(centres)))

    def _farthest(self, patches: Tensor, first: Tensor) -> Tensor:
        """Return M patches ``[B, M, D]``, each the one least like all that were taken before."""
        rows = torch.arange(patches.shape[0], device=patches.device)
        chosen = [patches[rows, first]]
        alike = (patches @ chosen[0][:, :, None])[:, :, 0]
        while len(chosen) < self.count:
            chosen.append(patches[rows, alike.argmin(1)])
            alike = torch.maximum(alike, (patches @ chosen[-1][:, :, None])[:, :, 0])
        return torch.stack(chosen, dim=1)


class RandomTokens(_OfClip):
    """Fixed random maps of CLS: what remains of the method if the tokens say nothing more."""

    count = _TOKENS
    ordered = True

    def __init__(self) -> None:
        super().__init__()
        self._maps: Tensor | None = None

    def __call__(self, tower: ClipTower, seen: Seen) -> Tensor:
        if self._maps is None or self._maps.device != seen.cls.device:
            shape = (tower.joint_width, self.count * tower.text.width)
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
            self._maps = drawn.to(seen.cls.device)
        said = seen.cls @ self._maps  # (B, M * d) -> (B, M, d)
        return self._as_words(tower, said.reshape(said.shape[0], self.count, -1))


class QFormerTokens:
    """BLIP-Diffusion's: what its Q-Former puts to CLIP in place of the subject's name."""

    ordered = True

    def __init__(self, model: QFormer) -> None:
        self.model = model
        self.count = model.tokens

    def __call__(self, tower: ClipTower, seen: Seen) -> Tensor:
        images = seen.images
        if (tower.spec.mean, tower.spec.std) != OPENAI_CLIP:
            mine, its = (
                [images.new_tensor(values)[:, None, None] for values in statistics]
                for statistics in ((tower.spec.mean, tower.spec.std), OPENAI_CLIP)
            )
            images = (images * mine[1] + mine[0] - its[0]) / its[1]
        rows, columns = (cubic_weights(side, self.model.image_size) for side in images.shape[-2:])
        found: Tensor = self.model(rows.to(images) @ images @ columns.T.to(images))
        return found


def cubic_weights(length: int, result: int) -> Tensor:
    """Return what antialiased bicubic resizing of a line multiplies it with, ``[result, length]``.

    As a matrix, for OpenVINO resizes without antialiasing whatever it is told.
    """
    pixels = torch.arange(length) + 0.5
    step = (pixels[-1] + 0.5) / result  # a tensor: a graph's length may be a symbol
    centres = (torch.arange(result) + 0.5) * step
    x = ((pixels - centres[:, None]) / step.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)


def make_object_tokens(kind: str, tower: ClipTower) -> ObjectTokens:
    """Return the source ``heads``, ``kmeans`` or ``random``."""
    if kind == "heads":
        return HeadTokens(tower)
    return ClusterTokens() if kind == "kmeans" else RandomTokens()
