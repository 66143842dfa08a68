"""What losses of several methods share."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def average_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a scalar over all training processes; in one process, the scalar."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / torch.tensor(distributed.get_world_size(), dtype=total.dtype)


def focal_loss(
    probability: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Return the mean focal loss of probabilities in [0, 1] (Lin et al., ICCV 2017, eq. 5).

    ``-alpha_t (1 - p_t)^gamma log p_t``, where ``alpha_t`` is ``alpha`` for target 1.
    """
    p = probability.clamp(1e-7, 1 - 1e-7)
    right = torch.where(target > 0.5, p, 1 - p)
    weight = torch.where(target > 0.5, alpha, 1 - alpha)
    return (weight * (1 - right).pow(gamma) * -right.log()).mean()


def dice_loss(probability: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Return ``1 - (2 sum(p t) + smooth) / (sum p + sum t + smooth)``, in [0, 1].

    Milletari et al., 3DV 2016, with sums in place of squared sums.
    """
    both = (probability * target).sum()
    return 1 - (2 * both + smooth) / (probability.sum() + target.sum() + smooth)
