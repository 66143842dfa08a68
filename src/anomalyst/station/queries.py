"""Which inspections are asked for, page by page, and as CSV or JSON lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from anomalyst.station.refusals import Refusal
from anomalyst.station.schemas import InspectionAnswer, answer
from anomalyst.station.tables import Inspection, Recipe, RecipeVersion, time_text

if TYPE_CHECKING:
    from anomalyst.station.core import Station

_CHUNK = 500
COLUMNS = (
    *("id", "image", "recipe", "version", "part_id", "category", "score", "p_value", "verdict"),
    *("threshold", "threshold_review", "calibrated", "by_hand", "regions", "similarity"),
    *("source", "error", "decision", "decision_reason", "decided_by", "decided_at", "actor"),
    *("created_at", "seconds", "image_sha256", "bundle_sha256"),
)
"""The columns of the CSV."""


@dataclass(frozen=True)
class Filters:
    """What an inspection must be; ``before`` is the row's number under which to go on."""

    recipe: str | None = None
    verdict: str | None = None
    decision: str | None = None
    part_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    pending: bool = False
    before: int | None = None


def page(
    session: Session, filters: Filters, limit: int
) -> tuple[list[InspectionAnswer], int | None]:
    """Return up to ``limit`` inspections, newest first, and the ``before`` of the next ones."""
    rows: Any = session.execute(_query(filters).limit(limit + 1)).all()
    found = [answer(row, recipe, number) for row, recipe, number in rows[:limit]]
    return found, rows[limit - 1][0].id if len(rows) > limit else None


def every(station: Station, filters: Filters) -> Iterator[InspectionAnswer]:
    """Yield all inspections, newest first; no transaction stays open while a client is slow."""
    at: Filters | None = filters
    while at is not None:
        with station.database.read() as session:
            found, following = page(session, at, _CHUNK)
        yield from found
        at = None if following is None else replace(at, before=following)


def as_csv(rows: Iterator[InspectionAnswer]) -> Iterator[str]:
    """Yield CSV, line by line; a text that a spreadsheet would compute is led by an apostrophe."""
    yield _csv_line(COLUMNS)
    for row in rows:
        values = row.model_dump(mode="json")
        values["regions"] = len(row.regions)
        yield _csv_line([_cell(values[name]) for name in COLUMNS])


def as_jsonl(rows: Iterator[InspectionAnswer]) -> Iterator[str]:
    """Yield one JSON object a line."""
    for row in rows:
        yield row.model_dump_json() + "\n"


def _query(filters: Filters) -> Any:
    """Return the rows (inspection, recipe's name, version's number) asked for, newest first."""
    query = (
        select(Inspection, Recipe.name, RecipeVersion.number)
        .join(Recipe, Recipe.id == Inspection.recipe_id)
        .join(RecipeVersion, RecipeVersion.id == Inspection.version_id)
        .order_by(Inspection.id.desc())
    )
    if filters.recipe is not None:
        query = query.where(Recipe.name == filters.recipe)
    if filters.verdict is not None:
        query = query.where(Inspection.verdict == filters.verdict)
    if filters.decision is not None:
        query = query.where(Inspection.decision == filters.decision)
    if filters.part_id is not None:
        query = query.where(Inspection.part_id == filters.part_id)
    if filters.since is not None:
        query = query.where(Inspection.created_at >= _moment(filters.since))
    if filters.until is not None:
        query = query.where(Inspection.created_at < _moment(filters.until))
    if filters.pending:
        open_ = or_(Inspection.verdict.in_(("review", "ng")), Inspection.error.is_not(None))
        query = query.where(and_(Inspection.decision.is_(None), open_))
    if filters.before is not None:
        query = query.where(Inspection.id < filters.before)
    return query


def _moment(moment: datetime) -> str:
    try:
        return time_text(moment)
    except OverflowError:
        raise Refusal(422, f"{moment.isoformat()}: no time that can be told in UTC") from None


def _cell(value: object) -> object:
    risky = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if risky else value


def _csv_line(values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
