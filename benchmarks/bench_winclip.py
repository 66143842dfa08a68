"""WinCLIP's windows, exact and shared, against a loop over them and one plain pass.

    python benchmarks/bench_winclip.py [--batches 1 8] [--rounds 3]

All on the whole architecture ViT-B-16-plus-240 at 240 pixels with random weights: times do not
depend on the weights, and nothing is said of accuracy. Each round times all four in turn; reported
is the median over the rounds of the ratio to the plain pass of the same round. The loop passes one
window after the other, of all images of the batch. GMAC are half the flops that torch counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from anomalyst.features.backbones import find_backbone
from anomalyst.features.clip import run_blocks
from anomalyst.methods.prompt_sentences import ABNORMAL_STATES, NORMAL_STATES, sentences
from anomalyst.methods.winclip import SIDES, SharedWinClipTower, WinClipTower, window_patches
from random_clip import gmac, plain_pass, random_state, ready
from timing import seconds

Work = Callable[[Tensor], object]


def make_towers() -> tuple[WinClipTower, SharedWinClipTower]:
    """Return both towers, on the same random weights."""
    spec = find_backbone("clip-vit-b-16-plus-240")
    state = random_state(spec.id)
    exact, shared = WinClipTower(spec, (10,)), SharedWinClipTower(spec, (10,))
    ready(exact, state)
    ready(shared, state)
    return exact, shared


def loop(tower: WinClipTower, images: Tensor) -> list[Tensor]:
    """Pass the image, then one window after the other."""
    tokens, grid = tower.embed(images)
    found = [tower.project(run_blocks(tower.blocks, tokens)[:, 0])]
    for side in SIDES:
        for patches in window_patches(grid, side).flatten(0, 1):
            seen = torch.cat([tokens[:, :1], tokens[:, 1 + patches]], dim=1)
            found.append(tower.project(run_blocks(tower.blocks, seen)[:, 0]))
    return found


@torch.inference_mode()
def measure(works: dict[str, Work], images: Tensor, rounds: int) -> dict[str, object]:
    works["plain"](images)
    times = [
        {name: seconds(lambda w=w: w(images)) for name, w in works.items()} for _ in range(rounds)
    ]
    ratios = {
        name: round(statistics.median(row[name] / row["plain"] for row in times), 2)
        for name in works
        if name != "plain"
    }
    took = statistics.median(row["plain"] for row in times)
    return {"batch": len(images), "plain_s": round(took, 3), "times_plain": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    exact, shared = make_towers()
    works: dict[str, Work] = {
        "plain": lambda images: plain_pass(exact, images),
        "exact": exact,
        "shared": shared,
        "loop": lambda images: loop(exact, images),
    }
    image = torch.randn(1, 3, 240, 240)
    texts = sentences([*NORMAL_STATES, *ABNORMAL_STATES], "metal nut")
    took = seconds(lambda: exact.text.features(texts))
    print(
        json.dumps(
            {
                "weights": "random weights",
                "architecture": "ViT-B-16-plus-240, 240 x 240 pixels",
                "threads": torch.get_num_threads(),
                "gmac_an_image": {
                    name: round(gmac(partial(work, image)), 1) for name, work in works.items()
                },
                "sentences": len(texts),
                "sentences_s": round(took, 1),
            }
        )
    )
    for batch in options.batches:
        images = torch.randn(batch, 3, 240, 240)
        print(json.dumps(measure(works, images, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
