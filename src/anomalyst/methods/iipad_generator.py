"""IIPAD's prompt generator: an image as two sequences of soft words (Lv, Su, Xu, ICLR 2025).

Of v (CLS) and Z (object tokens) each polarity makes T learned tokens that lean towards the image
and m tokens that say what the object is (eq. 3 and 4):

    S = [P_1 + C_1] ... [P_T + C_T] [O_1] ... [O_m],   C = f_p(v) + f(CA(v, Z', Z')),   O = f_c(Z)

The paper leaves the networks' sizes open. Our reading, the form ``paper``: f_p and f are two layers
R^d -> R^{T x d} with CoCoOp's bottleneck d / 16, which the paper refers to; Z' a linear layer; f_c
two layers along the tokens, as words are to stay words. ``code`` is what the authors released.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_SLOPE = 0.01  # of every LeakyReLU
_BOTTLENECK = 16
_POLARITIES = 2  # normal, abnormal


class Sizes(NamedTuple):
    """d, M, T and m of the paper."""

    width: int
    objects: int
    slots: int
    compressed: int


class Generator(nn.Module):
    """Z and v to the sequences S^n and S^a.

    Parameters
    ----------
    form
        ``paper`` or ``code``.
    instance
        The parts of C: ``both``, ``cls`` (f_p), ``attention`` (f of CA) or ``none``.
    dropout
        Behind the layers that mix channels.
    prompt_std
        Standard deviation of the learned tokens P and N at the start.
    """

    def __init__(
        self, form: str, sizes: Sizes, instance: str, dropout: float, prompt_std: float
    ) -> None:
        super().__init__()
        shape = (_POLARITIES, sizes.slots, sizes.width)
        parts = _CodeParts(sizes, dropout) if form == "code" else _PaperParts(sizes, dropout)
        self.shared = parts.of_cls() if instance in ("both", "cls") else None
        self.branches = nn.ModuleList(
            Branch(parts, instance, abnormal) for abnormal in (False, True)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        self.prompts = nn.Parameter(torch.randn(shape) * prompt_std)  # P and N

    def forward(self, objects: Tensor, cls: Tensor) -> Tensor:
        """Return S^n and S^a ``[B, 2, T + m, d]`` of Z ``[B, M, d]`` and v ``[B, d]``."""
        v = cls[:, None]
        lean = None if self.shared is None else self.shared(v)  # f_p(v), (B, T, d)
        made = []
        for prompts, branch in zip(self.prompts, self.branches, strict=True):
            tokens, objects_said = branch(objects, v)
            slots = prompts.expand(v.shape[0], -1, -1)
            slots = sum((part for part in (lean, *tokens) if part is not None), start=slots)
            made.append(torch.cat([slots, *objects_said], dim=1))
        return torch.stack(made, dim=1)


class Branch(nn.Module):
    """One polarity: what it adds to C of its own, and O."""

    def __init__(self, parts: _PaperParts, instance: str, abnormal: bool) -> None:
        super().__init__()
        sizes = parts.sizes
        self.of_cls = parts.of_cls_alone() if instance in ("both", "cls") else None
        self.project: nn.Module | None = None
        if instance in ("both", "attention"):
            self.project = parts.project()
            self.attend = nn.MultiheadAttention(sizes.width, 1, batch_first=True)
            self.spread = parts.spread()
        self.compress = parts.compress(abnormal) if sizes.compressed else None

    def forward(self, objects: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parts of C ``[B, T, d]``, and O ``[B, m, d]`` where there are any."""
        parts = [] if self.of_cls is None else [self.of_cls(v)]
        if self.project is not None:
            parts.append(self.spread(self.ask(v, self.project(objects))))
        return parts, [] if self.compress is None else [self.compress(objects)]

    def ask(self, v: Tensor, objects: Tensor) -> Tensor:
        """Return CA(v, Z', Z') ``[B, 1, d]``."""
        found: Tensor = self.attend(v, objects, objects, need_weights=False)[0]
        return found


class _PaperParts:
    """Makes the generator's networks as the paper describes them, ``[B, n, d]`` to such."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        self.sizes = sizes
        self.dropout = dropout

    def of_cls(self) -> nn.Module:
        """f_p, of both polarities: 1 token to T."""
        return self.spread()

    def of_cls_alone(self) -> nn.Module | None:
        """What else a polarity makes of v."""
        return None

    def project(self) -> nn.Module:
        """Z to Z^n or Z^a."""
        return nn.Linear(self.sizes.width, self.sizes.width)

    def spread(self) -> nn.Module:
        """f_n or f_a: 1 token to T."""
        return Spread(self.sizes, self.dropout)

    def compress(self, abnormal: bool) -> nn.Module:
        """f_c^n or f_c^a: M tokens to m."""
        narrow = max(self.sizes.objects // 2, 1)
        return nn.Sequential(
            Mix(self.sizes.objects, narrow),
            nn.LeakyReLU(_SLOPE),
            Mix(narrow, self.sizes.compressed),
        )


class _CodeParts(_PaperParts):
    """Makes them as the authors' code has them."""

    def of_cls(self) -> nn.Module:
        return nn.Sequential(self._channels(), Mix(1, self.sizes.slots))

    def of_cls_alone(self) -> nn.Module:
        """A branch that the paper does not have."""
        return nn.Sequential(self.spread(), nn.Dropout(self.dropout / 2), nn.LeakyReLU(_SLOPE))

    def project(self) -> nn.Module:
        return nn.Sequential(self._channels(), Mix(self.sizes.objects, self.sizes.objects))

    def spread(self) -> nn.Module:
        return nn.Sequential(
            Mix(1, self.sizes.objects),
            nn.LeakyReLU(_SLOPE),
            self._channels(),
            Mix(self.sizes.objects, self.sizes.slots),
        )

    def compress(self, abnormal: bool) -> nn.Module:
        """No activation inside the abnormal one."""
        narrow = max(self.sizes.objects // 2, 1)
        return nn.Sequential(
            Mix(self.sizes.objects, narrow),
            nn.Identity() if abnormal else nn.LeakyReLU(_SLOPE),
            Mix(narrow, self.sizes.compressed),
            nn.LeakyReLU(_SLOPE),
        )

    def _channels(self) -> nn.Module:
        width = self.sizes.width
        return nn.Sequential(
            nn.Linear(width, width), nn.Dropout(self.dropout), nn.LeakyReLU(_SLOPE)
        )


class Mix(nn.Module):
    """A linear layer along the tokens, ``[B, a, d]`` to ``[B, b, d]``; channels stay apart."""

    def __init__(self, tokens: int, result: int) -> None:
        super().__init__()
        self.linear = nn.Linear(tokens, result)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.linear(tokens.mT)
        return mixed.mT


class Spread(nn.Module):
    """Two layers that make of one token ``[B, 1, d]`` a sequence ``[B, T, d]``."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        hidden = max(sizes.width // _BOTTLENECK, 1)
        self.slots = sizes.slots
        self.layers = nn.Sequential(
            nn.Linear(sizes.width, hidden),
            nn.Dropout(dropout),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(hidden, sizes.slots * sizes.width),
        )

    def forward(self, token: Tensor) -> Tensor:
        made: Tensor = self.layers(token[:, 0])
        return made.reshape(made.shape[0], self.slots, -1)  # (B, T * d) -> (B, T, d)
