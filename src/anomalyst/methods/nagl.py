"""NAGL: normal and abnormal references guide a generalist that is trained once, on other products.

Wang et al., "Normal-Abnormal Guided Generalist Anomaly Detection", NeurIPS 2025, arXiv 2510.00495;
official code commit ``5466edf``. Patches f of a frozen backbone, query q, references n and a:

1. Normal-guided score: ``S_n = min d(f^q, f^n)`` with ``d = (1 - cos) / 2``.
2. Residual: ``Res(F) = f - f^n_nn``, the difference to the nearest normal patch.
3. Residual Mining: learnable proxies P attend to the patches inside the abnormal references' masks
   (keys F^a, values Res(F^a)), then to each other: residual proxies P~. Once, at `enroll`.
4. Anomaly Feature Learning: P~ attends to the query (keys Res(F^q), values F^q), then to itself:
   anomaly proxies P^.
5. ``S_a = mean_m (1 + cos(f^q, P^_m)) / 2`` and ``S = (S_n + S_a) / 2``; image score: mean of the
   highest 1 % of the patches.

Preset ``paper`` is that, trained by episodes with the paper's losses on S; ``compat`` is the
authors' code (losses on scores as logits, neighbours by inner product, shifted masks, position
codes that stand still inside a defect). The defaults (preset ``ours``) keep the two attentions and
mend what the sheet of the method and our measurements found wrong with the rest:

- ``guidance = evidence``: ``S = S_n exp(a (rho+ - rho-) + b sigmoid(z))`` with learned a, b >= 0.
  rho+ is the largest cosine of a patch's residual to those of the known defects, rho- to those of
  the healthy parts around them: what good parts differ by is no defect. z is a logit of S_a and of
  AFL's own attention. What equals a normal reference scores exactly 0.
- The healthy parts of abnormal references are normal patches too.
- Each abnormal reference has its own proxies and the largest z counts; only patches that stand out
  from the healthy rest of their image are mined (so their number adapts to the defect).
- Patches get the length of layer-normed ones: proxies and position codes would drown others.
- ``loss = rank``: within an episode the abnormal query shall score above the normal one, and its
  defect above the highest normal patches. Scores of different products lie on different scales,
  which losses on their values make the network fight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log, sqrt
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError, unknown
from anomalyst.features.backbones import BackboneSpec
from anomalyst.methods.base import (
    AbnormalReference,
    MethodOptions,
    TrainedMethod,
    TrainingOptions,
    stepped,
)
from anomalyst.methods.episodes import Draw, Episode, Episodes
from anomalyst.methods.memory_bank import (
    nearest_cosine,
    resize_like,
    to_map,
    to_patches,
    top_mean,
)
from anomalyst.methods.nagl_guide import Guide, guide_from, references_of
from anomalyst.methods.nagl_losses import logit_losses, ranking_losses, score_losses
from anomalyst.methods.proxy_attention import (
    ProxyAttention,
    grid_places,
    position_code,
    reference_codes,
)
from anomalyst.methods.residuals import Mined, mined, nearest_normal, shifted_pooling
from anomalyst.methods.views import PLAIN, View, turned
from anomalyst.training_data import TrainingFeatures

_DERIVED = 2  # fields of a `Guide`, the first, that follow from the normal patches alone
_TOP = 0.01  # share of patches that the image score means


class NaglOptions(TrainingOptions):
    """Options of NAGL."""

    epochs: int = Field(5, ge=1, description="passes of so many episodes")
    episodes: int = Field(500, ge=1, description="episodes a pass")
    batch_size: int = Field(8, ge=1, description="episodes a step")
    learning_rate: float = Field(5e-4, gt=0, description="after warm-up")
    final_learning_rate: float = Field(1e-6, ge=0, description="at the end of the half cosine")
    warmup: int = Field(30, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, description="of all weights")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a step's whole gradient")
    schedule: Literal["cosine", "steps"] = Field(
        "cosine", description="steps: no warm-up, a tenth after half and after three quarters"
    )
    normals: int = Field(4, ge=1, description="normal references of an episode, at most")
    abnormals: int = Field(2, ge=1, description="abnormal references of an episode, at most")
    draws: Literal["varied", "fixed"] = Field(
        "varied",
        description="fixed: always as many references, and queries of their type of defect",
    )
    loss: Literal["rank", "scores", "logits"] = Field(
        "rank", description="scores: the paper's; logits: the authors' code's"
    )
    guidance: Literal["evidence", "sum"] = Field("evidence", description="sum: the paper's S")
    parts: Literal["full", "normal", "abnormal", "naive"] = Field(
        "full", description="others: nearest neighbours only, for the ablation"
    )
    proxies: int = Field(25, ge=1, description="number M of learnable proxies")
    heads: int = Field(4, ge=1, description="attention heads")
    pooling: Literal["each", "joint"] = Field(
        "each", description="joint: one set of proxies for all abnormal references"
    )
    positions: Literal["none", "grid", "masked"] = Field(
        "none", description="code added to keys; masked: stands still inside defects"
    )
    matching: Literal["cosine", "inner-product"] = Field(
        "cosine", description="how a residual's normal patch is found"
    )
    mask_pooling: Literal["exact", "shifted"] = Field(
        "exact", description="shifted: masks one pixel off, as in the authors' code"
    )
    rotations: int = Field(1, ge=1, description="views of each normal reference, evenly turned")
    healthy_parts: bool = Field(True, description="abnormal images' good parts are normal patches")
    standing_out: bool = Field(True, description="mine only what stands out from the good parts")
    unit_length: bool = Field(True, description="bring patches to the length of layer-normed ones")
    null_token: bool = Field(True, description="AFL may look at nothing")

    def planned_steps(self, images: int, batch: int) -> int:
        """Return the steps: passes of episodes, whatever the number of images."""
        return self.steps or self.epochs * ceil(self.episodes / self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, by the schedule chosen."""
        if self.schedule == "cosine":
            return super().rate(step, steps)
        return self.learning_rate * stepped(step, steps, 0.5, 0.75)


_PAPER: Mapping[str, Any] = {
    "epochs": 20,
    "learning_rate": 1e-5,
    "schedule": "steps",
    "clip": None,
    "draws": "fixed",
    "normals": 1,
    "abnormals": 1,
    "loss": "scores",
    "guidance": "sum",
    "pooling": "joint",
    "positions": "grid",
    "healthy_parts": False,
    "standing_out": False,
    "unit_length": False,
    "null_token": False,
}
_PAPER_INPUT: Mapping[str, Any] = {
    "backbone": "dinov2-small",
    "layers": [11],
    "image_size": 448,
    "square": True,
}
_AS_AUTHORS: Mapping[str, Any] = {
    "loss": "logits",
    "positions": "masked",
    "matching": "inner-product",
    "mask_pooling": "shifted",
}


# ---- the network --------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Score maps ``[B, h, w]``: fused, normal-guided and anomaly-guided."""

    fused: Tensor
    normal: Tensor
    abnormal: Tensor


Defect = tuple[Tensor, Tensor, bool]
"""An abnormal map ``[C, h, w]``, its defect's coverage ``[h, w]``, and whether a mask was given."""


class NaglNetwork(nn.Module):
    """Residual Mining, Anomaly Feature Learning, and the scores that they guide."""

    def __init__(self, width: int, options: NaglOptions, stride: int) -> None:
        super().__init__()
        self.options = options
        self.stride = stride
        self.proxies = nn.Parameter(torch.randn(options.proxies, width))
        self.mine_cross = ProxyAttention(width, options.heads)
        self.mine_self = ProxyAttention(width, options.heads)
        self.learn_cross = ProxyAttention(width, options.heads, options.null_token)
        self.learn_self = ProxyAttention(width, options.heads)
        if options.guidance == "evidence":
            # a and b, before softplus.
            self.gains = nn.Parameter(torch.tensor([0.5, 0.05]).expm1().log())
            # Weights of S_a's contrast and of the attention, offset; log sharpness over proxies.
            self.logit = nn.Parameter(torch.tensor([2.0, 0.05, 0.0, 3.0]))

    def defect(self, maps: Tensor, coverage: Tensor, mask: Tensor) -> Defect:
        """Return an abnormal map with the patches that its mask marks."""
        if self.options.mask_pooling == "shifted":
            coverage = shifted_pooling(mask, self.stride)
        return maps, coverage, True

    def bank(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Return normal patches ``[N, C]`` at the network's length and at unit length."""
        scaled = self.scaled(normal)
        return scaled, functional.normalize(scaled, dim=1)

    def guide(self, normal: Tensor, defects: Sequence[Defect]) -> Guide:
        """Return what normal patches ``[N, C]`` and abnormal references come to."""
        options = self.options
        normal, unit = self.bank(normal)
        parts = [
            mined(self.scaled(maps), cover, normal, unit, options.matching, options.standing_out)
            for maps, cover, _ in defects
        ]
        none = normal.new_zeros(0, normal.shape[1])
        good, differ = [none], [none]
        if options.healthy_parts and options.parts == "full":
            for part, (_, _, given) in zip(parts, defects, strict=True):
                if given:  # around a defect that was only found, who knows
                    good.append(part.patches[part.healthy])
                    differ.append(part.residuals[part.healthy])
        inside = [none, *(part.patches[part.inside] for part in parts)]
        kept = [none, *(part.residuals[part.kept] for part in parts)]
        return Guide(
            normal,
            unit,
            _unit(good),
            _unit(differ),
            _unit(inside),
            _unit(kept),
            self._residual_proxies(parts, [cover for _, cover, _ in defects]),
        )

    def _residual_proxies(self, parts: Sequence[Mined], covers: Sequence[Tensor]) -> Tensor:
        """Residual Mining: return P~ of each abnormal reference, or of all together."""
        if not parts:
            return self.proxies.new_zeros(0, *self.proxies.shape)
        codes = reference_codes(self.options.positions, covers, self.proxies.shape[1])
        keys = [(p.patches + code)[p.kept] for p, code in zip(parts, codes, strict=True)]
        values = [part.residuals[part.kept] for part in parts]
        if self.options.pooling == "joint":
            return self.mine(torch.cat(keys)[None], torch.cat(values)[None])
        each = [self.mine(k[None], v[None]) for k, v in zip(keys, values, strict=True)]
        return torch.cat(each)

    def mine(self, keys: Tensor, residuals: Tensor) -> Tensor:
        """Return residual proxies ``[B, M, C]`` of a defect's patches ``[B, N, C]`` (RM)."""
        mined, _ = self.mine_cross(self.proxies.expand(len(keys), -1, -1), keys, residuals)
        return self.mine_self(mined, mined, mined)[0]  # type: ignore[no-any-return]

    def learn(
        self, proxies: Tensor, keys: Tensor, values: Tensor, sets: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return anomaly proxies ``[B, M, C]`` and AFL's logits ``[B, heads, M, N]``.

        ``proxies`` are so many ``sets`` of the same size in a row, which do not see each other.
        """
        found, logits = self.learn_cross(proxies, keys, values)
        width = found.shape[2]
        apart = found.reshape(-1, found.shape[1] // sets, width)  # (B * sets, M / sets, C)
        return self.learn_self(apart, apart, apart)[0].reshape(found.shape), logits

    def score(self, guide: Guide, maps: Tensor) -> Scores:
        """Return the scores of feature maps ``[B, C, h, w]``."""
        maps = self.scaled(maps)
        patches = to_patches(maps)
        unit = functional.normalize(patches, dim=1)
        normal, residual = nearest_normal(patches, guide.bank, guide.unit, self.options.matching)
        if guide.healthy.shape[0]:
            normal = normal.minimum(nearest_cosine(unit, guide.healthy)[0].clamp(min=0) / 2)
        s_n = to_map(normal, maps)
        parts = self.options.parts
        if parts == "normal" or not guide.proxies.shape[0]:
            return Scores(s_n, s_n, torch.zeros_like(s_n))
        if parts != "full":
            s_a = to_map(1 - nearest_cosine(unit, guide.defects)[0] / 2, maps)
            return Scores(s_a if parts == "abnormal" else (s_n + s_a) / 2, s_n, s_a)
        s_a = self._anomaly_guided(guide, maps, residual, s_n)
        if self.options.guidance == "sum":
            return Scores((s_n + s_a) / 2, s_n, s_a)
        difference = functional.normalize(residual, dim=1)
        rho = 1 - nearest_cosine(difference, guide.residuals)[0]
        if guide.differences.shape[0]:
            rho = rho - (1 - nearest_cosine(difference, guide.differences)[0])
        a, b = functional.softplus(self.gains)
        return Scores(s_n * torch.exp(a * to_map(rho, maps) + b * s_a), s_n, s_a)

    def _anomaly_guided(self, guide: Guide, maps: Tensor, residual: Tensor, s_n: Tensor) -> Tensor:
        """Anomaly Feature Learning: return S_a ``[B, h, w]``, of several proxies the largest."""
        batch, width, *grid = maps.shape
        tokens = maps.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        keys = residual.view(batch, -1, width)
        if self.options.positions != "none":
            keys = keys + position_code(grid_places(*grid), width).to(maps)
        sets, count = guide.proxies.shape[:2]
        proxies = guide.proxies.flatten(0, 1).expand(batch, -1, -1)  # (B, K * M, C)
        anomaly, logits = self.learn(proxies, keys, tokens, sets)
        anomaly = anomaly.view(batch, sets, count, width)
        logits = logits.view(batch, -1, sets, count, logits.shape[3])
        found = self._likeness(tokens, anomaly, logits, s_n.flatten(1)[:, None])
        return found.amax(1).view_as(s_n)

    def _likeness(self, tokens: Tensor, anomaly: Tensor, logits: Tensor, s_n: Tensor) -> Tensor:
        """Return S_a ``[B, K, N]`` in [0, 1] of K sets of anomaly proxies."""
        unit = functional.normalize(tokens, dim=-1)[:, None]
        cosine = unit @ functional.normalize(anomaly, dim=-1).mT  # (B, K, N, M)
        if self.options.guidance == "sum":
            return (1 + cosine.mean(-1)) / 2
        contrast, attention, offset, sharpness = self.logit
        count, sharp = log(cosine.shape[-1]), sharpness.exp()
        best = ((cosine * sharp).logsumexp(-1) - count) / sharp
        seen = (logits.logsumexp(3) - count).mean(1)  # over proxies, then heads: (B, K, N)
        # cos(f, P^) against cos(f, f^n) = 1 - 2 S_n, halved to distances.
        return torch.sigmoid(contrast * ((1 + best) / 2 - (1 - s_n)) + attention * seen + offset)

    def scaled(self, patches: Tensor) -> Tensor:
        """Return patches ``[N, C]`` or a map ``[..., C, h, w]`` at the network's length."""
        if not self.options.unit_length:
            return patches
        channels = 1 if patches.ndim == 2 else -3
        return functional.normalize(patches, dim=channels) * sqrt(patches.shape[channels])

    def forward(self, part: Sequence[Sequence[Episode]]) -> dict[str, Tensor]:
        """Return the losses of a step's episodes by name, ``loss`` their sum."""
        each = [self._losses(episode) for episode in part[0]]
        return {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}

    def _losses(self, episode: Episode) -> dict[str, Tensor]:
        normal = torch.cat([to_patches(maps[None]) for maps in episode.normals])
        guide = self.guide(normal, [self.defect(*given) for given in episode.abnormals])
        scores = [self.score(guide, query[None]) for query in episode.queries]
        if self.options.loss == "rank":
            return ranking_losses(scores[0].fused[0], scores[1].fused[0], episode.masks[1])
        maps, mask = scores[0], episode.masks[0]
        if self.options.loss == "scores":
            return score_losses(maps.fused[0], mask)
        return logit_losses(maps.fused[0], maps.normal[0], maps.abnormal[0], mask)


def _unit(rows: Sequence[Tensor]) -> Tensor:
    return functional.normalize(torch.cat(list(rows)), dim=1)


# ---- the method ---------------------------------------------------------------------------------


class Nagl(TrainedMethod):
    """A generalist: trained on a source domain, then guided by references of a new product."""

    name: ClassVar[str] = "nagl"
    Options: ClassVar[type[MethodOptions]] = NaglOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**_PAPER_INPUT, "options": _PAPER},
        "compat": {**_PAPER_INPUT, "options": {**_PAPER, **_AS_AUTHORS}},
        "ours": {},
    }
    options: NaglOptions
    network: NaglNetwork

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        super().__init__(options, backbone, layers, seed)
        width = sum(backbone.widths[layer] for layer in layers)
        if width % self.options.heads:
            raise InputError(
                f"option heads={self.options.heads} of nagl: give a divisor of the {width} channels"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = NaglNetwork(width, self.options, backbone.strides[layers[0]])
        self.network.eval()
        self._normal: dict[str, Tensor] = {}
        self._defects: dict[str, list[Defect]] = {}
        self._guides: dict[str, Guide] = {}
        self._guided: Tensor | None = None

    @property
    def judges_unseen(self) -> bool:
        return True

    @property
    def reference_views(self) -> Sequence[View]:
        return turned(self.options.rotations)

    def training_views(self, few_shot: bool) -> Sequence[View]:
        return (PLAIN,)

    def source(self, features: TrainingFeatures) -> Episodes:
        options = self.options
        draw = Draw(
            options.normals, options.abnormals, options.draws == "varied", options.loss == "rank"
        )
        steps = options.planned_steps(0, options.batch_size)
        return Episodes(features, steps * options.batch_size, draw, self.seed)

    @torch.inference_mode()
    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        fresh = [to_patches(resize_like(features)) for features in views]
        known = [self._normal[category]] if category in self._normal else []
        self._normal[category] = torch.cat([*known, *fresh])
        self._guide(category)

    @torch.inference_mode()
    def enroll_abnormal(self, category: str, references: Sequence[AbnormalReference]) -> None:
        known = self._defects.setdefault(category, [])
        for reference in references:
            maps = resize_like(reference.maps)[0]
            if reference.coverage is None or reference.mask is None:
                known.append((maps, self._found(category, maps), False))
            else:
                known.append(self.network.defect(maps, reference.coverage, reference.mask))
        self._guide(category)

    def _guide(self, category: str) -> None:
        self._guides[category] = self.network.guide(
            self._normal[category], self._defects.get(category, [])
        )

    def _found(self, category: str, maps: Tensor) -> Tensor:
        """Return where an unmasked defect is: the upper half of its own range of S_n."""
        normal = self._normal[category]
        distance, _ = nearest_normal(
            to_patches(maps[None]), normal, functional.normalize(normal, dim=1)
        )
        middle = (distance.median() + distance.max()) / 2
        return (distance >= middle).float().view(maps.shape[-2:])

    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        if category is None or category not in self._guides:
            raise unknown("category", category or "", self._guides)
        with torch.inference_mode():
            scores = self.network.score(self._guides[category], resize_like(features))
            maps = scores.fused
            if self._guided is not None:
                maps = torch.where(self._guided > 0, maps, scores.normal)
        return maps, top_mean(maps, _TOP)

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        guided = any(len(guide.proxies) for guide in self._guides.values())
        return references_of(self._guides[category or ""], self.network.proxies, guided)

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        self._guides = {category or "": guide_from(references)}
        self._guided = references.get("guided")

    def heat_unit(self, category: str | None) -> float:
        guide = self._guides.get(category or "")
        if guide is None or not len(guide.defects):
            return 0.15
        distance, _ = nearest_cosine(guide.defects, guide.unit)  # of the known defects' patches
        return max(float(distance.median()) / 2, 0.05)

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        for category, normal in self._normal.items():
            found[f"normal.0.{category}"] = normal
            for number, (maps, cover, given) in enumerate(self._defects.get(category, [])):
                found[f"abnormal.{number}.{category}"] = maps
                found[f"{'given' if given else 'found'}.{number}.{category}"] = cover
            if self._defects.get(category):
                mined = self._guides[category][_DERIVED:]
                found |= {f"guide.{k}.{category}": value for k, value in enumerate(mined)}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        kinds: dict[str, dict[tuple[str, int], Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind != "network":
                number, _, category = rest.partition(".")
                kinds.setdefault(category, {})[kind, int(number)] = value
        for category, known in kinds.items():
            self._normal[category] = known["normal", 0]
            defects = [(n, maps) for (kind, n), maps in known.items() if kind == "abnormal"]
            for n, maps in sorted(defects, key=lambda pair: pair[0]):
                given = ("given", n) in known
                cover = known["given" if given else "found", n]
                self._defects.setdefault(category, []).append((maps, cover, given))
            if defects:
                mined = [known["guide", k] for k in range(len(Guide._fields) - _DERIVED)]
                self._guides[category] = Guide(*self.network.bank(self._normal[category]), *mined)
            else:
                self._guide(category)
