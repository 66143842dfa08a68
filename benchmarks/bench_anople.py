"""AnoPLe's cost on full-size towers with random weights, against a plain pass of the same tower.

    python benchmarks/bench_anople.py [--backbone clip-vit-b-16-plus-240] [--rounds 5] [--images 1]

Judging an image (prompted pass, decoder, memory of one image, fusion) and a plain pass of the image
tower run in turn; the ratio of the medians is the result. A training step takes so many images in
ten views each. Nothing here depends on what the weights are.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

from anomalyst.features.backbones import find_backbone
from anomalyst.features.clip import ClipTower
from anomalyst.methods.anople import AnoPle, AnoPleOptions
from anomalyst.methods.anople_views import VIEWS
from random_clip import gmac, plain_pass, random_state, ready
from timing import matrix_rate, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="clip-vit-b-16-plus-240")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1)
    options = parser.parse_args()
    spec = find_backbone(options.backbone)
    tower = ready(ClipTower(spec, AnoPle.default_layers(spec)), random_state(spec.id))
    method = AnoPle(AnoPleOptions(), spec, tower.layers, seed=0)
    method.bind(tower)
    side = spec.image_size
    print(json.dumps({"weights": "random", "threads": torch.get_num_threads(), "id": spec.id}))
    for batch in (1, 8):
        print(json.dumps(judging(method, torch.randn(batch, 3, side, side), options.rounds)))
    print(json.dumps(training(method, options.images, side, spec.stride)))


def judging(method: AnoPle, images: torch.Tensor, rounds: int) -> dict[str, object]:
    """Return times and flops of judging a batch, against a plain pass."""
    tower = method.network.requires_grad_(False).clip  # torch's counter follows gradients
    method.enroll("bottle", [method.encode([images[:1]])])

    def plain() -> None:
        plain_pass(tower, images)

    def judge() -> None:
        method.score(method.encode([images]), "bottle")

    judge()
    times = [[seconds(plain), seconds(judge)] for _ in range(rounds)]
    floor, ours = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "batch": len(images),
        "plain_s": round(floor, 3),
        "anople_s": round(ours, 3),
        "ratio": round(ours / floor, 2),
        "gmac_an_image": [round(gmac(work) / len(images), 1) for work in (plain, judge)],
    }


def training(method: AnoPle, images: int, side: int, patch: int) -> dict[str, object]:
    """Return time, flops and memory of one training step."""
    network = method.network.requires_grad_(True)
    network.train()
    network.words = ["bottle"]
    shape = (images, VIEWS)
    masks = torch.zeros(*shape, side, side)
    masks[..., :40, :40] = 1
    part = [
        torch.randn(*shape, 3, side, side),
        torch.randn(*shape, 3, side, side),
        masks,
        torch.zeros(*shape, side // patch, side // patch),
        torch.zeros(images, dtype=torch.long),
    ]

    def step() -> None:
        network(part)["loss"].backward()

    counter = FlopCounterMode(display=False)
    with counter:
        step()
    took = seconds(step)
    rate = matrix_rate(2048, 896, 3584)
    return {
        "images": images,
        "views": 2 * VIEWS * images,
        "step_s": round(took, 1),
        "gflop": round(counter.get_total_flops() / 1e9),
        "over_floor": round(took / (counter.get_total_flops() / rate), 2),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "trained_values": sum(p.numel() for p in network.parameters()),
    }


if __name__ == "__main__":
    main()
