"""Rendering, regions and conformal calibration against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from anomalyst.errors import InputError
from anomalyst.scoring import Calibration, Decision, find_regions, normals_needed
from anomalyst.types import ScoreMap


def whole(values: np.ndarray, size: tuple[int, int], sigma: float = 0.0) -> ScoreMap:
    return ScoreMap(values.astype(np.float32), size, sigma, (0.0, 0.0, *map(float, size)))


@pytest.mark.parametrize(
    ("grid", "size"),
    [((5, 5), (70, 70)), ((4, 7), (61, 90)), ((1, 1), (9, 4))],
)
def test_upsampling_equals_torchs_bilinear(grid: tuple[int, int], size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=grid).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    np.testing.assert_allclose(whole(values, size).at(*size), expected, atol=1e-5)


def test_smoothing_equals_scipys_gaussian_of_the_upsampled_map() -> None:
    values = np.random.default_rng(1).normal(size=(6, 8))
    size = (84, 112)  # 14 pixels a patch on both axes
    plain = whole(values, size).at(*size)
    expected = ndimage.gaussian_filter(plain, sigma=4.0, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(whole(values, size, 4 / 14).at(*size), expected, atol=1e-5)


def test_smoothing_keeps_a_constant_and_never_leaves_the_raw_range() -> None:
    constant = whole(np.full((3, 4), 7.5), (50, 40), 0.4).at(50, 40)
    np.testing.assert_allclose(constant, 7.5, rtol=1e-6)
    values = np.random.default_rng(2).normal(size=(5, 5)) * 1e3
    smooth = whole(values, (64, 64), 0.5).at(64, 64)
    assert values.min() <= smooth.min() < 0 < smooth.max() <= values.max()


def test_a_cropped_map_lies_where_the_method_looked() -> None:
    values = np.array([[1.0, 1.0], [1.0, 5.0]], dtype=np.float32)
    full = ScoreMap(values, (100, 200), 0.0, (10.0, 60.0, 80.0, 80.0)).at(100, 200)
    assert full.shape == (100, 200)
    assert full[:10].max() == full[:, :60].max() == full[90:].max() == full[:, 140:].max() == 1.0
    assert full[89, 139] == pytest.approx(5.0)
    assert full[10, 60] == pytest.approx(1.0)


def test_regions_have_exact_boxes_areas_and_peaks() -> None:
    full = np.zeros((20, 30), dtype=np.float32)
    full[2:5, 3:9] = 1.0
    full[3, 4] = 4.0
    full[10, 10] = full[11, 11] = 9.0  # touching by a corner: one region
    first, second = find_regions(full, 0.5)
    assert (first.bbox, first.area, first.score) == ((10, 10, 2, 2), 2, 9.0)
    assert (second.bbox, second.area, second.score) == ((3, 2, 6, 3), 18, 4.0)
    assert find_regions(full, 9.0) == ()  # strictly above


def test_regions_agree_with_scipy_on_noise() -> None:
    full = np.random.default_rng(3).normal(size=(60, 50)).astype(np.float32)
    regions = find_regions(full, 0.8)
    labels, count = ndimage.label(full > 0.8, structure=np.ones((3, 3)))
    expected = sorted(
        (-float(full[where][labels[where] == k + 1].max()), int((labels == k + 1).sum()))
        for k, where in enumerate(ndimage.find_objects(labels))
    )
    assert len(regions) == count
    assert sorted((-r.score, r.area) for r in regions) == expected


def test_p_values_by_hand() -> None:
    calibration = Calibration.of([3.0, 1.0, 2.0, 2.0], [0.0] * 4)
    assert calibration.p_value(0.5) == 1.0
    assert calibration.p_value(2.0) == pytest.approx(4 / 5)  # 1 + three not below
    assert calibration.p_value(2.5) == pytest.approx(2 / 5)
    assert calibration.p_value(9.0) == pytest.approx(1 / 5)


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05, 0.1, 0.3, 1 / 3, 0.5])
@pytest.mark.parametrize("count", [1, 3, 9, 19, 99, 100, 150])
def test_threshold_and_p_value_say_the_same(alpha: float, count: int) -> None:
    scores = np.random.default_rng(count).normal(size=count)
    calibration = Calibration.of(scores.tolist(), scores.tolist())
    threshold = calibration.threshold(alpha)
    assert (
        (threshold is not None) == calibration.supports(alpha) == (count >= normals_needed(alpha))
    )
    if threshold is not None:
        # the ceil((n + 1)(1 - alpha))-th smallest, in exact arithmetic
        from fractions import Fraction
        from math import ceil

        rank = ceil((count + 1) * (1 - Fraction(alpha).limit_denominator(1000)))
        assert threshold == sorted(scores)[rank - 1]
        for score in [*scores, threshold + 1e-9, 10.0]:
            assert (score > threshold) == (calibration.p_value(score) <= alpha + 1e-12)


def test_the_guarantee_holds_on_exchangeable_scores() -> None:
    """Over many draws, the share of normal images called ng stays at alpha (+ sampling error)."""
    random = np.random.default_rng(0)
    rejected = []
    for _ in range(4000):
        scores = random.exponential(size=20)
        calibration = Calibration.of(scores[:19].tolist(), scores[:19].tolist())
        rejected.append(calibration.p_value(scores[19]) <= 0.1)
    assert np.mean(rejected) == pytest.approx(2 / 20, abs=0.02)


def test_verdicts_at_their_edges() -> None:
    decision = Decision(0.01, 0.05)
    verdicts = [decision.verdict(p) for p in (0.005, 0.01, 0.0100001, 0.05, 0.051, 1.0)]
    assert verdicts == ["ng", "ng", "review", "review", "ok", "ok"]


def test_normals_needed() -> None:
    assert [normals_needed(a) for a in (0.01, 0.05, 0.1, 0.5)] == [99, 19, 9, 1]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0])
def test_a_level_outside_the_unit_interval_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        Decision(alpha, 0.05)


def test_pixel_threshold_falls_back_to_the_review_level() -> None:
    values = [float(k) for k in range(30)]
    calibration = Calibration.of(values, values)
    assert calibration.threshold(0.01) is None
    assert calibration.pixel_threshold(Decision(0.01, 0.05)) == calibration.threshold(0.05) == 29.0
    assert Calibration.of([1.0], [1.0]).pixel_threshold(Decision()) is None
