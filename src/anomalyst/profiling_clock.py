"""Timing several works in turn, so that all meet the same machine. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

WARM_UP = 2
"""Runs, or training steps, that are not timed. Of a training the last of them is counted."""

_FEWEST, _MOST, _ENOUGH = 5, 25, 5.0  # rounds; between them so many seconds are enough

Work = Callable[[], object]


def seconds(work: Work) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_in_turn(
    works: Sequence[Work], clock: Callable[[Work], float] = seconds
) -> list[list[float]]:
    """Return what ``clock`` says of each work in each round, all run in turn.

    Rounds go on for some seconds, and are five at least; two before them warm up.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(WARM_UP):
        for work in works:
            clock(work)
    began = time.perf_counter()
    while len(times[0]) < _FEWEST or (
        len(times[0]) < _MOST and time.perf_counter() - began < _ENOUGH
    ):
        for work, taken in zip(works, times, strict=True):
            taken.append(clock(work))
    return times
