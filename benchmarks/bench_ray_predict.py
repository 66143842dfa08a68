"""`predict --engine ray --workers 2` against two plain processes that take half the images each.

    python benchmarks/bench_ray_predict.py [--images 20000] [--rounds 2]

Both run in the same call, alternating, one thread a process, on small images that this script makes
and on seeded random weights. What comes out is the ratio of their throughputs, over the whole run
and without start and end, and the resident memory of the Ray run at a quarter and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from anomalyst.predictions import FILE
from bench_memory import SIZE, prepare

STEADY = (0.2, 0.9)  # of the images: between these neither start nor end counts


@dataclass(frozen=True)
class Sample:
    """A moment of a run: seconds since its start, share of the lines written, memory in MB."""

    seconds: float
    done: float
    memory: dict[str, float]


def make_images(folder: Path, count: int) -> list[Path]:
    """Write noise in two folders, PNG and JPEG by turns, and return the folders."""
    random = np.random.default_rng(1)
    halves = [folder / "images" / name for name in "ab"]
    for number in range(count):
        half = halves[number * 2 // count]
        half.mkdir(parents=True, exist_ok=True)
        picture = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        suffix = "png" if number % 2 else "jpg"
        Image.fromarray(picture).save(half / f"{number:06d}.{suffix}")
    return halves


def run(commands: Sequence[Sequence[str]], outs: Sequence[Path], size: int) -> list[Sample]:
    """Run commands side by side, and watch them until the last one ends."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    samples, log = [], tempfile.TemporaryFile()
    began = time.perf_counter()
    started = [
        subprocess.Popen(words, env=one_thread, stdout=subprocess.DEVNULL, stderr=log)
        for words in commands
    ]
    while any(process.poll() is None for process in started):
        done = sum(written(out) for out in outs) / size if size else 0.0
        memory = resident(started)
        samples.append(Sample(time.perf_counter() - began, done, memory))
        time.sleep(0.2)
    samples.append(Sample(time.perf_counter() - began, 1.0, {}))
    if any(process.returncode for process in started):
        log.seek(0)
        raise SystemExit(f"a run failed: {log.read()[-4000:].decode()}")
    return samples


def written(out: Path) -> int:
    """Return the bytes of all lines that are on the disk."""
    total = 0
    shards = list(out.glob("shards/*.jsonl"))
    for path in shards or out.glob("predictions.jsonl*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


def resident(started: Sequence[subprocess.Popen[bytes]]) -> dict[str, float]:
    """Return the memory of the processes started, and of Ray's workers below them, in MB."""
    found = {"driver": 0.0, "workers": 0.0, "rest of Ray": 0.0}
    for process in started:
        try:
            top = psutil.Process(process.pid)
            found["driver"] += top.memory_info().rss / 1e6
            for child in top.children(recursive=True):
                role = "workers" if child.name().startswith("ray::Map") else "rest of Ray"
                found[role] += child.memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            continue
    return found


def steady_seconds(samples: Sequence[Sample]) -> float:
    """Return the seconds between the two shares of `STEADY`, scaled to all images."""
    at = [next(sample for sample in samples if sample.done >= share) for share in STEADY]
    return (at[1].seconds - at[0].seconds) / (at[1].done - at[0].done)


def memory_at(samples: Sequence[Sample], share: float) -> dict[str, float]:
    """Return the memory when that share was first seen done, or when it was last seen."""
    known = [sample for sample in samples if sample.memory.get("workers")]
    at = next((sample for sample in known if sample.done >= share), known[-1])
    return {role: round(value, 1) for role, value in at.memory.items()}


def summary(images: int, runs: Mapping[str, Sequence[Sequence[Sample]]]) -> dict[str, Any]:
    """Return medians over the rounds, and the ratios of throughput, Ray's to plain."""
    whole = {e: statistics.median(r[-1].seconds for r in rounds) for e, rounds in runs.items()}
    steady = {e: statistics.median(map(steady_seconds, rounds)) for e, rounds in runs.items()}
    return {
        "images": images,
        "seconds": {engine: round(value, 1) for engine, value in whole.items()},
        "images_per_second": {engine: round(images / value) for engine, value in steady.items()},
        "ratio_whole_run": round(whole["plain"] / whole["ray"], 3),
        "ratio_steady": round(steady["plain"] / steady["ray"], 3),
        "ray_memory_mb": [
            {"at 25 %": memory_at(samples, 0.25), "at 100 %": memory_at(samples, 1.0)}
            for samples in runs["ray"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        halves = [str(half) for half in make_images(folder, options.images)]
        predict = [sys.executable, "-m", "anomalyst.cli", "predict", str(folder / "bundle")]
        outs = {"plain": [folder / "out-a", folder / "out-b"], "ray": [folder / "out-ray"]}
        pairs = zip(halves, outs["plain"], strict=True)
        on_ray = ["--engine", "ray", "--workers", "2"]
        commands = {
            "plain": [[*predict, half, "-o", str(out)] for half, out in pairs],
            "ray": [[*predict, *halves, "-o", str(outs["ray"][0]), *on_ray]],
        }
        runs: dict[str, list[list[Sample]]] = {"plain": [], "ray": []}
        size, expected = 0, b""
        order = [
            "plain"
        ]  # the first run warms the disk's cache, tells the size, and is not counted
        for turn in range(options.rounds):
            order += ["plain", "ray"] if turn % 2 else ["ray", "plain"]
        for number, engine in enumerate(order):
            samples = run(commands[engine], outs[engine], size)
            lines = b"".join((out / FILE).read_bytes() for out in outs[engine])
            if number == 0:
                size, expected = len(lines), lines
            else:
                runs[engine].append(samples)
            if lines != expected:
                raise SystemExit("the engines wrote different lines")
            for out in outs[engine]:
                shutil.rmtree(out)
            print(engine, round(samples[-1].seconds, 1), "s", file=sys.stderr, flush=True)
    print(json.dumps(summary(options.images, runs), indent=2))


if __name__ == "__main__":
    main()
