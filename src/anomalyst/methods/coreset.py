"""Greedy k-centre selection (farthest point first), done lazily in blocks.

Plain greedy recomputes the distance of all N points after each pick. Here those distances are
allowed to go stale: a stale distance to the selected set is an upper bound. Take the T points with
the largest bounds, run greedy exactly among them with their T x T distances, and go on for as long
as the best of them is at least the largest bound outside; each such pick is what plain greedy would
have picked. Only then is everybody brought up to date, by one matrix product for all new picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomalyst.errors import InputError

_BLOCK = 1024


def k_centre(points: Tensor, count: int, start: int) -> Tensor:
    """Return the indices ``[count]`` of a greedy k-centre selection, in order of selection.

    Parameters
    ----------
    points
        ``[N, C]``, compared by Euclidean distance.
    count
        How many to select, 1 to N. Fewer are returned when every point left coincides with a
        selected one.
    start
        The first point selected.
    """
    if not 1 <= count <= len(points):
        raise InputError(f"cannot select {count} of {len(points)} patches")
    squares = points.square().sum(1)
    bound = torch.full((len(points),), torch.inf, device=points.device)
    selected = [torch.tensor([start], device=points.device)]
    taken = 1
    _refresh(bound, points, squares, selected[0])
    while taken < count:
        size = min(_BLOCK, len(points) - 1)
        values, block = bound.topk(size + 1)
        picks = _greedy_inside(
            points[block[:size]], values[:size], float(values[size]), count - taken
        )
        if len(picks) == 0:
            break
        chosen = block[picks]
        selected.append(chosen)
        taken += len(chosen)
        _refresh(bound, points, squares, chosen)
    return torch.cat(selected)


def thin_out(points: Tensor, count: int, dimensions: int, seed: int) -> Tensor:
    """Return the indices of a `k_centre` selection made on a seeded random projection.

    Parameters
    ----------
    points
        ``[N, C]``.
    count
        How many to select; all of them, in their order, where there are no more.
    dimensions
        Of the projection (Johnson-Lindenstrauss); none is made where C is no larger.
    seed
        Draws the projection and the first point.
    """
    if count >= len(points):
        return torch.arange(len(points), device=points.device)
    random = torch.Generator().manual_seed(seed)
    width = points.shape[1]
    start = int(torch.randint(len(points), (1,), generator=random))
    if dimensions >= width:
        return k_centre(points, count, start)
    projection = torch.randn(width, dimensions, generator=random).to(points) / dimensions**0.5
    return k_centre(points @ projection, count, start)


def _refresh(bound: Tensor, points: Tensor, squares: Tensor, chosen: Tensor) -> None:
    """Lower every squared distance ``[N]`` to that of the nearest newly chosen point."""
    centres = points[chosen]
    # |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c); rows in slices keep the product small.
    for first in range(0, len(points), 8192):
        rows = slice(first, first + 8192)
        part = torch.addmm(squares[chosen], points[rows], centres.T, alpha=-2)
        distance = part.min(dim=1).values.add_(squares[rows]).clamp_(min=0)
        torch.minimum(bound[rows], distance, out=bound[rows])
    bound[chosen] = 0


def _greedy_inside(block: Tensor, bound: Tensor, outside: float, wanted: int) -> Tensor:
    """Return the picks inside a block ``[T, C]`` that plain greedy would make too.

    ``bound`` holds the block's exact squared distances to the selected set, ``outside`` the largest
    of the rest.
    """
    import numpy as np

    squares = block.square().sum(1)
    pairwise = torch.addmm(squares, block, block.T, alpha=-2).add_(squares[:, None])
    distances = pairwise.clamp_(min=0).cpu().numpy()  # (T, T); numpy: its small loops are quicker
    current = bound.cpu().numpy().copy()
    picks: list[int] = []
    while len(picks) < wanted:
        best = int(current.argmax())
        if current[best] < outside or current[best] <= 0:
            break
        picks.append(best)
        np.minimum(current, distances[best], out=current)
        current[best] = 0
    return torch.tensor(picks, dtype=torch.long, device=block.device)
