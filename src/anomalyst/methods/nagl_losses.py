"""What NAGL is trained by: ranks within an episode, the paper's losses, or the authors' code's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.methods.losses import dice_loss, focal_loss
from anomalyst.methods.memory_bank import top_mean

_TOP = 0.01  # share of patches that the image score means
_TOP_OF_AUTHORS = 20  # patches, in the authors' training
_HARDEST = 20  # one in so many normal patches is ranked against the defect: the highest ones
_SHARPNESS = 10.0  # of the ranking, per unit of the logarithm of a score
_TINY = 1e-3  # keeps that logarithm finite


def ranking_losses(good: Tensor, bad: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the losses by rank of a normal and an abnormal score map ``[h, w]``.

    ``mask`` ``[H, W]`` is the abnormal one's. Only ratios of scores count: a product whose scores
    are all twice as large loses nothing.
    """
    cover = functional.adaptive_avg_pool2d(mask[None, None], (bad.shape[0], bad.shape[1]))[0, 0]
    image = _rank(top_mean(bad[None], _TOP), top_mean(good[None], _TOP), _SHARPNESS)
    defect = bad[cover >= min(0.25, float(cover.max()))]
    others = torch.cat([bad[cover == 0], good.flatten()])
    hardest = others.topk(max(len(others) // _HARDEST, 1)).values
    pixel = _rank(defect[:, None], hardest[None], _SHARPNESS / 2)
    return {"loss": image + pixel, "image": image, "pixel": pixel}


def _rank(high: Tensor, low: Tensor, sharpness: float) -> Tensor:
    ratio = (high + _TINY).log() - (low + _TINY).log()
    return functional.softplus(-sharpness * ratio).mean()


def score_losses(fused: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the paper's losses of S ``[h, w]``, taken as probabilities: BCE, focal and dice."""
    label = mask.amax()
    image = functional.binary_cross_entropy(
        top_mean(fused[None], _TOP)[0].clamp(1e-7, 1 - 1e-7), label
    )
    full = _upsampled(fused[None], mask)[0]
    focal, dice = focal_loss(full, mask), dice_loss(full, mask)
    return {"loss": image + focal + dice, "image": image, "focal": focal, "dice": dice}


def logit_losses(
    fused: Tensor, normal: Tensor, abnormal: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Return the losses of the authors' code, which takes scores in [0, 1] for logits.

    The maps ``[h, w]`` of similarity to normal, ``1 - S_n``, and S_a are two classes.
    """
    label = mask.amax()
    flat = fused.flatten()
    top = flat.topk(min(_TOP_OF_AUTHORS, len(flat))).values.mean()
    image = functional.cross_entropy(torch.stack([1 - top, top])[None], label.long()[None])
    logits = _upsampled(torch.stack([1 - normal, abnormal]), mask)  # (2, H, W)
    target = torch.stack([1 - mask, mask])
    focal = focal_loss(logits.sigmoid(), target)
    both = logits.softmax(0)
    dice = dice_loss(both[0], target[0]) + dice_loss(both[1], target[1])
    return {"loss": image + focal + dice, "image": image, "focal": focal, "dice": dice}


def _upsampled(maps: Tensor, mask: Tensor) -> Tensor:
    """Return maps ``[K, h, w]`` at the size of a mask."""
    return functional.interpolate(maps[None], mask.shape, mode="bilinear", align_corners=False)[0]
