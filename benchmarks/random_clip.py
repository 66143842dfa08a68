"""Full-size CLIPs with random weights: enough to tell what a method costs, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import open_clip
import torch

from anomalyst.features.backbones import find_backbone
from anomalyst.features.extractor import Backbone
from anomalyst.methods.base import Method, MethodOptions


def random_clip(
    id: str, layers: Sequence[int], method: type[Method], options: MethodOptions
) -> Backbone:
    """Return the frozen network of a method, both towers drawn at random by open_clip itself."""
    config = open_clip.get_model_config(find_backbone(id).architecture)
    torch.manual_seed(0)
    model = open_clip.CLIP(
        config["embed_dim"],
        config["vision_cfg"],
        config["text_cfg"],
        quick_gelu=config.get("quick_gelu", False),
    )
    return Backbone.from_state(id, layers, model.state_dict(), partial(method.make_tower, options))
