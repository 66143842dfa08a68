"""IIPAD on ViT-L/14 against one plain forward pass of its image tower, and its training step.

    python benchmarks/bench_iipad.py [--rounds 3] [--qformer] [--images 4]

Random weights: times, memory and counted products are those of real ones, results are not. Plain
pass and whole judgement of the same images run in turn; the ratio of the medians is the result.
``--qformer`` adds BLIP-Diffusion's Q-Former at its full size. Products are torch's own count of one
image, in multiply-adds; attention is counted too.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from torch import Tensor

from anomalyst.evaluation import peak_rss_mb
from anomalyst.features.backbones import find_backbone
from anomalyst.features.object_tokens import QFormerTokens
from anomalyst.features.qformer import QFormer
from anomalyst.methods.iipad import Iipad, IipadOptions
from anomalyst.methods.iipad_sentences import guides
from anomalyst.methods.iipad_tower import IipadTower
from random_clip import gmac, plain_pass, random_state, ready
from timing import seconds

BATCHES = (1, 8)
# The hub's config, in what differs from its library's defaults.
QFORMER = {
    "num_query_tokens": 16,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "qformer_config": {
        "vocab_size": 30523,
        "encoder_hidden_size": 1024,
        "cross_attention_frequency": 1,
    },
}


def random_tower(name: str) -> IipadTower:
    spec = find_backbone(name)
    tower = IipadTower(spec, Iipad.default_layers(spec))
    ready(tower, random_state(spec.id))
    return tower


def with_qformer(tower: IipadTower) -> None:
    tower.qformer = QFormer.from_config(QFORMER)
    tower.objects = QFormerTokens(tower.qformer)


def judge(method: Iipad, tower: IipadTower, images: Tensor) -> Tensor:
    return method.score(method.encode(tower(images)), None)[1]


def training_step(method: Iipad, maps: list[Tensor]) -> None:
    optimizer = method.options.optimizer(method.network.parameters())
    method.network.train()
    optimizer.zero_grad()
    method.network(maps)["loss"].backward()
    optimizer.step()
    method.network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4, help="in the memory, all of one category")
    parser.add_argument("--backbone", default="clip-vit-l-14")
    parser.add_argument("--qformer", action="store_true")
    given = parser.parse_args()
    tower = random_tower(given.backbone)
    if given.qformer:
        with_qformer(tower)
    method = Iipad(IipadOptions(), tower.spec, tower.layers, 0)
    method.bind(tower)
    method.network.guides = guides(tower.text, "mvtec", False)
    generator = torch.Generator().manual_seed(1)
    side = tower.spec.image_size
    found: dict[str, object] = {
        "weights": "random",
        "backbone": given.backbone,
        "object_tokens": "qformer" if given.qformer else "heads",
        "threads": torch.get_num_threads(),
        "memory_images": given.images,
        "loaded_mb": round(peak_rss_mb()),
    }
    with torch.inference_mode():
        stored = torch.randn(given.images, 3, side, side, generator=generator)
        maps = tower(stored)
        method.enroll("part", [method.encode(maps)])
    with torch.inference_mode():
        for batch in BATCHES:
            images = torch.randn(batch, 3, side, side, generator=generator)
            works = [
                lambda images=images: plain_pass(tower, images),
                lambda images=images: judge(method, tower, images),
            ]
            for work in works:
                work()
            times = [[seconds(work) for work in works] for _ in range(given.rounds)]
            base, whole = (statistics.median(column) / batch for column in zip(*times, strict=True))
            found[f"batch_{batch}"] = {
                "plain_s_an_image": round(base, 3),
                "iipad_s_an_image": round(whole, 3),
                "ratio": round(whole / base, 2),
            }
            if batch == 1:
                counted = [gmac(work) for work in works]
                found["gmac_plain"], found["gmac_iipad"] = (round(x, 1) for x in counted)
        found["predict_peak_mb"] = round(peak_rss_mb())
    trained = [each.clone() for each in maps]
    for batch in (1, given.images):
        part = [each[:batch] for each in trained]
        training_step(method, part)
        if batch == 1:
            counted = gmac(lambda part=part: training_step(method, part))
            found["training_step_of_1_gflop"] = round(2 * counted, 1)
        taken = [seconds(lambda part=part: training_step(method, part)) for _ in range(5)]
        found[f"training_step_of_{batch}_s"] = round(statistics.median(taken), 3)
    found["generator_parameters_m"] = round(
        sum(p.numel() for p in method.network.parameters()) / 1e6, 2
    )
    found["peak_mb"] = round(peak_rss_mb())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
