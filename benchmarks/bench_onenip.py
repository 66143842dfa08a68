"""OneNIP's step with pooled pseudo-anomalies against fresh ones, and the flop floor.

    python benchmarks/bench_onenip.py [--data ../shared/data/mvtec] [--rounds 8]

Both kinds of step run in turn, on the same images and weights; the ratio of the medians is the
result. The floor is the flops that torch counts in one step of the network, forward and backward,
at the rate that this machine reaches on a matrix product of the MLPs' size in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from anomalyst import Detector, load_dataset
from anomalyst.features.cache import FeatureCache
from anomalyst.methods.onenip import OneNip
from anomalyst.methods.views import PLAIN
from anomalyst.training_data import TrainingFeatures
from timing import matrix_rate, seconds

PRESET = OneNip.presets["fast"]["options"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    train = load_dataset(options.data).train
    samples = train[:: len(train) // 32][:32]
    detectors = {
        name: Detector(
            "onenip",
            backbone="dinov2-small-packaged",
            image_size=224,
            options={**PRESET, "pool": pool},
        )
        for name, pool in (("pooled", 1), ("fresh", 0))
    }
    batch = int(PRESET["batch_size"])
    numbers = list(range(len(samples)))
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for name, detector in detectors.items():
            engine = replace(detector.engine, cache=FeatureCache(folder))
            method = detector.method
            assert isinstance(method, OneNip)
            source = method.source(TrainingFeatures(engine, samples, [PLAIN]))
            optimizer = method.options.optimizer(method.network.parameters())
            method.network.train()

            def step(k: int, source=source, network=method.network, optimizer=optimizer) -> None:
                optimizer.zero_grad()
                drawn = [numbers[(batch * k + i) % len(samples)] for i in range(batch)]
                (part,) = source.fetch(drawn, k)
                network(part)["loss"].backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()

            steps[name] = step
        for k in range(len(samples) // batch):  # fills the pool
            steps["pooled"](k)
        steps["fresh"](0)
        counter = FlopCounterMode(display=False)
        with counter:
            steps["pooled"](0)
        times = [
            [seconds(lambda name=name, k=k: steps[name](k)) for name in steps]
            for k in range(options.rounds)
        ]
    rate = matrix_rate(2048, 256, 1024)
    pooled, fresh = (statistics.median(column) for column in zip(*times, strict=True))
    floor = counter.get_total_flops() / rate
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "pooled_s": round(pooled, 3),
                "fresh_s": round(fresh, 3),
                "ratio": round(pooled / fresh, 3),
                "gflops_a_step": round(counter.get_total_flops() / 1e9, 1),
                "gflops_a_second": round(rate / 1e9, 1),
                "floor_s": round(floor, 3),
                "pooled_over_floor": round(pooled / floor, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
