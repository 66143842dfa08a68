"""Lazy block k-centre against plain greedy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from anomalyst.errors import InputError
from anomalyst.methods import coreset
from anomalyst.methods.coreset import k_centre


def plain_greedy(points: np.ndarray, count: int, start: int) -> list[int]:
    """Farthest point first, one full pass a pick, in float64."""
    picks = [start]
    distance = np.linalg.norm(points - points[start], axis=1)
    while len(picks) < count:
        picks.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[picks[-1]], axis=1))
    return picks


@pytest.mark.parametrize("block", [1, 7, 64, 4000])
@pytest.mark.parametrize("kind", ["gaussian", "clustered"])
def test_same_picks_as_plain_greedy(monkeypatch: pytest.MonkeyPatch, block: int, kind: str) -> None:
    monkeypatch.setattr(coreset, "_BLOCK", block)
    random = np.random.default_rng(0)
    points = random.normal(size=(600, 5))
    if kind == "clustered":
        points = points * 0.01 + random.normal(size=(6, 5))[random.integers(0, 6, 600)]
    picks = k_centre(torch.from_numpy(points), 150, 3).tolist()
    assert picks == plain_greedy(points, 150, 3)


def test_radius_never_grows_and_is_within_twice_the_best() -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picks = k_centre(points, 40, 0)
    assert len(set(picks.tolist())) == 40
    radii = [
        float(torch.cdist(points, points[picks[:k]]).min(dim=1).values.max()) for k in range(1, 40)
    ]
    assert all(a >= b for a, b in pairwise(radii))
    # k + 1 points pairwise at least r apart: no k centres can do better than r / 2
    apart = torch.cdist(points[picks[:11]], points[picks[:11]]) + torch.eye(11) * 1e9
    assert radii[9] <= float(apart.min()) + 1e-9


def test_duplicates_stop_at_radius_zero() -> None:
    points = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    assert sorted(points[k_centre(points, 15, 0)].flatten().tolist()) == [0.0, 1.0]


def test_all_points_and_impossible_counts() -> None:
    points = torch.arange(12.0).reshape(6, 2)
    assert sorted(k_centre(points, 6, 2).tolist()) == list(range(6))
    with pytest.raises(InputError, match="7 of 6"):
        k_centre(points, 7, 0)
