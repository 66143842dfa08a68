"""AnomalyDINO: the distance of each patch to the nearest patch of a few normal references.

Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2", WACV 2025,
arXiv 2405.14529; official code commit ``b3435f0``.

1. Bank: unit-length patch features of the references, each also rotated (``rotations = 8``: every
   45 degrees on the same canvas, mirrored border; the paper's "agnostic" setting).
2. Patch score: ``1 - cos`` to the nearest bank patch.
3. Foreground (``foreground = true``): the first principal component of the image's own patches
   tells object from background; background patches score 0.
4. Image score: mean of the highest 1 % of the patch scores (the tail value at risk).

The paper taps the last block after the final norm, at 448 px, with rotations on every category. The
defaults here are one view a reference and no foreground mask: cheapest, and right for categories in
which orientation itself matters (a part that lies turned is a defect).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.methods.bank_search import NO_GRAPH, BankSearch, Search
from anomalyst.methods.base import Method, MethodOptions
from anomalyst.methods.memory_bank import (
    Banks,
    in_one_piece,
    resize_like,
    to_map,
    to_patches,
    top_mean,
)
from anomalyst.methods.views import View, turned

_PAPER_THRESHOLD = 10.0


class AnomalyDINOOptions(MethodOptions):
    """Options of AnomalyDINO."""

    rotations: int = Field(1, ge=1, description="views of each reference, evenly turned")
    foreground: bool = Field(False, description="score background patches 0")
    foreground_threshold: float | None = Field(
        None,
        gt=0,
        description="first principal component above which a patch is foreground; 10 as in the "
        "paper for the last block after the final norm, other layers need a number of their own",
    )
    tail: float = Field(0.01, gt=0, le=1, description="share of patches that the image score means")
    search: Search = Field("exact", description="approximate: through an index, of a large bank")


class AnomalyDINO(Method):
    """Few-shot nearest neighbour on transformer patches (or any other backbone's)."""

    name: ClassVar[str] = "anomaly-dino"
    Options: ClassVar[type[MethodOptions]] = AnomalyDINOOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "backbone": "dinov2-small",
            "layers": [11],
            "image_size": 448,
            "options": {"rotations": 8},
        }
    }
    options: AnomalyDINOOptions

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        super().__init__(options, backbone, layers, seed)
        self._banks = Banks()
        self._search = BankSearch(self._banks, self.options.search, "cosine", seed)
        self._foreground_threshold = self.options.foreground_threshold or _PAPER_THRESHOLD
        as_in_the_paper = backbone.final_norm and self.layers == (backbone.taps - 1,)
        threshold_given = self.options.foreground_threshold is not None
        if self.options.foreground and not threshold_given and not as_in_the_paper:
            raise InputError(
                f"option foreground=true of anomaly-dino with layers {list(self.layers)} of "
                f"{backbone.id} needs foreground_threshold too: the paper's 10 is for the last "
                "block of a full DINOv2 after its final norm"
            )

    @property
    def reference_views(self) -> Sequence[View]:
        return turned(self.options.rotations)

    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        patches = [to_patches(resize_like(features)) for features in views]
        self._banks.add(category, functional.normalize(torch.cat(patches), dim=1))

    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        stacked = resize_like(features)
        patches = to_patches(stacked)
        distance, _ = self._search.nearest(functional.normalize(patches, dim=1), category)
        maps = to_map(distance, stacked)
        if self.options.foreground:
            maps = maps * foreground(stacked, self._foreground_threshold)
        return maps, top_mean(maps, self.options.tail)

    @property
    def obstacle(self) -> str | None:
        if self.options.foreground:
            return (
                "foreground=true takes eigenvectors of each image, and ONNX has none; leave it out"
            )
        return NO_GRAPH if self.options.search == "approximate" else None

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        return {"bank": self._banks[category]}

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        self._banks.load({category or "": references["bank"]})

    @property
    def grows(self) -> tuple[str, ...]:
        small = all(in_one_piece(len(self._banks[name])) for name in self._banks.categories)
        return ("bank",) if small and self.options.rotations == 1 else ()

    def gained(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        patches = resize_like(features).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        return {"bank": functional.normalize(patches, dim=2)}

    def heat_unit(self, category: str | None) -> float:
        return 0.5

    def tensors(self) -> dict[str, Tensor]:
        return self._search.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._search.load(tensors)


def foreground(feature_map: Tensor, threshold: float) -> Tensor:
    """Return where the object is, ``[B, h, w]`` of 0 and 1, from feature maps ``[B, C, h, w]``.

    The first principal component of each image's own patches is cut at ``threshold``; it is turned
    over if then at most 35 % of the central 60 % x 60 % window is foreground (its sign means
    nothing, and objects lie in the middle). The mask is dilated and closed by 3 x 3.
    """
    tokens = feature_map.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
    centred = tokens - tokens.mean(dim=1, keepdim=True)
    _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred)  # ascending eigenvalues
    component = (centred @ axes[:, :, -1:])[..., 0].reshape(-1, *feature_map.shape[-2:])
    height, width = component.shape[-2:]
    window = (
        slice(None),
        slice(int(height * 0.2), height - int(height * 0.2)),
        slice(int(width * 0.2), width - int(width * 0.2)),
    )
    mask = component > threshold
    turned = mask[window].float().mean(dim=(1, 2)) <= 0.35
    mask = torch.where(turned[:, None, None], -component > threshold, mask).float()[:, None]
    mask = functional.max_pool2d(mask, 3, 1, 1)  # dilate, then close: dilate and erode
    mask = -functional.max_pool2d(-functional.max_pool2d(mask, 3, 1, 1), 3, 1, 1)
    return mask[:, 0]
