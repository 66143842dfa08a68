"""Bottle, screw, transistor x shots x seeds: mean and standard deviation of every metric.

    python benchmarks/few_shot_table.py [--method anomaly-dino] [--set rotations=8] ...

Features are computed once for all cells (``--cache``); every cell is a detector of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from anomalyst import Detector, evaluate, load_dataset
from anomalyst.evaluation import METRICS
from anomalyst.features.cache import FeatureCache
from anomalyst.settings import detector_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--method", default="anomaly-dino")
    parser.add_argument("--categories", nargs="+", default=["bottle", "screw", "transistor"])
    parser.add_argument("--shots", nargs="+", default=["1", "2", "4", "8", "all"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=280)
    parser.add_argument("--backbone", default="dinov2-small-packaged")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--cache", type=Path, default=Path("out/feature-cache"))
    parser.add_argument("-o", "--output", type=Path, default=Path("out/few-shot.json"))
    options = parser.parse_args()
    cache = FeatureCache(options.cache)
    settings = detector_settings(
        options.method,
        None,
        options.set,
        backbone=options.backbone,
        image_size=options.image_size,
    )
    cells = []
    for category in options.categories:
        data = load_dataset(options.data, categories=[category])
        for shots in options.shots:
            # With all images there is nothing to draw: one seed is all there is.
            for seed in range(1 if shots == "all" else options.seeds):
                began = time.perf_counter()
                detector = Detector(options.method, **settings, seed=seed, feature_cache=cache)
                detector.fit(
                    data.train, shots=None if shots == "all" else int(shots), calibration=0
                )
                row = evaluate(detector, data).metrics["categories"][category]
                cells.append({"category": category, "shots": shots, "seed": seed, **row})
                took = time.perf_counter() - began
                print(f"{category} {shots} shots seed {seed}: {took:.0f} s", file=sys.stderr)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"options": vars(options), "cells": cells}, default=str))
    print_table(cells)


def print_table(cells: list[dict[str, object]]) -> None:
    print(f"| category | shots | {' | '.join(METRICS)} |")
    print(f"|---|---|{'---|' * len(METRICS)}")
    groups: dict[tuple[object, object], list[dict[str, object]]] = {}
    for cell in cells:
        groups.setdefault((cell["category"], cell["shots"]), []).append(cell)
    for (category, shots), rows in groups.items():
        texts = []
        for metric in METRICS:
            values = [float(str(row[metric])) for row in rows]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.3f}{spread}")
        print(f"| {category} | {shots} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
