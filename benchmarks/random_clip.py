"""Full-size CLIPs with random weights: enough to tell what a method costs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from anomalyst.features.backbones import find_backbone
from anomalyst.features.clip import ClipTower
from anomalyst.features.random_weights import random_tensors
from anomalyst.profiling_meter import count_flops, plain_pass

__all__ = ["gmac", "plain_pass", "random_state", "ready"]


def random_state(id: str) -> dict[str, Tensor]:
    """Return the tensors of both towers, drawn at random by open_clip itself."""
    return random_tensors(find_backbone(id))


def ready(tower: ClipTower, state: dict[str, Tensor]) -> ClipTower:
    """Return the tower with those weights, frozen."""
    tower.adopt(tower.choose(state))
    return tower.requires_grad_(False).eval()


def gmac(work: Callable[[], object]) -> float:
    """Return half the flops that torch counts, in units of 1e9, attention included."""
    return count_flops(work) / 2e9
