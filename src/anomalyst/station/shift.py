"""What a shift did, from inspections and the audit log, for the report that is printed."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from anomalyst.errors import InputError
from anomalyst.station import line
from anomalyst.station.bundles import categories_of
from anomalyst.station.pictures import image_file
from anomalyst.station.recipes import active_version, find_recipe
from anomalyst.station.refusals import Refusal
from anomalyst.station.shift_page import Facts, Row, render
from anomalyst.station.tables import AuditRow, Inspection, Recipe, RecipeVersion, now, time_text

if TYPE_CHECKING:
    from anomalyst.station.core import Station

_HOURS = 8
_ROWS = 60
_PICTURES = 30
_SIDE = 240
_CHANGES = 100
_FLAGGED = ("ng", "review")


@dataclass(frozen=True)
class _Part:
    """What the report says of an inspection."""

    version_id: int
    verdict: str | None
    threshold: float | None
    threshold_review: float | None
    by_hand: bool
    error: str | None
    created_at: str
    decision: str | None
    decided_by: str | None

    @property
    def word(self) -> str:
        return "unreadable" if self.error else self.verdict or "no verdict"


def report(station: Station, recipe: str, since: datetime | None, until: datetime | None) -> str:
    """Return the page on what a recipe judged from ``since`` to ``until``; the last eight hours."""
    end = datetime.now(timezone.utc) if until is None else until
    try:
        span = time_text(end - timedelta(hours=_HOURS) if since is None else since), time_text(end)
    except OverflowError:
        raise InputError("since and until: no times that can be told in UTC") from None
    if span[0] >= span[1]:
        raise InputError("since must lie before until")
    drift = line.drift_of(station, recipe, None)
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        parts = _parts(session, found, span)
        rows, left_out = _rows(session, found, span)
        facts = Facts(
            recipe=recipe,
            since=span[0],
            until=span[1],
            made=now(),
            counts=_counts(parts),
            promises=_promises(station, active_version(session, found)),
            alarm=drift["alarm"],
            versions=_versions(session, found, parts),
            hours=_hours(parts),
            people=_people(parts),
            changes=_changes(session, recipe, span),
            rows=_with_pictures(station, rows),
            left_out=left_out,
        )
    return render(facts)


def _parts(session: Session, recipe: Recipe, span: tuple[str, str]) -> list[_Part]:
    columns = [getattr(Inspection, name) for name in _Part.__dataclass_fields__]
    query = select(*columns).where(*_within(recipe, span)).order_by(Inspection.id)
    return [_Part(*row) for row in session.execute(query)]


def _within(recipe: Recipe, span: tuple[str, str]) -> list[Any]:
    return [
        Inspection.recipe_id == recipe.id,
        Inspection.created_at >= span[0],
        Inspection.created_at < span[1],
    ]


def _counts(parts: Sequence[_Part]) -> dict[str, int]:
    words = Counter(part.word for part in parts)
    found = {"parts": len(parts), **{name: words[name] for name in ("ok", "review", "ng")}}
    found |= {name: words[name] for name in ("no verdict", "unreadable") if words[name]}
    decided = Counter(part.decision for part in parts)
    found |= {"decided good": decided["good"], "decided defect": decided["defect"]}
    waiting = sum(part.word in (*_FLAGGED, "unreadable") and not part.decision for part in parts)
    return {**found, "not yet decided": waiting}


def _promises(station: Station, version: RecipeVersion) -> list[str]:
    """Say what the active version promises, one line a category."""
    lines = []
    for row in categories_of(station.settings, version.bundle_sha256, version.kind):
        name, count = row["name"], row["n_calibration"]
        if name in (version.thresholds or {}):
            lines.append(f"{name}: limits set by hand, no rate of false rejects is promised")
        elif not count:
            lines.append(f"{name}: not calibrated, so no verdicts")
        else:
            met = [f"{float(a):.3g}" for a, missing in row["needed_for"].items() if not missing]
            missing = [f"{n} more for {float(a):.3g}" for a, n in row["needed_for"].items() if n]
            said = f"{name}: calibrated on {count} pictures"
            said += f", false-reject rates that hold: {', '.join(met)}" if met else ""
            lines.append(
                said + (f"; good pictures needed: {', '.join(missing)}" if missing else "")
            )
    return lines


def _versions(
    session: Session, recipe: Recipe, parts: Sequence[_Part]
) -> list[tuple[str, str, str, int]]:
    counts: Counter[tuple[int, str]] = Counter()
    for part in parts:
        if not part.error:
            levels = (("NG above", part.threshold), ("review above", part.threshold_review))
            said = ", ".join(f"{name} {value:.4g}" for name, value in levels if value is not None)
            by_hand = " (by hand)" if part.by_hand else ""
            counts[part.version_id, (said or "none") + by_hand] += 1
    query = select(RecipeVersion).where(RecipeVersion.recipe_id == recipe.id)
    known = {version.id: version for version in session.scalars(query)}
    return [
        (f"{known[i].number} ({known[i].method})", known[i].bundle_sha256[:16], said, count)
        for (i, said), count in sorted(counts.items())
    ]


def _hours(parts: Sequence[_Part]) -> list[tuple[str, int, int, int, int]]:
    hours: dict[str, Counter[str]] = defaultdict(Counter)
    for part in parts:
        hours[part.created_at[:13]][part.word] += 1
    return [
        (f"{hour[:10]} {hour[11:]}:00", words.total(), words["ok"], words["review"], words["ng"])
        for hour, words in hours.items()
    ]


def _people(parts: Iterable[_Part]) -> list[tuple[str, int, int, int]]:
    """Count decisions by name, and those that went against the verdict."""
    people: dict[str, Counter[str]] = defaultdict(Counter)
    for part in parts:
        if part.decision is not None:
            own = people[part.decided_by or "unknown"]
            own["all"] += 1
            own["to good"] += part.decision == "good" and part.verdict in _FLAGGED
            own["to defect"] += part.decision == "defect" and part.verdict == "ok"
    return [(n, c["all"], c["to good"], c["to defect"]) for n, c in sorted(people.items())]


def _changes(session: Session, recipe: str, span: tuple[str, str]) -> list[tuple[str, str, str]]:
    """Return what the log says of the recipe and its golden samples, oldest first."""
    query = (
        select(AuditRow)
        .where(AuditRow.at >= span[0], AuditRow.at < span[1])
        .where(
            (AuditRow.subject == f"recipe:{recipe}") | AuditRow.action.in_(_GOLDEN_ACTIONS),
            AuditRow.action != "recipe.version",
        )
        .order_by(AuditRow.seq.desc())
        .limit(_CHANGES)
    )
    found = []
    for row in reversed(session.scalars(query).all()):
        detail = json.loads(row.detail)
        if row.action in _GOLDEN_ACTIONS and detail.get("recipe") != recipe:
            continue
        found.append((row.at[:19].replace("T", " "), row.actor, _change(row.action, detail)))
    return found


_GOLDEN_ACTIONS = ("golden.add", "golden.delete")


def _change(action: str, detail: dict[str, Any]) -> str:
    """Return a row of the log in words."""
    note = f": {detail['note']}" if detail.get("note") else ""
    if action == "recipe.add":
        return "the recipe was made"
    if action == "recipe.activate":
        former = f" in place of {detail['former']}" if detail.get("former") else ""
        return f"version {detail['number']} judges{former}{note}"
    if action == "recipe.teach":
        labels = Counter("defect" if each["mask"] else "good" for each in detail["taught"])
        said = ", ".join(f"{count} {label}" for label, count in sorted(labels.items()))
        return f"taught {said} ({detail['category']}), version {detail['number']}"
    if action == line.SEEN:
        return f"drift alarm seen{note}"
    if action in _GOLDEN_ACTIONS:
        what = "now golden" if action == "golden.add" else "no longer golden"
        return f"picture {detail['image_sha256'][:12]} {what}, must {detail['expected']}{note}"
    return f"{action}{note}"


def _rows(session: Session, recipe: Recipe, span: tuple[str, str]) -> tuple[list[Inspection], int]:
    """Return the newest parts to look at again, newest first, and how many more there are."""
    asks = (Inspection.verdict.in_(_FLAGGED)) | (Inspection.decision == "defect")
    query = select(Inspection).where(*_within(recipe, span), asks).order_by(Inspection.id.desc())
    found = session.scalars(query).all()
    return list(found[:_ROWS]), max(len(found) - _ROWS, 0)


def _with_pictures(station: Station, parts: Sequence[Inspection]) -> list[Row]:
    return [
        Row(
            at=part.created_at,
            part=part.part_id or part.image_name,
            verdict=part.verdict or "none",
            score=part.score,
            decision=f"{part.decision} ({part.decided_by})" if part.decision else "not yet",
            reason=part.decision_reason or "",
            picture=_picture(station, part) if number < _PICTURES else None,
        )
        for number, part in enumerate(parts)
    ]


def _picture(station: Station, part: Inspection) -> str | None:
    """Return a small picture as a data URL, None where it is gone."""
    from PIL import Image

    try:
        content, _ = image_file(station.store.get(part.image_sha256 or ""), _SIDE)
    except (Refusal, InputError, ValueError):
        return None
    blob = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(blob, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(blob.getvalue()).decode()}"
