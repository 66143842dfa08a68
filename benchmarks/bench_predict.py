"""`predict` end to end (decode to written result) against the bare backbone on the same tensors.

    python benchmarks/bench_predict.py [--data ../shared/data/mvtec] [--images 64]

Both are timed in the same run, alternating, batch 8; the ratio of the medians is the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from anomalyst import Detector, load_dataset
from anomalyst.data.images import read_image
from anomalyst.data.layouts import Dataset
from anomalyst.generalist import load_generalist
from anomalyst.predictions import write_predictions
from timing import seconds

BATCH = 8


def compare(detector: Detector, paths: list[Path], rounds: int) -> dict[str, float]:
    """Return median seconds an image of both, and their ratio."""
    engine = detector.engine
    tensors = torch.from_numpy(np.stack([engine.preprocess(read_image(p)) for p in paths]))

    def bare() -> None:
        with torch.inference_mode():
            for batch in tensors.split(BATCH):
                engine.backbone(batch)

    def end_to_end() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for _ in write_predictions(detector, paths, Path(folder)):
                pass

    bare(), end_to_end()  # warm up
    times = [(seconds(bare), seconds(end_to_end)) for _ in range(rounds)]
    base = statistics.median(t[0] for t in times) / len(paths)
    whole = statistics.median(t[1] for t in times) / len(paths)
    return {"bare_s": round(base, 4), "predict_s": round(whole, 4), "ratio": round(whole / base, 3)}


def taught(data: Dataset, normal: int, abnormal: int) -> Detector:
    """Return the shipped generalist with so many references."""
    detector = load_generalist()
    bad = [(s, s.mask) for s in data.test if s.label == 1][:abnormal]
    detector.enroll("bottle", data.train[:normal], bad)
    return detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", help="only this one")
    options = parser.parse_args()
    data = load_dataset(options.data, categories=["bottle"])
    paths = [sample.path for sample in data.test][: options.images]
    settings = {
        "anomaly-dino, 4 shots": ("anomaly-dino", {}, 4),
        "patchcore, 10 % of 200 images": ("patchcore", {"coreset": 0.1}, 200),
        # How long it was trained makes no difference to the time of a prediction.
        "inp-former": ("inp-former", {"steps": 1, "augment": "never"}, 20),
        "inp-former, 2000 stored prototypes": (
            "inp-former",
            {"steps": 1, "augment": "never", "stored": 2000},
            20,
        ),
        "onenip": ("onenip", {"steps": 1, "batch_size": 4}, 20),
        "onenip, two layers each": (
            "onenip",
            {"steps": 1, "batch_size": 4, "encoder_layers": 2, "decoder_layers": 2},
            20,
        ),
    }
    results = {}
    for name, (method, method_options, shots) in settings.items():
        if options.method not in (None, method):
            continue
        detector = Detector(
            method, backbone="dinov2-small-packaged", image_size=280, options=method_options
        )
        detector.fit(data.train, shots=shots, calibration=0)
        results[name] = compare(detector, paths, options.rounds)
        print(name, results[name], flush=True)
    if options.method in (None, "nagl"):
        for normal, abnormal in ((1, 1), (4, 2)):
            name = f"nagl, {normal} normal and {abnormal} abnormal"
            results[name] = compare(taught(data, normal, abnormal), paths, options.rounds)
            print(name, results[name], flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "images": len(paths), **results}))


if __name__ == "__main__":
    main()
