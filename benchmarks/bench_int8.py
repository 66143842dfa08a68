"""A bundle's export in int8 against its export in float32: time, order of scores, verdicts.

    python benchmarks/bench_int8.py BUNDLE IMAGES... [--format onnx openvino] [--rounds 9]

IMAGES are folders with all calibration images and defects, searched to the bottom; the parity gate
judges all of them. What is timed is `predict` on eight of the files, on two threads, in turn.
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
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--format", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    every = [path for folder in options.images for path in list_images(folder, recursive=True)]
    for format in options.format:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, format, every, Path(folder))


def compare(options: argparse.Namespace, format: str, every: list[Path], folder: Path) -> None:
    """Print what the gate says of an int8 export, and its times."""
    try:
        exports = [
            export_bundle(
                options.bundle, folder / str(int8), every, format=format, int8=int8, tell=print
            )
            for int8 in (True, False)
        ]
    except InputError as error:
        return print(f"{format}: {error}")
    parity = json.loads((exports[0] / "parity.json").read_text())
    print(f"{format}:", {key: parity[key] for key in ("images", "int8_layers", "spearman")})
    int8, plain = (Runtime.load(export, threads=2) for export in exports)
    for batch in (1, 8):
        times = [
            [
                seconds(lambda r=r, b=batch: list(r.predict(every[:8], batch_size=b))) / 8
                for r in (plain, int8)
            ]
            for _ in range(options.rounds + 1)
        ][1:]
        before, after = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        print(
            f"{format}, batch {batch}: {before:.1f} ms, int8 {after:.1f} ms an image: {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
