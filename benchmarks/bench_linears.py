"""Linear layers by oneDNN (`features/linears.py`) against torch's own, in one network's pass.

    python benchmarks/bench_linears.py [--size 280] [--rounds 7]

DINOv2-small of twelve blocks with random weights, both in turn: by threads and batch the median
milliseconds an image and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics

import timm
import torch

from anomalyst.features.linears import QuickLinears
from timing import seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=280)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    network = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=options.size
    ).eval()

    def quick(images: torch.Tensor) -> torch.Tensor:
        with QuickLinears():
            return network.forward_features(images)

    print("| threads | batch | torch's own | oneDNN | times quicker |")
    print("|---|---|---|---|---|")
    with torch.inference_mode():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for batch in (1, 8):
                images = torch.randn(batch, 3, options.size, options.size)
                network.forward_features(images), quick(images)
                pairs = [
                    (
                        seconds(lambda images=images: network.forward_features(images)),
                        seconds(lambda images=images: quick(images)),
                    )
                    for _ in range(options.rounds)
                ]
                own, fast = (statistics.median(times) / batch for times in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                cells = (f"{own * 1e3:.0f} ms", f"{fast * 1e3:.0f} ms", f"{ratio:.2f}")
                print(f"| {threads} | {batch} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
