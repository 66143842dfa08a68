"""Batch norms folded into the convolutions before them: of a frozen network they are one step."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(model: nn.Module) -> nn.Module | None:
    """Return a copy of a network in evaluation mode without such batch norms, None if it has none.

    A batch norm that is declared right after a convolution is taken to follow it: whoever calls
    this holds the copy's results against the network's own. Tensors that stay are shared.
    """
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return twin if _fold(twin) else None


def _fold(module: nn.Module) -> bool:
    found = False
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if (
            isinstance(child, nn.BatchNorm2d)
            and child.track_running_stats
            and before
            and isinstance(before[1], nn.Conv2d)
            and before[1].out_channels == child.num_features
        ):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            # timm's batch norm may have the activation inside.
            setattr(module, name, getattr(child, "act", nn.Identity()))
            found = True
        else:
            found |= _fold(child)
        before = name, child
    return found
