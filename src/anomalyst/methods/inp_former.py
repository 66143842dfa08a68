r"""INP-Former: reconstruct an image's features from prototypes of normality found in it.

Luo et al., "Exploring Intrinsic Normal Prototypes within a Single Image for Universal Anomaly
Detection", CVPR 2025, arXiv 2503.02424; official code luow23/INP-Former, commit ``17d2653``.

With :math:`f_1 \dots f_8` the maps of eight tapped blocks of a frozen vision transformer:

1. Targets :math:`E_g`: means of the first and of the last four; tokens :math:`F_Q`: their mean.
2. INP extractor (eq. 1): M learned tokens read :math:`F_Q` by cross-attention and become the
   image's intrinsic normal prototypes (INPs) P.
3. Coherence loss (eq. 2): mean over tokens of the cosine distance to the nearest INP.
4. Bottleneck: a two-layer MLP over :math:`F_Q`.
5. INP-guided decoder (eq. 3): in each block the tokens become non-negative combinations of P,
   without a residual, so that what no INP resembles cannot be passed on. Mean outputs of the last
   four blocks reconstruct :math:`E_1`, of the first four :math:`E_2`.
6. Soft mining loss (eq. 4): :math:`1 - \cos` of whole images; each token's gradient is weighted by
   :math:`(d / \bar d)^\gamma`, its distance over the batch's mean distance.
7. Score map: mean over g of :math:`1 - \cos(E_g, R_g)` a token. Zero-shot: the distance to the
   nearest INP. Image score: mean of the highest 1 % of the map's pixels at a side of 256.

Where the paper and the code differ, the defaults are the code's; ``fusion``, ``similarity``,
``skip``, ``bare``, ``heads``, ``groups`` and ``augment`` give the paper's equations. Beyond the
paper: grids of any shape; and what it names as future work, prototypes ``stored`` at enrolment
beside the image's own, against defects that resemble normal parts of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.methods.base import Condenser, MethodOptions, TrainedMethod, TrainingOptions
from anomalyst.methods.coreset import thin_out
from anomalyst.methods.losses import average_over_processes
from anomalyst.methods.memory_bank import Banks, nearest_cosine, top_mean
from anomalyst.methods.stable_adamw import StableAdamW
from anomalyst.methods.views import PLAIN, View, variants

_TAPS = 8
_SIDE = 256  # pixels of the map that the image score is taken from
_TOP = 0.01
_PROJECTION = 128  # dimensions in which stored prototypes are spread out
_STORED = "stored."


class InpFormerOptions(TrainingOptions):
    """Options of INP-Former; the training options' defaults are the official code's."""

    prototypes: int = Field(
        6, ge=0, description="INPs M an image; 0: the baseline, a self-attention decoder"
    )
    decoder_blocks: int = Field(8, ge=1, description="decoder blocks, a multiple of groups")
    coherence: float = Field(0.2, ge=0, description="weight of the coherence loss")
    gamma: float = Field(3.0, ge=0, description="power of the soft mining weights; 0: no mining")
    score: Literal["reconstruction", "prototypes"] = Field(
        "reconstruction", description="prototypes: distance to the nearest INP, for zero-shot"
    )
    fusion: Literal["mean", "sum"] = Field("mean", description="of the tapped maps; paper: sum")
    similarity: Literal["cosine", "dot"] = Field(
        "cosine", description="of tokens and INPs in the decoder; paper: dot"
    )
    skip: Literal["attention", "input"] = Field(
        "attention", description="what a decoder block's MLP is added to; paper's eq. 3: input"
    )
    bare: bool = Field(False, description="no layer norms or output projections, as the equations")
    heads: int = Field(0, ge=0, description="attention heads; 0: one for 64 channels; paper: 1")
    groups: Literal[2, 8] = Field(2, description="groups of layers compared; paper's eq. 4: 8")
    stored: int = Field(
        0, ge=0, description="stored prototypes a category, beside the image's own (ours)"
    )
    augment: Literal["few-shot", "always", "never"] = Field(
        "few-shot", description="when each image is trained on in 22 fixed variants"
    )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the official code's optimiser."""
        return StableAdamW(parameters, weight_decay=self.weight_decay)


class InpFormer(TrainedMethod):
    """One model of one or many categories, trained on normal images only."""

    name: ClassVar[str] = "inp-former"
    Options: ClassVar[type[MethodOptions]] = InpFormerOptions
    # The code's 5 x 5 filter at a side of 256 pixels has a standard deviation of 1.38 pixels there.
    sigma: ClassVar[float] = 1.5
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "backbone": "dinov2-base-reg",
            "image_size": 392,
            "resize": 448,
            "square": True,
        },
        # Half an hour on two processor cores (docs/benchmarks.md).
        "fast": {
            "image_size": 224,
            "options": {"steps": 2000, "batch_size": 8, "stored": 2000},
        },
    }
    options: InpFormerOptions
    network: InpNetwork

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        super().__init__(options, backbone, layers, seed)
        if not backbone.transformer or len(self.layers) != _TAPS:
            raise InputError(
                f"inp-former with layers {list(self.layers)} of {backbone.id}: it needs "
                f"{_TAPS} layers of a vision transformer"
            )
        if self.options.decoder_blocks % self.options.groups:
            raise InputError(
                f"option decoder_blocks={self.options.decoder_blocks} of inp-former: "
                f"give a multiple of groups={self.options.groups}"
            )
        if self.options.score == "prototypes" and not self.options.prototypes:
            raise InputError("option score=prototypes of inp-former needs prototypes of 1 or more")
        width = backbone.widths[self.layers[0]]
        heads = self.options.heads or max(width // 64, 1)
        if width % heads:
            raise InputError(
                f"option heads={heads} of inp-former: give a divisor of the {width} channels"
            )
        self.network = InpNetwork(width, heads, self.options, seed)
        self._stored = Banks()

    @classmethod
    def default_layers(cls, backbone: BackboneSpec) -> tuple[int, ...]:
        """Return eight middle blocks: 2 to 9 of twelve, every second from 4 to 18 of 24."""
        if not backbone.transformer or backbone.taps < _TAPS:
            raise InputError(
                f"inp-former needs a vision transformer of {_TAPS} blocks or more, and "
                f"{backbone.id} has {backbone.taps} layers; choose another (`anomalyst backbones`)"
            )
        step = backbone.taps // 12
        if step == 0:
            return tuple(range(backbone.taps - _TAPS, backbone.taps))
        return tuple(range(2 * step, 10 * step, step))

    @classmethod
    def condenser(cls, options: MethodOptions) -> Condenser:
        """Only the targets are kept of the eight maps: all else follows from them."""
        assert isinstance(options, InpFormerOptions)
        groups = options.groups
        return Condenser(f"means of {groups} groups", partial(group_means, groups=groups))

    @property
    def judges_unseen(self) -> bool:
        return self.options.score == "prototypes"

    def training_views(self, few_shot: bool) -> Sequence[View]:
        wanted = self.options.augment
        many = wanted == "always" or (few_shot and wanted == "few-shot")
        return variants() if many else (PLAIN,)

    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        """Keep ``stored`` prototypes: tokens F_Q of the references, of unit length, spread out."""
        if self.options.stored:
            tokens = torch.cat([self.network.fuse(maps).flatten(0, 1) for maps in views])
            unit = functional.normalize(tokens, dim=1)
            kept = thin_out(unit, self.options.stored, _PROJECTION, self.seed)
            self._stored.add(category, unit[kept])

    @torch.inference_mode()
    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        if self.options.score == "prototypes":
            tokens = self.network.fuse(features)
            distance = nearest_distance(tokens, self.network.extractor(tokens))
            maps = distance.view(-1, *features[0].shape[-2:])  # (B, N) -> (B, h, w)
        else:
            maps = reconstruction_distance(features, self.network.reconstruct(features))
            maps = self._with_stored(maps, features)
        return maps, image_score(maps, self.backbone.stride)

    def _with_stored(self, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return the geometric mean of the map and the distance to the nearest stored prototype.

        Of any category, as the category is not known. The mean of logarithms does not ask which of
        the two distances is the larger one, and that changes while training goes on.
        """
        bank = self._stored.joint
        if bank is None:
            return maps
        unit = functional.normalize(self.network.fuse(features), dim=2).flatten(0, 1)
        distance, _ = nearest_cosine(unit, bank)
        return (maps * distance.clamp(min=0).view_as(maps)).sqrt()

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        return {} if self._stored.joint is None else {"stored": self._stored.joint}

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        self._stored.load(references)

    def tensors(self) -> dict[str, Tensor]:
        stored = {f"{_STORED}{name}": bank for name, bank in self._stored.tensors().items()}
        return super().tensors() | stored

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self._stored.load(
            {k.removeprefix(_STORED): v for k, v in tensors.items() if k.startswith(_STORED)}
        )

    @property
    def explains(self) -> bool:
        return self.options.prototypes > 0

    @torch.inference_mode()
    def attention_maps(self, features: Sequence[Tensor]) -> Tensor:
        """Return what each INP stands for, ``[B, M, h, w]``: attention of decoder block 4."""
        tokens = self.network.fuse(features)
        prototypes = self.network.extractor(tokens)
        x = self.network.bottleneck(tokens)
        *before, shown = list(self.network.decoder)[:4]
        for block in before:
            x = block(x, prototypes)
        assert isinstance(shown, GuidedBlock)
        weights = shown.attention(x, prototypes).mean(dim=1)  # (B, H, N, M) -> (B, N, M)
        return weights.transpose(1, 2).reshape(len(x), -1, *features[0].shape[-2:])

    def heat_unit(self, category: str | None) -> float:
        if self.options.score == "prototypes":
            return 0.5
        return 0.1 if self.options.stored else 0.2


# ---- the network --------------------------------------------------------------------------------


class InpNetwork(nn.Module):
    """Extractor, bottleneck and decoder; called, it returns the losses of a batch.

    Parameters
    ----------
    width
        Channels C of the tapped maps.
    heads
        Attention heads; must divide ``width``.
    seed
        Of the initial weights: linear ones truncated normal of standard deviation 0.01.
    """

    def __init__(self, width: int, heads: int, options: InpFormerOptions, seed: int) -> None:
        super().__init__()
        self.options = options
        # Layers draw their first weights from the global generator, which must stay untouched.
        with torch.random.fork_rng(devices=[]):
            self.bottleneck = Mlp(width)
            if options.prototypes:
                self.extractor = Extractor(width, heads, options)
            block = GuidedBlock if options.prototypes else PlainBlock
            self.decoder = nn.ModuleList(
                block(width, heads, options) for _ in range(options.decoder_blocks)
            )
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03, generator=generator)
                nn.init.zeros_(module.bias)
        if options.prototypes:
            nn.init.normal_(self.extractor.tokens, generator=generator)

    def fuse(self, targets: Sequence[Tensor]) -> Tensor:
        """Return the tokens F_Q ``[B, N, C]`` of the target maps ``[B, C, h, w]``."""
        total = sum(targets[1:], start=targets[0])
        scale = _TAPS if self.options.fusion == "sum" else 1
        return (total * (scale / len(targets))).flatten(2).transpose(1, 2)

    def forward(self, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``soft_mining`` and ``coherence``, scalars."""
        tokens = self.fuse(targets)
        prototypes = self.extractor(tokens) if self.options.prototypes else None
        rebuilt = self.decode(tokens, prototypes, targets[0].shape[-2:])
        mining = soft_mining_loss(targets, rebuilt, self.options.gamma)
        if prototypes is None:
            return {"loss": mining, "soft_mining": mining}
        coherence = nearest_distance(tokens, prototypes).mean()
        loss = mining + self.options.coherence * coherence
        return {"loss": loss, "soft_mining": mining, "coherence": coherence}

    def reconstruct(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Return the reconstruction ``[B, C, h, w]`` of every target."""
        tokens = self.fuse(targets)
        prototypes = self.extractor(tokens) if self.options.prototypes else None
        return self.decode(tokens, prototypes, targets[0].shape[-2:])

    def decode(
        self, tokens: Tensor, prototypes: Tensor | None, grid: Sequence[int]
    ) -> list[Tensor]:
        """Return the group means of the decoder's outputs, the last block's group first."""
        x = self.bottleneck(tokens)
        outputs = []
        for block in self.decoder:
            x = block(x, prototypes)
            outputs.append(x)
        means = group_means(outputs[::-1], self.options.groups)
        # (B, N, C) -> (B, C, h, w)
        return [mean.transpose(1, 2).reshape(*x.shape[::2], *grid) for mean in means]


class Mlp(nn.Module):
    """Two linear layers with GELU between, ``[..., C]`` to ``[..., C]`` through 4 C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class CrossAttention(nn.Module):
    """Projections of queries, keys and values, split into heads."""

    def __init__(self, width: int, heads: int, bare: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Identity() if bare else nn.Linear(width, width)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q ``[B, H, N, d]`` of ``x``, k and v ``[B, H, M, d]`` of ``source``."""
        batch, _, width = x.shape
        q = self.q(x).view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
        kv = self.kv(source).view(batch, -1, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, M, 2, H, d) -> 2 x (B, H, M, d)
        return q, k, v


class Extractor(nn.Module):
    """INP extractor (eq. 1): tokens ``[B, N, C]`` to prototypes ``[B, M, C]``."""

    def __init__(self, width: int, heads: int, options: InpFormerOptions) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(options.prototypes, width))
        self.norm1 = _norm(width, options.bare)
        self.attn = CrossAttention(width, heads, options.bare)
        self.norm2 = _norm(width, options.bare)
        self.mlp = Mlp(width)

    def forward(self, features: Tensor) -> Tensor:
        start = self.tokens.expand(features.shape[0], -1, -1)
        q, k, v = self.attn.split(self.norm1(start), self.norm1(features))
        read = functional.scaled_dot_product_attention(q, k, v)  # softmax over the N tokens
        x: Tensor = start + self.attn.proj(read.transpose(1, 2).flatten(2))
        prototypes: Tensor = x + self.mlp(self.norm2(x))
        return prototypes


class GuidedBlock(nn.Module):
    """INP-guided decoder block (eq. 3): each token by itself, given the prototypes."""

    def __init__(self, width: int, heads: int, options: InpFormerOptions) -> None:
        super().__init__()
        self.options = options
        self.norm1 = _norm(width, options.bare)
        self.attn = CrossAttention(width, heads, options.bare)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.norm2 = _norm(width, options.bare)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        weights, values = self._weights(x, prototypes)
        proj = self.attn.proj
        if isinstance(proj, nn.Linear):
            # Projecting the M values of each head, not the N tokens, gives the same sum for less.
            rows = proj.weight.T.reshape(self.attn.heads, -1, x.shape[2])  # (C, C) -> (H, d, C)
            values = (values @ rows).flatten(1, 2)  # (B, H, M, d) (H, d, C) -> (B, H M, C)
            y = torch.baddbmm(proj.bias, weights.transpose(1, 2).flatten(2), values)
        else:
            y = (weights @ values).transpose(1, 2).flatten(2)
        kept = y if self.options.skip == "attention" else x
        rebuilt: Tensor = kept + self.mlp(self.norm2(y))
        return rebuilt

    def attention(self, x: Tensor, prototypes: Tensor) -> Tensor:
        """Return the weights ``[B, H, N, M]``, none negative, that combine the prototypes."""
        return self._weights(x, prototypes)[0]

    def _weights(self, x: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.attn.split(self.norm1(x), self.norm1(prototypes))
        if self.options.similarity == "dot":
            return functional.relu(q @ k.transpose(2, 3)), v
        k = functional.normalize(k, dim=-1) * self.scale
        # Dividing the M products of a token is cheaper than the d values of its query.
        length = q.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return functional.relu(q @ k.transpose(2, 3) / length), v


class PlainBlock(nn.Module):
    """The baseline's decoder block: self-attention and MLP, both with residuals."""

    def __init__(self, width: int, heads: int, options: InpFormerOptions) -> None:
        super().__init__()
        self.norm1 = _norm(width, options.bare)
        self.attn = CrossAttention(width, heads, options.bare)
        self.norm2 = _norm(width, options.bare)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, _: None) -> Tensor:
        inside = self.norm1(x)
        read = functional.scaled_dot_product_attention(*self.attn.split(inside, inside))
        y = x + self.attn.proj(read.transpose(1, 2).flatten(2))
        out: Tensor = y + self.mlp(self.norm2(y))
        return out


def _norm(width: int, bare: bool) -> nn.Module:
    return nn.Identity() if bare else nn.LayerNorm(width, eps=1e-8)


# ---- losses and scores --------------------------------------------------------------------------


def group_means(maps: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Return the means of ``groups`` equal runs of maps."""
    size = len(maps) // groups
    return [sum(maps[k + 1 : k + size], maps[k]) / size for k in range(0, len(maps), size)]


def nearest_distance(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return each token's cosine distance to the nearest INP, ``[B, N]`` in [0, 2] (eq. 2)."""
    unit = functional.normalize(tokens, dim=-1, eps=1e-8)
    similarity = unit @ functional.normalize(prototypes, dim=-1, eps=1e-8).transpose(1, 2)
    return 1 - similarity.max(dim=-1).values


def soft_mining_loss(targets: Sequence[Tensor], rebuilt: Sequence[Tensor], gamma: float) -> Tensor:
    """Return the soft mining loss (eq. 4) of maps ``[B, C, h, w]``: mean over groups and images.

    The value is that of the plain cosine distance of flattened maps; gradients are weighted.
    """
    losses = []
    for target, output in zip(targets, rebuilt, strict=True):
        e, r = target.detach().float(), output.float()
        with torch.no_grad():
            distance = (1 - functional.cosine_similarity(e, r)).clamp(min=0)  # (B, h, w)
            mean = average_over_processes(distance.mean()).clamp(min=1e-12)
            weight = (distance / mean).pow(gamma)[:, None]
        # Equal to r in value; its gradient is the weighted one.
        r = r + (weight - 1) * (r - r.detach())
        losses.append(1 - functional.cosine_similarity(e.flatten(1), r.flatten(1)).mean())
    return torch.stack(losses).mean()


def reconstruction_distance(targets: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """Return the mean over groups of each position's cosine distance, ``[B, h, w]`` in [0, 2]."""
    distances = [
        1 - functional.cosine_similarity(e, r) for e, r in zip(targets, rebuilt, strict=True)
    ]
    return torch.stack(distances).mean(0)


def smoothed_map(maps: Tensor, stride: int) -> Tensor:
    """Return maps ``[B, h, w]`` as the official code compares them, short side 256 pixels.

    Upsampled to the network's input with aligned corners, then to 256 without; smoothed by a 5 x 5
    Gaussian of sigma 4 with zeros outside, which damps the border.
    """
    height, width = maps.shape[-2:]
    short: Any = torch.sym_min(height, width)
    side = [(2 * _SIDE * long + short) // (2 * short) for long in (height, width)]  # rounded
    full = functional.interpolate(
        maps[:, None], (height * stride, width * stride), mode="bilinear", align_corners=True
    )
    small = functional.interpolate(full, side, mode="bilinear")
    line = torch.exp(-0.5 * (torch.arange(-2, 3).to(maps) / 4) ** 2)
    kernel = torch.outer(line, line)
    kernel = kernel / kernel.sum()
    return functional.conv2d(small, kernel[None, None], padding=2)[:, 0]


def image_score(maps: Tensor, stride: int) -> Tensor:
    """Return the mean ``[B]`` of the highest 1 % of the smoothed map's pixels."""
    return top_mean(smoothed_map(maps, stride), _TOP)
