"""What AnoPLe is trained by: dice and focal on maps, contrast and alignment on images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.methods.losses import dice_loss, focal_loss


def pixel_loss(probability: Tensor, mask: Tensor) -> Tensor:
    """Return dice, averaged over maps ``[R, H, W]`` of P(abnormal), plus focal loss.

    Focal loss with gamma 2 and both classes weighted alike.
    """
    dice = torch.vmap(dice_loss)(probability, mask).mean()
    return dice + focal_loss(probability, mask, alpha=0.5)


def image_loss(image: Tensor, texts: Tensor, truth: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of images ``[R, D]`` over their texts ``[R, T, D]``, unit length.

    ``truth`` ``[R]`` is the position of the right text.
    """
    logits = torch.einsum("rd,rtd->rt", image, texts) / temperature
    return functional.cross_entropy(logits, truth)


def alignment_loss(image: Tensor, decoded: Tensor, probability: Tensor) -> Tensor:
    """Return ``1 - <z, s>``, the mean over images: s is what the map points at.

    Parameters
    ----------
    image
        CLS embeddings z ``[R, D]``, unit length.
    decoded
        Decoder features F ``[R, D, h, w]``; ``s = sum_ij M_ij F_ij``, brought to unit length, so
        that the loss lies in [0, 2].
    probability
        Weights M ``[R, h, w]``.
    """
    seen = torch.einsum("rdhw,rhw->rd", decoded, probability)
    return (1 - (image * functional.normalize(seen, dim=1, eps=1e-6)).sum(1)).mean()
