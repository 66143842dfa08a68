"""The line as its inspections show it: drift since a bundle judges, and repeatability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from anomalyst.station import drift, history, repeatability
from anomalyst.station.bundles import categories_of
from anomalyst.station.confusion import verdict
from anomalyst.station.history import Knowledge, Model
from anomalyst.station.recipes import active_version, find_recipe
from anomalyst.station.tables import AuditRow, Inspection, Recipe
from anomalyst.station.verdicts import Limits

if TYPE_CHECKING:
    from anomalyst.station.core import Station

_BLOCK = 10_000  # inspections after which the watching begins anew, so that it never grows slow
_BLOCKS = 3
_LOOKS = 5_000
SEEN = "drift.seen"
"""What the audit log says when an engineer has taken note of an alarm."""


@dataclass(frozen=True)
class _Part:
    """An inspection that counts for drift."""

    uid: str
    image_sha256: str
    at: str
    score: float
    similarity: float | None

    @property
    def tie(self) -> float:
        """A number in [0, 1) that is fixed by the picture, as if drawn by chance."""
        return int(self.image_sha256[:13], 16) / 16**13


# ---- drift --------------------------------------------------------------------------------------


def drift_of(station: Station, recipe: str, category: str | None) -> dict[str, Any]:
    """Return how scores and features of a category stand against its calibration.

    Without a category that is the only one, or the one with the strongest evidence.
    """
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        model = Model.of(active_version(session, found))
        since = _seen_at(session, recipe)
        rows = categories_of(station.settings, model.sha256, model.kind)
        names = [str(row["name"]) for row in rows]
        if category is not None:
            names = [history.category_of(station.settings, model, category)]
        streams = 2 * max(len(rows), 1)
        told = [_drift(station, session, found, model, name, since, streams) for name in names]
    if not told:
        return _nothing(since)
    return max(told, key=lambda each: (each["alarm"] is not None, each["evidence"]))


def _nothing(since: str | None) -> dict[str, Any]:
    """Return the answer for a recipe that knows no category yet."""
    return {
        **dict.fromkeys(("category", "score", "features", "alarm")),
        "since": since,
        "evidence": 0.0,
        "parts_a_false_alarm": drift.PARTS_A_FALSE_ALARM,
        "words": "the recipe knows no category yet: nothing to compare with",
    }


def _drift(
    station: Station,
    session: Session,
    recipe: Recipe,
    model: Model,
    category: str,
    since: str | None,
    streams: int,
) -> dict[str, Any]:
    known = history.knowledge(station.settings, model, category)
    parts = _stream(session, recipe, model, category, known, since)
    base = () if known.calibration is None else known.calibration.scores
    ties = [part.tie for part in parts]
    score = drift.watch(base, [part.score for part in parts], ties, streams)
    alike = [(part, part.similarity) for part in parts if part.similarity is not None]
    features = drift.watch([], [s for _, s in alike], [part.tie for part, _ in alike], streams)
    words = [
        _words("scores are", score, parts, "the calibration" if base else "earlier parts"),
        _words(
            "similarity to the nearest good reference is",
            features,
            [part for part, _ in alike],
            "earlier parts",
        ),
    ]
    said = [each for each in words if each is not None]
    return {
        "category": category,
        "since": since,
        "score": _told(score, parts),
        "features": _told(features, [part for part, _ in alike]),
        "evidence": max(score.evidence, features.evidence),
        "alarm": _alarm(said) if said else None,
        "parts_a_false_alarm": drift.PARTS_A_FALSE_ALARM,
        "words": _state(score, len(base)),
    }


def _stream(
    session: Session,
    recipe: Recipe,
    model: Model,
    category: str,
    known: Knowledge,
    since: str | None,
) -> list[_Part]:
    """Return the parts that count, oldest first: each part and picture once, no known defects.

    Pictures that the bundle was made or calibrated on are not new, and parts decided defective are
    no sign that the line has changed.
    """
    chosen = [
        Inspection.recipe_id == recipe.id,
        Inspection.bundle_sha256 == model.sha256,
        Inspection.category == category,
        Inspection.score.is_not(None),
    ]
    if since is not None:
        chosen.append(Inspection.created_at > since)
    count = session.scalar(select(func.count()).select_from(Inspection).where(*chosen)) or 0
    query = (
        select(
            Inspection.uid,
            Inspection.image_sha256,
            Inspection.created_at,
            Inspection.score,
            Inspection.similarity,
            Inspection.part_id,
            Inspection.decision,
        )
        .where(*chosen)
        .order_by(Inspection.id)
        .offset(max(count // _BLOCK - _BLOCKS + 1, 0) * _BLOCK)
    )
    learned = set(known.references)
    if known.calibration is not None:
        learned |= set(known.calibration.images)
    parts, seen = [], set[str]()
    for uid, image, at, score, similarity, part_id, decision in session.execute(query):
        names = {f"picture {image}", *([f"part {part_id}"] if part_id else [])}
        new = image not in learned and not names & seen
        seen |= names
        if new and decision != "defect":
            parts.append(_Part(uid, str(image), at, float(score or 0), similarity))
    return parts


def _told(found: drift.Watched, parts: Sequence[_Part]) -> dict[str, Any]:
    change = None
    if found.change is not None:
        change = {
            **asdict(found.change),
            "at": {"id": parts[found.change.at].uid, "time": parts[found.change.at].at},
            "since": {"id": parts[found.change.since].uid, "time": parts[found.change.since].at},
        }
    return {**asdict(found), "change": change}


def _words(what: str, found: drift.Watched, parts: Sequence[_Part], against: str) -> str | None:
    change = found.change
    if change is None:
        return None
    since = parts[change.since].at[:16].replace("T", " ")
    return (
        f"{what} {change.direction} than in {against}, probably since {since} UTC "
        f"(usually {change.usual:.3g}, then {change.now:.3g})"
    )


def _alarm(said: Sequence[str]) -> str:
    text = "; ".join(said)
    return (
        f"{text[0].upper()}{text[1:]}. Look at camera, light, lens and part first. If the parts "
        "are good and stay like this, the promised rate no longer holds: calibrate again with new "
        "good parts."
    )


def _state(score: drift.Watched, baseline: int) -> str:
    against = (
        f"{baseline} pictures of the calibration"
        if baseline
        else "earlier parts: the recipe is not calibrated"
    )
    rate = f"{drift.PARTS_A_FALSE_ALARM:,}"
    return (
        f"{score.count} parts compared with {against}, features with earlier parts; where nothing "
        f"changes, at most one false alarm in {rate} parts on average."
    )


def note_drift(station: Station, recipe: str, note: str, actor: str) -> None:
    """Take note of an alarm, in the log; watching begins anew with the next part."""
    with station.database.change(actor) as change:
        found = find_recipe(change.session, recipe)
        change.record(SEEN, f"recipe:{found.name}", note=note)


def _seen_at(session: Session, recipe: str) -> str | None:
    query = (
        select(AuditRow.at)
        .where(AuditRow.subject == f"recipe:{recipe}", AuditRow.action == SEEN)
        .order_by(AuditRow.seq.desc())
        .limit(1)
    )
    return session.scalars(query).first()


# ---- repeatability ------------------------------------------------------------------------------


def repeatability_of(station: Station, recipe: str, part_ids: Sequence[str]) -> dict[str, Any]:
    """Return the study of parts that the active bundle saw at least twice, in their last looks.

    Verdicts are those of the active limits. A picture that came twice counts once: it repeats
    itself, whatever the camera does.
    """
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        model = Model.of(active_version(session, found))
        query = select(
            Inspection.part_id, Inspection.image_sha256, Inspection.category, Inspection.score
        ).where(
            Inspection.recipe_id == found.id,
            Inspection.bundle_sha256 == model.sha256,
            Inspection.part_id.is_not(None),
            Inspection.category.is_not(None),
            Inspection.score.is_not(None),
        )
        if part_ids:
            query = query.where(Inspection.part_id.in_(part_ids))
        rows = session.execute(query.order_by(Inspection.id.desc()).limit(_LOOKS)).all()
    looks: dict[str, list[repeatability.Look]] = {name: [] for name in part_ids}
    seen, again, limits = set[tuple[str, str]](), 0, dict[str, Limits]()
    for part_id, image, category, number in reversed(rows):
        part_id, category, score = str(part_id), str(category), float(number or 0)
        if (part_id, str(image)) in seen:
            again += 1
            continue
        seen.add((part_id, str(image)))
        if category not in limits:
            known = history.knowledge(station.settings, model, category)
            limits[category] = known.limits(category, model.thresholds)
        look = repeatability.Look(score, verdict(limits[category], score))
        looks.setdefault(part_id, []).append(look)
    study = repeatability.study(looks)
    return {**asdict(study), "words": repeatability.in_words(study, again)}
