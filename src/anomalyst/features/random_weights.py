"""Random weights for a backbone: enough to tell what a method costs, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anomalyst.features.backbones import BackboneSpec, find_backbone
from anomalyst.features.libraries import is_plain_clip


def random_tensors(spec: BackboneSpec, seed: int = 0) -> dict[str, Tensor]:
    """Return a backbone's tensors as its own library draws them, of a plain CLIP both towers."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = _make_clip(spec) if spec.library == "open_clip" else _make_timm(spec)
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors


def random_weights(id: str, path: Path, seed: int = 0) -> str:
    """Write such tensors as a ``.safetensors`` file, and return it as ``file:PATH``."""
    tensors = random_tensors(find_backbone(id), seed)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return f"file:{path}"


def _make_clip(spec: BackboneSpec) -> Any:
    import open_clip

    config = open_clip.get_model_config(spec.architecture)
    text = config["text_cfg"] if is_plain_clip(spec) else {}
    quick = config.get("quick_gelu", False)
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text, quick_gelu=quick)


def _make_timm(spec: BackboneSpec) -> Any:
    import timm

    return timm.create_model(spec.architecture, pretrained=False)
