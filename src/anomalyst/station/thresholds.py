"""Thresholds set by hand: tried on labelled history first, then saved as a new version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from anomalyst.errors import InputError
from anomalyst.station import golden, history
from anomalyst.station.bundles import Kept, Kind
from anomalyst.station.confusion import confusion, ordered
from anomalyst.station.history import Knowledge, Labelled, Model
from anomalyst.station.recipes import active_version, add_version, find_recipe
from anomalyst.station.refusals import Refusal
from anomalyst.station.tables import Recipe, RecipeVersion
from anomalyst.station.verdicts import Limits, Thresholds, check_thresholds
from anomalyst.types import Verdict

if TYPE_CHECKING:
    from anomalyst.station.core import Station


@dataclass(frozen=True)
class Levels:
    """Scores above which a category is NG or for review; none at all: back to its calibration."""

    category: str | None
    ng: float | None = None
    review: float | None = None


@dataclass(frozen=True)
class _Seen:
    """A category's labelled parts with their scores by the active version."""

    recipe: Recipe
    version: RecipeVersion
    category: str
    known: Knowledge
    rows: list[tuple[Labelled, float]]
    left_out: int

    def limits(self, thresholds: Thresholds | None) -> Limits:
        return self.known.limits(self.category, thresholds)

    def verdict(self, limits: Limits, part: Labelled, score: float) -> Verdict | None:
        return history.unseen_verdict(self.known, limits, part.image_sha256, score)

    def counted(self, thresholds: Thresholds | None) -> dict[str, Any]:
        limits = self.limits(thresholds)
        counts = confusion((p.label, self.verdict(limits, p, score)) for p, score in self.rows)
        return {**counts.to_dict(), "ordered": ordered((p.label, score) for p, score in self.rows)}


def past(station: Station, recipe: str, category: str | None) -> dict[str, Any]:
    """Return labelled parts and calibration as the active version scores them."""
    seen = _seen(station, recipe, category)
    limits = seen.limits(seen.version.thresholds)
    calibration, decision = seen.known.calibration, seen.known.decision
    return {
        "category": seen.category,
        "scores": [
            {
                "id": part.uid,
                "score": score,
                "label": part.label,
                "verdict": seen.verdict(limits, part, score),
            }
            for part, score in seen.rows
        ],
        "calibration": [] if calibration is None else list(calibration.scores),
        "thresholds": {
            "ng": limits.ng,
            "review": limits.review,
            "by_hand": limits.by_hand,
            "calibrated": limits.calibrated,
            "alpha": decision.alpha,
            "alpha_review": decision.alpha_review,
        },
        "confusion": seen.counted(seen.version.thresholds),
        "left_out": seen.left_out,
    }


def preview(station: Station, recipe: str, levels: Levels) -> dict[str, Any]:
    """Return how history and golden samples would be judged under other thresholds."""
    seen = _seen(station, recipe, levels.category)
    wanted = _with(seen, levels)
    model = Model.of(seen.version)._replace(thresholds=wanted)
    held = golden.check(station, seen.recipe, golden.by(station, model))
    return {
        **seen.counted(wanted),
        "category": seen.category,
        "before": seen.counted(seen.version.thresholds),
        "golden": [each.to_dict() for each in held],
        "blocked": any(each.broken for each in held),
    }


def save(station: Station, recipe: str, levels: Levels, note: str, actor: str) -> RecipeVersion:
    """Make the active bundle with these thresholds the recipe's new version.

    Raises
    ------
    Refusal
        409: golden samples would break, or the recipe was changed meanwhile.
    InputError
        No such category, or levels that make no sense.
    """
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        version = active_version(session, found)
    model = Model.of(version)
    category = history.category_of(station.settings, model, levels.category)
    wanted = _changed(version.thresholds, category, levels)
    kept = Kept(version.bundle_sha256, cast("Kind", version.kind), version.method)
    golden.require(station, recipe, kept, wanted)
    with station.database.change(actor) as change:
        found = find_recipe(change.session, recipe)
        if found.active_version_id != version.id:
            raise Refusal(409, "the recipe was changed meanwhile: look at the thresholds again")
        return add_version(change, found, kept, thresholds=wanted, note=note)


def _seen(station: Station, recipe: str, category: str | None) -> _Seen:
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        version = active_version(session, found)
        model = Model.of(version)
        name = history.category_of(station.settings, model, category)
        parts = history.labelled(session, found, name)
    known = history.knowledge(station.settings, model, name)
    new = [part for part in parts if part.image_sha256 not in known.references]
    scores = history.scores(station, model, name, [part.image_sha256 for part in new])
    rows = [(p, scores[p.image_sha256]) for p in new if p.image_sha256 in scores]
    return _Seen(found, version, name, known, rows, len(parts) - len(rows))


def _with(seen: _Seen, levels: Levels) -> Thresholds | None:
    return _changed(seen.version.thresholds, seen.category, levels)


def _changed(old: Thresholds | None, category: str, levels: Levels) -> Thresholds | None:
    try:
        own = check_thresholds({"ng": levels.ng, "review": levels.review})
    except ValueError as error:
        raise InputError(f"thresholds: {error}") from None
    kept = {name: dict(each) for name, each in (old or {}).items() if name != category}
    if any(value is not None for value in own.values()):
        kept[category] = own
    return kept or None
