"""The frozen half of a detector: image tensors in, feature maps out, cached where asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureCache
from anomalyst.features.extractor import Backbone
from anomalyst.inference import Item

Views = Callable[[Tensor], Iterable[Tensor]]


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} asked for, but torch sees {torch.cuda.device_count()} GPUs; use cpu"
        )
    return device


@dataclass(frozen=True)
class Engine:
    """A backbone, the preprocessing that feeds it, and the cache beside it."""

    backbone: Backbone
    preprocess: Preprocess
    device: torch.device
    cache: FeatureCache | None = None

    def features(self, items: Sequence[Item]) -> list[Tensor]:
        """Return one map ``[B, C, h, w]`` a tapped layer, of good items of one shape."""
        return self._extract(items, self._stack(items), "image")

    def view_features(
        self, items: Sequence[Item], views: Views, description: str
    ) -> list[list[Tensor]]:
        """Return the feature maps of every view of good items of one shape.

        ``description`` says how the views are made, for the cache.
        """
        images = self._stack(items)
        return [
            self._extract(items, view, f"{description} {number}" if number else "image")
            for number, view in enumerate(views(images))
        ]

    def _stack(self, items: Sequence[Item]) -> Tensor:
        stacked = np.stack([item.tensor for item in items if item.tensor is not None])
        return torch.from_numpy(stacked).to(self.device)

    @torch.inference_mode()
    def _extract(self, items: Sequence[Item], images: Tensor, view: str) -> list[Tensor]:
        if self.cache is None:
            return self.backbone(images)
        transform = json.dumps(self.preprocess.to_dict(), sort_keys=True)
        keys = [
            self.cache.key(
                item.sha256,
                transform,
                f"{self.backbone.identity}:{self.backbone.weights_sha256}",
                self.backbone.layers,
                view,
            )
            for item in items
        ]
        found = [self.cache.get(key) for key in keys]
        missing = [k for k, arrays in enumerate(found) if arrays is None]
        if missing:
            fresh = [maps.cpu().numpy() for maps in self.backbone(images[missing])]
            for row, k in enumerate(missing):
                found[k] = self.cache.put(keys[k], [maps[row] for maps in fresh])
        return [
            torch.from_numpy(np.stack([arrays[tap] for arrays in found if arrays is not None]))
            .to(self.device)
            .float()
            for tap in range(len(self.backbone.layers))
        ]
