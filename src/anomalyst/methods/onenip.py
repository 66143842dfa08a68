r"""OneNIP: reconstruct an image's features with one normal image as the prompt.

Gao, "Learning to Detect Multi-class Anomalies with Just One Normal Image Prompt", ECCV 2024, arXiv
2505.09264; official code gaobb/OneNIP, commit ``e93dec5``. Features :math:`F` of a frozen backbone,
levels resized to one grid and joined (`join_levels`):

1. Prompt: a normal image of the same category; in training another one for every image and step.
2. Encoder: target and prompt pass the same neighbour-masked self-attention, each by itself.
3. Bidirectional decoder (eq. 3): the prompt's tokens read the target's, the target's read the
   prompt's; what comes out of the prompt's stream is the reconstruction :math:`\hat F`.
4. Restoration, in training only: a pseudo-anomaly is rebuilt as the image that it was made of.
   :math:`L_{rec} = |\hat F(x) - F(x)|^2`, :math:`L_{res} = |\hat F(x') - F(x)|^2`, means.
5. Refiner: two upsampling convolutions on :math:`|\hat F - F|` that predict the pseudo-anomaly's
   mask; Dice loss.
6. Map: :math:`S = (1 - \alpha) S_{rec} + \alpha \kappa S_{ref}`, at the network's input size, with
   :math:`S_{rec} = |F - \hat F|_2` and S_ref the refiner's probability. Image score: the highest
   mean over 16 x 16 pixels.

The defaults follow the official code, but that the fusion scale :math:`\kappa` comes from the
training images instead of the whole test set. ``decoder = legacy`` is the form that the paper's
figures come from (see `BidirectionalLayer`), ``query`` its baseline UniAD. Beyond the paper: grids
of any shape, several prompts a category, pools of pseudo-anomalies whose features are computed
once, and the preset ``fast``, whose refiner learns from good images too (``loss = balanced``) and
leaves the transformer alone (``detach``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError, unknown
from anomalyst.features.backbones import BackboneSpec
from anomalyst.methods.base import (
    Condenser,
    MethodOptions,
    TrainedMethod,
    TrainingOptions,
    stepped,
)
from anomalyst.methods.onenip_losses import segmentation_loss
from anomalyst.methods.prompt_decoders import (
    BidirectionalDecoder,
    Decoder,
    EncoderLayer,
    PositionCode,
    QueryDecoder,
    cell_means,
    neighbour_mask,
    resized,
)
from anomalyst.methods.prompted import Prompted
from anomalyst.methods.synthesis import Synthesizer
from anomalyst.methods.textures import by_category, find_textures
from anomalyst.methods.views import PLAIN, View
from anomalyst.retrieval import describe
from anomalyst.training_data import TrainingFeatures
from anomalyst.types import Sample

_POOL = 16  # side in pixels of the window that the image score means
_SCALED_ON = 64  # images that the fusion scale is taken of
_SHOWN = 4  # values of the score map a patch and axis
_ENCODED = 64  # grids and categories whose encoded prompts are remembered
_LEAST_DEVIATION = 0.05  # of the median channel's
_PROMPTS = "prompts."


class OneNipOptions(TrainingOptions):
    """Options of OneNIP."""

    epochs: int = Field(1000, ge=1, description="passes over the training images")
    batch_size: int = Field(64, ge=1, description="images a step")
    learning_rate: float = Field(1e-4, gt=0, description="at its highest")
    final_learning_rate: float = Field(1e-5, ge=0, description="at the end of the half cosine")
    schedule: Literal["steps", "cosine"] = Field(
        "steps", description="steps: no warm-up, a tenth after four fifths"
    )
    width: int = Field(256, ge=2, description="channels d of the transformer")
    heads: int = Field(8, ge=1, description="attention heads")
    hidden: int = Field(1024, ge=1, description="channels inside its MLPs")
    encoder_layers: int = Field(4, ge=1, description="layers of the encoder")
    decoder_layers: int = Field(4, ge=1, description="layers of the decoder")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the transformer")
    jitter: float = Field(20.0, ge=0, description="scale of the noise on features in training")
    side: int = Field(16, ge=1, description="rows and columns of the learned position code")
    masked: Literal["all", "encoder"] = Field(
        "all", description="attention that cannot see a patch's neighbourhood"
    )
    decoder: Literal["dynamic", "static", "query", "legacy"] = Field(
        "dynamic", description="static: one way; query: UniAD, no prompt; legacy: before the fix"
    )
    standardize: bool = Field(False, description="bring channels to mean 0, deviation 1 first")
    restoration: bool = Field(True, description="train on pseudo-anomalies' reconstruction too")
    refiner: bool = Field(True, description="train and use the supervised refiner")
    detach: bool = Field(False, description="the refiner's loss does not train the transformer")
    loss: Literal["code", "paper", "balanced"] = Field(
        "code", description="paper: sums both errors, Dice with its factor of 2; balanced: ours"
    )
    segmentation: float = Field(0.5, ge=0, description="weight of the refiner's loss")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the refiner in the map")
    draw: Literal["random", "fixed", "nearest"] = Field(
        "random", description="prompts in training: any image, the first, or the most similar"
    )
    prompts: int = Field(1, ge=1, description="prompts kept a category")
    choice: Literal["nearest", "mean"] = Field(
        "nearest", description="of several prompts: the most similar, or the mean of all maps"
    )
    recipe: Literal["hybrid", "cutpaste", "perlin", "nsa"] = Field(
        "hybrid", description="how pseudo-anomalies are made"
    )
    textures: str = Field(
        "procedural", description="procedural, shuffled, others, or a folder of textures"
    )
    foreground: bool = Field(False, description="pseudo-anomalies on the object alone")
    pool: int = Field(0, ge=0, description="pseudo-anomalies an image, made once; 0: always fresh")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, by the schedule chosen."""
        if self.schedule == "cosine":
            return super().rate(step, steps)
        return self.learning_rate * stepped(step, steps, 0.8)


class OneNip(TrainedMethod):
    """One model of many categories; each needs one normal image beside the one to judge."""

    name: ClassVar[str] = "onenip"
    Options: ClassVar[type[MethodOptions]] = OneNipOptions
    sigma: ClassVar[float] = 0.0
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "backbone": "efficientnet-b4",
            "image_size": 224,
            "square": True,
            "options": {"side": 14},
        },
        # Under half an hour on two processor cores (docs/benchmarks.md).
        "fast": {
            "image_size": 224,
            "options": {
                "steps": 1500,
                "batch_size": 4,
                "schedule": "cosine",
                "learning_rate": 1e-3,
                "clip": 1.0,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "dropout": 0.0,
                "standardize": True,
                "detach": True,
                "loss": "balanced",
                "pool": 4,
            },
        },
    }
    options: OneNipOptions
    network: OneNipNetwork

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        super().__init__(options, backbone, layers, seed)
        if self.options.width % self.options.heads or self.options.width % 2:
            raise InputError(
                f"option width={self.options.width} of onenip: give an even multiple of "
                f"heads={self.options.heads}"
            )
        channels = sum(backbone.widths[layer] for layer in layers)
        stride = max(backbone.strides[layer] for layer in layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = OneNipNetwork(channels, stride, self.options)
        self.network.eval()
        self._prompts: dict[str, Tensor] = {}
        self._encoded: dict[tuple[str, tuple[int, int]], Tensor] = {}
        self._taken: Mapping[str, Tensor] = {}

    @classmethod
    def default_layers(cls, backbone: BackboneSpec) -> tuple[int, ...]:
        """Return the levels of stride 2 to 16 of a CNN, or two blocks of a ViT."""
        late = backbone.default_taps[-1]
        two = dict.fromkeys(((late + 1) // 2, late))
        return tuple(two) if backbone.transformer else tuple(backbone.default_taps)

    @classmethod
    def condenser(cls, options: MethodOptions) -> Condenser:
        """Only the joined levels are kept."""
        return Condenser("levels joined", join_levels)

    def training_views(self, few_shot: bool) -> Sequence[View]:
        return (PLAIN,)

    def require_trainable(self, samples: Sequence[Sample]) -> None:
        self._synthesizer(samples)

    def _synthesizer(self, samples: Sequence[Sample]) -> Synthesizer | None:
        options = self.options
        if not (options.restoration or options.refiner):
            return None
        textures = find_textures(options.textures, by_category(samples))
        return Synthesizer(options.recipe, textures, options.foreground)

    def source(self, features: TrainingFeatures) -> Prompted:
        options = self.options
        synthesizer = self._synthesizer(features.samples)
        source = Prompted(features, synthesizer, options.pool, options.draw, self.seed)
        source.require_visible()
        if options.standardize:
            self.network.standardize(source.statistics())
        return source

    def finish(self, source: Prompted) -> None:
        """Fix the fusion scale: the middle of S_rec's range, over new pseudo-anomalies."""
        extremes = []
        with torch.inference_mode():
            for _, pseudo, _, prompts in source.held_out(_SCALED_ON, self.options.batch_size):
                maps, _ = self.network.maps(pseudo, self.network.encode(prompts))
                extremes += [maps.amin(), maps.amax()]
        both = torch.stack(extremes)
        self.network.scale.copy_((both.min() + both.max()) / 2)

    # ---- prompts --------------------------------------------------------------------------------

    @torch.inference_mode()
    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        """Keep ``prompts`` of the images: the most typical one, then those least like the kept.

        Those of another shape are brought to the shape of the first.
        """
        known = [self._prompts[category]] if category in self._prompts else []
        maps = [*known, *(features[0] for features in views)]
        shape = maps[0].shape[-2:]
        self._prompts[category] = _spread(
            torch.cat([resized(each, shape) for each in maps]), self.options.prompts
        )
        self._encoded = {key: value for key, value in self._encoded.items() if key[0] != category}

    def _tokens(self, category: str, grid: tuple[int, int]) -> Tensor:
        """Return a category's encoded prompts ``[K, L, d]`` on a grid, computed once."""
        if (prompts := self._taken.get("prompts")) is not None:
            known = self._taken.get("encoded")
            return known if known is not None else self.network.encode(resized(prompts, grid))
        if (category, grid) not in self._encoded:
            if len(self._encoded) >= _ENCODED:
                self._encoded.clear()
            prompts = resized(self._prompts[category], grid)
            self._encoded[category, grid] = self.network.encode(prompts)
        return self._encoded[category, grid]

    @torch.inference_mode()
    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        if category is None or category not in self._prompts:
            raise unknown("category", category or "", self._prompts)
        maps = features[0]
        tokens = self._tokens(category, (maps.shape[-2], maps.shape[-1]))
        if tokens.shape[0] > 1 and self.options.choice == "nearest":
            chosen = (describe([maps]) @ describe([self._prompts[category]]).T).argmax(1)
            prompts = [tokens[chosen]]
        else:
            prompts = [one.expand(maps.shape[0], -1, -1) for one in tokens]
        found = torch.stack([self.network.judge(maps, each) for each in prompts]).mean(0)
        # Four values a patch are as fine as the refiner sees; at its centres, not at corners.
        return cell_means(found, self.network.stride, _SHOWN), image_score(found)

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        prompts = self._prompts[category or ""]
        if size is None:
            return {"prompts": prompts}
        grid = (size[0] // self.network.stride, size[1] // self.network.stride)
        return {"prompts": prompts, "encoded": self._tokens(category or "", grid)}

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        self._prompts, self._taken = {category or "": references["prompts"]}, references

    def heat_unit(self, category: str | None) -> float:
        return float(self.network.scale)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"{_PROMPTS}{k}": v for k, v in self._prompts.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self._prompts = {
            name.removeprefix(_PROMPTS): value
            for name, value in tensors.items()
            if name.startswith(_PROMPTS)
        }
        self._encoded = {}


def join_levels(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return the levels ``[B, C_i, h_i, w_i]`` joined on the coarsest grid, a list of one map."""
    grid = min((level.shape[-2:] for level in maps), key=tuple)
    return [torch.cat([resized(level, grid) for level in maps], dim=1)]


def _spread(maps: Tensor, count: int) -> Tensor:
    """Return so many of the maps ``[N, C, h, w]``: the most typical, then the least alike."""
    unit = describe([maps])
    chosen = [int((unit @ unit.mean(0)).argmax())]
    while len(chosen) < min(count, len(maps)):
        alike = (unit @ unit[chosen].T).amax(1)
        alike[chosen] = torch.inf
        chosen.append(int(alike.argmin()))
    return maps[chosen].clone()


# ---- the network --------------------------------------------------------------------------------


class OneNipNetwork(nn.Module):
    """Encoder, decoder and refiner on feature maps ``[B, C, h, w]``.

    Parameters
    ----------
    channels
        C of the joined levels.
    stride
        Pixels of the network's input between two grid points.
    """

    mean: Tensor
    deviation: Tensor
    scale: Tensor

    def __init__(self, channels: int, stride: int, options: OneNipOptions) -> None:
        super().__init__()
        self.options = options
        self.stride = stride
        size = (options.width, options.heads, options.hidden, options.dropout)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))
        self.register_buffer("scale", torch.ones(()))
        self.code = PositionCode(options.side, options.width)
        self.project = nn.Linear(channels, options.width)
        self.encoder = nn.ModuleList(EncoderLayer(*size) for _ in range(options.encoder_layers))
        self.decoder = self._decoder(size)
        self.rebuild = nn.Linear(options.width, channels)
        for module in (self.project, self.encoder, self.decoder, self.rebuild):
            module.apply(_initialize)
        if options.refiner:
            self.refiner = Refiner(channels).apply(_initialize)

    def _decoder(self, size: tuple[int, int, int, float]) -> nn.Module:
        options = self.options
        if options.decoder in ("dynamic", "legacy"):
            legacy = options.decoder == "legacy"
            return BidirectionalDecoder(options.decoder_layers, *size, legacy)
        static = options.decoder == "static"
        return QueryDecoder(options.decoder_layers, *size, static, options.side)

    def standardize(self, statistics: tuple[Tensor, Tensor]) -> None:
        """Take mean and standard deviation ``[C]`` of the training images' channels."""
        mean, deviation = statistics
        self.mean.copy_(mean[:, None, None])
        # A channel that hardly varied must not drown the others when it does.
        floor = max(_LEAST_DEVIATION * float(deviation.median()), 1e-6)
        self.deviation.copy_(deviation.clamp(min=floor)[:, None, None])

    def encode(self, maps: Tensor) -> Tensor:
        """Return the encoder's tokens ``[B, L, d]`` of raw maps, of targets or prompts."""
        return self._encode(self._standard(maps))

    def _standard(self, maps: Tensor) -> Tensor:
        return (maps - self.mean) / self.deviation

    def _encode(self, maps: Tensor) -> Tensor:
        grid = (maps.shape[-2], maps.shape[-1])
        tokens = maps.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, L, C)
        if self.training and self.options.jitter:
            tokens = jittered(tokens, self.options.jitter)
        x: Tensor = self.project(tokens)
        code, mask = self.code(grid), self._mask(grid)
        for layer in self.encoder:
            x = layer(x, code, mask)
        return x

    def _mask(self, grid: tuple[int, int]) -> Tensor | None:
        mask = neighbour_mask(grid)
        return None if mask is None else mask.to(self.scale.device)

    def _decode(self, tokens: Tensor, prompts: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the reconstruction ``[B, C, h, w]`` of encoded targets, in standardised form."""
        decoder: Decoder = self.decoder
        mask = self._mask(grid) if self.options.masked == "all" else None
        rebuilt: Tensor = self.rebuild(decoder(tokens, prompts, grid, self.code(grid), mask))
        # (B, L, C) -> (B, C, h, w)
        return rebuilt.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)

    def forward(self, part: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the losses of clean maps, their pseudo-anomalies, masks and prompts.

        ``clean``, ``pseudo`` and ``prompts`` are raw maps ``[B, C, h, w]``, ``masks`` ``[B, H, W]``
        of 0 and 1 at the network's input size.
        """
        clean, pseudo, masks, prompts = part
        paired = self.options.restoration or self.options.refiner
        seen = self._standard(torch.cat([clean, pseudo] if paired else [clean]))
        prompt = self._standard(prompts)
        grid = (clean.shape[-2], clean.shape[-1])
        if self.options.decoder == "query":
            prompt = prompt[:0]  # nobody reads it
        tokens = self._encode(torch.cat([seen, prompt]))  # one pass: they never mix
        x, p = tokens[: len(seen)], tokens[len(seen) :]
        rebuilt = self._decode(x, torch.cat([p, p]) if paired else p, grid)
        losses = self._reconstruction(seen, rebuilt, len(clean))
        if self.options.refiner:
            error = (rebuilt - seen).abs()
            logits = self.refine(error.detach() if self.options.detach else error)
            target = torch.cat([torch.zeros_like(masks), masks])
            found = segmentation_loss(logits.to(target), target, self.options.loss)
            losses["segmentation"] = found
            losses["loss"] = losses["loss"] + self.options.segmentation * found
        return losses

    def _reconstruction(self, seen: Tensor, rebuilt: Tensor, count: int) -> dict[str, Tensor]:
        """Return L_rec of the first ``count`` maps and L_res of the pseudo-anomalies after them."""
        target = seen[:count]
        rec = functional.mse_loss(rebuilt[:count], target)
        if not self.options.restoration:
            return {"loss": rec, "reconstruction": rec}
        res = functional.mse_loss(rebuilt[count:], target)
        both = rec + res if self.options.loss == "paper" else (rec + res) / 2
        return {"loss": both, "reconstruction": rec, "restoration": res}

    def refine(self, error: Tensor) -> Tensor:
        """Return logits ``[B, H, W]`` at the input size of errors ``[B, C, h, w]``."""
        height, width = error.shape[-2] * self.stride, error.shape[-1] * self.stride
        return resized(self.refiner(error), (height, width))[:, 0]

    def maps(self, maps: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return S_rec and S_ref ``[B, H, W]`` of raw maps and encoded prompts ``[B, L, d]``."""
        seen = self._standard(maps)
        grid = (maps.shape[-2], maps.shape[-1])
        error = seen - self._decode(self._encode(seen), prompts, grid)
        size = (grid[0] * self.stride, grid[1] * self.stride)
        reconstruction = resized(error.norm(dim=1, keepdim=True), size)[:, 0]
        if not self.options.refiner:
            return reconstruction, None
        return reconstruction, self.refine(error.abs()).sigmoid()

    def judge(self, maps: Tensor, prompts: Tensor) -> Tensor:
        """Return the score map S ``[B, H, W]``."""
        reconstruction, refined = self.maps(maps, prompts)
        if refined is None:
            return reconstruction
        alpha = self.options.alpha
        return (1 - alpha) * reconstruction + alpha * self.scale * refined


class Refiner(nn.Sequential):
    """Errors ``[B, C, h, w]`` to the logits ``[B, 1, 4h, 4w]`` of a mask."""

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__(
            *self._block(channels, width), *self._block(width, width), nn.Conv2d(width, 1, 1)
        )

    @staticmethod
    def _block(channels: int, width: int) -> tuple[nn.Module, ...]:
        return (
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )


def _initialize(module: nn.Module) -> None:
    """Xavier-uniform weights and no bias for all linear layers and convolutions."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def jittered(tokens: Tensor, scale: float) -> Tensor:
    """Return tokens ``[B, L, C]`` with Gaussian noise of ``scale`` times their length over C."""
    length = tokens.norm(dim=-1, keepdim=True) / tokens.shape[-1]
    noisy: Tensor = tokens + torch.randn_like(tokens) * (scale * length)
    return noisy


def image_score(maps: Tensor) -> Tensor:
    """Return the highest mean ``[B]`` over windows of 16 x 16 pixels of maps ``[B, H, W]``."""
    window = (min(_POOL, maps.shape[-2]), min(_POOL, maps.shape[-1]))
    # Along one side after the other: 32 additions a window in place of 256.
    rows = functional.avg_pool2d(maps[:, None], (1, window[1]), stride=1)
    means: Tensor = functional.avg_pool2d(rows, (window[0], 1), stride=1)
    return means.amax(dim=(1, 2, 3))
