"""The graph of a bundle in int8 against float32: time, order of scores, and what the gate says.

    python benchmarks/bench_int8.py BUNDLE IMAGES [--rounds 9]

IMAGES is a folder with all calibration images and defects, searched to the bottom. Ranges are
measured on 32 of the images, which both graphs then judge in turn, on two threads; the parity gate
judges all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from anomalyst.data.images import list_images
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.export import export_bundle
from anomalyst.export_graph import as_onnx, as_openvino, references_of, trace
from anomalyst.export_int8 import quantized
from anomalyst.inference import read_item
from anomalyst.runtime.engines import ENGINES
from timing import seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    every = list_images(options.images, recursive=True)
    detector = Detector.load(options.bundle, device="cpu")
    read = [read_item(path, "image", detector.engine.preprocess).tensor for path in every]
    usual = Counter(each.shape for each in read if each is not None).most_common(1)[0][0]
    same = [each for each in read if each is not None and each.shape == usual]
    images = np.stack(same[:: max(len(same) // 32, 1)][:32])
    known = references_of(detector, detector.categories, usual[1:])
    fed = {name: each.numpy() for name, each in next(iter(known.values())).items()}
    plain = trace(detector, known, usual[1:])
    quick = quantized(plain, [{"image": image[None], **fed} for image in images])
    for name in ENGINES:
        pair = [
            ENGINES[name]((as_onnx(graph),) if name == "onnxruntime" else as_openvino(graph), 2)
            for graph in (plain, quick)
        ]
        scores = [
            [float(each.run({"image": image[None], **fed})["score"][0]) for image in images]
            for each in pair
        ]
        for batch in (1, 8):
            feeds = {"image": images[:batch], **fed}
            times = [
                [seconds(lambda e=e, feeds=feeds: e.run(feeds)) / batch for e in pair]
                for _ in range(options.rounds + 1)
            ][1:]
            own, int8 = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
            ratio = statistics.median(a / b for a, b in times)
            print(f"{name}, batch {batch}: {own:.1f} ms, int8 {int8:.1f} ms an image: {ratio:.2f}")
        print(f"{name}: Spearman {spearmanr(*scores).statistic:.4f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_bundle(options.bundle, Path(folder) / "int8", every, int8=True)
            print("the gate: passed")
        except InputError as error:
            print("the gate:", error)


if __name__ == "__main__":
    main()
