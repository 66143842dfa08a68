r"""AnoPLe: prompts of CLIP's two towers, learned in both directions from a few good images.

Lee et al., "Bidirectional Multimodal Prompt Learning with Scale-Aware Training for Few-Shot
Multi-Class Anomaly Detection", CVPR 2026, arXiv 2408.13516. No code is public:

**This is a reconstruction.** What the paper states:

1. Texts name the product and, for the abnormal one, add the word "abnormal"; nothing else.
2. Bidirectional prompts: in each prompted block j, text prompts are
   :math:`[P^t_j; f_j(P^v_j)]`, visual ones :math:`[P^v_j; g_j(P^t_j)]`, f and g affine maps.
3. Scale-aware prefix: an image is seen whole and in four quadrants, each with a vector of its own;
   at test only whole.
4. A decoder turns patch tokens into features F; their likeness to the two texts is the map M.
5. Losses: dice and focal on M, cross-entropy of the CLS z over the texts,
   :math:`1 - \langle z, \sum_{ij} M_{ij} F_{ij} \rangle`.
6. Pseudo-anomalies in pixels and in tokens; M is joined with a memory of patches by the harmonic
   mean.

What it leaves open is chosen here, each an option where a choice was worth one: four prompts of
each kind in the first three quarters of the blocks (PromptAD's and MaPLe's sizes); visual prompts
and the prefix behind the patches; the decoder (two transposed convolutions to four values a patch,
beside CLIP's own tokens, with which it starts); temperature 0.07; Perlin blobs, CutPaste patches
and scars of the image's own texture, or noise of 0.25 to 1 times a token's length behind the middle
block; AdamW at 1e-3; memory of the patches behind blocks 3 and 8 of 12 (PromptAD's), the image
score :math:`H(p, \max A_{mem})` (PromptAD's too). The paper's open question, zero-shot, is
``zero_shot``: train on some products, judge others by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.features.clip import (
    AroundClip,
    ClipTower,
    abnormal_share,
    overwrite,
    patch_map,
    run_blocks,
)
from anomalyst.features.towers import Tower
from anomalyst.methods.anople_decoder import Decoder
from anomalyst.methods.anople_losses import alignment_loss, image_loss, pixel_loss
from anomalyst.methods.anople_views import VIEWS, Views
from anomalyst.methods.base import MethodOptions, TrainedMethod, TrainingOptions
from anomalyst.methods.class_names import Names, class_name
from anomalyst.methods.memory_bank import Banks, nearest_cosine, to_map, to_patches
from anomalyst.methods.synthesis import Synthesizer
from anomalyst.methods.textures import by_category, find_textures
from anomalyst.methods.views import PLAIN, View
from anomalyst.training_data import TrainingFeatures
from anomalyst.types import Sample

_SEEN_SHARE = 5e-4  # of a view's pixels: a view with less of a pseudo-anomaly counts as normal
_NOISE = (0.25, 1.0)  # length of latent noise, in lengths of the token
_EPS = 1e-6
_STD = 0.02


class AnoPleOptions(TrainingOptions):
    """Options of AnoPLe."""

    epochs: int = Field(100, ge=1, description="passes over the training images")
    batch_size: int = Field(8, ge=1, description="images a step, each in ten views")
    learning_rate: float = Field(1e-3, gt=0, description="after warm-up")
    final_learning_rate: float = Field(1e-5, ge=0, description="at the end of the half cosine")
    warmup: int = Field(10, ge=0, description="steps in which the learning rate rises from 0")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a step's whole gradient")
    text_prompts: int = Field(4, ge=1, description="learned prompts of the text tower a block")
    visual_prompts: int = Field(4, ge=1, description="learned prompts of the image tower a block")
    depth: float = Field(0.75, gt=0, le=1, description="share of the blocks with prompts")
    interaction: Literal["both", "t2i", "i2t", "none", "text", "visual"] = Field(
        "both", description="t2i, i2t: one direction; text, visual: prompts of that tower alone"
    )
    views: Literal["all", "whole"] = Field(
        "all", description="all: the whole image and its quadrants in training"
    )
    prefix: Literal["token", "add", "none"] = Field(
        "token", description="add: onto each visual prompt of the first block"
    )
    pseudo: Literal["both", "pixels", "latent"] = Field(
        "both", description="where pseudo-anomalies are made"
    )
    recipe: Literal["hybrid", "cutpaste", "perlin", "nsa"] = Field(
        "hybrid", description="how those in pixels are made"
    )
    textures: str = Field(
        "shuffled", description="shuffled, procedural, others, or a folder of textures"
    )
    temperature: float = Field(0.07, gt=0, description="of all likenesses to texts")
    contrast: Literal["pair", "all"] = Field(
        "pair", description="all: the texts of all products are negatives"
    )
    align: Literal["abnormal", "both", "none"] = Field(
        "abnormal", description="views whose CLS is aligned; both: normal ones by 1 - M"
    )
    detach: bool = Field(False, description="the alignment moves the CLS alone")
    bank: Literal["category", "shared", "none"] = Field(
        "category", description="shared: all products' patches are compared"
    )
    image_score: Literal["memory", "map"] = Field(
        "memory", description="what the CLS's score is joined with: its maximum"
    )
    zero_shot: bool = Field(False, description="fit enrols nothing: judge by name alone")
    names: Names = Field({}, description="words for categories: CATEGORY:WORDS,CATEGORY:WORDS")


class AnoPle(TrainedMethod):
    """One model of many products; each is told by its name."""

    name: ClassVar[str] = "anople"
    Options: ClassVar[type[MethodOptions]] = AnoPleOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"image_size": 240, "square": True},
    }
    options: AnoPleOptions
    network: AnoPleNetwork

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        super().__init__(options, backbone, layers, seed)
        self._banks = [Banks() for _ in layers]
        self._texts: dict[str, Tensor] = {}
        self._words: dict[str | None, str] = {}

    @classmethod
    def default_layers(cls, backbone: BackboneSpec) -> tuple[int, ...]:
        """Return the blocks whose patches are remembered: a quarter and two thirds deep."""
        return (max(backbone.taps // 4 - 1, 0), max(backbone.taps * 2 // 3 - 1, 1))

    @classmethod
    def make_tower(
        cls, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int]
    ) -> ClipTower:
        return ClipTower(backbone, layers)

    def bind(self, tower: Tower) -> None:
        super().bind(tower)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = AnoPleNetwork(cast(ClipTower, tower), self.options)
        self.network.eval()

    @property
    def judges_unseen(self) -> bool:
        return self.options.zero_shot

    @property
    def shares_references(self) -> bool:
        return self.options.bank == "shared"

    def require_name(self, category: str) -> None:
        self.network.tokenized([class_name(category, self.options.names, self.name)])

    def training_views(self, few_shot: bool) -> Sequence[View]:
        return (PLAIN,)

    def require_trainable(self, samples: Sequence[Sample]) -> None:
        find_textures(self.options.textures, by_category(samples))
        for category in by_category(samples):
            self.require_name(category)

    def source(self, features: TrainingFeatures) -> Views:
        options = self.options
        textures = find_textures(options.textures, by_category(features.samples))
        synthesizer = Synthesizer(options.recipe, textures)
        count = VIEWS if options.views == "all" else 1
        share = {"both": 0.5, "pixels": 1.0, "latent": 0.0}[options.pseudo]
        source = Views(features, synthesizer, count, share, self.seed)
        self.network.words = [class_name(c, options.names, self.name) for c in source.categories]
        return source

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self._texts = {}
        for k, bank in enumerate(self._banks):
            start = f"bank{k}."
            bank.load({n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)})

    def tensors(self) -> dict[str, Tensor]:
        banks = {
            f"bank{k}.{name}": patches
            for k, bank in enumerate(self._banks)
            for name, patches in bank.tensors().items()
        }
        return super().tensors() | banks

    # ---- an image -------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return, of images, the remembered layers' maps, projected patches Z and CLS z."""
        (images,) = features
        whole = torch.zeros(images.shape[0], dtype=torch.long, device=images.device)
        tapped: dict[int, Tensor] = {}
        image, patches = self.network.look(images, whole, tapped=tapped)
        grid = patches.shape[-2:]
        taps = [patch_map(tapped[k][:, 1 : 1 + grid[0] * grid[1]], grid) for k in self.layers]
        return [*taps, patches, image[:, :, None, None]]

    @torch.inference_mode()
    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        for maps in views:
            for bank, layer in zip(self._banks, maps, strict=False):
                bank.add(category, functional.normalize(to_patches(layer), dim=1))

    def _pair(self, category: str | None) -> Tensor:
        """Return a product's texts ``[2, D]``, computed once: nothing of the image is in them."""
        if category not in self._words:  # a warning of a name is worth giving once
            self._words[category] = class_name(category, self.options.names, self.name)
        words = self._words[category]
        if words not in self._texts:
            self._texts[words] = self.network.texts([words])[0]
        return self._texts[words]

    @torch.inference_mode()
    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        *taps, patches, image = features
        texts = self._pair(category)
        _, decoded = self.network.decode(patches, texts.expand(patches.shape[0], -1, -1))
        told = abnormal_share(image.flatten(1) @ texts.T, self.options.temperature)
        memory = self._remembered(taps, category)
        if memory is None:
            return decoded, harmonic_mean(told, decoded.flatten(1).amax(1))
        fine = functional.interpolate(
            memory[:, None], decoded.shape[-2:], mode="bilinear", align_corners=False
        )[:, 0]
        maps = harmonic_mean(decoded, fine)
        highest = maps if self.options.image_score == "map" else memory
        return maps, harmonic_mean(told, highest.flatten(1).amax(1))

    def _remembered(self, taps: Sequence[Tensor], category: str | None) -> Tensor | None:
        """Return the memory's map ``[B, h, w]`` in [0, 1], None where nothing is remembered."""
        found = []
        for number, layer in enumerate(taps):
            patches = self._patches(number, category)
            if patches is None:
                return None
            queries = functional.normalize(to_patches(layer), dim=1)
            found.append(to_map(nearest_cosine(queries, patches)[0] / 2, layer))
        return torch.stack(found).mean(0)

    def _patches(self, layer: int, category: str | None) -> Tensor | None:
        bank = self._banks[layer]
        if self.options.bank == "shared":
            return bank.joint
        known = category in bank.categories and self.options.bank == "category"
        return bank[category] if known else None

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        banks = {f"bank{k}": self._patches(k, category) for k in range(len(self._banks))}
        known = {name: patches for name, patches in banks.items() if patches is not None}
        return {"texts": self._pair(category)} | known

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        self._words[category] = ""
        self._texts = {"": references["texts"]}
        for number, bank in enumerate(self._banks):
            patches = references.get(f"bank{number}")
            bank.load({} if patches is None else {category or "": patches})

    def heat_unit(self, category: str | None) -> float:
        return 0.3


def harmonic_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return ``2 a b / (a + b)`` of values of 0 and more, 0 where both are."""
    return 2 * a * b / (a + b + _EPS)


# ---- the network --------------------------------------------------------------------------------


class AnoPleNetwork(AroundClip):
    """Prompts, prefix and decoder around a frozen CLIP, which is no part of its weights.

    Attributes
    ----------
    words
        Class names of the products trained on, in the order of the source's positions.
    """

    def __init__(self, tower: ClipTower, options: AnoPleOptions) -> None:
        super().__init__(tower)
        self.options = options
        self.words: list[str] = []
        blocks = min(len(tower.blocks), tower.text.layers)
        depth = max(round(options.depth * blocks), 1)
        seen, read = tower.spec.widths[0], tower.text.width
        self.text = _prompts(depth, options.text_prompts, read)
        self.visual = _prompts(depth, options.visual_prompts, seen)
        self.to_text = nn.ModuleList(nn.Linear(seen, read) for _ in range(depth))
        self.to_visual = nn.ModuleList(nn.Linear(read, seen) for _ in range(depth))
        self.prefix = _prompts(VIEWS, 1, seen)
        self.decoder = Decoder(tower.joint_width)
        self._rest()

    def _rest(self) -> None:
        """Leave alone what the options make no use of: several processes wait for each gradient."""
        way, rest = self.options.interaction, set[nn.Module | nn.Parameter]()
        if way not in ("both", "i2t"):
            rest.add(self.to_text)
        if way not in ("both", "t2i"):
            rest.add(self.to_visual)
        if way == "text":
            rest.add(self.visual)
        if way == "visual":
            rest.add(self.text)
        if self.options.prefix == "none" or (way == "text" and self.options.prefix == "add"):
            rest.add(self.prefix)
        for unused in rest:
            unused.requires_grad_(False)

    def mixed(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return each block's prompts of the text and of the image tower, ``[n, C]``; or none."""
        way = self.options.interaction
        texts, visuals = list(self.text), list(self.visual)
        if way in ("both", "i2t"):
            pairs = zip(self.text, self.to_text, self.visual, strict=True)
            texts = [torch.cat([own, to(other)]) for own, to, other in pairs]
        if way in ("both", "t2i"):
            pairs = zip(self.visual, self.to_visual, self.text, strict=True)
            visuals = [torch.cat([own, to(other)]) for own, to, other in pairs]
        return ([] if way == "visual" else texts), ([] if way == "text" else visuals)

    # ---- texts ----------------------------------------------------------------------------------

    def tokenized(self, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens ``[2 N, L]`` of "slots, words." and "slots, abnormal words." and ends."""
        text, slots = self.clip.text, "X " * self.slots
        room = text.room - text.count(f"{slots}abnormal .")
        if room < 1:
            raise InputError(
                f"options text_prompts, visual_prompts of anople: {self.slots} prompts leave no "
                f"room for a name, CLIP reads {text.room} tokens at most"
            )
        for word in words:
            if (count := text.count(word)) > room:
                raise InputError(
                    f"class name {word!r} has {count} tokens, beside anople's prompts CLIP reads "
                    f"{room} at most: give shorter words with --set names=CATEGORY:WORDS"
                )
        sentences = [f"{slots}{state}{word}." for word in words for state in ("", "abnormal ")]
        return text.tokenize_short(sentences)

    @property
    def slots(self) -> int:
        """Tokens of a text that prompts take the place of."""
        options = self.options
        if options.interaction == "visual":
            return 0
        more = options.visual_prompts if options.interaction in ("both", "i2t") else 0
        return options.text_prompts + more

    def texts(self, words: Sequence[str]) -> Tensor:
        """Return the normal and the abnormal text of products, ``[N, 2, D]`` of unit length."""
        ids, ends = self.tokenized(words)
        with torch.no_grad():
            embedded = self.clip.text.embed(ids)
        prompts = dict(enumerate(self.mixed()[0]))
        if prompts:
            embedded = overwrite(embedded, 1, prompts.pop(0))
        found, _ = self.clip.text.encode(embedded, ends, prompts)
        return functional.normalize(found.float(), dim=1).view(len(words), 2, -1)

    # ---- images ---------------------------------------------------------------------------------

    def look(
        self,
        images: Tensor,
        view: Tensor,
        noise: Tensor | None = None,
        tapped: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pass images ``[R, 3, H, W]`` through the prompted image tower.

        Parameters
        ----------
        view
            Which view each is ``[R]``: 0 the whole image, 1 to 4 the quadrants.
        noise
            Patches ``[R, h, w]`` that get noise behind the middle block.
        tapped
            Filled with the tokens behind every block, by number.

        Returns
        -------
        tuple of Tensor
            CLS z ``[R, D]`` of unit length and patches Z ``[R, D, h, w]``.
        """
        with torch.no_grad():
            tokens, grid = self.clip.embed(images)
        first = tokens.shape[1]
        prompts = dict(enumerate(self.mixed()[1]))
        prefix = self.prefix[view] if self.options.prefix != "none" else None  # (R, 1, C)
        if prompts:
            rows = prompts.pop(0).expand(images.shape[0], -1, -1)
            if prefix is not None and self.options.prefix == "add":
                rows = rows + prefix
            tokens = torch.cat([tokens, rows.to(tokens.dtype)], dim=1)
        if prefix is not None and self.options.prefix == "token":
            tokens = torch.cat([tokens, prefix.to(tokens.dtype)], dim=1)
        middle = len(self.clip.blocks) // 2 - 1

        def hook(number: int, tokens: Tensor) -> Tensor:
            if noise is not None and number == middle:
                tokens = with_noise(tokens, noise.flatten(1))
            if tapped is not None:
                tapped[number] = tokens
            return tokens

        tokens = run_blocks(self.clip.blocks, tokens, prompts, first, hook=hook)
        projected = self.clip.project(tokens[:, :first]).float()
        return functional.normalize(projected[:, 0], dim=1), patch_map(projected[:, 1:], grid)

    def decode(self, patches: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return features F ``[R, D, 4 h, 4 w]`` and P(abnormal) M ``[R, 4 h, 4 w]``.

        ``patches`` is Z ``[R, D, h, w]``, ``texts`` each one's normal and abnormal text
        ``[R, 2, D]``.
        """
        features = self.decoder(patches).float()
        likeness = torch.einsum("rdhw,rsd->rhws", functional.normalize(features, dim=1), texts)
        return features, abnormal_share(likeness, self.options.temperature)

    # ---- one step -------------------------------------------------------------------------------

    def forward(self, part: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the losses of images; for the part see `Views.fetch`."""
        clean, pseudo, masks, noise, product = part
        count = clean.shape[1]
        images = torch.cat([clean, pseudo]).flatten(0, 1)  # (2 B, V, 3, h, w) -> (R, 3, h, w)
        mask = torch.cat([torch.zeros_like(masks), masks]).flatten(0, 1)
        noised = torch.cat([torch.zeros_like(noise), noise]).flatten(0, 1)
        view = torch.arange(count, device=images.device).repeat(len(images) // count)
        product = product.repeat(2).repeat_interleave(count)
        truth = (mask.flatten(1).mean(1) >= _SEEN_SHARE).long()

        every = self.options.contrast == "all"
        shown = list(range(len(self.words))) if every else sorted(set(product.tolist()))
        texts = self.texts([self.words[k] for k in shown])
        place = torch.searchsorted(torch.tensor(shown, device=product.device), product)
        image, patches = self.look(images, view, noised)
        features, probability = self.decode(patches, texts[place])
        fine = functional.interpolate(
            probability[:, None], mask.shape[-2:], mode="bilinear", align_corners=False
        )[:, 0]
        losses = {"pixel": pixel_loss(fine, mask)}
        temperature = self.options.temperature
        if every:
            flat = texts.flatten(0, 1).expand(len(image), -1, -1)
            losses["image"] = image_loss(image, flat, 2 * place + truth, temperature)
        else:
            losses["image"] = image_loss(image, texts[place], truth, temperature)
        losses["align"] = self._align(image, features, probability, truth)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _align(self, image: Tensor, features: Tensor, probability: Tensor, truth: Tensor) -> Tensor:
        """Return the alignment loss of the views that it is taken of; 0 without any."""
        options = self.options
        weights = probability
        if options.align == "both":
            weights = torch.where(truth[:, None, None] > 0, probability, 1 - probability)
            taken = torch.ones_like(truth, dtype=torch.bool)
        else:
            taken = truth > 0
        if options.align == "none" or not taken.any():
            return image.sum() * 0
        if options.detach:
            features, weights = features.detach(), weights.detach()
        return alignment_loss(image[taken], features[taken], weights[taken])


def _prompts(blocks: int, count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(blocks, count, width) * _STD)


def with_noise(tokens: Tensor, patches: Tensor) -> Tensor:
    """Return tokens ``[R, 1 + N + n, C]`` with Gaussian noise on the marked patches ``[R, N]``.

    Its length is on average r times the token's, r uniform in [0.25, 1] for each image, so that the
    cosine to what was there is about ``1 / sqrt(1 + r^2)``.
    """
    here = tokens[:, 1 : 1 + patches.shape[1]]
    low, high = _NOISE
    ratio = low + (high - low) * torch.rand(len(tokens), 1, 1, device=tokens.device)
    deviation = ratio * here.norm(dim=2, keepdim=True).detach() / here.shape[2] ** 0.5
    noisy = here + patches[:, :, None] * deviation * torch.randn_like(here)
    return overwrite(tokens, 1, noisy)
