r"""IIPAD: CLIP prompts made from each image, and a memory that needs no category.

Lv, Su, Xu, "One-for-All Few-Shot Anomaly Detection via Instance-Induced Prompt Learning", ICLR
2025; code Vanssssry/One-For-All-Few-Shot-Anomaly-Detection. Everything frozen but the generator:

1. An image gives patches :math:`F_l` of four V-V attention layers, raw patches :math:`G` of two
   layers, CLS :math:`v`, and M object tokens :math:`Z` that CLIP's text tower can read
   (`IipadTower`).
2. The generator makes a normal and an abnormal sequence of T + m soft words (eq. 3 and 4,
   `Generator`), the text tower an embedding :math:`e^\pm` and token embeddings of each (eq. 5).
3. Training on K normal images a category, no category known (eq. 12):
   :math:`L = (L_s^n + L_s^a) + \beta (L_f^n + L_f^a) + \alpha L_t`, that is patches against
   prompts, patches against their tokens, prompts against sentences (`iipad_losses`,
   `iipad_sentences`). Abnormal patches are made up of two layers and noise (eq. 8).
4. The memory keeps Z, G and :math:`e^\pm` of the normal images; the K most like an image's Z count
   (eq. 13 and 14, `Memory`).
5. :math:`A^p`: the share of the abnormal prompt, the image's own and the retrieved ones together
   (eq. 15 and 16). :math:`A^v`: distance to the nearest retrieved patch (eq. 17). Map
   :math:`A^p + A^v`, image score :math:`\max A^p + \max A^v` (eq. 18).

The defaults follow the paper, and the released code where that is silent (the start of the learned
tokens, dropout, batches of one, raw G). Its object tokens alone need weights that few have: the
default ``heads`` needs none, the preset ``paper`` takes the Q-Former. The preset ``released`` is
the code, but that no dropout acts at test, CLS is normalised for the memory too, and the last
step's weights count, not the best on the test set. ``fixed`` keeps temperatures and noise where
something can be learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.features.clip import AroundClip, abnormal_share
from anomalyst.features.towers import Tower
from anomalyst.methods.base import MethodOptions, TrainedMethod, TrainingOptions
from anomalyst.methods.iipad_generator import Generator, Sizes
from anomalyst.methods.iipad_losses import pseudo_features, semantic_loss, text_loss, token_loss
from anomalyst.methods.iipad_memory import Entries, Memory, visual_map
from anomalyst.methods.iipad_sentences import guides
from anomalyst.methods.iipad_tower import IipadMaps, IipadTower, quarters
from anomalyst.training_data import TrainingFeatures

_PAPER = {"backbone": "clip-vit-l-14", "image_size": 224, "square": True}


class IipadOptions(TrainingOptions):
    """Options of IIPAD."""

    epochs: int = Field(20, ge=1, description="passes over the training images")
    batch_size: int = Field(1, ge=1, description="images a step")
    learning_rate: float = Field(1e-3, gt=0, description="at the start, after warm-up")
    final_learning_rate: float = Field(1e-3, ge=0, description="at the end of the half cosine")
    warmup: int = Field(0, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="of all weights")
    clip: float | None = Field(None, gt=0, description="largest norm of a step's whole gradient")
    object_tokens: Literal["heads", "kmeans", "random", "qformer"] = Field(
        "heads", description="where Z comes from; qformer: BLIP-Diffusion's, as in the paper"
    )
    qformer: str | None = Field(
        None, description="folder of Salesforce/blipdiffusion; a bundle needs it no more"
    )
    ln_post: bool = Field(True, description="CLS passes through CLIP's last norm")
    generator: Literal["paper", "code"] = Field("paper", description="the generator's form")
    slots: int = Field(24, ge=1, description="learned tokens T of a prompt")
    object_slots: int = Field(4, ge=0, description="tokens m made of Z; 0: none")
    instance: Literal["both", "cls", "attention", "none"] = Field(
        "both", description="what the learned tokens take from the image"
    )
    prompt_std: float = Field(1.0, gt=0, description="deviation of the learned tokens at first")
    dropout: float = Field(0.2, ge=0, lt=1, description="of the generator")
    losses: Literal["softmax", "linear"] = Field(
        "softmax", description="form of L_s and L_t; linear: the code's"
    )
    semantic: float = Field(1.0, ge=0, description="weight of L_s; 0: without")
    alpha: float = Field(8.0, ge=0, description="weight of L_t; 0: without")
    beta: float = Field(8.0, ge=0, description="weight of L_f; 0: without")
    temperature: float = Field(1.0, gt=0, description="of the losses")
    synthetic: Literal["paper", "code", "none"] = Field(
        "paper", description="abnormal features; code: the first layer gets the last one"
    )
    noise: float = Field(1.0, ge=0, description="deviation of each of their components")
    sentences: Literal["generic", "mvtec", "visa", "code-mvtec", "code-visa"] = Field(
        "generic", description="what L_t compares with; the others name a test set's defects"
    )
    dedup: bool = Field(False, description="count repeated sentences once")
    memory: Literal["category", "shared", "none"] = Field(
        "category", description="images whose patches count; shared: all"
    )
    retrieve: int | None = Field(
        None, ge=1, description="images consulted; none: as many as a category has at most"
    )
    test_temperature: float = Field(1.0, gt=0, description="of the map A^p")
    image_score: Literal["paper", "code", "paper+cls"] = Field(
        "paper", description="paper+cls: and CLS; code: and CLS, less the likeness to the memory"
    )

    @field_validator("qformer")
    @classmethod
    def _read_at_all(cls, folder: str | None, info: ValidationInfo) -> str | None:
        if folder and info.data.get("object_tokens") != "qformer":
            raise ValueError("set object_tokens=qformer too")
        return folder

    @field_validator("beta")
    @classmethod
    def _learn_something(cls, beta: float, info: ValidationInfo) -> float:
        if not (beta or info.data.get("semantic") or info.data.get("alpha")):
            raise ValueError("semantic, alpha and beta are all 0; set one above it")
        return beta

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return plain Adam."""
        return torch.optim.Adam(parameters, weight_decay=self.weight_decay)


class Iipad(TrainedMethod):
    """One model of many categories; an image's category is asked for neither here nor there."""

    name: ClassVar[str] = "iipad"
    Options: ClassVar[type[MethodOptions]] = IipadOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**_PAPER, "options": {"object_tokens": "qformer", "sentences": "mvtec"}},
        "released": {
            **_PAPER,
            "options": {
                "object_tokens": "qformer",
                "ln_post": False,
                "generator": "code",
                "learning_rate": 1e-5,
                "final_learning_rate": 0.05,  # it rises
                "weight_decay": 1e-4,
                "losses": "linear",
                "semantic": 0.125,
                "alpha": 1.0,
                "beta": 0.25,  # a mean of four terms
                "synthetic": "code",
                "noise": 2.0,
                "sentences": "code-mvtec",
                "test_temperature": 0.07,
                "image_score": "code",
            },
        },
        # Not measured yet: no CLIP weights could be had where this was written.
        "fixed": {
            **_PAPER,
            "options": {
                "steps": 300,
                "batch_size": 8,
                "final_learning_rate": 1e-5,
                "weight_decay": 1e-4,
                "clip": 1.0,
                "prompt_std": 0.02,
                "alpha": 1.0,
                "beta": 1.0,
                "temperature": 0.07,
                "noise": 0.036,  # as long as a patch: 1 / sqrt(768)
                "test_temperature": 0.07,
            },
        },
    }
    options: IipadOptions
    network: IipadNetwork

    @classmethod
    def default_layers(cls, backbone: BackboneSpec) -> tuple[int, ...]:
        """Return the block behind each quarter: 6, 12, 18 and 24 of 24, counted from 1."""
        return tuple(dict.fromkeys(quarters(backbone.taps)))

    @classmethod
    def make_tower(
        cls, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int]
    ) -> Tower:
        assert isinstance(options, IipadOptions)
        return IipadTower(backbone, layers, options.object_tokens, options.qformer, options.ln_post)

    def bind(self, tower: Tower) -> None:
        assert isinstance(tower, IipadTower)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = IipadNetwork(tower, self.options, len(self.layers))
        self.network.eval()
        self.memory = Memory(tower.objects.ordered)

    def source(self, features: TrainingFeatures) -> TrainingFeatures:
        self.network.guides = guides(self.network.text, self.options.sentences, self.options.dedup)
        return features

    @property
    def shares_references(self) -> bool:
        return True  # an image consults those most like it, of whatever category

    @torch.inference_mode()
    def encode(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add the image's own prompts e^n and e^a."""
        seen = IipadMaps.of(features, len(self.layers))
        prompts, _ = self.network.prompts(seen.objects, seen.cls)
        return seen._replace(prompts=prompts.mT[..., None]).flat()  # (B, 2, d) -> (B, d, 2, 1)

    @torch.inference_mode()
    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        """Keep object tokens, prompts and patches of the images."""
        parts = (IipadMaps.of(features, len(self.layers)) for features in views)
        self.memory.add(category, [_entries(seen) for seen in parts])

    @torch.inference_mode()
    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        """Judge each image by what it is most like, whatever its category is said to be."""
        seen = IipadMaps.of(features, len(self.layers))
        image, patches = _entries(seen), unit_patches(seen.local)
        if not self.memory.shots:
            prompted = self._prompted(patches, image.prompts)
            return _as_maps(prompted, seen), prompted.amax(1)
        count = self.options.retrieve or self.memory.shots
        rows, alike = self.memory.retrieve(image.objects, count)
        retrieved = self.memory.all.prompts[rows]  # (B, k, 2, d)
        joint = (retrieved.mean(1) + image.prompts) / 2  # eq. 15
        prompted = self._prompted(patches, functional.normalize(joint, dim=-1))
        visual = self._visual(image.patches, rows)
        scores = prompted.amax(1) + visual.amax(1)
        if self.options.image_score != "paper":
            v = functional.normalize(seen.cls.flatten(1), dim=1)
            scores = scores + self._share(torch.einsum("bd,bkpd->bkp", v, retrieved)).mean(1)
        if self.options.image_score == "code":
            scores = scores - 1 - alike.mean(1)  # share - 1 is the code's -p_normal
        return _as_maps(prompted + visual, seen), scores

    def _prompted(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """Return A^p ``[B, R]`` (eq. 16) of F ``[B, J, R, d]`` and e ``[B, 2, d]``."""
        return self._share(torch.einsum("bjrd,bpd->bjrp", patches, prompts)).mean(1)

    def _share(self, alike: Tensor) -> Tensor:
        """Return the softmax of normal and abnormal similarities ``[..., 2]`` at the second."""
        return abnormal_share(alike, self.options.test_temperature)

    def _visual(self, patches: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Return A^v ``[B, R]`` (eq. 17), or what an ablation puts in its place."""
        bank = self.memory.all
        if self.options.memory == "none":
            return torch.zeros(patches[0].shape[:2], device=rows.device)
        if self.options.memory == "shared":
            rows = torch.arange(bank.objects.shape[0], device=rows.device).expand(rows.shape[0], -1)
        return visual_map(patches, bank.patches, rows)

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        return self.memory.references() if self.memory.shots else {}

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        if references:
            self.memory.take(references)

    def heat_unit(self, category: str | None) -> float:
        """Where A^p is undecided and the patch half as far from normal as it can be."""
        return 1.0

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self.memory.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self.memory.load(tensors)


def unit_patches(maps: Sequence[Tensor]) -> Tensor:
    """Return the patches ``[B, J, R, d]`` of J maps ``[B, d, h, w]``, of unit length."""
    return functional.normalize(_patches(maps), dim=-1)


def _patches(maps: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.flatten(2).mT for each in maps], dim=1)


def _entries(seen: IipadMaps) -> Entries:
    """Return what the memory keeps of images, or compares with it."""
    assert seen.prompts is not None
    return Entries(
        functional.normalize(seen.objects[..., 0].mT, dim=-1),  # (B, d, M, 1) -> (B, M, d)
        seen.prompts[..., 0].mT,  # (B, d, 2, 1) -> (B, 2, d)
        [functional.normalize(each.flatten(2).mT, dim=-1) for each in seen.original],
    )


def _as_maps(values: Tensor, seen: IipadMaps) -> Tensor:
    """Return values ``[B, R]`` of patches as maps ``[B, h, w]``."""
    return values.reshape(values.shape[0], *seen.local[0].shape[-2:])


class IipadNetwork(AroundClip):
    """The generator with its losses; CLIP's text tower is reached through, and is no part of it.

    Attributes
    ----------
    guides
        Vectors of the sentences on good and bad objects, ``[n, d]`` each; set before training.
    """

    guides: tuple[Tensor, Tensor]

    def __init__(self, tower: IipadTower, options: IipadOptions, taps: int) -> None:
        super().__init__(tower)
        self.options = options
        self.text = tower.text
        self.taps = taps
        width, length = self.text.width, options.slots + options.object_slots
        if width != tower.joint_width:
            raise InputError(
                f"iipad on {tower.spec.id}: words have {width} channels, images and sentences "
                f"{tower.joint_width}; take a CLIP with as many, such as clip-vit-l-14"
            )
        if length + 2 > self.text.context:
            raise InputError(
                f"options slots={options.slots}, object_slots={options.object_slots} of iipad: "
                f"a prompt has {length} tokens, CLIP reads {self.text.context - 2} at most"
            )
        sizes = Sizes(width, tower.objects.count, options.slots, options.object_slots)
        self.generator = Generator(
            options.generator, sizes, options.instance, options.dropout, options.prompt_std
        )

    def prompts(self, objects: Tensor, cls: Tensor) -> tuple[Tensor, Tensor]:
        """Return e ``[B, 2, d]`` and its tokens ``[B, 2, L, d]``, all unit, of maps Z and v.

        Normal first, abnormal second.
        """
        v = functional.normalize(cls.flatten(1), dim=1)
        words = self.generator(objects[..., 0].mT, v).flatten(0, 1)  # (2 B, L, d)
        start, end = self.text.embed(self.text.tokenize([""])[0, :2])
        sequence = torch.cat(
            [start.expand_as(words[:, :1]), words, end.expand_as(words[:, :1])], dim=1
        )
        last = torch.full((words.shape[0],), words.shape[1] + 1, device=words.device)
        found, tokens = self.text.encode(sequence, last)
        tokens = functional.normalize(tokens[:, 1:-1], dim=-1)
        # (2 B, ...) -> (B, 2, ...)
        return (
            functional.normalize(found, dim=-1).reshape(-1, 2, found.shape[1]),
            tokens.reshape(-1, 2, *tokens.shape[1:]),
        )

    def forward(self, part: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the losses of normal images, and how alike their two prompts are."""
        options, seen = self.options, IipadMaps.of(part, self.taps)
        prompts, tokens = self.prompts(seen.objects, seen.cls)
        layers = _patches(seen.local)
        features = functional.normalize(layers, dim=-1)
        pseudo = None
        if options.synthetic != "none":
            pseudo = pseudo_features(layers, options.synthetic, options.noise)
        tau, linear = options.temperature, options.losses == "linear"
        found: dict[str, tuple[float, Tensor]] = {}
        if options.semantic:
            loss = semantic_loss(features, pseudo, prompts, tau, linear)
            found["semantic"] = (options.semantic, loss)
        if options.beta:
            loss = token_loss(tokens[:, 0], features, tau)
            if pseudo is not None:
                loss = loss + token_loss(tokens[:, 1], pseudo, tau)
            found["tokens"] = (options.beta, loss)
        if options.alpha:
            loss = text_loss(prompts, self.guides, tau, linear)
            found["text"] = (options.alpha, loss)
        total = sum((weight * loss for weight, loss in found.values()), prompts.new_zeros(()))
        alike = (prompts[:, 0] * prompts[:, 1]).sum(-1).mean().detach()
        return {"loss": total, "alike": alike} | {name: loss for name, (_, loss) in found.items()}
