"""StableAdamW: an optimiser that damps steps into directions it knows little of yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class StableAdamW(torch.optim.Optimizer):
    """AdamW with amsgrad whose update is damped where the gradient outruns its second moment.

    Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
    NeurIPS 2023, in INP-Former's form: the running maximum is taken of the uncorrected second
    moment, and the damping is the root mean square of gradient over its root, a tensor at a time.

    Parameters
    ----------
    params
        What to train.
    lr
        Learning rate, set anew before every step.
    betas, eps
        As in Adam.
    weight_decay
        Decoupled, of all tensors alike.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("first", "second", "highest"):
                state[name] = torch.zeros_like(parameter)
        state["step"] = int(state["step"]) + 1  # a checkpoint gives it back as a tensor
        rate, (beta1, beta2) = group["lr"], group["betas"]
        parameter.mul_(1 - rate * group["decay"])
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        torch.maximum(state["highest"], state["second"], out=state["highest"])
        root = state["highest"].sqrt().div_((1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        surprise = (gradient / root).square_().mean().sqrt().clamp_(min=1)
        size = rate / (1 - beta1 ** state["step"])
        parameter.sub_(state["first"].div(root).mul_(size / surprise))
