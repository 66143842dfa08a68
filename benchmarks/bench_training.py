"""INP-Former's step on cached features against the step that runs the backbone, and the floor.

    python benchmarks/bench_training.py [--data ../shared/data/mvtec] [--rounds 8]

Both kinds of step run in turn, on the same images, with the same weights at the start; the ratio
of the medians is the result. The floor is the heads' matrix products, forward and backward, at the
rate that this machine reaches on such a product, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from anomalyst import Detector, load_dataset
from anomalyst.features.cache import FeatureCache
from anomalyst.methods.inp_former import InpFormer, InpNetwork
from anomalyst.methods.stable_adamw import StableAdamW
from anomalyst.methods.views import PLAIN
from anomalyst.training_data import TrainingFeatures
from timing import matrix_rate, seconds


def head_flops(network: InpNetwork, batch: int, grid: int) -> float:
    """Return flops of the heads' linear layers for one step: forward, and twice that backward.

    The bottleneck's first layer needs no gradient of its input, which is frozen.
    """
    seen: list[int] = []

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], _: object) -> None:
        assert isinstance(module, nn.Linear)
        products = 2 if module is network.bottleneck.fc1 else 3
        seen.append(2 * products * given[0].numel() * module.out_features)

    handles = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Linear)
    ]
    width = next(iter(network.parameters())).shape[-1]
    network([torch.randn(batch, width, grid, grid) for _ in range(2)])
    for handle in handles:
        handle.remove()
    return float(sum(seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    samples = load_dataset(options.data).train[:: len(load_dataset(options.data).train) // 64][:64]
    detector = Detector(
        "inp-former", backbone="dinov2-small-packaged", image_size=224, resize=256, seed=1
    )
    method = detector.method
    assert isinstance(method, InpFormer)
    model = method.network
    fabric = Fabric(accelerator="cpu", devices=1, precision=options.precision)
    network, optimizer = fabric.setup(model, StableAdamW(model.parameters()))

    def step(source: TrainingFeatures, first: int) -> None:
        optimizer.zero_grad()
        numbers = [(first + k) % len(samples) for k in range(options.batch)]
        (maps,) = source.fetch(numbers)
        fabric.backward(network(maps)["loss"])
        fabric.clip_gradients(network, optimizer, max_norm=0.1)
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        engine = replace(detector.engine, cache=FeatureCache(folder))
        cached = TrainingFeatures(engine, samples, [PLAIN])
        fresh = TrainingFeatures(detector.engine, samples, [PLAIN])
        step(cached, 0), step(fresh, 0)  # warm up
        times = [
            (seconds(lambda k=k: step(cached, 16 * k)), seconds(lambda k=k: step(fresh, 16 * k)))
            for k in range(options.rounds)
        ]
    rate = matrix_rate(4096, 384, 1536)
    floor = head_flops(model, options.batch, 16) / rate
    with_cache = statistics.median(t[0] for t in times)
    without = statistics.median(t[1] for t in times)
    print(
        json.dumps(
            {
                "precision": options.precision,
                "threads": torch.get_num_threads(),
                "cached_s": round(with_cache, 3),
                "uncached_s": round(without, 3),
                "ratio": round(with_cache / without, 3),
                "gflops_a_second": round(rate / 1e9, 1),
                "floor_s": round(floor, 3),
                "cached_over_floor": round(with_cache / floor, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
