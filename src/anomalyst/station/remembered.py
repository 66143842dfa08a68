"""Frozen features of pictures, in memory and exact: a lesson tried again need not see them again.

Teaching changes what features are compared with, never the features. The cache on disk rounds them
to half precision, and a preview must score as the line will.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from anomalyst.features.cache import FeatureArray, FeatureCache

_MOST_BYTES = 512 << 20


class Remembered(FeatureCache):
    """A feature cache without files; those used least recently go first."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._entries: OrderedDict[str, list[FeatureArray]] = OrderedDict()
        self._held = 0
        self._most = most_bytes
        self._lock = threading.Lock()

    def get(self, key: str) -> list[FeatureArray] | None:
        """Return an entry's arrays, or None."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: str, arrays: Sequence[npt.NDArray[Any]]) -> list[FeatureArray]:
        """Keep feature maps, in single precision as they are, and return them."""
        kept: list[FeatureArray] = [np.array(array, dtype=np.float32) for array in arrays]
        with self._lock:
            if key not in self._entries:
                self._entries[key] = kept
                self._held += _size(kept)
            while self._held > self._most and self._entries:
                self._held -= _size(self._entries.popitem(last=False)[1])
        return kept


def _size(arrays: Sequence[FeatureArray]) -> int:
    return sum(array.nbytes for array in arrays)


FEATURES = Remembered()
"""Shared by all previews: entries are named by content, weights and preprocessing."""
