"""The station's figures against values that were worked out otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

from anomalyst.scoring import Calibration, Decision
from anomalyst.station import drift
from anomalyst.station.confusion import Confusion, at_most, confusion, ordered, verdict
from anomalyst.station.history import Knowledge, unseen_verdict
from anomalyst.station.repeatability import Look, in_words, study
from anomalyst.station.verdicts import limits_of

# ---- limits and confusion -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 19, 20, 99, 250])
def test_a_score_alone_gives_the_verdict_of_its_p_value(count: int) -> None:
    random = np.random.default_rng(count)
    calibration = Calibration.of(random.integers(0, 40, count).tolist(), [1.0] * count)
    decision = Decision(0.01, 0.05)
    limits = limits_of({"a": calibration}, decision, None, "a")
    for score in np.arange(-1, 42, 0.5):
        assert verdict(limits, score) == decision.verdict(calibration.p_value(score)), score
    assert verdict(limits_of({}, decision, None, "a"), 1e9) is None


def test_a_part_of_the_calibration_is_judged_without_itself() -> None:
    """The highest of 20 has p = 2/21 with itself, which passes, and 1/20 without: review."""
    scores = [float(k) for k in range(20)]
    names = [f"{k:02d}" for k in range(20)]
    known = Knowledge(Calibration.of(scores, scores, names), Decision(0.01, 0.05), frozenset())
    limits = known.limits("a", None)
    assert unseen_verdict(known, limits, "19", 19.0) == "review"
    assert unseen_verdict(known, limits, "18", 18.0) == "ok"
    assert unseen_verdict(known, limits, "new", 19.0) == "ok"  # equals the highest: p = 2/21
    by_hand = known.limits("a", {"a": {"ng": 18.5, "review": None}})
    assert unseen_verdict(known, by_hand, "19", 19.0) == "ng"


def test_limits_by_hand_may_be_one_alone() -> None:
    by_hand = {"a": {"ng": 2.0, "review": None}, "b": {"ng": None, "review": 1.0}}
    one, other = (limits_of({}, Decision(), by_hand, name) for name in "ab")
    assert [verdict(one, score) for score in (2.0, 2.1)] == ["ok", "ng"]
    assert [verdict(other, score) for score in (1.0, 9.0)] == ["ok", "review"]


def test_what_became_of_labelled_parts() -> None:
    rows = [("good", "ok"), ("good", "ng"), ("good", "review"), ("defect", "ng")]
    rows += [("defect", "ok"), ("defect", "ok"), ("defect", "review"), ("good", None)]
    assert confusion(rows) == Confusion(4, 4, false_rejects=1, misses=2, reviews=2, unjudged=1)
    assert confusion([]).to_dict()["misses_at_most"] is None


def test_the_share_of_pairs_in_order_is_the_auroc() -> None:
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 9, 60), random.integers(0, 2, 60)
    metrics = pytest.importorskip("sklearn.metrics")
    rows = [("defect" if bad else "good", float(s)) for bad, s in zip(labels, scores, strict=True)]
    assert ordered(rows) == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert ordered(rows[:1]) is None


@pytest.mark.parametrize(("count", "of"), [(0, 1), (0, 12), (1, 12), (3, 40), (39, 40), (40, 40)])
def test_the_rate_that_counts_allow_is_that_of_clopper_and_pearson(count: int, of: int) -> None:
    beta = pytest.importorskip("scipy.stats").beta
    expected = 1.0 if count == of else beta.ppf(0.95, count + 1, of - count)
    assert at_most(count, of) == pytest.approx(expected, abs=1e-9)


# ---- repeatability ------------------------------------------------------------------------------


def _looks(*parts: Sequence[float]) -> dict[str, list[Look]]:
    return {f"p{k}": [Look(score, "ok") for score in scores] for k, scores in enumerate(parts)}


def test_gauge_r_and_r_of_a_balanced_study() -> None:
    """Parts at 1, 2 and 3, each seen at its value -+ 0.1: both mean squares by hand."""
    found = study(_looks([0.9, 1.1], [1.9, 2.1], [2.9, 3.1]))
    within = 3 * 0.02 / 3  # squares 0.01 + 0.01 a part, three degrees of freedom
    between = (2 * (1 + 0 + 1) / 2 - within) / 2
    assert found.repeatability_sd == pytest.approx(within**0.5)
    assert found.part_sd == pytest.approx(between**0.5)
    assert found.grr_percent == pytest.approx(100 * (within / (within + between)) ** 0.5)
    assert found.distinct == int(1.41 * (between / within) ** 0.5) == 9
    assert found.flip_rate == 0


def test_unequal_numbers_of_looks_give_the_true_variances_on_average() -> None:
    random = np.random.default_rng(3)
    within, between = [], []
    for _ in range(400):
        parts = [random.normal(random.normal(0, 3), 2, n) for n in (2, 3, 9, 4)]
        found = study(_looks(*(part.tolist() for part in parts)))
        assert found.repeatability_sd is not None and found.part_sd is not None
        within.append(found.repeatability_sd**2)
        between.append(found.part_sd**2)
    assert np.mean(within) == pytest.approx(4, rel=0.1)
    assert np.mean(between) == pytest.approx(9, rel=0.15)


def test_flips_are_looks_against_a_parts_usual_verdict() -> None:
    looks = {
        "a": [Look(1, "ok"), Look(2, "review"), Look(1, "ok")],
        "b": [Look(5, "ng"), Look(5, "ng")],
        "once": [Look(9, "ng")],
    }
    found = study(looks)
    assert [(part.part_id, part.n, part.flips) for part in found.parts] == [
        ("a", 3, 1),
        ("b", 2, 0),
    ]
    assert found.flip_rate == pytest.approx(1 / 5)
    silent = study({"a": [Look(1, None), Look(2, None)]})
    assert silent.flip_rate is None and silent.grr_percent is None and silent.distinct is None
    assert "two parts or more" in in_words(silent, 0)


def test_parts_that_do_not_differ_are_all_gauge() -> None:
    found = study(_looks([1.0, 2.0], [2.0, 1.0]))
    assert found.grr_percent == 100 and found.distinct == 0
    assert "not acceptable" in in_words(found, 1) and "1 look at a picture" in in_words(found, 1)
    assert study({}).parts == () and "at least twice" in in_words(study({}), 0)


# ---- drift --------------------------------------------------------------------------------------


def test_smoothed_p_values_of_a_steady_line_are_uniform() -> None:
    random = np.random.default_rng(0)
    values, seen, found = random.integers(0, 5, 4000).astype(float), [], []  # ties all over
    for value in values:
        found.append(drift.p_value(sorted(seen), value, random.random()))
        seen.append(value)
    assert np.histogram(found, bins=10, range=(0, 1))[0] == pytest.approx(400, abs=80)


def _ties(count: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).random(count).tolist()


@pytest.mark.parametrize(("shift", "side"), [(2.0, "higher"), (-2.0, "lower")])
def test_a_shift_is_noticed_within_a_few_parts_and_dated(shift: float, side: str) -> None:
    random = np.random.default_rng(1)
    base, steady = random.normal(size=99).tolist(), random.normal(size=200).tolist()
    later = (random.normal(size=100) + shift).tolist()
    found = drift.watch(base, [*steady, *later], _ties(300, 2))
    change = found.change
    assert change is not None and change.direction == side and found.evidence == 1
    assert 190 <= change.since <= 215 and change.at < 250
    assert change.usual == pytest.approx(0, abs=0.3) and change.now == pytest.approx(shift, abs=0.6)


def test_without_a_calibration_parts_are_compared_with_earlier_ones() -> None:
    random = np.random.default_rng(4)
    values = [*random.normal(size=150).tolist(), *(random.normal(size=80) - 3).tolist()]
    found = drift.watch([], values, _ties(230, 5))
    assert found.baseline == 0 and found.change is not None and found.change.direction == "lower"
    assert drift.watch([], [], []).usual is None


def test_some_gross_defects_are_no_drift() -> None:
    """One part in fifty far above all others, which nobody has decided yet."""
    random = np.random.default_rng(6)
    values = random.normal(size=2000)
    values[::50] = 50
    assert (
        drift.watch(random.normal(size=100).tolist(), values.tolist(), _ties(2000, 7)).change
        is None
    )


def test_a_steady_line_seldom_gives_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On average at least so many parts to the first: seen at a level where it can be counted."""
    monkeypatch.setattr(drift, "PARTS_A_FALSE_ALARM", 100)
    random, runs = np.random.default_rng(8), []
    for _ in range(120):
        values = random.normal(size=1500).tolist()
        found = drift.watch(random.normal(size=30).tolist(), values, random.random(1500).tolist())
        runs.append(found.change.at + 1 if found.change else 1500)
    assert np.mean(runs) > 100
    # Two streams side by side share it: each may give half as many.
    assert drift.watch([], [], [], streams=2).evidence == 0
