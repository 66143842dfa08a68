"""How labelled parts would be judged under given limits: false rejects, misses, reviews. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import exp, lgamma, log, log1p
from typing import Any, Literal

from anomalyst.station.verdicts import Limits
from anomalyst.types import Verdict

Label = Literal["good", "defect"]
_DOUBT = 0.05


def verdict(limits: Limits, score: float) -> Verdict | None:
    """Return the verdict of a score alone, None where nothing can be said.

    It is that of the score's p-value where the limits come from a calibration.
    """
    if not (limits.calibrated or limits.by_hand):
        return None
    if limits.ng is not None and score > limits.ng:
        return "ng"
    return "review" if limits.review is not None and score > limits.review else "ok"


@dataclass(frozen=True)
class Confusion:
    """What became of parts whose truth somebody said.

    ``false_rejects`` are good parts judged NG, ``misses`` defective ones judged OK, ``reviews``
    parts of either kind sent to review, ``unjudged`` those without a verdict.
    """

    n_good: int = 0
    n_defect: int = 0
    false_rejects: int = 0
    misses: int = 0
    reviews: int = 0
    unjudged: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, and the rates that they still allow (95 %, one-sided)."""
        return {
            **asdict(self),
            "false_rejects_at_most": at_most(self.false_rejects, self.n_good),
            "misses_at_most": at_most(self.misses, self.n_defect),
        }


def confusion(judged: Iterable[tuple[Label, Verdict | None]]) -> Confusion:
    """Count labelled verdicts."""
    rows = list(judged)
    return Confusion(
        n_good=sum(label == "good" for label, _ in rows),
        n_defect=sum(label == "defect" for label, _ in rows),
        false_rejects=rows.count(("good", "ng")),
        misses=rows.count(("defect", "ok")),
        reviews=sum(verdict == "review" for _, verdict in rows),
        unjudged=sum(verdict is None for _, verdict in rows),
    )


def ordered(judged: Iterable[tuple[Label, float]]) -> float | None:
    """Return the share of pairs of a good and a defective part in which the latter scores higher.

    Ties count half; None without both. It is the AUROC, and needs no threshold.
    """
    rows = list(judged)
    good = sorted(score for label, score in rows if label == "good")
    bad = [score for label, score in rows if label == "defect"]
    if not good or not bad:
        return None
    won = sum(bisect_left(good, score) + bisect_right(good, score) for score in bad)
    return won / (2 * len(good) * len(bad))


def at_most(count: int, of: int) -> float | None:
    """Return the highest rate that ``count`` cases ``of`` so many allow, None of none.

    The one-sided 95 % limit of C. Clopper and E. Pearson, Biometrika 26, 1934.

    >>> round(at_most(0, 59), 3)  # "no miss among 59" still allows one in twenty
    0.05
    """
    if of == 0:
        return None
    if count >= of:
        return 1.0
    low, high = count / of, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _at_most_so_many(count, of, middle) > _DOUBT else (low, middle)
        )
    return high


def _at_most_so_many(count: int, of: int, rate: float) -> float:
    """Return the binomial probability of at most ``count`` cases; ``rate`` in (0, 1]."""
    if rate >= 1 or rate <= 0:
        return float(rate <= 0)
    logs = (
        lgamma(of + 1)
        - lgamma(k + 1)
        - lgamma(of - k + 1)
        + k * log(rate)
        + (of - k) * log1p(-rate)
        for k in range(count + 1)
    )
    return sum(exp(value) for value in logs)
