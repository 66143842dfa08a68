"""Every method in torch, ONNX Runtime and OpenVINO, each against its bare backbone there.

    python benchmarks/deploy_table.py [METHOD...] [--sizes 224 280 392] [--batches 1 8]
        [--threads 1 2] [--runtimes torch onnxruntime openvino] [--rounds 3]
        [--data ../shared/data/mvtec] -o deploy.jsonl
    python benchmarks/deploy_table.py --show deploy.jsonl

What is timed is `predict` on image files, from decoding to verdict, and the backbone alone on
tensors that are ready, in turn: all of one size, batch and number of threads in every round. The
ratio is the median of the rounds' own. Weights are drawn at random, which costs the same, and the
heads that a training would shape are as they start; NAGL is the shipped generalist. Sizes are
brought to the backbone's next step. IIPAD's ViT-L leaves room for one runtime a run in 24 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalyst import Detector, load_dataset
from anomalyst.data.images import read_image
from anomalyst.data.layouts import Dataset
from anomalyst.export import export_bundle
from anomalyst.export_graph import as_onnx, as_openvino
from anomalyst.features.backbones import find_backbone
from anomalyst.features.random_weights import random_weights
from anomalyst.generalist import load_generalist
from anomalyst.methods.base import find_method
from anomalyst.profiling_meter import bare_pass
from anomalyst.runtime import Runtime
from anomalyst.runtime.engines import ENGINES
from timing import seconds

SHOTS = 4
# What differs from the defaults. The two last have no public weights of their own to start from.
METHODS: dict[str, dict[str, Any]] = {
    "anomaly-dino": {},
    "patchcore": {"options": {"coreset": 0.1}},
    "inp-former": {},
    "onenip": {},
    "nagl": {},
    "winclip": {},
    "anople": {},
    "iipad": {},
}
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}


class Bare(torch.nn.Module):
    """The pass that the others are multiples of, as a graph."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.backbone = detector.engine.backbone

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = bare_pass(self.backbone, image)
        return (found,) if isinstance(found, torch.Tensor) else tuple(found)  # type: ignore[arg-type]


def make_detector(method: str, size: int, data: Dataset, folder: Path) -> Detector:
    """Return a detector of random weights that knows the data's first category."""
    settings = dict(METHODS[method])
    backbone = find_backbone(find_method(method).backbone_for(settings.pop("backbone", "auto")))
    weights = folder / f"{backbone.id}.safetensors"
    if not weights.exists():
        random_weights(backbone.id, weights)
    near = [size - size % backbone.stride, size + -size % backbone.stride]
    size = min(near, key=lambda side: (abs(side - size), side % 32))
    if method == "nagl":  # maps of a head of random weights are nearly flat
        detector = load_generalist(image_size=size, device="cpu")
    else:
        detector = Detector(
            method,
            backbone=backbone.id,
            weights=f"file:{weights}",
            image_size=size,
            device="cpu",
            **settings,
        )
    if hasattr(detector.method, "trained"):
        detector.method.trained = True
    bad = [(s, s.mask) for s in data.test if s.label == 1][:1]
    detector.enroll(data.train[0].category, data.train[:SHOTS], bad if method == "nagl" else [])
    return detector


def bare_graph(detector: Detector, side: int) -> Any:
    """Return the backbone alone, for any batch of that size."""
    batch = {0: torch.export.Dim("batch")}
    module = Bare(detector).eval()
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.zeros(5, 3, side, side),), dynamic_shapes=(batch,), strict=False
        )
        return torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"]
        ).model_proto


def contenders(
    detector: Detector, exports: dict[str, tuple[Path, Any]], threads: int, runtimes: Sequence[str]
) -> dict[str, tuple[Any, Callable[[np.ndarray], object]]]:
    """Return by runtime what predicts, and the bare pass."""
    found: dict[str, Any] = {}
    if "torch" in runtimes:
        backbone = detector.engine.backbone
        found["torch"] = (detector, lambda x: bare_pass(backbone, torch.from_numpy(x)))
    for engine, (export, bare) in exports.items():
        alone = ENGINES[engine](bare, threads)
        runtime = Runtime.load(export, threads=threads)
        found[engine] = (runtime, lambda x, alone=alone: alone.run({"image": x}))
    return found


def exported(
    detector: Detector, side: int, paths: list[Path], folder: Path, runtimes: Sequence[str]
) -> dict[str, tuple[Path, Any]]:
    """Return by engine the export, and the bare pass as a file of that engine."""
    found: dict[str, tuple[Path, Any]] = {}
    for engine in FORMATS.keys() & set(runtimes):
        format = FORMATS[engine]
        path = export_bundle(detector, folder / format, paths[:2], format=format, size=(side, side))
        bare = bare_graph(detector, side)
        found[engine] = path, (as_onnx(bare),) if format == "onnx" else as_openvino(bare)
    return found


def rows(method: str, size: int, data: Dataset, paths: list[Path], options: Any) -> Iterator[dict]:
    """Yield one row a batch, number of threads and runtime."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        detector = make_detector(method, size, data, folder)
        preprocess = detector.engine.preprocess
        tensors = np.stack([preprocess(read_image(path)) for path in paths])
        side = tensors.shape[-1]
        exports = exported(detector, side, paths, folder, options.runtimes)
        for threads in options.threads:
            torch.set_num_threads(threads)
            ready = contenders(detector, exports, threads, options.runtimes)
            for batch in options.batches:
                times = measure(ready, tensors, paths, batch, options.rounds)
                for runtime, pairs in times.items():
                    yield {
                        "method": method,
                        "backbone": detector.engine.backbone.spec.id,
                        "size": side,
                        "batch": batch,
                        "threads": threads,
                        "runtime": runtime,
                        "predict_s": statistics.median(p for p, _ in pairs),
                        "bare_s": statistics.median(b for _, b in pairs),
                        "ratio": statistics.median(p / b for p, b in pairs),
                    }


def measure(
    ready: dict[str, Any], tensors: np.ndarray, paths: list[Path], batch: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds an image of predicting and of the bare pass, a pair a round and runtime.

    A first round warms up, but for methods that take over a second an image: there it counts.
    """
    count = 3 if batch == 1 else batch
    some, inputs = paths[:count], tensors[:count]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for number in range(rounds + 1):
        for name, (judge, alone) in ready.items():
            with torch.inference_mode():
                pair = (
                    seconds(lambda judge=judge: list(judge.predict(some, batch_size=batch))),
                    seconds(
                        lambda alone=alone: [
                            alone(inputs[k : k + batch]) for k in range(0, count, batch)
                        ]
                    ),
                )
            times[name].append((pair[0] / count, pair[1] / count))
        if number + 1 == rounds and min(pairs[0][0] for pairs in times.values()) > 1:
            return times
    return {name: pairs[1:] for name, pairs in times.items()}


def show(file: Path) -> None:
    """Print the rows as one table a method: milliseconds an image and multiples."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    keys = ("method", "backbone", "size", "batch", "threads")
    print("| method | size | batch | threads | torch | ONNX Runtime | OpenVINO |")
    print("|---|---|---|---|---|---|---|")
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in found:
        cell = f"{row['predict_s'] * 1000:.0f} ms, {row['ratio']:.2f} x"
        cells.setdefault(tuple(row[key] for key in keys), {})[row["runtime"]] = cell
    for (method, _, size, batch, threads), each in cells.items():
        line = " | ".join(each.get(name, "") for name in ("torch", *FORMATS))
        print(f"| {method} | {size} | {batch} | {threads} | {line} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 280, 392])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runtimes", nargs="+", default=["torch", *FORMATS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--scratch", type=Path, help="where exports go meanwhile")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--show", type=Path)
    options = parser.parse_args(arguments)
    if options.show:
        return show(options.show)
    data = load_dataset(options.data, categories=["bottle"])
    paths = [sample.path for sample in data.test][: max(3, *options.batches)]
    for method in options.methods or METHODS:
        for size in options.sizes:
            for row in rows(method, size, data, paths, options):
                line = json.dumps(row)
                print(line, flush=True)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(line + "\n")
    return None


if __name__ == "__main__":
    main()
