"""What the prompt and the refiner are worth: one trained OneNIP bundle, many prompts.

    anomalyst fit onenip ../shared/data/mvtec -o out/onenip --preset fast --calibration 0
    python benchmarks/onenip_prompts.py out/onenip --data ../shared/data/mvtec

Rows: the refiner's weight in the map; then the prompt of every category changed in one way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from anomalyst import Detector, Sample, load_dataset
from anomalyst.data.images import read_image
from anomalyst.data.layouts import seeded_order
from anomalyst.evaluation import EVAL_SIZE, CategoryEvaluation, mean_metrics
from anomalyst.features.cache import FeatureCache

METRICS = ("i_auroc", "i_ap", "p_auroc", "p_ap", "aupro")
Prompts = Mapping[str, Sequence[object]]
Change = Callable[[np.ndarray], np.ndarray]


def blurred(image: np.ndarray) -> np.ndarray:
    radius = min(image.shape[:2]) / 50
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


CHANGES: dict[str, Change] = {
    "blurred": blurred,
    "at 0.6 of its light": lambda image: (image * 0.6).astype(np.uint8),
    "turned by 90 degrees": lambda image: np.rot90(image).copy(),
    "turned by 180 degrees": lambda image: np.rot90(image, 2).copy(),
    "grey noise instead": lambda image: np.random.default_rng(0).integers(
        0, 256, image.shape, dtype=np.uint8
    ),
    "black instead": lambda image: np.zeros_like(image),
}


class Bench:
    """A trained bundle that is given other prompts again and again."""

    def __init__(self, bundle: Path, data: Path, cache: Path) -> None:
        self.bundle = bundle
        self.data = load_dataset(data)
        self.cache = FeatureCache(cache)

    def detector(self, images: Prompts | None = None, **options: object) -> Detector:
        """Return the bundle, with other prompts if there are any."""
        found = Detector.load(self.bundle, feature_cache=self.cache, options=options)
        if images is not None:
            weights = found.method.tensors()
            found.method.load_tensors(
                {k: v for k, v in weights.items() if k.startswith("network.")}
            )
            found.references, found.calibration = {}, {}
            found.index.load({})
            for category, own in images.items():
                found.enroll(category, own)
        return found

    def row(self, name: str, detector: Detector, retrieved: bool = False) -> None:
        """Judge all test images and print the mean metrics."""
        test = self.data.test
        asked = [replace(sample, category=None) for sample in test] if retrieved else test
        found = {name: CategoryEvaluation(name) for name in self.data.categories}
        right = 0
        for sample, prediction in zip(test, detector.predict(asked), strict=True):
            right += prediction.category == sample.category
            found[sample.category or ""].add(sample, prediction, EVAL_SIZE)
        mean = mean_metrics([category.figures for category in found.values()])
        note = f", {right} of {len(test)} right" if retrieved else ""
        print(f"| {name}{note} | {' | '.join(f'{mean[key]:.3f}' for key in METRICS)} |", flush=True)

    def draw(self, seed: int, count: int = 1) -> dict[str, list[Sample]]:
        """Return so many normal training images of each category."""
        drawn = {}
        for name in self.data.categories:
            own = [sample for sample in self.data.train if sample.category == name]
            drawn[name] = [own[k] for k in seeded_order(len(own), seed, name)[:count]]
        return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("out/fc"))
    options = parser.parse_args()
    bench = Bench(options.bundle, options.data, options.cache)
    names = bench.data.categories
    print(f"| prompt | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        bench.row(f"as enrolled, alpha {alpha}", bench.detector(alpha=alpha))
    bench.row("as enrolled, category by similarity", bench.detector(), retrieved=True)
    for seed in range(options.draws):
        bench.row(f"any good image, draw {seed}", bench.detector(bench.draw(seed)))
    four = bench.draw(0, 4)
    for choice in ("nearest", "mean"):
        several = bench.detector(four, prompts=4, choice=choice)
        bench.row(f"four good images, {choice}", several)
    one = {name: read_image(samples[0].path) for name, samples in bench.draw(0).items()}
    for name, change in CHANGES.items():
        bench.row(name, bench.detector({c: [change(image)] for c, image in one.items()}))
    bad = {c: [s for s in bench.data.test if s.category == c and s.label == 1][:1] for c in names}
    bench.row("a defective image", bench.detector(bad))
    for turn in range(1, len(names)):
        wrong = {c: [one[names[(k + turn) % len(names)]]] for k, c in enumerate(names)}
        bench.row(f"of another category ({turn})", bench.detector(wrong))


if __name__ == "__main__":
    main()
