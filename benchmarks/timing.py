"""What the benchmarks time with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def matrix_rate(rows: int, inner: int, columns: int) -> float:
    """Return the machine's rate on a matrix product of that size, in flops a second."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    a @ b
    took = min(seconds(lambda: [a @ b for _ in range(10)]) for _ in range(5)) / 10
    return 2 * rows * inner * columns / took
