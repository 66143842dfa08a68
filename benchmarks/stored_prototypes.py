"""What stored prototypes change in a trained INP-Former: the same weights with more or fewer.

python benchmarks/stored_prototypes.py BUNDLE [--data ../shared/data/mvtec] [--stored 0 2000]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anomalyst import Detector, evaluate, load_dataset
from anomalyst.evaluation import METRICS
from anomalyst.features.cache import FeatureCache


def with_stored(trained: Detector, count: int) -> Detector:
    """Return a detector of the same network with so many stored prototypes, none enrolled yet."""
    options = {**trained.method.options.model_dump(), "stored": count}
    detector = Detector("inp-former", options=options, seed=trained.seed)
    network = {k: v for k, v in trained.method.tensors().items() if k.startswith("network.")}
    detector.restore(trained.engine, {"method": network, "retrieval": {}})
    return detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--stored", type=int, nargs="+", default=[0, 500, 2000, 5000])
    parser.add_argument("--cache", type=Path, default=Path("out/feature-cache"))
    options = parser.parse_args()
    trained = Detector.load(options.bundle, feature_cache=FeatureCache(options.cache))
    data = load_dataset(options.data, categories=trained.categories)
    print(f"| stored | category | {' | '.join(METRICS)} |")
    print(f"|---|---|{'---|' * len(METRICS)}")
    for count in options.stored:
        detector = with_stored(trained, count)
        for category in data.categories:
            detector.enroll(category, [s for s in data.train if s.category == category])
        found = evaluate(detector, data).metrics
        for name, row in {**found["categories"], "mean": found["mean"]}.items():
            print(f"| {count} | {name} | {' | '.join(f'{row[m]:.3f}' for m in METRICS)} |")


if __name__ == "__main__":
    main()
