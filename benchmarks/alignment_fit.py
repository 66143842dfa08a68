"""How well a golden sample's patch fits good images, defective ones and other products.

    python benchmarks/alignment_fit.py ../shared/data/mvtec/* ../shared/data/source/*

The patch is the middle half of each product's first good image, looked for within a twentieth of
the longer side. Lowest, median and highest correlation of up to 12 good and 12 defective images,
and of three good ones of every other product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anomalyst.data.alignment import find_shift, grey
from anomalyst.data.images import list_images, read_image


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Return up to so many of them, evenly spread."""
    count = min(count, len(paths))
    return [paths[k * len(paths) // count] for k in range(count)]


def good_of(root: Path) -> list[Path]:
    """Return a product's good images, of training and test."""
    return [p for p in list_images(root, recursive=True) if "good" in p.parts]


def bad_of(root: Path) -> list[Path]:
    """Return a product's defective images."""
    return [p for p in list_images(root / "test", recursive=True) if "good" not in p.parts]


def main() -> None:
    """Print one line a product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("products", type=Path, nargs="+")
    roots = [root for root in parser.parse_args().products if root.is_dir()]
    spent: list[float] = []
    for root in roots:
        first, *good = spread(good_of(root), 13)
        golden = grey(read_image(first))
        height, width = golden.shape
        place, search = (width // 4, height // 4), max(height, width) // 20
        template = np.ascontiguousarray(
            golden[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        )
        others = [p for other in roots if other != root for p in spread(good_of(other), 3)]
        line = []
        for paths in (good, spread(bad_of(root), 12), others):
            fits = []
            for path in paths:
                began = time.perf_counter()
                fit = find_shift(read_image(path), template, place, search)[2]
                spent.append(time.perf_counter() - began)
                if fit > -1:  # else the patch does not lie on that image
                    fits.append(fit)
            line.append(f"{min(fits):.2f} {np.median(fits):.2f} {max(fits):.2f} ({len(fits)})")
        print(f"{root.name}: good {line[0]}, defective {line[1]}, others {line[2]}", flush=True)
    print(f"{1000 * np.median(spent):.0f} ms an image, decoding included (median)")


if __name__ == "__main__":
    main()
