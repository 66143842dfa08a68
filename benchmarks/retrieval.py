"""How often the category of a test image is found by similarity alone.

    python benchmarks/retrieval.py [--data ../shared/data/mvtec ../shared/data/source]

All categories of all folders, and the demo's two kinds of solar cell, share one detector with a few
references each; every test image is then judged without its category.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from anomalyst import Detector, Sample, load_dataset
from anomalyst.data.layouts import few_shot
from anomalyst.demo import solar_cells
from anomalyst.features.cache import FeatureCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders = [Path("../shared/data/mvtec"), Path("../shared/data/source")]
    parser.add_argument("--data", type=Path, nargs="+", default=folders)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--every", type=int, default=4, help="judge every n-th test image")
    parser.add_argument("--cache", type=Path, default=Path("out/feature-cache"))
    options = parser.parse_args()
    train: list[Sample] = []
    test: list[Sample] = []
    for data in [*map(load_dataset, options.data), solar_cells(options.shots)[0]]:
        train += few_shot(data.train, options.shots, 0)
        test += data.test[:: options.every]
    detector = Detector(
        "anomaly-dino",
        backbone="dinov2-small-packaged",
        image_size=options.image_size,
        feature_cache=FeatureCache(options.cache),
    )
    detector.fit(train, calibration=0)
    found = detector.predict([replace(sample, category=None) for sample in test])
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    taken_for: Counter[tuple[str, str]] = Counter()
    for sample, prediction in zip(test, found, strict=True):
        truth, guess = sample.category or "", prediction.category or ""
        seen[truth] += 1
        right[truth] += truth == guess
        if truth != guess:
            taken_for[truth, guess] += 1
    print("| category | test images | category found |\n|---|---|---|")
    for name, count in seen.items():
        print(f"| {name} | {count} | {right[name] / count:.3f} |")
    print(f"| all | {seen.total()} | {right.total() / seen.total():.3f} |")
    print("\nmistakes:", dict(taken_for.most_common(6)))


if __name__ == "__main__":
    main()
