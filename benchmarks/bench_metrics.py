"""Time AUPRO against the loop over thresholds that most code uses, and against adeval.

``python benchmarks/bench_metrics.py`` prints a table and one line of JSON. Everything runs in one
process on the same maps, so that ratios can be compared between machines. The loop comes in two
forms: ``loop`` labels the masks at every threshold, as most repositories do; ``loop, labels kept``
labels them once. Only ours is exact and also gives AUROC, AP, F1-max and the curves. Seconds are
the median of 3 runs after one to warm up, but of a single run for ``loop``, the slowest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalyst.metrics import PixelMetrics, PixelResult
from anomalyst.types import BoolArray, FloatArray

LIMIT = 0.3
STRUCTURE = np.ones((3, 3), dtype=np.int64)
ADEVAL_STRIPS = 1000
Region = tuple[npt.NDArray[np.intp], ...]


@dataclass(frozen=True)
class Timed:
    """A value and the seconds that it took."""

    value: float
    seconds: float


def realistic_maps(count: int, size: int, seed: int) -> tuple[FloatArray, BoolArray]:
    """Return smooth random score maps and masks ``[count, size, size]``; two in five are normal."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    maps = np.empty((count, size, size), dtype=np.float32)
    masks = np.zeros((count, size, size), dtype=np.bool_)
    for index in range(count):
        noise = ndimage.gaussian_filter(rng.normal(size=(size, size)), sigma=size / 40)
        score = 1.0 + 0.15 * noise / noise.std()
        for _ in range(rng.integers(1, 5) if index % 5 >= 2 else 0):
            y, x = rng.uniform(0.1 * size, 0.9 * size, size=2)
            radius = rng.uniform(0.02, 0.1) * size
            distance = np.hypot(rows - y, (columns - x) * rng.uniform(0.6, 1.6)) / radius
            masks[index] |= distance < 1
            # The response is shifted and blurred, so that no threshold separates perfectly.
            score += rng.uniform(0.1, 0.9) * np.exp(-((distance / rng.uniform(0.7, 1.4)) ** 2))
        maps[index] = score
    return maps, masks


def area_to_limit(fpr: list[float], pro: list[float]) -> float:
    """Return the area under (fpr, pro) up to the limit, divided by it."""
    grid = np.append([x for x in fpr if x < LIMIT], LIMIT)
    heights = np.interp(grid, fpr, pro)
    return float(np.sum(np.diff(grid) * (heights[1:] + heights[:-1])) / 2 / LIMIT)


def regions_of(mask: BoolArray) -> list[Region]:
    """Return the pixel coordinates of every region of a mask."""
    labels, count = ndimage.label(mask, STRUCTURE)
    boxes = ndimage.find_objects(labels)
    regions: list[Region] = []
    for index in range(count):
        y, x = np.nonzero(labels[boxes[index]] == index + 1)
        regions.append((y + boxes[index][0].start, x + boxes[index][1].start))
    return regions


def loop_aupro(maps: FloatArray, masks: BoolArray, thresholds: int, *, keep_labels: bool) -> float:
    """Binarise at every threshold and average the overlap over regions."""
    kept = [regions_of(mask) for mask in masks] if keep_labels else None
    normal = ~masks
    normals = np.count_nonzero(normal)
    fpr, pro = [0.0], [0.0]
    for threshold in np.linspace(maps.max(), maps.min(), thresholds):
        binary = maps >= threshold
        overlaps: list[float] = []
        for index, mask in enumerate(masks):
            regions = regions_of(mask) if kept is None else kept[index]
            overlaps.extend(float(binary[index][region].mean()) for region in regions)
        fpr.append(np.count_nonzero(binary & normal) / normals)
        pro.append(float(np.mean(overlaps)))
    return area_to_limit(fpr, pro)


def our_result(maps: FloatArray, masks: BoolArray) -> PixelResult:
    """Return every pixel metric and curve, streamed image by image."""
    metrics = PixelMetrics(aupro_limit=LIMIT)
    for score_map, mask in zip(maps, masks, strict=True):
        metrics.update(score_map, mask)
    return metrics.result()


@contextmanager
def trapz_restored() -> Iterator[None]:
    """Give adeval 1.1 the ``np.trapz`` that numpy 2.4 removed."""
    if hasattr(np, "trapz"):
        yield
        return
    np.trapz = np.trapezoid  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.trapz  # type: ignore[attr-defined]


def adeval_metrics(maps: FloatArray, masks: BoolArray) -> tuple[float, float]:
    """Return adeval's AUROC and AUPRO."""
    from adeval import auroc_aupr_aupro

    with trapz_restored():
        auroc, _, aupro = auroc_aupr_aupro(maps, masks.astype(np.uint8), nstrips=ADEVAL_STRIPS)
    return auroc, aupro


def adeval_bounds(maps: FloatArray, masks: BoolArray) -> tuple[float, float]:
    """Return how far equal strips can put AUROC and AUPRO off: the boxes between curve corners."""
    edges = np.linspace(maps.min(), maps.max(), ADEVAL_STRIPS + 1)
    weights = np.zeros(maps.shape)
    for weight, mask in zip(weights, masks, strict=True):
        for region in regions_of(mask):
            weight[region] = 1 / len(region[0])
    falses, _ = np.histogram(maps[~masks], edges)
    hits, _ = np.histogram(maps[masks], edges)
    overlaps, _ = np.histogram(maps[masks], edges, weights=weights[masks])
    widths = falses / falses.sum()
    reached = np.minimum(np.cumsum(widths[::-1]), LIMIT)
    clipped = np.diff(np.append(0.0, reached))[::-1]
    auroc = np.sum(widths * hits) / hits.sum()
    return float(auroc), float(np.sum(clipped * overlaps) / overlaps.sum() / LIMIT)


def timed(compute: Callable[[], float], repeats: int = 1) -> Timed:
    """Return the value and the median seconds of some repeats."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = compute()
        seconds.append(time.perf_counter() - start)
    return Timed(value, statistics.median(seconds))


def required(value: float | None) -> float:
    """Return a metric that these maps cannot leave undefined."""
    if value is None:
        raise SystemExit("the maps hold one class only: give more images")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=256, help="height and width of the maps")
    parser.add_argument("--thresholds", type=int, default=200, help="of the loop")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    maps, masks = realistic_maps(options.images, options.size, options.seed)

    # These also warm up: adeval's first call imports torch.
    ours = our_result(maps, masks)
    adeval_auroc, _ = adeval_metrics(maps, masks)
    rows = {
        "anomalyst": timed(lambda: required(our_result(maps, masks).aupro), repeats=3),
        "adeval": timed(lambda: adeval_metrics(maps, masks)[1], repeats=3),
        "loop, labels kept": timed(
            lambda: loop_aupro(maps, masks, options.thresholds, keep_labels=True), repeats=3
        ),
        "loop": timed(lambda: loop_aupro(maps, masks, options.thresholds, keep_labels=False)),
    }
    base = rows["anomalyst"]
    print(f"{'':18} {'AUPRO':>9} {'difference':>11} {'seconds':>8} {'times ours':>10}")
    for name, row in rows.items():
        print(
            f"{name:18} {row.value:9.6f} {row.value - base.value:+11.1e} "
            f"{row.seconds:8.2f} {row.seconds / base.seconds:10.1f}"
        )
    auroc_bound, aupro_bound = adeval_bounds(maps, masks)
    figures = {
        "images": options.images,
        "size": options.size,
        "thresholds": options.thresholds,
        "seconds": {name: round(row.seconds, 3) for name, row in rows.items()},
        "speedup_loop": round(rows["loop"].seconds / base.seconds, 1),
        "speedup_loop_labels_kept": round(rows["loop, labels kept"].seconds / base.seconds, 1),
        "speedup_adeval": round(rows["adeval"].seconds / base.seconds, 1),
        "aupro_minus_loop": base.value - rows["loop"].value,
        "aupro_minus_adeval": base.value - rows["adeval"].value,
        "adeval_aupro_bound": aupro_bound,
        "auroc_minus_adeval": required(ours.auroc) - adeval_auroc,
        "adeval_auroc_bound": auroc_bound,
        "auroc_minus_sklearn": required(ours.auroc) - roc_auc_score(masks.ravel(), maps.ravel()),
        "ap_minus_sklearn": required(ours.ap)
        - average_precision_score(masks.ravel(), maps.ravel()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
