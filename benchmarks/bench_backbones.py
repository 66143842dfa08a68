"""Frozen networks as their libraries compute them against `Backbone`, on the processor.

    python benchmarks/bench_backbones.py [--rounds 7]

Both of one depth, weights drawn at random, in turn: by threads and batch the median milliseconds an
image and the median of the rounds' ratios. `Backbone` computes linear layers with oneDNN
(`features/linears.py`), CLIP's attention written out (`features/attention.py`), and convolutions
with the channels of a pixel together and batch norms inside (`features/folding.py`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import open_clip
import timm
import torch

from anomalyst.features.extractor import Backbone
from anomalyst.features.random_weights import random_weights
from timing import seconds

Network = Callable[[torch.Tensor], object]


def dinov2() -> Network:
    return timm.create_model("vit_small_patch14_dinov2", img_size=280).eval().forward_features


def clip() -> Network:
    config = open_clip.get_model_config("ViT-B-16-plus-240")
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    return model.eval().visual


def stages(name: str, *layers: int) -> Network:
    return timm.create_model(name, features_only=True, out_indices=layers).eval()


# Our name, side in pixels, taps, and the library's network.
NETWORKS = [
    ("dinov2-small", 280, [11], dinov2),
    ("clip-vit-b-16-plus-240", 240, [11], clip),
    ("timm:resnet18", 288, [2, 3], lambda: stages("resnet18", 2, 3)),
    ("efficientnet-b4", 224, [0, 1, 2, 3], lambda: stages("efficientnet_b4", 0, 1, 2, 3)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print("| network | threads | batch | library | Backbone | times as fast |")
    print("|---|---|---|---|---|---|")
    for id, side, layers, make in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            weights = random_weights(id, Path(folder) / "weights.safetensors")
            pair: list[Network] = [make(), Backbone.load(id, layers, weights=weights)]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for batch in (1, 8):
                row = compare(pair, torch.randn(batch, 3, side, side), options.rounds)
                print(f"| {id}, {side} px | {threads} | {batch} | {row} |", flush=True)


@torch.inference_mode()
def compare(pair: list[Network], images: torch.Tensor, rounds: int) -> str:
    """Return the cells that tell the times of both."""
    times = [
        [seconds(lambda each=each: each(images)) / len(images) for each in pair]
        for _ in range(rounds + 1)
    ][1:]
    library, ours = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    return f"{library:.1f} ms | {ours:.1f} ms | {ratio:.2f}"


if __name__ == "__main__":
    main()
