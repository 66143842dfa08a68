"""An int8 export against the float32 one of the same bundle: size, time, order of scores.

    python benchmarks/bench_int8.py BUNDLE IMAGES [--rounds 5]

IMAGES is a folder with all calibration images and defects, searched to the bottom. Both exports of
each format judge the same 16 images in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from anomalyst.data.images import list_images
from anomalyst.errors import InputError
from anomalyst.export import export_bundle
from anomalyst.runtime import Runtime
from timing import seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    every = list_images(options.images, recursive=True)
    some = every[:: max(len(every) // 16, 1)][:16]
    with tempfile.TemporaryDirectory() as name:
        for format in ("onnx", "openvino"):
            runtimes = []
            for int8 in (False, True):
                folder = Path(name) / f"{format}-{int8}"
                try:
                    export_bundle(options.bundle, folder, every, format=format, int8=int8)
                except InputError as error:
                    print(format, "int8" if int8 else "float32", "refused:", error)
                    break
                parity = json.loads((folder / "parity.json").read_text())
                size = sum(path.stat().st_size for path in folder.glob("model.*")) / 1e6
                print(format, "int8" if int8 else "float32", f"{size:.0f} MB", parity, flush=True)
                runtimes.append(Runtime.load(folder))
            if len(runtimes) == 2:
                pairs = [
                    [seconds(lambda r=r: list(r.predict(some))) / len(some) for r in runtimes]
                    for _ in range(options.rounds + 1)
                ][1:]
                plain, quick = (statistics.median(times) for times in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"{format}: float32 {plain:.4f} s, int8 {quick:.4f} s an image: {ratio:.2f}")


if __name__ == "__main__":
    main()
