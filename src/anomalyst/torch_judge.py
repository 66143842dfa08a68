"""A detector as the judge that `judging` asks: backbone and method in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from anomalyst.data.transforms import Preprocess
from anomalyst.inference import Item
from anomalyst.retrieval import described
from anomalyst.scoring import Calibration, Decision
from anomalyst.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

    from anomalyst.detector import Detector


class TorchJudge:
    """Looks at images with a detector's backbone and method; levels are the detector's own."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    @property
    def preprocess(self) -> Preprocess:
        return self._detector.engine.preprocess

    @property
    def categories(self) -> Sequence[str]:
        return self._detector.categories

    @property
    def calibration(self) -> Mapping[str, Calibration]:
        return self._detector.calibration

    @property
    def decision(self) -> Decision:
        return self._detector.decision

    @property
    def sigma(self) -> float:
        return self._detector.method.sigma

    @property
    def needs_category(self) -> bool:
        return self._detector.spec.needs_category

    @property
    def needs_name(self) -> bool:
        return self._detector.spec.needs_class_name and self._detector.method.judges_unseen

    def knows(self, category: str) -> bool:
        return self._detector.knows(category)

    def compare(self, descriptors: FloatArray) -> Sequence[Mapping[str, float]]:
        return self._detector.index.compare(descriptors)

    def look(self, items: Sequence[Item], likely: str | None) -> TorchGlance:
        import torch

        from anomalyst.features.linears import QuickLinears

        features = self._detector.engine.features(items)
        with torch.inference_mode(), QuickLinears():
            return TorchGlance(self._detector, self._detector.method.encode(features))


class TorchGlance:
    """Feature maps of a batch: one backbone pass, however many categories it turns out to hold."""

    def __init__(self, detector: Detector, features: Sequence[Tensor]) -> None:
        self._detector = detector
        self._features = features

    def descriptors(self) -> FloatArray:
        return self._described

    @cached_property
    def _described(self) -> FloatArray:
        return described(self._features)

    def score(self, at: Sequence[int], category: str | None) -> tuple[FloatArray, Sequence[float]]:
        import torch

        from anomalyst.features.linears import QuickLinears

        whole = len(at) == len(self._features[-1])
        part = self._features if whole else [maps[list(at)] for maps in self._features]
        with torch.inference_mode(), QuickLinears():
            maps, scores = self._detector.method.score(part, category)
        values: FloatArray = maps.cpu().numpy()
        return values, scores.tolist()
