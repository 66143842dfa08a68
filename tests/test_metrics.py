"""Metrics against scikit-learn, scipy, brute force and values worked out by hand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalyst.components import label_regions
from anomalyst.errors import InputError
from anomalyst.metrics import ImageMetrics, PixelMetrics, PixelResult, binary_metrics

Array = npt.NDArray[np.generic]
EIGHT = np.ones((3, 3), dtype=np.int64)
FINE = 1e-9


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "bench_metrics.py"
    spec = importlib.util.spec_from_file_location("bench_metrics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure(maps: Array, masks: Array | list[Array | None], **options: float) -> PixelResult:
    metrics = PixelMetrics(**options)
    for score_map, mask in zip(maps, masks, strict=True):
        metrics.update(score_map, mask)
    return metrics.result()


def sklearn_metrics(scores: Array, labels: Array) -> dict[str, float]:
    precision, recall, _ = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    return {
        "auroc": roc_auc_score(labels, scores),
        "ap": average_precision_score(labels, scores),
        "f1max": f1.max(),
    }


def brute_force_aupro(maps: Array, masks: Array, limit: float) -> float:
    """Return AUPRO by its definition: every unique score is a threshold, labels made at each."""
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        overlaps = []
        for score_map, mask in zip(maps, masks, strict=True):
            labels, count = ndimage.label(mask, EIGHT)
            overlaps += [(score_map[labels == i + 1] >= threshold).mean() for i in range(count)]
        fpr.append((maps[~masks] >= threshold).mean())
        pro.append(np.mean(overlaps))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr, fpr[1:], pro, pro[1:], strict=False):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


def random_case(seed: int, *, levels: int = 12) -> tuple[Array, Array]:
    """Return five small maps with many ties and masks with several regions; two are normal."""
    rng = np.random.default_rng(seed)
    masks = ndimage.binary_dilation(rng.random((5, 9, 14)) < 0.04, np.ones((1, 2, 2)))
    masks[:2] = False
    masks[2, 4, 5:8] = True
    scores = rng.normal(size=masks.shape) + 1.2 * masks
    return (np.round(scores * levels / 4) / levels).astype(np.float32), masks


SCORES = {
    "distinct": lambda rng: rng.normal(size=200),
    "ties": lambda rng: rng.integers(0, 6, 200) / 5,
    "constant": lambda rng: np.full(200, 0.7),
    "negative": lambda rng: -np.exp(rng.normal(size=200)) * 40,
    "huge": lambda rng: rng.normal(size=200) * 1e300,
    "tiny": lambda rng: rng.normal(size=200) * 1e-300,
    "signed zeros": lambda rng: rng.choice([-1.0, -0.0, 0.0, 1.0], 200),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("share", [0.02, 0.4, 0.95])
def test_binary_metrics_equal_sklearn(kind: str, share: float) -> None:
    rng = np.random.default_rng(3)
    scores = SCORES[kind](rng)
    labels = (rng.random(200) < share).astype(int)
    labels[:2] = 0, 1
    assert binary_metrics(scores, labels) == pytest.approx(
        sklearn_metrics(scores, labels), abs=FINE, rel=0
    )


def test_undefined_is_none_and_defined_is_not() -> None:
    assert binary_metrics([], []) == {"auroc": None, "ap": None, "f1max": None}
    assert binary_metrics([1.0, 2.0], [0, 0]) == {"auroc": None, "ap": None, "f1max": None}
    assert binary_metrics([1.0, 2.0], [1, 1]) == {"auroc": None, "ap": 1.0, "f1max": 1.0}


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [0, 1], "score nan is not finite"),
        ([0.1, -np.inf], [0, 1], "score -inf is not finite"),
        ([0.1, 0.2], [0, 2], "label 2 is unknown"),
        ([0.1, 0.2], [0], r"shape \(2,\) and labels \(1,\)"),
    ],
)
def test_binary_metrics_refuses(scores: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        binary_metrics(scores, labels)


def test_image_metrics_equal_sklearn_and_refuse_at_once() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=60).round(1), rng.integers(0, 2, 60)
    metrics = ImageMetrics()
    for score, label in zip(scores, labels, strict=True):
        metrics.update(float(score), int(label))
    with pytest.raises(InputError, match="not finite"):
        metrics.update(float("nan"), 0)
    result = metrics.result()
    expected = {f"i_{key}": value for key, value in sklearn_metrics(scores, labels).items()}
    assert result.metrics() == pytest.approx(expected, abs=FINE, rel=0)
    assert trapezoid(result.roc[:, 1], result.roc[:, 0]) == pytest.approx(result.auroc)
    assert result.pr[-1] == pytest.approx((1.0, labels.mean()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e30, -5e29), (1e-30, 0), (3, -100)])
def test_pixel_metrics_equal_sklearn_and_brute_force(seed: int, scale: float, shift: float) -> None:
    maps, masks = random_case(seed)
    maps = (maps * np.float32(scale) + np.float32(shift)).astype(np.float32)
    result = measure(maps, masks)
    expected = sklearn_metrics(maps.ravel().astype(np.float64), masks.ravel())
    expected = {f"p_{key}": value for key, value in expected.items()}
    expected["aupro"] = brute_force_aupro(maps, masks, 0.3)
    assert result.metrics() == pytest.approx(expected, abs=FINE, rel=0)
    assert result.exact


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.6, 1.0])
def test_aupro_limit_equals_brute_force(limit: float) -> None:
    maps, masks = random_case(11, levels=1000)
    expected = brute_force_aupro(maps, masks, limit)
    assert measure(maps, masks, aupro_limit=limit).aupro == pytest.approx(expected, abs=FINE, rel=0)


def test_many_settled_normals_equal_sklearn() -> None:
    # Defects at few scores: most normals are counted by bin, some tie with a defect exactly.
    rng = np.random.default_rng(5)
    maps = rng.normal(size=(3, 300, 300)).astype(np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    masks[0, 10:14, 20:60] = masks[2, 100:103, 7] = True
    maps[masks] = rng.choice(maps[~masks], masks.sum())
    result = measure(maps, masks)
    expected = sklearn_metrics(maps.ravel(), masks.ravel())
    assert (result.auroc, result.ap, result.f1max) == pytest.approx(
        tuple(expected.values()), abs=FINE, rel=0
    )


def test_constant_map_runs_straight() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:4, 2:4] = mask[8, 8] = True
    result = measure(np.full((1, 10, 10), -3.0), [mask])
    # The only threshold takes the curve from (0, 0) to (1, 1): 0.3^2 / 2 under it up to 0.3.
    assert (result.auroc, result.aupro) == pytest.approx((0.5, 0.15))
    assert result.ap == pytest.approx(0.05)
    assert result.pro == pytest.approx(np.array([[0.0, 0.0], [0.0, 0.0], [0.3, 0.3]]))


def test_regions_weigh_the_same_whatever_their_area() -> None:
    # 20 pixels found at once, a region of 1 found last: the overlap is 1/2 up to the limit.
    scores, mask = np.ones((20, 20)), np.zeros((20, 20), dtype=bool)
    mask[0:4, 0:5] = mask[10, 10] = True
    scores[0:4, 0:5], scores[10, 10] = 2.0, 0.0
    assert measure(scores[None], [mask]).aupro == pytest.approx(0.5)


def test_regions_touching_at_a_corner_are_one() -> None:
    scores, mask = np.ones((8, 8)), np.zeros((8, 8), dtype=bool)
    mask[1, 1] = mask[2, 2] = mask[3, 1] = True
    mask[6, 6] = True
    scores[1, 1], scores[[2, 3, 6], [2, 1, 6]] = 2.0, 0.0
    # One of three pixels of the first region, none of the second: (1/3 + 0) / 2.
    assert measure(scores[None], [mask]).aupro == pytest.approx(1 / 6)


def test_signed_zeros_are_equal() -> None:
    scores = np.array([[-0.0, 0.0, -0.0, 0.0]])
    mask = np.array([[False, True, False, True]])
    assert measure(scores[None], [mask]).auroc == 0.5
    assert measure(scores[None], [mask], max_exact_pixels=0).auroc == 0.5


def test_perfect_map_scores_exactly_one() -> None:
    _, masks = random_case(1)
    result = measure(masks.astype(np.float64) * 1e9 - 7, masks)
    assert set(result.metrics().values()) == {1.0}


def test_image_without_mask_counts_as_normal() -> None:
    maps, masks = random_case(2)
    with_none = measure(maps, [mask if mask.any() else None for mask in masks])
    assert with_none.metrics() == measure(maps, masks).metrics()
    assert with_none.metrics() != measure(maps[2:], masks[2:]).metrics()


@pytest.mark.parametrize("max_exact_pixels", [2**26, 0])
def test_pixels_of_one_class(max_exact_pixels: int) -> None:
    options = {"max_exact_pixels": max_exact_pixels}
    scores = np.arange(12.0).reshape(1, 3, 4)
    normal = measure(scores, [None], **options)
    assert set(normal.metrics().values()) == {None}
    assert len(normal.roc) == len(normal.pr) == len(normal.pro) == 0
    defect = measure(scores, [np.ones((3, 4), dtype=bool)], **options)
    assert defect.metrics() == {"p_auroc": None, "p_ap": 1.0, "p_f1max": 1.0, "aupro": None}
    assert set(PixelMetrics(**options).result().metrics().values()) == {None}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    metrics = PixelMetrics()
    scores = np.zeros((4, 5))
    scores[2, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="at row 2, column 3"):
            metrics.update(scores)
    assert metrics.nbytes == 0


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        (np.zeros((4, 5)), np.zeros((5, 4), dtype=bool), "resize one of them"),
        (np.zeros((4, 5)), np.zeros((4, 5), dtype=np.uint8), "give a bool array"),
        (np.zeros((1, 4, 5)), None, "give a float array"),
        (np.zeros((4, 5), dtype=np.int64), None, "give a float array"),
    ],
)
def test_wrong_arrays_are_refused(scores: Array, mask: Array | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PixelMetrics().update(scores, mask)
    with pytest.raises(InputError, match="aupro_limit is 0"):
        PixelMetrics(aupro_limit=0)


def test_input_is_left_as_it_was() -> None:
    scores, mask = np.array([[-0.0, 1.0]], dtype=np.float32), np.array([[True, False]])
    PixelMetrics().update(scores, mask)
    assert np.signbit(scores[0, 0]) and mask.tolist() == [[True, False]]


@pytest.mark.parametrize("max_exact_pixels", [2**26, 300, 0])
def test_order_of_images_does_not_matter(max_exact_pixels: int) -> None:
    maps, masks = random_case(4, levels=50)
    options = {"max_exact_pixels": max_exact_pixels}
    forward = measure(maps, masks, **options)
    backward = measure(maps[::-1], masks[::-1], **options)
    assert backward.metrics() == pytest.approx(forward.metrics(), abs=1e-14, rel=0)


@pytest.mark.parametrize("max_exact_pixels", [2**26, 300, 0])
def test_results_can_be_asked_for_between_updates(max_exact_pixels: int) -> None:
    maps, masks = random_case(6)
    metrics = PixelMetrics(max_exact_pixels=max_exact_pixels)
    for score_map, mask in zip(maps, masks, strict=True):
        metrics.update(score_map, mask)
        metrics.result()
    expected = measure(maps, masks, max_exact_pixels=max_exact_pixels)
    assert metrics.result().metrics() == pytest.approx(expected.metrics(), abs=1e-14, rel=0)


def off_by(binned: PixelResult, exact: PixelResult) -> dict[str, tuple[float, float]]:
    """Return (error, stated bound) of every metric."""
    return {
        name: (abs(getattr(binned, name) - getattr(exact, name)), getattr(binned.error_bound, name))
        for name in ("auroc", "ap", "f1max", "aupro")
    }


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_histogram_keeps_its_bound(spread: float, limit: float) -> None:
    # Bins around 1 are 2^-13 wide: the smaller the spread, the more of the order they lose.
    for seed in range(6):
        maps, masks = random_case(seed, levels=500)
        maps = (1.0 + spread * maps).astype(np.float32)
        exact = measure(maps, masks, aupro_limit=limit)
        binned = measure(maps, masks, aupro_limit=limit, max_exact_pixels=400)
        assert not binned.exact and exact.exact
        errors = off_by(binned, exact)
        for error, bound in errors.values():
            assert error <= bound + 1e-12
        assert set(off_by(exact, exact).values()) == {(0.0, 0.0)}


def test_histogram_bound_is_reached_in_the_extremes() -> None:
    # All scores in one bin; in truth the order is perfect, then perfectly wrong.
    ramp = (1 + np.arange(100) * 2.0**-22).astype(np.float32).reshape(1, 10, 10)
    mask = np.zeros((10, 10), dtype=bool)
    mask[9] = True
    for scores in (ramp, ramp[:, ::-1]):
        exact, binned = measure(scores, [mask]), measure(scores, [mask], max_exact_pixels=0)
        errors = off_by(binned, exact)
        assert errors["auroc"] == pytest.approx((0.5, 0.5))
        assert all(error <= bound + 1e-12 for error, bound in errors.values())
        if scores is ramp:
            assert errors["ap"] == pytest.approx((0.9, 0.9))
            assert errors["f1max"][0] == pytest.approx(errors["f1max"][1])
            assert errors["aupro"] == pytest.approx((0.85, 0.85))


def test_histogram_bound_covers_precision_lost_as_well_as_gained() -> None:
    # 90 defect pixels below 10 normal ones in one bin: AP is 0.9 there, in truth much lower.
    scores = (1 + np.arange(100) * 2.0**-22).astype(np.float32).reshape(1, 10, 10)
    mask = np.ones((10, 10), dtype=bool)
    mask[9] = False
    exact, binned = measure(scores, [mask]), measure(scores, [mask], max_exact_pixels=0)
    error, bound = off_by(binned, exact)["ap"]
    assert 0.15 < error <= bound < 0.16


def test_histogram_is_exact_when_no_bin_holds_two_scores() -> None:
    maps, masks = random_case(8)
    exact, binned = measure(maps, masks), measure(maps, masks, max_exact_pixels=0)
    assert binned.metrics() == pytest.approx(exact.metrics(), abs=1e-12, rel=0)


def test_histogram_bound_is_small_on_realistic_maps(bench: ModuleType) -> None:
    maps, masks = bench.realistic_maps(20, 96, seed=3)
    errors = off_by(measure(maps, masks, max_exact_pixels=0), measure(maps, masks))
    for error, bound in errors.values():
        assert error <= bound + 1e-12
        assert bound < 1e-3


def test_memory_is_four_bytes_a_normal_pixel_then_flat() -> None:
    maps, masks = random_case(9)
    metrics = PixelMetrics(max_exact_pixels=maps.size)
    for score_map, mask in zip(maps, masks, strict=True):
        metrics.update(score_map, mask)
    assert metrics.nbytes == 4 * np.count_nonzero(~masks) + 8 * np.count_nonzero(masks)
    metrics.update(maps[0])
    folded = metrics.nbytes
    for _ in range(20):
        metrics.update(maps[2], masks[2])
    assert metrics.nbytes == folded <= 100 * 2**20


def test_curves_are_thin_monotone_and_true(bench: ModuleType) -> None:
    maps, masks = bench.realistic_maps(10, 96, seed=1)
    result = measure(maps, masks)
    for curve in (result.roc, result.pr, result.pro):
        assert 100 < len(curve) <= 501
        assert (np.diff(curve[:, 0]) >= 0).all()
    assert result.roc[0].tolist() == [0, 0] and result.roc[-1] == pytest.approx((1, 1))
    assert result.pro[-1, 0] == 0.3
    area = trapezoid(result.pro[:, 1], result.pro[:, 0]) / 0.3
    assert area == pytest.approx(result.aupro, abs=5e-3)
    assert trapezoid(result.roc[:, 1], result.roc[:, 0]) == pytest.approx(result.auroc, abs=5e-3)


def test_realistic_maps_agree_with_loop_and_adeval(bench: ModuleType) -> None:
    maps, masks = bench.realistic_maps(20, 96, seed=2)
    result = measure(maps, masks)
    loop = bench.loop_aupro(maps, masks, 200, keep_labels=False)
    assert result.aupro == pytest.approx(loop, abs=1e-3)
    auroc, aupro = bench.adeval_metrics(maps, masks)
    auroc_bound, aupro_bound = bench.adeval_bounds(maps, masks)
    assert auroc_bound < 0.01 and aupro_bound < 0.01
    assert result.auroc == pytest.approx(auroc, abs=auroc_bound)
    assert result.aupro == pytest.approx(aupro, abs=aupro_bound)


def shapes() -> dict[str, Array]:
    rng = np.random.default_rng(7)
    snake = np.zeros((21, 30), dtype=bool)
    snake[::2] = snake[1::4, -1] = snake[3::4, 0] = True
    comb = np.zeros((20, 31), dtype=bool)
    comb[:, ::2] = comb[-1] = True
    rows, columns = np.mgrid[:40, :52]
    spiral = (np.hypot(rows - 20, columns - 26) + np.arctan2(rows - 20, columns - 26)) % 4 < 1.3
    cases = {
        "empty": np.zeros((7, 5), dtype=bool),
        "full": np.ones((7, 5), dtype=bool),
        "one pixel": np.ones((1, 1), dtype=bool),
        "no rows": np.zeros((0, 4), dtype=bool),
        "no columns": np.zeros((4, 0), dtype=bool),
        "row": rng.random((1, 80)) < 0.5,
        "column": rng.random((80, 1)) < 0.5,
        "chessboard": (rows + columns) % 2 == 0,
        "snake": snake,
        "comb": comb,
        "comb upside down": comb[::-1],
        "spiral": spiral,
        "not contiguous": (rng.random((60, 40)) < 0.4).T[::-2],
        "wraps at the border": np.eye(9, dtype=bool)[:, ::-1] | np.eye(9, k=-8, dtype=bool),
    }
    for index, share in enumerate((0.05, 0.2, 0.3, 0.41, 0.5, 0.7)):
        cases[f"noise {share}"] = rng.random((30 + 17 * index, 64)) < share
    return cases


@pytest.mark.parametrize("name", shapes())
def test_label_regions_equals_scipy(name: str) -> None:
    mask = shapes()[name]
    labels, count = label_regions(mask)
    expected, expected_count = ndimage.label(mask, EIGHT)
    assert count == expected_count
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("mask", [np.zeros((3, 3), dtype=np.uint8), np.zeros(3, dtype=bool)])
def test_label_regions_refuses_what_is_no_mask(mask: Array) -> None:
    with pytest.raises(InputError, match="give a bool array"):
        label_regions(mask)


def test_metrics_need_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, anomalyst.metrics as m; m.binary_metrics([1, 2], [0, 1]); "
        "print(sorted({'torch', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.bench
def test_aupro_is_twenty_times_as_fast_as_the_loop(bench: ModuleType) -> None:
    maps, masks = bench.realistic_maps(200, 256, seed=0)
    ours = bench.timed(lambda: measure(maps, masks).aupro, repeats=3)
    loop = bench.timed(lambda: bench.loop_aupro(maps, masks, 200, keep_labels=False))
    assert abs(ours.value - loop.value) <= 1e-3
    assert loop.seconds >= 20 * ours.seconds


@pytest.mark.bench
def test_label_regions_keeps_up_with_scipy(bench: ModuleType) -> None:
    _, masks = bench.realistic_maps(5, 448, seed=0)
    noise = np.random.default_rng(0).random((256, 256)) < 0.5
    for mask, factor in ((masks[3], 2), (noise, 20)):
        ours = bench.timed(lambda mask=mask: label_regions(mask)[1], repeats=9)
        scipys = bench.timed(lambda mask=mask: ndimage.label(mask, EIGHT)[1], repeats=9)
        assert ours.value == scipys.value
        assert ours.seconds <= factor * scipys.seconds
