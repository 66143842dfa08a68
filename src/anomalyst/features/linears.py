"""Linear layers on the processor by oneDNN.

torch computes convolutions with oneDNN but linear layers with MKL, which leaves half of an AMD
processor's arithmetic unused: a DINOv2 passes 1.4 to 1.7 times as fast this way
(docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# What torch's own compiler puts in place of a linear layer; an old torch may not have it.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_THERE = _LINEAR is not None and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _flops(rows: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(rows) * weight[0]


LINEAR_FLOPS: dict[Any, Callable[..., int]] = {} if _LINEAR is None else {_LINEAR: _flops}
"""How torch's counter counts it."""


class QuickLinears(TorchFunctionMode):
    """A context in which ``linear`` runs on oneDNN: float32, on the processor, without gradients.

    Results differ from MKL's by rounding. All else in it stays as it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and not kwargs and _is_plain(args):
            rows, weight, bias = (*args, None)[:3]
            assert _LINEAR is not None
            return _LINEAR(rows, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _is_plain(args: Sequence[Any]) -> bool:
    """Tell whether oneDNN can take the tensors of a linear layer in place of MKL."""
    return (
        _THERE
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # nor while a graph is made of it
        and all(_is_ready(each) for each in args if each is not None)
    )


def _is_ready(tensor: Tensor) -> bool:
    on_processor = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return on_processor and tensor.dtype is torch.float32 and tensor.numel() > 0
