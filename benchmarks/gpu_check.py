"""What a GPU gives: each method's score maps against the CPU's, and what it costs there.

    python benchmarks/gpu_check.py -o OUT [--method NAME]... [--batch-size N]...

Random weights, made-up images: the figures are of cost and of rounding only. Writes
``OUT/METHOD.json`` as `anomalyst profile` does, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalyst import Detector
from anomalyst.features.backbones import find_backbone
from anomalyst.features.random_weights import random_weights
from anomalyst.methods import REGISTRY
from anomalyst.methods.base import find_method
from anomalyst.profiling import profile
from anomalyst.profiling_parts import Parts
from anomalyst.settings import detector_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--batch-size", type=int, action="append", default=[])
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    for method in given.method or REGISTRY:
        try:
            agreement(method)
            costs(method, given.batch_size or [1, 8, 32], given.output)
        except Exception:
            print(method, traceback.format_exc(limit=3), flush=True)


def agreement(method: str) -> None:
    """Train and enroll on the GPU, then judge on both: how far maps and scores lie apart."""
    with tempfile.TemporaryDirectory() as name:
        folder, spec = Path(name), find_method(method)
        backbone = find_backbone(spec.backbone_for("auto")).id
        weights = random_weights(backbone, folder / "weights.safetensors")
        options = {"steps": 2} if spec.trains_on else {}
        parts = Parts(280)
        detector = Detector(method, weights=weights, device="cuda", options=options)
        detector.fit(parts.write(folder / "data", 2, 8, 4 if spec.generalist else 0), calibration=0)
        if spec.generalist:
            for product, category in enumerate(parts.names(2)):
                bad = [parts.bad(product, number) for number in range(2)]
                detector.enroll(category, [parts.good(product, 50)], bad)
        detector.save(folder / "bundle")
        images = [parts.good(0, 60), *(parts.bad(product, 60)[0] for product in (0, 1))]
        found = {}
        for device in ("cpu", "cuda"):
            loaded = Detector.load(folder / "bundle", device=device)
            found[device] = list(loaded.predict(images, category=parts.names(1)[0]))
    for kind in ("map", "score"):
        cpu, gpu = (np.array([getattr(p, kind) for p in found[d]]) for d in ("cpu", "cuda"))
        span = float(cpu.max() - cpu.min()) or 1.0
        apart = float(np.abs(cpu - gpu).max())
        print(f"{method}: {kind} apart by {apart:.2g}, {apart / span:.2g} of its range", flush=True)


def costs(method: str, batch_sizes: list[int], output: Path) -> None:
    chosen = detector_settings(method, None, [], "auto")
    found: Any = profile(
        method,
        settings={**chosen, "device": "cuda"},
        batch_sizes=tuple(batch_sizes),
        random=True,
    )
    (output / f"{method}.json").write_text(json.dumps(found.to_dict(), indent=1))
    for size in found.sizes:
        for each in size.judging:
            image, bare = each.image.median * 1e3, each.backbone.median * 1e3
            print(
                f"{method} {size.image_size} px on {found.backbone}, batch {each.batch_size}: "
                f"{image:.2f} ms an image, bare {bare:.2f} ms, ratio {each.ratio:.2f}, "
                f"GPU {each.memory.gpu_mb:.0f} MB",
                flush=True,
            )
        if size.training:
            step = size.training.step.median * 1e3
            print(f"{method}: {step:.0f} ms a training step of {size.training.batch_size}")


if __name__ == "__main__":
    main()
