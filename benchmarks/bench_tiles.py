"""Memory that judging one picture of 4000 x 3000 pixels in tiles takes beyond the idle detector.

    python benchmarks/bench_tiles.py --image-size 1344
    python benchmarks/bench_tiles.py --image-size 2996

AnomalyDINO on the packaged DINOv2-small, tiles of 448 with an overview, one reference, one thread;
pictures that this script makes. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, seed: int) -> Path:
    """Write soft random spots as PNG."""
    rough = np.random.default_rng(seed).integers(60, 200, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(rough).resize((4000, 3000), Image.Resampling.BICUBIC).save(path)
    return path


def main() -> None:
    """Enroll, forget the peak, judge, and print what that took in MB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=1344)
    parser.add_argument("--tile", type=int, default=448)
    given = parser.parse_args()
    import torch

    from anomalyst import Detector
    from anomalyst.evaluation import peak_rss_mb

    torch.set_num_threads(1)
    tiles = {"image_size": given.image_size, "tile": given.tile, "overview": True}
    detector = Detector("anomaly-dino", backbone="dinov2-small-packaged", **tiles)
    with tempfile.TemporaryDirectory() as folder:
        good, new = (picture(Path(folder) / f"{k}.png", k) for k in range(2))
        detector.enroll("part", [good])
        print(f"enrolment: peak {peak_rss_mb():.0f} MB in all")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held
        idle = peak_rss_mb()
        (found,) = detector.predict([new])
        print(
            f"map {found.score_map.values.shape}: {peak_rss_mb() - idle:.0f} MB over {idle:.0f} MB"
        )


if __name__ == "__main__":
    main()
