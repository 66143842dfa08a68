"""Losses of OneNIP's refiner (Gao, ECCV 2024, arXiv 2505.09264)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def segmentation_loss(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """Return the refiner's loss of logits and masks ``[B, H, W]``.

    ``code`` and ``paper``: Dice of each. ``balanced``: Dice with its factor of 2 on the images with
    a defect alone, plus cross-entropy on all: Dice of an empty mask saturates, so that good images
    teach nothing, and at higher learning rates the refiner ends up predicting nothing at all.
    """
    probability = logits.sigmoid()
    if kind != "balanced":
        return squared_dice(probability, target, doubled=kind == "paper")
    entropy = functional.binary_cross_entropy_with_logits(logits, target)
    marked = target.flatten(1).any(dim=1)
    if not marked.any():
        return entropy
    return entropy + squared_dice(probability[marked], target[marked], doubled=True)


def squared_dice(probability: Tensor, target: Tensor, doubled: bool) -> Tensor:
    """Return the mean Dice loss over samples ``[B, H, W]``, in [0, 1].

    The official code's ``1 - (sum pt + 1) / (sum p^2 + sum t^2 + 1)``, or ``doubled``, the paper's
    ``1 - 2 sum pt / (sum p^2 + sum t^2)``, which is 1 for an empty mask, whatever is predicted.
    """
    p, t = probability.flatten(1), target.flatten(1)
    both, total = (p * t).sum(1), p.square().sum(1) + t.square().sum(1)
    if doubled:
        return (1 - 2 * both / total.clamp(min=1e-6)).mean()
    return (1 - (both + 1) / (total + 1)).mean()
