"""IIPAD's losses (Lv, Su, Xu, ICLR 2025), on vectors of unit length.

Letters of the shapes: B images, J layers, R patches, L tokens of a prompt, d channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LEAST = 1e-8


def contrast(own: Tensor, other: Tensor, temperature: float, linear: bool) -> Tensor:
    """Return the mean loss of similarities to the right prompt and to the other one.

    ``-log softmax`` of the pair (eq. 6, 9 and 11), or ``linear``, the released code's quarter of
    ``1 - (own - other)``.
    """
    if linear:
        return (1 - (own - other)).mean() / 4
    return functional.softplus((other - own) / temperature).mean()


def semantic_loss(
    features: Tensor, pseudo: Tensor | None, prompts: Tensor, temperature: float, linear: bool
) -> Tensor:
    """Return L_s^n + L_s^a of features and pseudo ``[B, J, R, d]`` and e ``[B, 2, d]``."""
    normal, abnormal = torch.einsum("bjrd,bpd->pbjr", features, prompts)
    loss = contrast(normal, abnormal, temperature, linear)
    if pseudo is not None:
        normal, abnormal = torch.einsum("bjrd,bpd->pbjr", pseudo, prompts)
        loss = loss + contrast(abnormal, normal, temperature, linear)
    return loss


def text_loss(
    prompts: Tensor, sentences: tuple[Tensor, Tensor], temperature: float, linear: bool
) -> Tensor:
    """Return L_t (eq. 11) of e ``[B, 2, d]`` and good and bad sentences ``[n, d]``."""
    good, bad = (prompts @ each.T for each in sentences)  # (B, 2, n)
    return contrast(good[:, 0], good[:, 1], temperature, linear) + contrast(
        bad[:, 1], bad[:, 0], temperature, linear
    )


def token_loss(tokens: Tensor, features: Tensor, temperature: float) -> Tensor:
    """Return L_f of one polarity (eq. 7), the mean over layers and images.

    Parameters
    ----------
    tokens
        ``[B, L, d]``.
    features
        ``[B, J, R, d]``.
    """
    weights = token_weights(torch.einsum("bld,bjrd->bjlr", tokens, features))
    grouped = functional.normalize(weights @ features, dim=-1)  # (B, J, L, d)
    alike = torch.einsum("bld,bjkd->bjlk", tokens, grouped) / temperature
    matched = alike.diagonal(dim1=-2, dim2=-1)
    return (alike.logsumexp(-1) + alike.logsumexp(-2) - 2 * matched).mean()


def token_weights(similarity: Tensor, threshold: float | None = None) -> Tensor:
    """Return W ``[..., L, R]``: each token's share in the patches, from their similarity.

    Rows are brought to [0, 1], what is below the threshold (1 / R by default, the paper's 1 / 256)
    to 0, and then divided by their sum. Eq. 7 divides by the sum of the similarities themselves,
    which may be 0 or less; the released code does as is done here.
    """
    # Not aminmax: older versions of torch have no derivative of it.
    low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
    scaled = (similarity - low) / (high - low).clamp(min=_LEAST)
    threshold = 1 / similarity.shape[-1] if threshold is None else threshold
    kept = torch.where(scaled >= threshold, scaled, 0)
    return kept / kept.sum(-1, keepdim=True).clamp(min=_LEAST)


def pseudo_features(layers: Tensor, kind: str, noise: float) -> Tensor:
    """Return F^a ``[B, J, R, d]`` of unit length (eq. 8): each layer, the one before, and noise.

    Parameters
    ----------
    layers
        F ``[B, J, R, d]``, not normalised.
    kind
        ``paper``: the first layer has none before it. ``code``: it gets the last one, which there
        is not normalised yet.
    noise
        Standard deviation of each component.
    """
    unit = functional.normalize(layers, dim=-1)
    first = layers[:, -1:] if kind == "code" else torch.zeros_like(unit[:, :1])
    before = torch.cat([first, unit[:, :-1]], dim=1)
    return functional.normalize(unit + before + noise * torch.randn_like(unit), dim=-1)
