"""Whether the audit log is whole, and whether the records still say what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from anomalyst.station.audit import FIRST, canonical, row_hash
from anomalyst.station.database import Database
from anomalyst.station.inspections import DECIDED, FACTS
from anomalyst.station.tables import (
    ApiKey,
    AuditRow,
    Golden,
    Inspection,
    Recipe,
    RecipeVersion,
)

_SETTINGS = ("recipe.version", "recipe.activate", "key.add", "golden.add", "golden.delete")
_VERSION = ("number", "bundle_sha256", "kind", "method", "thresholds", "note")
_SAMPLE = ("category", "image_sha256", "expected", "note")
_CHUNK = 1000
_MOST = 100


@dataclass
class Found:
    """What a verification has seen; ``head`` is the newest row's hash."""

    rows: int = 0
    inspections: int = 0
    head: str = FIRST
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def fault(self, text: str) -> None:
        """Take note of a fault; the first 100 are kept."""
        if len(self.faults) < _MOST:
            self.faults.append(text)


def verify(database: Database) -> Found:
    """Walk the whole log, and compare every inspection and decision with what it says."""
    found = Found()
    noted = database.witness.read() if database.witness else None
    with database.read() as session:
        for rows in _log(session):
            _check_chain(found, rows, noted)
            _check_subjects(session, found, rows)
        if noted is not None and noted[0] > found.rows:
            found.fault(f"row {noted[0]} was the last once: rows were removed from the end")
        if noted is None and found.rows and database.witness is not None:
            found.fault(
                f"{database.witness.path} is missing: without it nobody can tell whether rows were "
                "removed from the end"
            )
        for inspections in _inspections(session):
            _check_inspections(session, found, inspections)
        _check_settings(session, found)
    return found


def _log(session: Session) -> Iterator[Sequence[AuditRow]]:
    last = -(1 << 62)
    while True:
        query = select(AuditRow).where(AuditRow.seq > last).order_by(AuditRow.seq).limit(_CHUNK)
        rows = session.scalars(query).all()
        if not rows:
            return
        last = rows[-1].seq
        yield rows
        session.expunge_all()


def _check_chain(found: Found, rows: Sequence[AuditRow], noted: tuple[int, str] | None) -> None:
    for row in rows:
        if row.seq != found.rows + 1:
            found.fault(f"row {found.rows + 1}: missing, the next is {row.seq}")
        if row.previous != found.head:
            found.fault(f"row {row.seq}: does not follow the one before it")
        if row.hash != row_hash(row):
            found.fault(f"row {row.seq}: was changed, its hash differs")
        if noted is not None and row.seq == noted[0] and row.hash != noted[1]:
            found.fault(f"row {row.seq}: is not the one that was noted outside the database")
        found.rows, found.head = row.seq, row.hash


def _check_subjects(session: Session, found: Found, rows: Sequence[AuditRow]) -> None:
    """Every inspection that the log tells of must be there."""
    told = {r.subject.removeprefix("inspection:"): r.seq for r in rows if r.action == "inspect"}
    there = set(session.scalars(select(Inspection.uid).where(Inspection.uid.in_(told))))
    for uid in told.keys() - there:
        found.fault(f"row {told[uid]}: inspection {uid} was removed")


def _inspections(session: Session) -> Iterator[Sequence[Inspection]]:
    last = 0
    while True:
        query = select(Inspection).where(Inspection.id > last).order_by(Inspection.id)
        rows = session.scalars(query.limit(_CHUNK)).all()
        if not rows:
            return
        last = rows[-1].id
        yield rows
        session.expunge_all()


def _check_inspections(session: Session, found: Found, rows: Sequence[Inspection]) -> None:
    subjects = [f"inspection:{row.uid}" for row in rows]
    query = select(AuditRow).where(AuditRow.subject.in_(subjects)).order_by(AuditRow.seq)
    told: dict[tuple[str, str], list[AuditRow]] = {}
    for entry in session.scalars(query):
        told.setdefault((entry.subject, entry.action), []).append(entry)
    for row in rows:
        found.inspections += 1
        made = told.get((f"inspection:{row.uid}", "inspect"), [])
        if len(made) != 1:
            found.fault(f"inspection {row.uid}: {len(made)} rows of the log tell of it, not 1")
        elif made[0].detail != _facts(row, FACTS):
            found.fault(f"inspection {row.uid}: {_differing(row, made[0], FACTS)} was changed")
        decided = told.get((f"inspection:{row.uid}", "decide"), [])
        last = decided[-1].detail if decided else canonical(dict.fromkeys(DECIDED))
        if last != _facts(row, DECIDED):
            found.fault(f"inspection {row.uid}: its decision is not the one in the log")


def _check_settings(session: Session, found: Found) -> None:
    """Compare recipes, their versions, keys and golden samples with what the log says last."""
    told: dict[tuple[str, str], dict[str, Any]] = {}
    query = select(AuditRow).where(AuditRow.action.in_(_SETTINGS)).order_by(AuditRow.seq)
    for row in session.scalars(query):
        detail = json.loads(row.detail)
        kind = "golden" if row.action.startswith("golden") else row.action
        subject = f"{row.subject} {detail['number']}" if kind == "recipe.version" else row.subject
        told[kind, subject] = {**detail, "action": row.action}
    names = {recipe.id: recipe for recipe in session.scalars(select(Recipe))}
    active = {recipe.active_version_id for recipe in names.values()}
    for version in session.scalars(select(RecipeVersion)):
        subject = f"recipe:{names[version.recipe_id].name}"
        said = told.get(("recipe.version", f"{subject} {version.number}"), {})
        if any(said.get(name) != getattr(version, name) for name in _VERSION):
            found.fault(f"{subject}: version {version.number} is not as it was made")
        judging = told.get(("recipe.activate", subject), {}).get("number")
        if version.id in active and judging != version.number:
            found.fault(f"{subject}: version {version.number} judges, the log says {judging}")
    for key in session.scalars(select(ApiKey)):
        said = told.get(("key.add", f"key:{key.name}"), {})
        if (said.get("role"), said.get("sha256")) != (key.role, key.sha256):
            found.fault(f"key:{key.name}: is not as it was made")
    samples = {f"golden:{sample.id}": sample for sample in session.scalars(select(Golden))}
    kept = {s for (k, s), said in told.items() if k == "golden" and said["action"] == "golden.add"}
    for subject in samples.keys() ^ kept:
        found.fault(f"{subject}: is {'not in the log' if subject in samples else 'gone'}")
    for subject in samples.keys() & kept:
        said = told["golden", subject]
        if any(said[name] != getattr(samples[subject], name) for name in _SAMPLE):
            found.fault(f"{subject}: is not as it was made")


def _facts(row: Inspection, names: Sequence[str]) -> str:
    return canonical({name: getattr(row, name) for name in names})


def _differing(row: Inspection, entry: AuditRow, names: Sequence[str]) -> str:
    """Return the names of what differs from the log."""
    try:
        said = json.loads(entry.detail)
        now = json.loads(_facts(row, names))
        return ", ".join(name for name in names if said.get(name) != now[name]) or "something"
    except (ValueError, AttributeError):
        return "something"
