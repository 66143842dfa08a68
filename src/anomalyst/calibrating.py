"""Held-out normal images to calibrations, whatever judges them: torch, or an exported graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from anomalyst.errors import InputError
from anomalyst.scoring import Calibration
from anomalyst.types import Prediction, Progress, Sample


def calibration_of(
    predict: Callable[[Sequence[Sample]], Iterable[Prediction]],
    data: Sequence[Sample],
    references: Iterable[str],
    abnormal: Mapping[str, str],
    progress: Progress | None,
) -> dict[str, Calibration]:
    """Return by category what held-out normal images say; see `Detector.calibrate`.

    Parameters
    ----------
    references
        SHA-256 of the images that the judge learned from: they are left out.
    abnormal
        The category by the SHA-256 of each abnormal reference: they are refused.
    """
    anomalous = next((s for s in data if s.label == 1), None)
    if anomalous is not None:
        raise InputError(f"{anomalous.path}: calibration takes normal images only")
    seen = set(references)
    kept: dict[str, list[tuple[float, float, str]]] = {}
    for done, p in enumerate(predict(data), start=1):
        if p.error or p.category is None or p.score is None or p.map is None:
            raise InputError(f"calibration image: {p.error}")
        if p.sha256 in abnormal:
            name = abnormal[p.sha256]
            raise InputError(f"{p.image}: an abnormal reference of {name!r}; leave it out")
        if p.sha256 not in seen:
            seen.add(p.sha256)
            kept.setdefault(p.category, []).append((p.score, float(p.map.max()), p.sha256))
        if progress:
            progress("calibrate", done, len(data))
    if not kept:
        raise InputError(
            f"all {len(data)} images given are references of this detector: "
            "calibrate with normal images that it has not seen"
        )
    return {name: Calibration.of(*zip(*rows, strict=True)) for name, rows in kept.items()}
