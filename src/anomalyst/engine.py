"""The frozen half of a detector: image tensors in, feature maps out, cached where asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureArray, FeatureCache
from anomalyst.features.extractor import Backbone
from anomalyst.inference import Item
from anomalyst.methods.base import Condenser
from anomalyst.methods.views import PLAIN, View


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
    """A backbone, the preprocessing that feeds it, and the cache beside it.

    ``condenser`` keeps of the backbone's maps what the method uses; the cache holds only that.
    """

    backbone: Backbone
    preprocess: Preprocess
    device: torch.device
    cache: FeatureCache | None = None
    condenser: Condenser | None = None

    def features(self, items: Sequence[Item], view: View = PLAIN) -> list[Tensor]:
        """Return the feature maps ``[B, C, h, w]`` of one view of good items of one shape."""
        if self.cache is None:
            return self._extract(items, view)
        keys = self.cache_keys(items, view)
        found = [self.cache.get(key) for key in keys]
        missing = [k for k, arrays in enumerate(found) if arrays is None]
        if missing:
            fresh = [m.cpu().numpy() for m in self._extract([items[k] for k in missing], view)]
            for row, k in enumerate(missing):
                found[k] = self.cache.put(keys[k], [maps[row] for maps in fresh])
        return self.stack([arrays for arrays in found if arrays is not None])

    def cache_keys(self, items: Sequence[Item], view: View) -> list[str]:
        """Return the names under which the cache keeps what `features` returns."""
        transform = json.dumps(self.preprocess.to_dict(), sort_keys=True)
        network = f"{self.backbone.identity}:{self.backbone.weights_sha256}"
        made = view.name if self.condenser is None else f"{view.name}, {self.condenser.name}"
        return [
            FeatureCache.key(item.sha256, transform, network, self.backbone.layers, made)
            for item in items
        ]

    def stack(self, found: Sequence[Sequence[FeatureArray]]) -> list[Tensor]:
        """Return cached entries of one shape as float32 maps ``[B, C, h, w]`` on the device."""
        return [
            torch.from_numpy(np.stack(maps)).to(self.device).float()
            for maps in zip(*found, strict=True)
        ]

    @torch.inference_mode()
    def _extract(self, items: Sequence[Item], view: View) -> list[Tensor]:
        stacked = np.stack([item.tensor for item in items if item.tensor is not None])
        maps = self.backbone(view.apply(torch.from_numpy(stacked).to(self.device)))
        return maps if self.condenser is None else self.condenser.apply(maps)
