"""Who asks, the audit log, watched folders, health and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy import select

from anomalyst.station.access import Engineer, StationHere, Viewer
from anomalyst.station.limits import Short, too_often
from anomalyst.station.schemas import (
    CHANGES,
    ERRORS,
    AuditAnswer,
    AuditPage,
    Health,
    Me,
    Verification,
    WatchAnswer,
)
from anomalyst.station.tables import AuditRow
from anomalyst.station.verification import verify

router = APIRouter(tags=["station"])
root = APIRouter(tags=["station"])


class WatchGiven(BaseModel):
    """A folder to watch, judged by a recipe; the only recipe by default."""

    folder: Short
    recipe: Short | None = None
    category: Short | None = None


@router.get("/me")
def me(caller: Viewer) -> Me:
    """Say who asks; ``open`` is true where no key is needed."""
    return Me(name=caller.name, role=caller.role, open=caller.open)


@router.get("/audit")
def list_audit(
    station: StationHere,
    _: Viewer,
    before: Annotated[int | None, Query(ge=1, le=1 << 62)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> AuditPage:
    """List the audit log, newest first."""
    query = select(AuditRow).order_by(AuditRow.seq.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(AuditRow.seq < before)
    with station.database.read() as session:
        rows = session.scalars(query).all()
    following = rows[limit - 1].seq if len(rows) > limit else None
    return AuditPage(items=[AuditAnswer.of(row) for row in rows[:limit]], next=following)


@router.get("/audit/verify")
def verify_audit(station: StationHere, _: Viewer) -> Verification:
    """Walk the whole audit log and compare it with the inspections and decisions."""
    found = verify(station.database)
    return Verification(
        ok=found.ok,
        rows=found.rows,
        inspections=found.inspections,
        head=found.head,
        faults=found.faults,
    )


@router.get("/watch")
def list_watched(station: StationHere, _: Viewer) -> list[WatchAnswer]:
    """List watched folders."""
    return station.watcher.folders()


@router.post("/watch", status_code=201, responses=CHANGES)
def watch_folder(station: StationHere, caller: Engineer, body: WatchGiven) -> list[WatchAnswer]:
    """Watch a folder of the station's machine from now on, pictures that lie there included."""
    station.watcher.add(Path(body.folder), body.recipe, body.category, caller.name)
    return station.watcher.folders()


@router.delete("/watch", responses=CHANGES)
def unwatch_folder(station: StationHere, caller: Engineer, folder: Short) -> list[WatchAnswer]:
    """Stop watching a folder, named as it is listed."""
    station.watcher.remove(folder, caller.name)
    return station.watcher.folders()


@root.get("/healthz", responses={code: ERRORS[code] for code in (429, 503)})
def health(request: Request, station: StationHere) -> Health:
    """Say whether the station and its database answer; no key is needed."""
    if not station.buckets.take(request.client.host if request.client else ""):
        raise too_often()
    station.database.check()
    return Health(status="ok")


@root.get(
    "/metrics",
    response_class=Response,
    responses={**ERRORS, 200: {"content": {"text/plain": {}}}},
)
def metrics(station: StationHere, _: Viewer) -> Response:
    """Return counts in Prometheus' text format."""
    return Response(station.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
