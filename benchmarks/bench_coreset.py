"""Coreset of 10 % of 100,000 x 384: lazy block k-centre against plain greedy, same run.

python benchmarks/bench_coreset.py
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from anomalyst.methods.coreset import k_centre


def plain_greedy(points: Tensor, count: int, start: int) -> Tensor:
    """One matrix-vector product and one minimum a pick, norms computed once."""
    squares = points.square().sum(1)
    picks = [start]
    distance = torch.full((len(points),), torch.inf)
    for _ in range(count - 1):
        chosen = picks[-1]
        fresh = torch.addmv(squares, points, points[chosen], alpha=-2).add_(squares[chosen])
        torch.minimum(distance, fresh, out=distance)
        distance[chosen] = 0
        picks.append(int(distance.argmax()))
    return torch.tensor(picks)


def patch_like(count: int, width: int) -> Tensor:
    """Return points that cluster as patches do: a few hundred centres, low-rank spread."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(300, width, generator=random)
    owner = torch.randint(300, (count,), generator=random)
    spread = torch.randn(count, 24, generator=random) @ torch.randn(24, width, generator=random)
    return centres[owner] + 0.15 * spread + 0.1 * torch.randn(count, width, generator=random)


def covering_radius(points: Tensor, picks: Tensor) -> float:
    """Return the largest distance of any point to its nearest pick."""
    return max(
        float(torch.cdist(rows, points[picks]).min(1).values.max()) for rows in points.split(2000)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    points = patch_like(options.points, options.width)
    count = int(options.points * options.share)
    began = time.perf_counter()
    lazy = k_centre(points, count, 0)
    middle = time.perf_counter()
    plain = plain_greedy(points, count, 0)
    ended = time.perf_counter()
    same = len(set(lazy.tolist()) & set(plain.tolist())) / count
    differ = (lazy != plain).nonzero().flatten().tolist()
    radius = [covering_radius(points, picks) for picks in (lazy, plain)]
    result = {
        "points": options.points,
        "width": options.width,
        "picks": count,
        "lazy_s": round(middle - began, 2),
        "plain_s": round(ended - middle, 2),
        "times_faster": round((ended - middle) / (middle - began), 2),
        "first_difference": differ[0] if differ else None,
        "share_of_same_picks": same,
        "radius_lazy_over_plain": radius[0] / radius[1],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
