"""Whether the parts on the line still look like those of the calibration, with few false alarms.

Every part gets a conformal p-value among all parts before it, the calibration's first; if nothing
changes, these are independent and uniform. Two bets are laid against that, on higher and on lower
values, and each bet's money is counted as Shiryaev and Roberts do. Sources: V. Vovk, I. Nouretdinov
and A. Gammerman, Testing Exchangeability On-Line, ICML 2003 (p-values, bets); V. Vovk, Testing
Randomness Online, Statistical Science 36, 2021 (the conformal Shiryaev-Roberts procedure);
M. Pollak, Annals of Statistics 13, 1985 (how seldom it errs).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from statistics import median
from typing import Literal

PARTS_A_FALSE_ALARM = 10_000
"""A line on which nothing changes gives a false alarm at most once in so many parts, on average; a
Shewhart chart with limits at three sigma gives one in 370."""

_STAKE = 1.8
"""A bet multiplies its money by 1 - _STAKE * (p - 1/2), or by 1 + that: never by less than a
tenth, nor by more than 1.9, so that single parts, such as defects, decide nothing."""

Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Change:
    """An alarm: ``at`` is the part that gave it, ``since`` the one with which it probably began.

    Both are places in the stream, from 0; ``usual`` and ``now`` are medians before ``since`` and
    from there to ``at``.
    """

    at: int
    since: int
    direction: Direction
    usual: float
    now: float


@dataclass(frozen=True)
class Watched:
    """What is known of a stream.

    Attributes
    ----------
    baseline
        How many values came from the calibration.
    count
        How many parts were looked at.
    evidence
        What the bets have won, as a share of what gives the alarm; 1 from the alarm on.
    usual, now
        Median of the calibration (of all parts where there is none), and of the newest parts.
    change
        The first alarm, None without any.
    """

    baseline: int
    count: int
    evidence: float
    usual: float | None
    now: float | None
    change: Change | None


def p_value(ascending: Sequence[float], value: float, tie: float) -> float:
    """Return the smoothed conformal p-value of a value among earlier ones: small where it is high.

    ``tie`` in [0, 1) is a random number that was drawn without knowledge of the value.

    >>> p_value([1.0, 2.0, 3.0], 2.5, 0.5)  # one is higher, and half of the value itself counts
    0.375
    """
    below, not_above = bisect_left(ascending, value), bisect_right(ascending, value)
    higher, equal = len(ascending) - not_above, not_above - below + 1
    return (higher + tie * equal) / (len(ascending) + 1)


def watch(
    baseline: Sequence[float],
    values: Sequence[float],
    ties: Sequence[float],
    streams: int = 1,
    recent: int = 50,
) -> Watched:
    """Look at values in the order in which they came; of parts, not of several looks at one.

    Parameters
    ----------
    baseline
        Values of the calibration, in any order; with none, parts are compared with earlier parts.
    values, ties
        A value and a random number in [0, 1) a part.
    streams
        How many streams are watched beside each other, this one too: together they keep to
        `PARTS_A_FALSE_ALARM`.
    recent
        How many parts are the newest.
    """
    seen, limit = sorted(baseline), 2.0 * PARTS_A_FALSE_ALARM * streams
    money: dict[Direction, float] = {"higher": 0.0, "lower": 0.0}
    run: dict[Direction, float] = {"higher": 0.0, "lower": 0.0}
    began: dict[Direction, int] = {"higher": 0, "lower": 0}
    change: Change | None = None
    for place, (value, tie) in enumerate(zip(values, ties, strict=True)):
        edge = _STAKE * (0.5 - p_value(seen, value, tie))
        factors: dict[Direction, float] = {"higher": 1 + edge, "lower": 1 - edge}
        for side, factor in factors.items():
            if run[side] <= 0:  # the last place from which a bet would have won most
                run[side], began[side] = 0.0, place
            run[side] += log(factor)
            money[side] = (money[side] + 1) * factor
        if sum(money.values()) >= limit:
            side = max(factors, key=lambda name: money[name])
            change = _change(baseline, values, place, began[side], side)
            break
        seen.insert(bisect_left(seen, value), value)
    usual = baseline or values
    return Watched(
        baseline=len(baseline),
        count=len(values),
        evidence=1.0 if change else sum(money.values()) / limit,
        usual=median(usual) if usual else None,
        now=median(values[-recent:]) if values else None,
        change=change,
    )


def _change(
    baseline: Sequence[float], values: Sequence[float], at: int, since: int, side: Direction
) -> Change:
    before = [*baseline, *values[:since]] or values[: at + 1]
    return Change(at, since, side, median(before), median(values[since : at + 1]))
