"""Full-size CLIPs with random weights: enough to tell what a method costs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anomalyst.features.backbones import find_backbone
from anomalyst.features.clip import ClipTower, run_blocks


def random_state(id: str) -> dict[str, Tensor]:
    """Return the tensors of both towers, drawn at random by open_clip itself."""
    config = open_clip.get_model_config(find_backbone(id).architecture)
    torch.manual_seed(0)
    model = open_clip.CLIP(
        config["embed_dim"],
        config["vision_cfg"],
        config["text_cfg"],
        quick_gelu=config.get("quick_gelu", False),
    )
    return model.state_dict()


def ready(tower: ClipTower, state: dict[str, Tensor]) -> ClipTower:
    """Return the tower with those weights, frozen."""
    tower.adopt(tower.choose(state))
    return tower.requires_grad_(False).eval()


@torch.inference_mode()
def plain_pass(tower: ClipTower, images: Tensor) -> Tensor:
    """Return what CLIP itself makes of images: its embedding of each."""
    tokens, _ = tower.embed(images)
    return tower.project(run_blocks(tower.blocks, tokens)[:, 0])


def gmac(work: Callable[[], object]) -> float:
    """Return half the flops that torch counts, in units of 1e9, attention included."""
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        work()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() / 2e9
