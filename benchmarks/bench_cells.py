"""What a benchmark adds to its cells' own work, and how often a feature is computed.

    python benchmarks/bench_cells.py [--images 40] [--ray]

On random images and a random DINOv2-small (the figures say nothing of accuracy):

1. Overhead: the time of `run_benchmark` less the time in its cells' own work (fit, predict,
   metrics), as a share of it. Goal: under 3 %. The page with its plots, once a run, is told apart.
2. Backbone passes: images that went through the network against different images among all cells
   that share them. Goal: each once.
3. With --ray, the same cells by one worker and by two, and what two processes of plain matrix
   products do against one on these cores: more than that no engine can gain.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from anomalyst.benchmark import runner
from anomalyst.benchmark.reading import load_benchmark
from anomalyst.benchmark.runner import Engine, Workshop, one_by_one, run_benchmark
from anomalyst.data.layouts import few_shot
from anomalyst.engine import Engine as FeatureEngine
from anomalyst.features.random_weights import random_weights
from anomalyst.scale.cells import on_ray

CONFIG = """
title: Overhead
method: anomaly-dino
setting: few-shot
data: {data}
shots: [1, 2, 4]
seeds: [0, 1, 2]
backbone: dinov2-small
weights: {weights}
image_size: 224
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40, help="test images a category")
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder, given.images)
        overhead(folder, config)
        if given.ray:
            workers(folder, config)


def prepare(folder: Path, images: int) -> Path:
    """Write two categories of noisy images, weights and the configuration."""
    generator = np.random.default_rng(0)
    for category in ("first", "second"):
        for part, count in (
            ("train/good", 8),
            ("test/good", images // 2),
            ("test/bad", images // 2),
        ):
            home = folder / "data" / category / part
            home.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (300, 300, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{number:03}.png")
    weights = random_weights("dinov2-small", folder / "weights.safetensors")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(data=folder / "data", weights=weights))
    return config


def overhead(folder: Path, config: Path) -> None:
    passes, spent, paged = 0, 0.0, 0.0
    extract, measure, page = FeatureEngine._extract, Workshop._measure, runner.write_page

    def counted(self: Any, items: Any, view: Any) -> Any:
        nonlocal passes
        passes += len(items)
        return extract(self, items, view)

    def timed(self: Any, *arguments: Any) -> Any:
        nonlocal spent
        began = time.perf_counter()
        try:
            return measure(self, *arguments)
        finally:
            spent += time.perf_counter() - began

    def drawn(*arguments: Any) -> None:
        nonlocal paged
        began = time.perf_counter()
        page(*arguments)
        paged = time.perf_counter() - began

    FeatureEngine._extract, Workshop._measure = counted, timed  # type: ignore[method-assign]
    runner.write_page = drawn
    try:
        seconds, cells, images = run(config, folder / "plain", one_by_one())
    finally:
        FeatureEngine._extract, Workshop._measure = extract, measure  # type: ignore[method-assign]
        runner.write_page = page
    share = (seconds - paged - spent) / spent
    print(f"{cells} cells: their own work {spent:.1f} s, {share:.1%} more around them", end="")
    print(f", the page {paged:.1f} s")
    print(f"{passes} images through the network, {images} different ones among the cells")


def run(config: Path, out: Path, engine: Engine) -> tuple[float, int, int]:
    """Return the seconds, the number of cells, and of different images among them."""
    began = time.perf_counter()
    outcomes = run_benchmark(load_benchmark(config), out, engine=engine, tell=lambda _: None)
    seconds = time.perf_counter() - began
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        raise SystemExit(failed[0])
    drawn = {sample.path for o in outcomes for sample in o.cell.test.test}
    for outcome in outcomes:
        cell = outcome.cell
        drawn |= {s.path for s in few_shot(cell.train.train, cell.shots or 1, cell.seed)}
    return seconds, len(outcomes), len(drawn)


def workers(folder: Path, config: Path) -> None:
    import ray

    torch.set_num_threads(1)
    found = {}
    for count in (1, 2):
        ray.init(address="local", num_cpus=count, include_dashboard=False, log_to_driver=False)
        try:
            run(config, folder / f"warm-{count}", on_ray())  # processes start and import
            found[count], cells, _ = run(config, folder / f"ray-{count}", on_ray())
        finally:
            ray.shutdown()
        print(f"{count} worker(s): {cells} cells in {found[count]:.1f} s")
    print(f"2 workers against 1: {found[1] / found[2]:.2f} times as fast")
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(multiply, range(2)))  # both are started
        one = pool.submit(multiply, 0).result()
        both = max(pool.map(multiply, range(2)))
    print(f"2 processes of matrix products against 1: {2 * one / both:.2f} times as fast")


def multiply(_: int) -> float:
    """Return the seconds that some matrix products take in one thread."""
    torch.set_num_threads(1)
    matrix = torch.randn(800, 800)
    began = time.perf_counter()
    for _ in range(100):
        matrix @ matrix
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
