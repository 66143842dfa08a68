"""What the cells of a benchmark run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalyst.detector import Detector
from anomalyst.features.cache import FeatureCache


@dataclass(frozen=True)
class Machine:
    """Where the cells run, which changes no figure beyond rounding.

    Attributes
    ----------
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    offline
        Forbid downloads.
    feature_cache
        Folder for the frozen features of all cells; by default ``features`` among the results.
    """

    device: str = "auto"
    offline: bool = False
    feature_cache: Path | None = None

    def detector(
        self, method: str, arguments: Mapping[str, Any], seed: int, cache: FeatureCache
    ) -> Detector:
        """Return a detector that has learned nothing yet."""
        return Detector(
            method,
            **arguments,
            seed=seed,
            device=self.device,
            offline=self.offline,
            feature_cache=cache,
        )
