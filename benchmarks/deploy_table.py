"""Every method in torch, ONNX Runtime and OpenVINO, each against its bare backbone there.

    python benchmarks/deploy_table.py [METHOD...] [--sizes 224 280 392] [--batches 1 8]
        [--threads 1 2] [--runtimes torch onnxruntime openvino] [--rounds 3]
        [--data ../shared/data/mvtec] -o deploy.jsonl
    python benchmarks/deploy_table.py --show deploy.jsonl
    python benchmarks/deploy_table.py [METHOD...] [--sizes 224 280 392] --arithmetic

What is timed is `predict` on image files, from decoding to verdict, and the backbone alone on
tensors that are ready, in turn in every round; the ratio is the median of the rounds' own. Where
the method needs the backbone's first blocks alone, the bare backbone stops there too; `whole` is
the pass of all its blocks. Weights are drawn at random, which costs the same, and the heads that a
training would shape are as they start; NAGL is the shipped generalist. Sizes are brought to the
backbone's next step. IIPAD's ViT-L leaves room for one runtime a run in 24 GiB. `--arithmetic`
counts multiply-adds in place of time: what the multiples would be if all of them took equally long
and nothing else took any.
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
from anomalyst.features.clip import ClipTower
from anomalyst.features.extractor import Backbone
from anomalyst.features.random_weights import random_weights
from anomalyst.generalist import load_generalist
from anomalyst.methods.base import find_method
from anomalyst.profiling_meter import bare_pass, count_flops
from anomalyst.profiling_stages import held_still
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
    """A pass that the others are multiples of, as a graph."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

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


def bare_backbones(detector: Detector, folder: Path) -> dict[str, Backbone]:
    """Return the backbone, and with all its blocks where the method stops before the last."""
    backbone = detector.engine.backbone
    found = {"bare": backbone}
    # The packaged network ends with the last block that its methods need.
    spec = find_backbone(backbone.spec.id.removesuffix("-packaged"))
    if not isinstance(backbone.tower, ClipTower) and max(backbone.layers) < spec.taps - 1:
        weights = random_weights(spec.id, folder / "whole.safetensors")
        found["whole"] = Backbone.load(spec.id, [spec.taps - 1], weights=weights)
    return found


def bare_graph(backbone: Backbone, side: int) -> Any:
    """Return a backbone alone, for any batch of that size."""
    batch = {0: torch.export.Dim("batch")}
    module = Bare(backbone).eval()
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.zeros(5, 3, side, side),), dynamic_shapes=(batch,), strict=False
        )
        return torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"]
        ).model_proto


Work = Callable[[np.ndarray], object]


def in_torch(backbone: Backbone) -> Work:
    return lambda images: bare_pass(backbone, torch.from_numpy(images))


def in_engine(name: str, files: Any, threads: int) -> Work:
    engine = ENGINES[name](files, threads)
    return lambda images: engine.run({"image": images})


def contenders(
    runtime: str,
    detector: Detector,
    bare: dict[str, Backbone],
    paths: list[Path],
    side: int,
    folder: Path,
) -> Callable[[int], tuple[Any, dict[str, Work]]]:
    """Return what gives, for a number of threads, what predicts and the bare passes by name."""
    if runtime == "torch":
        return lambda _: (detector, {name: in_torch(each) for name, each in bare.items()})
    format = FORMATS[runtime]
    export = export_bundle(detector, folder / format, paths[:2], format=format, size=(side, side))
    graphs = {name: bare_graph(each, side) for name, each in bare.items()}
    files = {n: (as_onnx(g),) if format == "onnx" else as_openvino(g) for n, g in graphs.items()}

    def load(threads: int) -> tuple[Any, dict[str, Work]]:
        passes = {name: in_engine(runtime, each, threads) for name, each in files.items()}
        return Runtime.load(export, threads=threads), passes

    return load


def rows(method: str, size: int, data: Dataset, paths: list[Path], options: Any) -> Iterator[dict]:
    """Yield one row a runtime, number of threads and batch.

    One runtime is loaded at a time: the idle threads of another would spin beside it.
    """
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        detector = make_detector(method, size, data, folder)
        preprocess = detector.engine.preprocess
        tensors = np.stack([preprocess(read_image(path)) for path in paths])
        side = tensors.shape[-1]
        bare = bare_backbones(detector, folder)
        for runtime in options.runtimes:
            load = contenders(runtime, detector, bare, paths, side, folder)
            for threads in options.threads:
                torch.set_num_threads(threads)
                judge, passes = load(threads)
                for batch in options.batches:
                    rounds = measure(judge, passes, tensors, paths, batch, options.rounds)
                    yield {
                        "method": method,
                        "backbone": detector.engine.backbone.spec.id,
                        "size": side,
                        "batch": batch,
                        "threads": threads,
                        "runtime": runtime,
                        **summary(rounds),
                    }
                del judge, passes


def measure(
    judge: Any,
    passes: dict[str, Work],
    tensors: np.ndarray,
    paths: list[Path],
    batch: int,
    rounds: int,
) -> list[dict[str, float]]:
    """Return seconds an image of predicting and of the bare passes, by round.

    A first round warms up, but for methods that take over a second an image: there it counts.
    """
    count = 3 if batch == 1 else batch
    parts = [tensors[k : k + batch] for k in range(0, count, batch)]
    works: dict[str, Callable[[], object]] = {
        "predict": lambda: list(judge.predict(paths[:count], batch_size=batch))
    }
    for name, alone in passes.items():
        works[name] = lambda alone=alone: [alone(part) for part in parts]
    times: list[dict[str, float]] = []
    while len(times) <= rounds:
        times.append({name: seconds(work) / count for name, work in works.items()})
        if len(times) == rounds and times[0]["predict"] > 1:
            return times
    return times[1:]


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return medians: seconds of each, and predicting as multiples of the bare passes."""
    found = {f"{name}_s": statistics.median(each[name] for each in rounds) for name in rounds[0]}
    for name in rounds[0].keys() - {"predict"}:
        ratio = statistics.median(each["predict"] / each[name] for each in rounds)
        found["ratio" if name == "bare" else f"{name}_ratio"] = ratio
    return found


def count(method: str, size: int, data: Dataset, path: Path) -> str:
    """Return the cell of one image's multiply-adds, as multiples of the bare backbones'."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        detector = make_detector(method, size, data, folder)
        images = torch.from_numpy(detector.engine.preprocess(read_image(path)))[None]
        bare = bare_backbones(detector, folder)
        list(detector.predict([path]))  # what is computed once has been by now
        with held_still(detector.method):
            ours = count_flops(lambda: list(detector.predict([path])))
        alone = [count_flops(lambda each=each: bare_pass(each, images)) for each in bare.values()]
    first, *whole = (f"{ours / each:.2f}" for each in alone)
    return f"{first} ({whole[0]})" if whole else first


def show(file: Path) -> None:
    """Print the rows as one table: milliseconds an image, multiples (of all blocks)."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    keys = ("method", "backbone", "size", "batch", "threads")
    print("| method | size | batch | threads | torch | ONNX Runtime | OpenVINO |")
    print("|---|---|---|---|---|---|---|")
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in found:
        cell = f"{row['predict_s'] * 1000:.0f} ms, {row['ratio']:.2f} x"
        if "whole_ratio" in row:
            cell += f" ({row['whole_ratio']:.2f})"
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
    parser.add_argument("--arithmetic", action="store_true")
    options = parser.parse_args(arguments)
    if options.show:
        return show(options.show)
    data = load_dataset(options.data, categories=["bottle"])
    paths = [sample.path for sample in data.test][: max(3, *options.batches)]
    methods = options.methods or list(METHODS)
    if options.arithmetic:
        for method in methods:
            cells = [count(method, size, data, paths[0]) for size in options.sizes]
            print(f"| {method} | {' | '.join(cells)} |", flush=True)
        return None
    for method in methods:
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
