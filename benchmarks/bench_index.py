"""Exact search in a bank of patches against indexes of faiss: time, recall, error, size, metrics.

    python benchmarks/bench_index.py search     exact, IVF and HNSW, banks of 10,000 to 200,000
    python benchmarks/bench_index.py accuracy   a whole category judged with and without an index
    python benchmarks/bench_index.py blocks     exact search by the size of its blocks
    python benchmarks/bench_index.py graph      the same in a graph on ONNX Runtime

Real patches: MVTec AD's screw, packaged DINOv2-small (block 7), 280 px, 400 patches an image of 384
numbers. Banks are the patches of the first training images; of more than there are (128,000), then
of the same images turned by half a circle. Two threads; all is timed in turn, image by image.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import faiss
import numpy as np
import torch
from torch import Tensor

from anomalyst import Detector, evaluate, load_dataset
from anomalyst.features.cache import FeatureCache
from anomalyst.inference import read_item
from anomalyst.methods import bank_search, memory_bank
from anomalyst.methods.bank_search import InvertedLists
from anomalyst.methods.memory_bank import nearest_cosine, resize_like, to_patches, top_mean
from anomalyst.methods.views import turned
from anomalyst.types import Sample
from timing import seconds

CATEGORY, WIDTH, PATCHES = "screw", 384, 400
SIZES = (10_000, 25_000, 50_000, 100_000, 200_000)
Find = Callable[[Tensor], Tensor]


def make(cache: Path, **options: object) -> Detector:
    return Detector(
        "anomaly-dino",
        backbone="dinov2-small-packaged",
        image_size=280,
        options=options,
        feature_cache=FeatureCache(cache),
    )


def patches_of(detector: Detector, samples: list[Sample], view: int) -> Tensor:
    """Return unit-length patches ``[n * 400, 384]`` of images, as AnomalyDINO keeps them."""
    found = []
    for sample in samples:
        item = read_item(sample, str(sample.path), detector.engine.preprocess)
        maps = resize_like(detector.engine.features([item], turned(2)[view]))
        found.append(torch.nn.functional.normalize(to_patches(maps), dim=1))
    return torch.cat(found)


def all_patches(given: argparse.Namespace, most: int) -> tuple[Tensor, Tensor]:
    """Return a bank of ``most`` rows and the queries of every tenth test image."""
    data, detector = load_dataset(given.data, categories=[CATEGORY]), make(given.cache)
    images = math.ceil(most / PATCHES)
    bank = patches_of(detector, data.train[:images], 0)
    if len(bank) < most:
        again = data.train[: images - len(data.train)]
        bank = torch.cat([bank, patches_of(detector, again, 1)])
    return bank[:most], patches_of(detector, data.test[::10], 0)


# ---- search -------------------------------------------------------------------------------------


def indexes(bank: Tensor) -> dict[str, Find]:
    """Return what finds the row of each query, by name; building it is timed and told."""
    rows, found = bank.numpy(), dict[str, Find]()
    began = time.perf_counter()
    lists = InvertedLists.of(bank, "cosine", 0)
    ivf = lists._index
    took, size = time.perf_counter() - began, lists.centres.nbytes + lists.list_of.nbytes
    print(f"  IVF: {len(lists.centres)} lists, built in {took:.1f} s, {size / 1e6:.1f} MB more")
    for probes in (8, 16, 32):
        found[f"IVF {probes}"] = searcher(ivf, "nprobe", probes)
    hnsw = faiss.IndexHNSWFlat(WIDTH, 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 100
    took = seconds(lambda: hnsw.add(rows))
    size = len(faiss.serialize_index(hnsw)) - bank.nbytes
    print(f"  HNSW: 32 links, built in {took:.1f} s, {size / 1e6:.1f} MB more")
    for depth in (32, 128):
        found[f"HNSW {depth}"] = searcher(hnsw, "efSearch", depth, hnsw.hnsw)
    return found


def searcher(index: object, name: str, value: int, holder: object | None = None) -> Find:
    def find(queries: Tensor) -> Tensor:
        setattr(holder or index, name, value)
        return torch.from_numpy(index.search(queries.numpy(), 1)[1][:, 0])

    return find


def compare_searches(given: argparse.Namespace) -> None:
    """Print a row for each bank and search: time an image, recall, errors of distance and score."""
    whole, queries = all_patches(given, max(given.sizes))
    images = queries.split(PATCHES)
    for size in given.sizes:
        bank = whole[:size].contiguous()
        print(f"{size} rows, {bank.nbytes / 1e6:.0f} MB")
        ways = indexes(bank)
        exact, taken = [], {name: [] for name in ("exact", *ways)}
        rows: dict[str, list[Tensor]] = {name: [] for name in ways}
        for image in images:
            began = time.perf_counter()
            exact.append(nearest_cosine(image, bank))
            taken["exact"].append(time.perf_counter() - began)
            for name, find in ways.items():
                began = time.perf_counter()
                rows[name].append(find(image))
                taken[name].append(time.perf_counter() - began)
        print(f"  exact {1e3 * median(taken['exact']):.1f} ms an image")
        for name in ways:
            pairs = zip(taken["exact"], taken[name], strict=True)
            quicker = median(slow / quick for slow, quick in pairs)
            print(f"  {name:9} {quicker:5.1f} x quicker,", errors(images, bank, exact, rows[name]))


def errors(
    images: tuple[Tensor, ...], bank: Tensor, exact: list[tuple[Tensor, Tensor]], rows: list[Tensor]
) -> str:
    recall, distance, score = [], [], []
    for image, (true, row), found in zip(images, exact, rows, strict=True):
        near = 1 - (image * bank[found]).sum(dim=1)
        recall.append(float((found == row).float().mean()))
        distance.append(near - true)
        first, second = (top_mean(each[None, None], 0.01) for each in (near, true))
        score.append(float((first - second).abs()))
    gaps = torch.cat(distance)
    return (
        f"recall@1 {np.mean(recall):.5f}, distance {float(gaps.mean()):.1e} too large in the mean, "
        f"{float(gaps.max()):.4f} at most; image score {max(score):.4f} at most"
    )


# ---- accuracy -----------------------------------------------------------------------------------


def compare_metrics(given: argparse.Namespace) -> None:
    """Print the metrics of the category with all its training images as references."""
    data, found = load_dataset(given.data, categories=[CATEGORY]), {}
    for search in ("exact", "approximate"):
        detector = make(given.cache, search=search)
        detector.fit(data.train, calibration=0.2)
        judged = evaluate(detector, data)
        row = judged.metrics["categories"][CATEGORY]
        rows = len(detector.method.tensors()[CATEGORY])
        predicted = list(detector.predict(data.test))
        maps = np.stack([p.score_map.values for p in predicted])
        found[search] = np.array([p.score for p in predicted]), maps, [p.verdict for p in predicted]
        figures = ", ".join(
            f"{key} {row[key]:.6f}" for key in row if key.startswith(("i_", "p_", "au"))
        )
        print(f"{search}, {rows} rows: {figures}")
    (exact, true, first), (near, maps, second) = found.values()
    changed = sum(a != b for a, b in zip(first, second, strict=True))
    other = maps - true > 1e-5
    print(
        f"scores differ by {np.abs(near - exact).max():.1e} at most, of a range of "
        f"{np.ptp(exact):.2f}; {other.sum()} of {other.size} patches by {(maps - true).max():.3f} "
        f"at most; {changed} of {len(first)} verdicts"
    )


# ---- blocks -------------------------------------------------------------------------------------


def compare_blocks(given: argparse.Namespace) -> None:
    """Print the time of exact search by block, as a multiple of that with blocks of 2,048."""
    whole, queries = all_patches(given, max(given.sizes))
    blocks = (512, 1024, 2048, 4096, 8192, 16384, 10**9)
    for size in given.sizes:
        bank = whole[:size].contiguous()
        for batch in (1, 8):
            some = queries[: batch * PATCHES].contiguous()
            times: dict[int, list[float]] = {block: [] for block in blocks}
            for _ in range(given.rounds + 1):
                for block in blocks:
                    with mock.patch.object(memory_bank, "_BLOCK", block):
                        times[block].append(seconds(lambda q=some, b=bank: nearest_cosine(q, b)))
            print(f"{size} rows, batch {batch}:", ratios(times, 2048))


def ratios(times: dict[int, list[float]], usual: int) -> str:
    """Return the median ratio to the usual block's time, round by round; the first warms up."""
    base = times[usual][1:]
    texts = []
    for block, each in times.items():
        ratio = median(a / b for a, b in zip(each[1:], base, strict=True))
        texts.append(f"{'all' if block == 10**9 else block} {ratio:.2f}")
    return ", ".join(texts) + f" ({usual}: {1e3 * median(base):.1f} ms)"


class Search(torch.nn.Module):
    def forward(self, queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        return nearest_cosine(queries, bank)


def compare_graphs(given: argparse.Namespace) -> None:
    """Print the same of the search as a graph, by the rows of its blocks."""
    import onnxruntime

    whole, queries = all_patches(given, max(given.sizes))
    blocks = (2048, 4096, 16384, 65536, 10**9)
    for size in given.sizes:
        bank, sessions = whole[:size].contiguous(), {}
        for block in blocks:
            with (
                mock.patch.object(memory_bank, "_WIDE", block),
                tempfile.TemporaryDirectory() as at,
            ):
                path = Path(at) / "search.onnx"
                shapes = ({0: torch.export.Dim("n")}, None)
                args = (queries[:PATCHES].contiguous(), bank)
                program = torch.export.export(Search(), args, dynamic_shapes=shapes, strict=False)
                torch.onnx.export(program, dynamo=True, verbose=False).save(str(path))
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 2
                sessions[block] = onnxruntime.InferenceSession(str(path), options)
        for batch in (1, 8):
            feeds = [queries[: batch * PATCHES].contiguous().numpy(), bank.numpy()]
            times: dict[int, list[float]] = {block: [] for block in blocks}
            for _ in range(given.rounds + 1):
                for block, session in sessions.items():
                    named = {i.name: x for i, x in zip(session.get_inputs(), feeds, strict=True)}
                    times[block].append(seconds(lambda s=session, n=named: s.run(None, n)))
            print(f"{size} rows, batch {batch}:", ratios(times, 16384))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {
        "search": compare_searches,
        "accuracy": compare_metrics,
        "blocks": compare_blocks,
        "graph": compare_graphs,
    }
    parser.add_argument("part", choices=parts)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mvtec"))
    parser.add_argument("--cache", type=Path, default=Path("out/feature-cache"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    bank_search._faiss()
    with torch.inference_mode():
        parts[given.part](given)


if __name__ == "__main__":
    main()
