"""What IIPAD takes from the frozen networks, once an image (Lv, Su, Xu, ICLR 2025)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.features.clip import ClipTower, local_path, patch_map
from anomalyst.features.object_tokens import (
    ObjectTokens,
    QFormerTokens,
    Seen,
    make_object_tokens,
)
from anomalyst.features.qformer import QFormer

_PREFIX = "qformer."
_CONFIG = f"{_PREFIX}config"  # the architecture as JSON: a bundle has no folder to ask


class IipadMaps(NamedTuple):
    """The maps of a batch of images.

    Attributes
    ----------
    local
        F_l ``[B, D, h, w]`` of every tapped layer: patches of the V-V stream in the joint space.
    original
        G_l ``[B, C, h, w]`` of the two memory layers: the original stream as it is.
    objects
        Z ``[B, d, M, 1]``.
    prompts
        e^n and e^a ``[B, d, 2, 1]``, once the generator has seen the image.
    cls
        v ``[B, D, 1, 1]``, last: categories are told apart by it.
    """

    local: Sequence[Tensor]
    original: Sequence[Tensor]
    objects: Tensor
    prompts: Tensor | None
    cls: Tensor

    @classmethod
    def of(cls, maps: Sequence[Tensor], taps: int) -> IipadMaps:
        """Sort out what comes in one list, of so many tapped layers."""
        objects, *prompts, last = maps[taps + 2 :]
        original = maps[taps : taps + 2]
        return cls(maps[:taps], original, objects, prompts[0] if prompts else None, last)

    def flat(self) -> list[Tensor]:
        """Return all in one list."""
        prompts = [] if self.prompts is None else [self.prompts]
        return [*self.local, *self.original, self.objects, *prompts, self.cls]


def quarters(depth: int) -> tuple[int, int, int, int]:
    """Return the blocks, counted from 0, behind each quarter of a transformer."""
    first, second, third, fourth = (max(depth * part // 4 - 1, 0) for part in (1, 2, 3, 4))
    return first, second, third, fourth


class IipadTower(ClipTower):
    """CLIP with V-V attention from the first quarter on, beside it a source of object tokens.

    Parameters
    ----------
    objects
        ``heads``, ``kmeans``, ``random`` or ``qformer``.
    folder
        A local copy of BLIP-Diffusion, for a Q-Former that the weights do not hold.
    ln_post
        Whether CLS passes through CLIP's last norm.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        layers: Sequence[int],
        objects: str = "heads",
        folder: str | None = None,
        ln_post: bool = True,
    ) -> None:
        super().__init__(spec, layers)
        first, _, third, _ = quarters(len(self.blocks))
        self.start = first
        self.memory_layers = (first, third)
        self.ln_post = ln_post
        self.qformer: QFormer | None = None
        self.objects: ObjectTokens
        self._folder = folder
        self._kind = objects
        # In the cache's key: which maps these are depends on the options.
        self.name = f"iipad {objects}{'' if ln_post else ', raw CLS'}"

    def forward(self, images: Tensor) -> list[Tensor]:
        tokens, grid = self.embed(images)
        local, original, entering = {}, {}, tokens
        streams = enumerate(local_path(self.blocks, tokens, self.start))
        for number, (plain, stream) in streams:
            entering, tokens = tokens, plain
            if number in self.layers:
                local[number] = patch_map(self.project(stream[:, 1:]), grid)
            if number in self.memory_layers:
                original[number] = patch_map(plain[:, 1:], grid)
        cls = self._project_cls(tokens[:, 0])
        objects = self.objects(self, Seen(images, entering, tokens, cls))
        return IipadMaps(
            [local[layer] for layer in self.layers],
            [original[layer] for layer in self.memory_layers],
            objects.mT[..., None],  # (B, M, d) -> (B, d, M, 1)
            None,
            cls[:, :, None, None],
        ).flat()

    def _project_cls(self, tokens: Tensor) -> Tensor:
        if self.ln_post:
            return self.project(tokens)
        model: Any = self.model
        projected: Tensor = tokens @ model.visual.proj
        return projected

    # ---- the Q-Former's weights, part of the backbone's -----------------------------------------

    def state(self) -> dict[str, Tensor]:
        if self.qformer is None:
            return super().state()
        its = {f"{_PREFIX}{name}": x for name, x in self.qformer.state_dict().items()}
        words = json.dumps(self.qformer.config, sort_keys=True).encode()
        return super().state() | its | {_CONFIG: torch.tensor(list(words), dtype=torch.uint8)}

    def choose(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen = super().choose(tensors)
        if self._kind == "qformer":
            chosen |= {name: x for name, x in tensors.items() if name.startswith(_PREFIX)}
        return chosen

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        mine = {name: x for name, x in tensors.items() if not name.startswith(_PREFIX)}
        super().adopt(mine)
        if self._kind != "qformer":
            self.objects = make_object_tokens(self._kind, self)
            return
        its = {k.removeprefix(_PREFIX): x for k, x in tensors.items() if k not in mine}
        self.qformer = self._kept(its) if its else self._read()
        if self.qformer.width != self.text.width:
            raise InputError(
                f"iipad: the Q-Former's tokens have {self.qformer.width} channels, words of "
                f"{self.spec.id} {self.text.width}; take clip-vit-l-14, or object_tokens=heads"
            )
        self.objects = QFormerTokens(self.qformer)

    def _kept(self, tensors: Mapping[str, Tensor]) -> QFormer:
        """Return the Q-Former that a bundle holds."""
        config = json.loads(bytes(tensors["config"].tolist()))
        with torch.device("meta"):
            model = QFormer.from_config(config)
        weights = {name: x for name, x in tensors.items() if name != "config"}
        model.load_state_dict(weights, assign=True)
        return model

    def _read(self) -> QFormer:
        """Return the Q-Former of the folder."""
        if not self._folder:
            raise InputError(
                "iipad with object_tokens=qformer: give qformer=FOLDER, a local copy of "
                "Salesforce/blipdiffusion; object_tokens=heads needs none"
            )
        return QFormer.from_folder(self._folder)
