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
