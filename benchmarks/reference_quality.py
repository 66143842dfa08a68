"""What becomes of the shipped generalist when its one abnormal reference is poorly marked or taken.

    python benchmarks/reference_quality.py --data ../shared/data/mvtec

One good and one abnormal image a category, drawn as the benchmark draws them; the abnormal one is
never judged. Every row changes the mask or the picture of that reference in one way.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from anomalyst import Detector, Sample, load_dataset
from anomalyst.benchmark.references import Task, draw_tasks
from anomalyst.data.images import read_image, read_mask
from anomalyst.evaluation import EVAL_SIZE, Judged, mean_metrics
from anomalyst.features.cache import FeatureCache
from anomalyst.generalist import load_generalist

METRICS = ("i_auroc", "i_ap", "p_auroc", "p_ap", "aupro")
Picture = np.ndarray
Mask = np.ndarray


def drawn(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    return picture, mask


def box(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    marked = np.zeros_like(mask)
    marked[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return picture, marked


def generous(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    """Grown on every side by a twentieth of the image."""
    far = ndimage.distance_transform_edt(~mask)
    return picture, far <= max(mask.shape) / 20


def half(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    """The left half of the defect's pixels alone."""
    columns = np.nonzero(mask)[1]
    marked = mask.copy()
    marked[:, int(np.median(columns)) + 1 :] = False
    return picture, marked


def elsewhere(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    """The mask upside down and mirrored: another place, but where the two meet."""
    return picture, mask[::-1, ::-1].copy()


def found(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    return picture, None


def blurred(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    radius = max(mask.shape) / 200
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))), mask


def dark(picture: Picture, mask: Mask) -> tuple[Picture, Mask | None]:
    return (picture * 0.6).astype(np.uint8), mask


KINDS: dict[str, Callable[[Picture, Mask], tuple[Picture, Mask | None]]] = {
    "mask as drawn": drawn,
    "its bounding box": box,
    "grown by 1/20 of the image": generous,
    "half of the defect marked": half,
    "no mask: defect found": found,
    "mask at the opposite place": elsewhere,
    "blurred picture": blurred,
    "picture at 0.6 of its light": dark,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("out/fc"))
    options = parser.parse_args()
    cache = FeatureCache(options.cache)
    data = load_dataset(options.data)
    draws = [draw_tasks(data, 1, 1, seed) for seed in range(options.draws)]
    none = [measure(cache, tasks, None) for tasks in draws]
    print(f"| abnormal reference | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    print_row("none", none)
    for name, change in KINDS.items():
        print_row(name, [measure(cache, tasks, change) for tasks in draws])
    for name, pick in (("the smallest defect", min), ("the largest defect", max)):
        chosen = [[_with_defect(task, pick) for task in tasks] for tasks in draws]
        print_row(name, [measure(cache, tasks, drawn) for tasks in chosen])


def print_row(name: str, rows: Sequence[dict[str, float]]) -> None:
    texts = []
    for metric in METRICS:
        values = [row[metric] for row in rows]
        texts.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    print(f"| {name} | {' | '.join(texts)} |", flush=True)


def measure(
    cache: FeatureCache,
    tasks: Sequence[Task],
    change: Callable[[Picture, Mask], tuple[Picture, Mask | None]] | None,
) -> dict[str, float]:
    """Return the mean metrics over the categories."""
    rows = []
    for task in tasks:
        detector = load_generalist(feature_cache=cache)
        (references,) = task.references
        (bad,) = references.abnormal
        abnormal = [] if change is None else [change(*_read(bad))]
        detector.enroll(references.category, references.normal, abnormal)
        rows.append(_judge(detector, [s for s in task.queries if s.path != bad.path]))
    return {key: value for key, value in mean_metrics(rows).items() if value is not None}


def _judge(detector: Detector, samples: Sequence[Sample]) -> dict[str, float]:
    judged = Judged(EVAL_SIZE, len(samples))
    judged.add(detector, samples)
    (category,) = judged.categories.values()
    return category.figures


def _with_defect(task: Task, pick: Callable[..., Sample]) -> Task:
    """Return the task with the abnormal image of the smallest or largest defect instead."""
    (references,) = task.references
    masked = [sample for sample in task.queries if sample.label == 1 and sample.mask]
    chosen = pick(masked, key=lambda sample: _read(sample)[1].mean())
    return Task((replace(references, abnormal=(chosen,)),), task.queries)


def _read(sample: Sample) -> tuple[Picture, Mask]:
    picture = read_image(sample.path)
    assert sample.mask is not None
    return picture, read_mask(sample.mask, (picture.shape[0], picture.shape[1]), sample.path)


if __name__ == "__main__":
    main()
