"""Two score levels to a verdict: those of the bundle's calibration, or an engineer's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anomalyst.scoring import Calibration, Decision
from anomalyst.types import Prediction, Verdict

Thresholds = Mapping[str, Mapping[str, float | None]]
"""``{category: {"ng": score | None, "review": score | None}}``, of categories set by hand."""


@dataclass(frozen=True)
class Limits:
    """Scores above which a picture is ``ng`` or for ``review``; None where there is no such level.

    Set by hand they promise no rate of false rejects, whatever the calibration.
    """

    ng: float | None
    review: float | None
    calibrated: bool
    by_hand: bool


def limits_of(
    calibration: Mapping[str, Calibration],
    decision: Decision,
    thresholds: Thresholds | None,
    category: str | None,
) -> Limits:
    """Return the levels that judge a category."""
    known = calibration.get(category or "")
    own = (thresholds or {}).get(category or "")
    if own is not None:
        return Limits(own.get("ng"), own.get("review"), known is not None, True)
    if known is None:
        return Limits(None, None, False, False)
    levels = (known.threshold(decision.alpha), known.threshold(decision.alpha_review))
    return Limits(*levels, calibrated=True, by_hand=False)


def verdict_of(limits: Limits, prediction: Prediction) -> Verdict | None:
    """Return what a prediction means under these levels; None where nothing can be said."""
    score = prediction.score
    if score is None:
        return None
    if not limits.by_hand:
        return prediction.verdict
    if limits.ng is not None and score > limits.ng:
        return "ng"
    return "review" if limits.review is not None and score > limits.review else "ok"


def check_thresholds(levels: Mapping[str, Any]) -> dict[str, float | None]:
    """Return levels as a version keeps them; a ValueError says what is wrong with them."""
    ng, review = levels.get("ng"), levels.get("review")
    if ng is not None and review is not None and review > ng:
        raise ValueError(f"review ({review:g}) lies above ng ({ng:g}): nothing could be reviewed")
    return {"ng": ng, "review": review}
