"""Which rows of a benchmark differ: paired tests, average ranks and their critical difference.

Source: J. Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7, 2006.
His data sets are our categories. Seeds of one category are no independent samples, so a row has one
score a category: its mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

Scores = Mapping[str, Mapping[str, float]]
"""A row's label to its score in each category; higher is better."""

ALPHA = 0.05
LEAST_PAIRS = 6  # of five, all in one direction, the two-sided p is 2 / 2^5 = .0625
_DIGITS = 12  # what floats differ by beyond that is no difference


@dataclass(frozen=True)
class PairedTest:
    """Two rows over the categories that both have.

    Attributes
    ----------
    difference
        Mean of ``one`` less ``other``.
    p
        Two-sided, of the Wilcoxon signed-rank test; None where under `LEAST_PAIRS` categories
        differ, which cannot give a p under .05.
    p_holm
        The same, corrected for all pairs that have one.
    """

    one: str
    other: str
    categories: int
    difference: float
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Ranking:
    """Average ranks over the categories that all rows have.

    Attributes
    ----------
    ranks
        Best first; 1 is best, equal scores share their ranks.
    friedman_p
        That all rows are equal, by the chi-squared statistic, which is rough for few categories.
    critical_difference
        Of two average ranks at `ALPHA`, by Nemenyi's test.
    groups
        The largest groups of rows that do not differ, best first. They may overlap; all rows are
        one where Friedman's test finds no difference.
    """

    ranks: Mapping[str, float]
    categories: int
    friedman_p: float
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]


def paired_tests(scores: Scores) -> list[PairedTest]:
    """Compare every two rows, in their order; those without a common category are left out."""
    found: list[tuple[str, str, int, float]] = []
    p_values: list[float | None] = []
    for one, other in combinations(scores, 2):
        common = [name for name in scores[one] if name in scores[other]]
        if common:
            pairs = np.array([[scores[row][name] for name in common] for row in (one, other)])
            differences = pairs[0] - pairs[1]
            found.append((one, other, len(common), float(differences.mean())))
            p_values.append(signed_rank_p(differences))
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [
        PairedTest(*pair, p, None if p is None else next(corrected))
        for pair, p in zip(found, p_values, strict=True)
    ]


def signed_rank_p(differences: Sequence[float] | np.ndarray[Any, Any]) -> float | None:
    """Return the two-sided p of Wilcoxon's signed-rank test, None for too few differences.

    Zeros are left out, as Wilcoxon did, and equal differences share their ranks. The p is exact,
    with ties too: all 2^n signs of the ranks at hand are counted.
    """
    from scipy.stats import rankdata

    rounded = np.round(np.asarray(differences, dtype=float), _DIGITS)
    found = rounded[rounded != 0]
    if len(found) < LEAST_PAIRS:
        return None
    ranks = np.rint(2 * rankdata(np.abs(found))).astype(int)  # twice: shared ranks are halves
    share = np.zeros(int(ranks.sum()) + 1)  # of all signs, by the sum of the positive ranks
    share[0] = 1.0
    for rank in ranks:
        share[rank:] += share[:-rank].copy()
        share /= 2
    smaller = min(int(ranks[found > 0].sum()), int(ranks[found < 0].sum()))
    return min(1.0, 2 * float(share[: smaller + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected by Holm's step-down procedure, in the order given."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[index]))
        corrected[index] = largest
    return corrected


def rank_rows(scores: Scores) -> Ranking | None:
    """Rank the rows; None for under three rows, or under two categories that all of them have."""
    from scipy.stats import rankdata

    labels = list(scores)
    labels = list(scores)
    if len(labels) < 3:
        return None
    common = [name for name in scores[labels[0]] if all(name in scores[row] for row in labels)]
    if len(common) < 2:
        return None
    table = np.array([[scores[row][name] for row in labels] for name in common])  # (category, row)
    ranks = rankdata(-np.round(table, _DIGITS), axis=1)
    average = ranks.mean(axis=0)
    order = np.argsort(average, kind="stable")
    ordered = {labels[i]: float(average[i]) for i in order}
    p = _friedman_p(ranks)
    width = critical_difference(len(labels), len(common))
    groups = (tuple(ordered),) if p >= ALPHA else _groups(ordered, width)
    return Ranking(ordered, len(common), p, width, groups)


def critical_difference(rows: int, categories: int) -> float:
    """Return how far two average ranks must lie apart at `ALPHA`: Demšar, section 3.2.2."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - ALPHA, rows, np.inf)) / np.sqrt(2)
    return float(q * np.sqrt(rows * (rows + 1) / (6 * categories)))


def _friedman_p(ranks: np.ndarray[Any, Any]) -> float:
    """Return Friedman's p from ranks ``[category, row]``, with its correction for ties."""
    from scipy.stats import friedmanchisquare

    if (ranks == ranks[0, 0]).all():
        return 1.0  # all tied everywhere: the statistic is 0 / 0
    return float(friedmanchisquare(*ranks.T).pvalue)


def _groups(ranks: Mapping[str, float], width: float) -> tuple[tuple[str, ...], ...]:
    """Return the largest runs of rows, sorted by rank, that lie less than ``width`` apart."""
    labels, values = list(ranks), list(ranks.values())
    groups: list[tuple[str, ...]] = []
    reached = 0
    for start, value in enumerate(values):
        end = sum(other - value < width for other in values)
        if end - start > 1 and end > reached:
            groups.append(tuple(labels[start:end]))
            reached = end
    return tuple(groups)
