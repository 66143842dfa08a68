"""`predict` on image files, here and in anomalib: the same images, size, backbone and machine.

    pip install anomalib==2.7.0        # into an environment of its own that has anomalyst too
    python benchmarks/against_anomalib.py [--methods anomaly-dino patchcore inp-former]
        [--size 280] [--images 24] [--rounds 3] [--data ../shared/data/mvtec]

All are timed in turn in every round: anomalib's `Engine.predict` without its visualiser, our
detector in torch, and its two exports. anomalib's download of weights is patched out: both sides
draw theirs at random, which costs the same. The bare backbone is ours on ready tensors, one image
at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from anomalyst import Detector, load_dataset
from anomalyst.data.images import read_image
from anomalyst.data.layouts import Dataset
from anomalyst.export import export_bundle
from anomalyst.features.backbones import find_backbone
from anomalyst.features.random_weights import random_weights
from anomalyst.profiling_meter import bare_pass
from anomalyst.runtime import Runtime
from deploy_table import FORMATS
from timing import seconds

SHOTS = 8
# Each with the backbone and layers of the other side.
OURS: dict[str, dict[str, Any]] = {
    "anomaly-dino": {"backbone": "dinov2-small", "layers": [11]},
    "patchcore": {"backbone": "timm:resnet18", "options": {"coreset": 0.1}},
    "inp-former": {"backbone": "dinov2-small"},
}


def make_theirs(method: str, size: int) -> Any:
    """Return anomalib's model of that method, at that size and without its pictures."""
    from anomalib.models import AnomalyDINO, InpFormer, Patchcore

    side = (size, size)
    if method == "anomaly-dino":
        ready = AnomalyDINO.configure_pre_processor(side)
        return AnomalyDINO(pre_processor=ready, visualizer=False)
    if method == "patchcore":
        ready = Patchcore.configure_pre_processor(side)
        return Patchcore(
            backbone="resnet18",
            layers=["layer2", "layer3"],
            coreset_sampling_ratio=0.1,
            pre_processor=ready,
            visualizer=False,
        )
    ready = InpFormer.configure_pre_processor(side, size)
    return InpFormer(encoder_name="vit_small_patch14_dinov2", pre_processor=ready, visualizer=False)


def anomalib_predict(
    method: str, size: int, good: Path, images: Path, folder: Path
) -> Callable[[], object]:
    """Fit anomalib's model on a few images and return its prediction of a folder."""
    from anomalib.data import Folder
    from anomalib.engine import Engine

    create = timm.create_model
    timm.create_model = lambda *args, **more: create(*args, **{**more, "pretrained": False})
    try:
        model = make_theirs(method, size)
    finally:
        timm.create_model = create
    data = Folder(
        name="parts",
        root=good.parent,
        normal_dir=good.name,
        train_batch_size=SHOTS,
        eval_batch_size=1,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="from_train",
    )
    limits = {"max_steps": 1} if method == "inp-former" else {"max_epochs": 1}
    engine = Engine(
        default_root_dir=folder, accelerator="cpu", logger=False, barebones=False, **limits
    )
    engine.fit(model, datamodule=data)
    return partial(engine.predict, model=model, data_path=images)


def make_ours(method: str, size: int, data: Dataset, folder: Path) -> Detector:
    """Return our detector with as many references."""
    settings = dict(OURS[method])
    weights = random_weights(settings["backbone"], folder / "weights.safetensors")
    detector = Detector(method, weights=weights, image_size=size, device="cpu", **settings)
    if method == "inp-former":
        detector.method.trained = True  # how long makes no difference to the time
    else:
        detector.enroll("bottle", data.train[:SHOTS])
    return detector


def compare(method: str, data: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Return median seconds an image of each, and how many times as long anomalib takes."""
    step = find_backbone(OURS[method]["backbone"]).stride
    size = -(-options.size // step) * step
    paths = [sample.path for sample in data.test][: options.images]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good, images = folder / "good", folder / "images"
        for place, files in ((good, [s.path for s in data.train[:SHOTS]]), (images, paths)):
            place.mkdir()
            for number, path in enumerate(files):  # names repeat from defect to defect
                (place / f"{number:03}{path.suffix}").symlink_to(path.resolve())
        files = sorted(images.iterdir())
        works = {"anomalib": anomalib_predict(method, size, good, images, folder / "a")}
        detector = make_ours(method, size, data, folder)
        works["torch"] = lambda: list(detector.predict(files))
        for engine, format in FORMATS.items():
            export_bundle(detector, folder / format, files[:2], format=format)
            runtime = Runtime.load(folder / format)
            works[engine] = lambda runtime=runtime: list(runtime.predict(files))
        tensors = np.stack([detector.engine.preprocess(read_image(path)) for path in files])
        works["bare backbone, torch"] = lambda: bare(detector, tensors)
        times: dict[str, list[float]] = {key: [] for key in works}
        for number in range(options.rounds + 1):
            for key, work in works.items():
                took = seconds(work) / len(files)
                if number:
                    times[key].append(took)
    theirs = times.pop("anomalib")
    return {
        "method": method,
        "size": size,
        "images": len(files),
        "anomalib_s": round(statistics.median(theirs), 4),
        **{f"{key}_s": round(statistics.median(found), 4) for key, found in times.items()},
        **{
            f"anomalib / {key}": round(
                statistics.median(a / b for a, b in zip(theirs, found, strict=True)), 2
            )
            for key, found in times.items()
        },
    }


@torch.inference_mode()
def bare(detector: Detector, tensors: np.ndarray) -> None:
    for each in torch.from_numpy(tensors):
        bare_pass(detector.engine.backbone, each[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(OURS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--size", type=int, default=280)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["ANOMALYST_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data = load_dataset(options.data, categories=["bottle"])
    for method in options.methods:
        print(json.dumps(compare(method, data, options)), flush=True)


if __name__ == "__main__":
    main()
