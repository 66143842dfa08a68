"""What a detector can promise, and what it must refuse, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anomalyst.data.layouts import Dataset, hold_out
from anomalyst.errors import InputError, unknown
from anomalyst.scoring import normals_needed
from anomalyst.types import Sample

if TYPE_CHECKING:
    from anomalyst.detector import Detector
    from anomalyst.runtime import Runtime


def state(detector: Detector | Runtime) -> list[dict[str, Any]]:
    """Return one row a category: its references, and what its calibration supports."""
    rows = []
    for name in detector.references:
        calibration = detector.calibration.get(name)
        rows.append(
            {
                "category": name,
                **detector.counts(name),
                "calibrated_on": calibration.count if calibration else 0,
                "smallest_alpha": calibration.smallest_level if calibration else None,
                "alpha": detector.decision.alpha,
            }
        )
    return rows


def describe(detector: Detector | Runtime, categories: Iterable[str] | None = None) -> list[str]:
    """Return `state` in sentences, one a category."""
    lines = []
    if not detector.references:
        lines.append(
            "no category yet: give it a product's references with `anomalyst enroll`"
            if detector.trains_apart
            else "no category yet: scores for images of any, verdicts once calibrated "
            "(`anomalyst calibrate`)"
        )
    for row in state(detector):
        name, count, alpha = row["category"], row["calibrated_on"], row["alpha"]
        if categories is not None and name not in categories:
            continue
        if count == 0:
            promise = "not calibrated: scores, but no verdicts"
        elif count >= normals_needed(alpha):
            promise = f"calibrated on {count}: at most {alpha:.2%} of good parts NG"
        else:
            promise = (
                f"calibrated on {count}: NG at {alpha:g} needs {normals_needed(alpha)}, "
                f"the least here is --alpha {row['smallest_alpha']:.4f}"
            )
        known = f"{row['references']} reference{'s' * (row['references'] != 1)}"
        lines.append(f"{name}: {known}{_abnormal(row)}, {promise}")
    return lines


def _abnormal(row: Mapping[str, Any]) -> str:
    """Return the abnormal references in words, empty without any."""
    if not row["abnormal"]:
        return ""
    found = row["masks_found"]
    how = f" ({found} without a mask: its defect was found)" if found else ""
    return f" and {row['abnormal']} abnormal{how}"


def require_levels(
    detector: Detector | Runtime, levels: Iterable[float | None], categories: Iterable[str]
) -> None:
    """Raise unless those categories are calibrated well enough to promise every level asked for."""
    counts = {name: known.count for name, known in detector.calibration.items()}
    for category in categories:
        for level in levels:
            _require(level, category, counts.get(category, 0))


def require_held_out(
    samples: Sequence[Sample], share: float, levels: Iterable[float | None]
) -> None:
    """Raise before any work if the share to hold out cannot support every level asked for."""
    _, held_out = hold_out(samples, share)
    for category in dict.fromkeys(sample.category for sample in samples):
        count = sum(sample.category == category for sample in held_out)
        for level in levels:
            _require(level, category or "", count)


def _require(alpha: float | None, category: str, count: int) -> None:
    """Raise where a level was asked for that so many images cannot support."""
    if alpha is not None and count < normals_needed(alpha):
        raise InputError(
            f"category {category!r}: alpha {alpha:g} needs at least {normals_needed(alpha)} "
            f"held-out normal images, it has {count}; give more with `anomalyst calibrate BUNDLE "
            "DATA` or ask for a larger alpha"
        )


def belonging(
    detector: Detector | Runtime,
    data: Dataset,
    samples: Sequence[Sample],
    wanted: Sequence[str] | None = None,
) -> list[Sample]:
    """Return those samples of a data set that belong to the detector's (or ``wanted``) categories.

    A plain folder names no product: its images stand for the only category that they can be of.
    Where the detector learned several data sets together, a category that they share is looked for
    as ``DATASET/CATEGORY`` too.

    Raises
    ------
    InputError
        A wanted category was not enrolled, or no sample belongs to any.
    """
    joint = {name: f"{data.root.resolve().name}/{name}" for name in data.categories}
    full = {name: joint[name] for name in joint if joint[name] in detector.references}
    samples = [replace(s, category=full.get(s.category or "", s.category)) for s in samples]
    known = {full.get(name, name) for name in data.categories}
    names = list(wanted or detector.categories)
    for name in names:
        if not detector.knows(name):
            raise unknown("category", name, detector.references)
    if wanted is None and detector.judges_any and not {*names} & known:
        names = list(data.categories)  # judged without having been trained on
    nameless = wanted is not None or data.layout == "folder"
    if nameless and len(data.categories) == 1 and len(names) == 1:
        samples = [replace(sample, category=names[0]) for sample in samples]
    found = [sample for sample in samples if sample.category in names]
    if not found:
        raise InputError(
            f"{data.root}: no such images of {', '.join(names)}; its categories are "
            f"{', '.join(data.categories) or 'none'} (name one with --category)"
        )
    return found
