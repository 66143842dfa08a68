"""How alike an abnormal image is to good ones of its own product, and to those of others.

    python benchmarks/product_similarity.py

The figures behind `retrieval.SAME_PRODUCT`, under which `enroll` refuses an abnormal image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anomalyst import Sample, load_dataset
from anomalyst.data.layouts import seeded_order
from anomalyst.features.cache import FeatureCache
from anomalyst.generalist import load_generalist
from anomalyst.inference import read_batches
from anomalyst.retrieval import CategoryIndex

BOUNDS = (0.65, 0.7, 0.75, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders = [Path("../shared/data/mvtec"), Path("../shared/data/source")]
    parser.add_argument("--data", type=Path, nargs="+", default=folders)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--images", type=int, default=60, help="abnormal images a product, at most")
    parser.add_argument("--cache", type=Path, default=Path("out/fc"))
    options = parser.parse_args()
    engine = load_generalist(feature_cache=FeatureCache(options.cache)).engine
    train: list[Sample] = []
    test: list[Sample] = []
    for data in map(load_dataset, options.data):
        train += data.train
        for name in data.categories:
            bad = [s for s in data.test if s.category == name and s.label == 1]
            test += [bad[place] for place in seeded_order(len(bad), 0, name)[: options.images]]
    names = sorted({sample.category or "" for sample in test})
    print("| good images | product | abnormal images | least like its own | most like another |")
    print("|---|---|---|---|---|")
    for shots in options.shots:
        index = CategoryIndex()
        for name in names:
            first = [sample for sample in train if sample.category == name][:shots]
            for items in read_batches(first, engine.preprocess, 1):
                index.add(name, engine.features(items))
        every_own: list[float] = []
        every_other: list[float] = []
        for name in names:
            own, others = [], []
            bad = [sample for sample in test if sample.category == name]
            for items in read_batches(bad, engine.preprocess, 1):
                found = index.similarities(engine.features(items))[0]
                own.append(found.pop(name))
                others.append(max((value, other) for other, value in found.items()))
                every_other += found.values()
            every_own += own
            like, other = max(others)
            print(f"| {shots} | {name} | {len(bad)} | {min(own):.2f} | {like:.2f} ({other}) |")
        for bound in BOUNDS:
            refused = sum(value < bound for value in every_own)
            passed = sum(value >= bound for value in every_other)
            print(
                f"{shots} good, bound {bound}: {refused} of {len(every_own)} images of the product "
                f"refused, {passed} of {len(every_other)} pairs with another product let through"
            )


if __name__ == "__main__":
    main()
