"""What NAGL makes of a product's references, and the form in which an exported graph takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class Guide(NamedTuple):
    """What the references of one product come to.

    Attributes
    ----------
    bank, unit
        Patches of the normal references ``[N, C]``, and the same at unit length.
    healthy
        Those of the healthy parts of abnormal ones, at unit length ``[H, C]``.
    differences
        Residuals of the healthy parts, at unit length ``[H, C]``.
    defects
        Patches inside the masks, at unit length ``[D, C]``.
    residuals
        Of those that are mined, at unit length ``[R, C]``.
    proxies
        Residual proxies P~ ``[K, M, C]``; none without abnormal references.
    """

    bank: Tensor
    unit: Tensor
    healthy: Tensor
    differences: Tensor
    defects: Tensor
    residuals: Tensor
    proxies: Tensor


def references_of(guide: Guide, learned: Tensor, guided: bool) -> dict[str, Tensor]:
    """Return a guide by name, with rows that change nothing where it has none.

    A graph is the same for all products, so that those without abnormal references need the
    others' parts too: ``guided`` is 0 there. Without ``guided`` no product has any.

    Parameters
    ----------
    learned
        The learnable proxies ``[M, C]``.
    """
    if not guided:
        return {"bank": guide.bank}
    nothing = guide.bank.new_zeros(1, guide.bank.shape[1])  # its cosine to anything is 0
    known = len(guide.proxies) > 0
    return {
        "bank": guide.bank,
        "healthy": guide.healthy if len(guide.healthy) else guide.unit[:1],
        "differences": guide.differences if len(guide.differences) else nothing,
        "defects": guide.defects if len(guide.defects) else nothing,
        "residuals": guide.residuals if len(guide.residuals) else nothing,
        "proxies": guide.proxies if known else learned.detach()[None],
        "guided": guide.bank.new_tensor([float(known)]),
    }


def guide_from(references: Mapping[str, Tensor]) -> Guide:
    """Return the guide that `references_of` named."""
    bank = references["bank"]
    unit, none = functional.normalize(bank, dim=1), bank[:0]
    rest = [references.get(name, none) for name in Guide._fields[2:]]
    return Guide(bank, unit, *rest)
