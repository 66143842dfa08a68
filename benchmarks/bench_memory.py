"""Peak memory of `predict` over 5,000 images against that over 500: it must not grow.

    python benchmarks/bench_memory.py

Each runs in a process of its own on small images that this script makes, on seeded random weights
(what is measured is memory, not accuracy).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

SIZE = 64


def prepare(folder: Path) -> None:
    """Write a bundle and 100 images, which `measure` passes again and again."""
    import timm
    import torch
    from safetensors.torch import save_file

    from anomalyst import Detector

    torch.manual_seed(0)
    weights = folder / "tiny.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), str(weights))
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(100)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:03d}.png")
    detector = Detector(
        "anomaly-dino", backbone="timm:test_vit", weights=f"file:{weights}", image_size=SIZE
    )
    detector.enroll("noise", pictures[:4])
    detector.save(folder / "bundle")


def measure(folder: Path, count: int) -> None:
    """Predict ``count`` images and print the peak resident memory in MB."""
    from anomalyst import Detector
    from anomalyst.evaluation import peak_rss_mb
    from anomalyst.predictions import write_predictions

    images = sorted(folder.glob("*.png"))
    detector = Detector.load(folder / "bundle")
    sources = (images[k % len(images)] for k in range(count))
    done = sum(1 for _ in write_predictions(detector, sources, folder / f"out-{count}"))
    resident = psutil.Process().memory_info().rss / 1e6
    print(json.dumps({"images": done, "peak": peak_rss_mb(), "at_end": resident}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "COUNT"))
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), int(options.measure[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        found = {}
        for count in (500, 5000):
            command = [sys.executable, __file__, "--measure", folder, str(count)]
            ended = subprocess.run(command, check=True, capture_output=True, text=True)
            found[count] = json.loads(ended.stdout)
    # Starting up may peak above the work itself, so what is held at the end is compared as well.
    growth = {key: round(found[5000][key] - found[500][key], 1) for key in ("peak", "at_end")}
    print(json.dumps({"resident_mb": found, "growth_mb": growth}, indent=2))


if __name__ == "__main__":
    main()
