"""Comparisons of a benchmark's rows, against hand counts and Demšar's published values."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from anomalyst.benchmark.comparison import (
    critical_difference,
    holm,
    paired_tests,
    rank_rows,
    signed_rank_p,
)
from anomalyst.benchmark.figures import comparison_table, figures_of, label_of, scores_of
from anomalyst.benchmark.rows import Row
from anomalyst.evaluation import METRICS


def row(
    method: str = "patchcore",
    variant: str = "default",
    shots: int | None = None,
    abnormal: int | None = None,
    **values: list[float | None],
) -> Row:
    """A row with each category's image AUROC by seed; None is a seed that was not run."""
    seeds: dict[int, list[SimpleNamespace]] = {}
    for category, by_seed in values.items():
        for seed, value in enumerate(by_seed):
            found = None
            if value is not None:
                counts = {"n_normal": 1, "n_anomalous": 1}
                figures = dict.fromkeys(METRICS) | counts | {"i_auroc": value}
                found = {"categories": {category: figures}}
                found |= {"images_per_second": 4.0 * (seed + 1), "peak_rss_mb": 100.0 + seed}
            seeds.setdefault(seed, []).append(SimpleNamespace(metrics=found))
    return Row("", method, variant, shots, abnormal, seeds)  # type: ignore[arg-type]


# ---- pairs --------------------------------------------------------------------------------------


def test_signed_rank_p_is_the_count_of_signs() -> None:
    # Six ranks, 64 signs. Only "all positive" and "all negative" are as far out as all positive.
    assert signed_rank_p([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == 2 / 64
    # Sums of the negative ranks up to 1: none and {1}; up to 3: also {2}, {3}, {1, 2}.
    assert signed_rank_p([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == 4 / 64
    assert signed_rank_p([0.1, 0.2, -0.3, 0.4, 0.5, 0.6]) == 10 / 64
    assert signed_rank_p([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]) == 2 / 64
    # Equal differences share the rank 3.5: none and six single ones reach one negative of them.
    assert signed_rank_p([0.1, 0.1, 0.1, 0.1, 0.1, -0.1]) == 14 / 64
    assert signed_rank_p([0.1, -0.1] * 3) == 1.0


def test_zeros_are_left_out_and_five_differences_give_no_p() -> None:
    six = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert signed_rank_p([0.0, *six, 0.0]) == 2 / 64
    assert signed_rank_p(six[:5]) is None
    assert signed_rank_p([*six[:5], 0.0, 1e-15]) is None
    assert signed_rank_p([]) is None
    # .3 - .1 and .2 are no two floats alike, yet one difference: all share a rank.
    assert signed_rank_p([0.3 - 0.1, 0.2, 0.2, 0.2, 0.2, -0.2]) == 14 / 64


@pytest.mark.parametrize("count", [6, 15, 40])
def test_signed_rank_p_is_scipys_exact_one_without_ties(count: int) -> None:
    from scipy.stats import wilcoxon

    differences = np.random.default_rng(count).normal(0.2, 1, count)
    expected = wilcoxon(differences, method="exact").pvalue
    assert signed_rank_p(differences) == pytest.approx(expected, rel=1e-12)


def test_holm_by_hand() -> None:
    # Sorted .005 * 4, .01 * 3, .03 * 2, then .04 * 1, which may not be less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_pairs_are_over_the_categories_that_both_have() -> None:
    names = "abcdefgh"
    high = {name: 0.9 + 0.01 * i for i, name in enumerate(names)}
    low = {name: value - 0.05 - 0.001 * i for i, (name, value) in enumerate(high.items())}
    few = {name: 0.5 for name in "abcde"}
    found = paired_tests({"high": high, "low": low, "few": few, "none": {"z": 0.5}})
    assert [(test.one, test.other) for test in found] == [
        ("high", "low"),
        ("high", "few"),
        ("low", "few"),
    ]
    first, second, third = found
    assert first.categories == 8 and second.categories == third.categories == 5
    assert first.difference == pytest.approx(0.05 + 0.001 * 3.5)
    assert second.difference == pytest.approx(0.92 - 0.5)
    assert first.p == first.p_holm == 2 / 256  # the only one of three with a p: no correction
    assert second.p is second.p_holm is None


# ---- ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "q"),
    [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (8, 3.031), (10, 3.164)],
)
def test_critical_difference_has_demsars_q(rows: int, q: float) -> None:
    """His table 5a; the third digit of some is cut off, not rounded."""
    assert critical_difference(rows, 14) / math.sqrt(rows * (rows + 1) / 84) == pytest.approx(
        q, abs=1e-3
    )


def test_critical_difference_of_demsars_example() -> None:
    assert round(critical_difference(4, 14), 2) == 1.25


def test_ranking_by_hand() -> None:
    scores = {
        "worst": dict.fromkeys("abcd", 0.7),
        "best": dict.fromkeys("abcd", 0.9) | {"only here": 0.1},
        "middle": dict.fromkeys("abcd", 0.8),
    }
    found = rank_rows(scores)
    assert found is not None
    assert list(found.ranks.items()) == [("best", 1.0), ("middle", 2.0), ("worst", 3.0)]
    assert found.categories == 4
    # chi² = 12 * 4 / (3 * 4) * (1 + 4 + 9 - 3 * 16 / 4) = 8, of two degrees of freedom
    assert found.friedman_p == pytest.approx(math.exp(-4))
    assert found.critical_difference == pytest.approx(2.3437 * math.sqrt(12 / 24), abs=1e-4)
    assert found.groups == (("best", "middle"), ("middle", "worst"))


def test_ties_share_ranks() -> None:
    scores = {"a": {"x": 0.9, "y": 0.3 - 0.1}, "b": {"x": 0.9, "y": 0.2}, "c": {"x": 0.1, "y": 0.1}}
    found = rank_rows(scores)
    assert found is not None and found.ranks == {"a": 1.5, "b": 1.5, "c": 3.0}
    # Tied: chi² = 12 * 2 / 12 * (2.25 + 2.25 + 9 - 12) / (1 - 2 * 6 / (2 * 24)) = 4
    assert found.friedman_p == pytest.approx(math.exp(-2))
    assert found.groups == (("a", "b", "c"),)
    equal = rank_rows({label: {"x": 1.0, "y": 1.0} for label in "abc"})
    assert equal is not None and equal.friedman_p == 1.0
    assert set(equal.ranks.values()) == {2.0} and equal.groups == (("a", "b", "c"),)


def test_rows_that_differ_from_all_are_in_no_group() -> None:
    names = [str(i) for i in range(60)]
    levels = {"first": 0.9, "second": 0.8, "third": 0.7}
    found = rank_rows({label: dict.fromkeys(names, level) for label, level in levels.items()})
    assert found is not None and found.groups == ()


def test_groups_are_the_largest_ones() -> None:
    levels = [0.9, 0.8, 0.7]  # in turn: three rows with an average rank of 2
    scores = {
        label: {str(i): levels[(i + start) % 3] for i in range(9)}
        for start, label in enumerate("abc")
    }
    found = rank_rows(scores | {"d": {str(i): 0.1 for i in range(9)}})
    assert found is not None and found.friedman_p < 0.05
    assert found.ranks == {"a": 2.0, "b": 2.0, "c": 2.0, "d": 4.0}
    assert found.groups == (("a", "b", "c"),)  # d is 2 away, the critical difference is 1.56


def test_too_few_rows_or_categories_are_not_ranked() -> None:
    many = {"x": 0.1, "y": 0.2}
    assert rank_rows({}) is None
    assert rank_rows({"a": many, "b": many}) is None
    assert rank_rows({"a": many, "b": many, "c": {"x": 0.1}}) is None


# ---- from rows ----------------------------------------------------------------------------------


def test_scores_are_means_over_the_seeds_that_were_run() -> None:
    rows = [
        row(shots=1, x=[0.8, 0.9], y=[0.6, None]),
        row("winclip", "no text", 2, 1, x=[None, None]),
    ]
    assert scores_of(rows, "i_auroc") == {"patchcore, 1 shot": {"x": pytest.approx(0.85), "y": 0.6}}
    assert scores_of(rows, "aupro") == {}
    assert label_of(rows[1]) == "winclip, no text, 2 shots, 1 abnormal"


def test_comparison_table_in_words() -> None:
    low = {f"c{i}": [0.5 + 0.01 * i] for i in range(12)}
    high = {f"c{i}": [0.6 + 0.012 * i] for i in range(12)}
    few = {f"c{i}": [0.6] for i in range(2)}
    table = comparison_table([row("a", **low), row("b", **high), row("c", **few)], "i_auroc")
    assert table.rows == (
        ("a", "b", "12", "\N{MINUS SIGN}0.111", "< 0.001", "< 0.001"),
        ("a", "c", "2", "\N{MINUS SIGN}0.095", "\N{EN DASH}", "\N{EN DASH}"),
        ("b", "c", "2", "+0.006", "\N{EN DASH}", "\N{EN DASH}"),
    )
    assert len(table.heads) == 6
    assert comparison_table([row("a", **low)], "i_auroc").rows == ()


def test_plots_are_drawn_where_there_is_enough_for_them() -> None:
    assert figures_of([]) == []
    assert figures_of([row(x=[0.5]), row("winclip", x=[None])]) == []
    two = [row(shots=1, x=[0.5, 0.7]), row(shots=2, x=[0.6, 0.8])]
    assert [figure.name for figure in figures_of(two)] == ["shots", "seconds", "memory"]
    assert "interval" not in figures_of(two)[0].caption  # of two seeds there is none
    values = {"x": [0.5, 0.7, 0.8, 0.6, 0.9], "y": [0.5, 0.6, 0.7, 0.6, 0.5]}  # five seeds
    three = [row(shots=k, **values) for k in (1, 2, 4)]
    ranks, shots, *_ = figures_of(three)
    assert ranks.name == "critical-difference" and "2 categories" in ranks.caption
    assert "no difference is claimed" in ranks.caption and "p = 1.000" in ranks.caption
    assert "95 % interval" in shots.caption


def test_the_plots_are_given_means_and_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("anomalyst.benchmark.figures.scatter", lambda *a: given.append(a) or "")
    monkeypatch.setattr("anomalyst.benchmark.figures.shots_curve", lambda *a: given.append(a) or "")
    figures_of([row(shots=1, x=[0.5, 0.7]), row(shots=2, x=[0.6, 0.8]), row("other", x=[0.9])])
    (series, _), (seconds, *_), (memory, *_) = given
    assert series == {"patchcore": {1: pytest.approx((0.6,) * 3), 2: pytest.approx((0.7,) * 3)}}
    # Seed 0 judges 4 images a second and seed 1 eight: 3 / 16 s on average.
    assert seconds["patchcore, 1 shot"] == pytest.approx((3 / 16, 0.6))
    assert memory == {
        "patchcore, 1 shot": pytest.approx((101.0, 0.6)),
        "patchcore, 2 shots": pytest.approx((101.0, 0.7)),
        "other": pytest.approx((100.0, 0.9)),
    }
