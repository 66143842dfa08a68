"""Pictures in, inspections out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from anomalyst.errors import InputError
from anomalyst.station import queries
from anomalyst.station.access import Operator, StationHere, Viewer
from anomalyst.station.core import Station
from anomalyst.station.database import DatabaseGone, DiskFull
from anomalyst.station.inspections import (
    Target,
    decide,
    find_inspection,
    image_bytes,
    incoming,
    keep,
    submit,
    target_of,
)
from anomalyst.station.limits import Note, Short
from anomalyst.station.neighbours import nearest_good
from anomalyst.station.pictures import image_file, map_file, overlay_file
from anomalyst.station.refusals import Refusal, as_refusal
from anomalyst.station.schemas import (
    CHANGES,
    BatchError,
    DecisionWord,
    InspectionAnswer,
    Page,
    Verdict,
    answer,
    fresh,
)
from anomalyst.station.tables import Inspection, Recipe, RecipeVersion
from anomalyst.station.uploads import BODY, IMAGES, picture_of, pictures_of

router = APIRouter(prefix="/inspections", tags=["inspections"])

Uid = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
Side = Annotated[int | None, Query(ge=16, le=8192, description="Longest side in pixels")]
_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}}}
}


class Given(BaseModel):
    """What a sender says of pictures."""

    recipe: Short | None = None
    category: Short | None = None
    part_id: Short | None = None
    source: Literal["api", "page"] = "api"


class GivenOne(Given):
    """What a sender says of one picture; ``name`` counts where the body has none."""

    name: Short | None = None


def _filters(
    recipe: Short | None = None,
    verdict: Verdict | None = None,
    decision: DecisionWord | None = None,
    part_id: Short | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    pending: bool = False,
    before: Annotated[int | None, Query(ge=1, le=1 << 62)] = None,
) -> queries.Filters:
    return queries.Filters(recipe, verdict, decision, part_id, since, until, pending, before)


Filters = Annotated[queries.Filters, Depends(_filters)]


@router.post("", status_code=201, openapi_extra=BODY, responses=CHANGES)
async def inspect_picture(
    request: Request,
    station: StationHere,
    caller: Operator,
    given: Annotated[GivenOne, Query()],
) -> InspectionAnswer:
    """Judge the picture that is the body, and store it: acknowledged means on the disk.

    The body is the picture's bytes, or a multipart form with the file ``image``. Without a recipe
    the only one judges; without a category the picture's likeness tells it.
    """
    content, name = await picture_of(request, station.settings.max_image)
    target = await run_in_threadpool(_target, station, given.recipe)
    return await _judge(station, target, given, content, name or given.name or "image", caller.name)


@router.post("/batch", openapi_extra=IMAGES, responses=CHANGES)
async def inspect_batch(
    request: Request,
    station: StationHere,
    caller: Operator,
    given: Annotated[Given, Query()],
) -> list[InspectionAnswer | BatchError]:
    """Judge every file ``images`` of a multipart form, in order; each is stored by itself."""
    target = await run_in_threadpool(_target, station, given.recipe)
    turns = asyncio.Semaphore(8)

    async def one(file: UploadFile) -> InspectionAnswer | BatchError:
        async with turns:
            name = file.filename or "image"
            try:
                content = await file.read()
                return await _judge(station, target, given, content, name, caller.name)
            except (InputError, Refusal, DatabaseGone, DiskFull) as error:
                return BatchError(image=name[-255:], error=as_refusal(error).message)

    async with pictures_of(request, station.settings.max_batch_images) as files:
        return list(await asyncio.gather(*(one(file) for file in files)))


@router.get("")
def list_inspections(
    station: StationHere,
    _: Viewer,
    filters: Filters,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Page:
    """List inspections, newest first; ``pending`` are those that wait for an operator."""
    with station.database.read() as session:
        items, following = queries.page(session, filters, limit)
    return Page(items=items, next=following)


@router.get("/{uid}")
def get_inspection(station: StationHere, _: Viewer, uid: Uid) -> InspectionAnswer:
    """Return one inspection."""
    with station.database.read() as session:
        found = find_inspection(session, uid)
        return answer(found, *_names(session, found))


@router.get("/{uid}/image", response_class=Response, responses=_PICTURE)
def get_image(station: StationHere, _: Viewer, uid: Uid, side: Side = None) -> Response:
    """Return the picture as it came, or as PNG where browsers do not show it or ``side`` asks."""
    content, media_type = image_file(image_bytes(station, _found(station, uid)), side)
    return _lasting(content, media_type)


@router.get("/{uid}/map", response_class=Response, responses=_PNG)
def get_map(station: StationHere, _: Viewer, uid: Uid, side: Side = None) -> Response:
    """Return the score map as 8-bit grey: mid-grey (128) is where it turns strong."""
    return _lasting(map_file(_map(station, _found(station, uid)), side))


@router.get("/{uid}/overlay", response_class=Response, responses=_PNG)
def get_overlay(station: StationHere, _: Viewer, uid: Uid, side: Side = None) -> Response:
    """Return the picture under its heat map, regions outlined."""
    found = _found(station, uid)
    content, packed = image_bytes(station, found), _map(station, found)
    return _lasting(overlay_file(content, packed, found.regions, side))


@router.get("/{uid}/nearest", response_class=Response, responses=_PICTURE)
def get_nearest(station: StationHere, _: Viewer, uid: Uid, side: Side = None) -> Response:
    """Return the most similar picture of a good part; ``X-Inspection`` is that one's id."""
    with station.database.read() as session:
        found = nearest_good(station, session, find_inspection(session, uid))
    content, media_type = image_file(image_bytes(station, found), side)
    return Response(content, media_type=media_type, headers={"X-Inspection": found.uid})


class Decision(BaseModel):
    """What an operator says of a part."""

    decision: DecisionWord
    reason: Note = ""


@router.post("/{uid}/decision", responses=CHANGES)
def decide_inspection(
    station: StationHere, caller: Operator, uid: Uid, body: Decision
) -> InspectionAnswer:
    """Say what the part is; said again, the last counts and the audit log keeps all."""
    found = decide(station, uid, body.decision, body.reason, caller.name)
    with station.database.read() as session:
        return answer(found, *_names(session, found))


exports = APIRouter(tags=["inspections"])


@exports.get(
    "/inspections.csv",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {}}}},
)
def export_csv(station: StationHere, _: Viewer, filters: Filters) -> StreamingResponse:
    """Export inspections as CSV, newest first."""
    lines = queries.as_csv(_started(queries.every(station, filters)))
    return _download(lines, "text/csv; charset=utf-8", "inspections.csv")


@exports.get(
    "/inspections.jsonl",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/jsonl": {}}}},
)
def export_jsonl(station: StationHere, _: Viewer, filters: Filters) -> StreamingResponse:
    """Export inspections as one JSON object a line, newest first."""
    lines = queries.as_jsonl(_started(queries.every(station, filters)))
    return _download(lines, "application/jsonl", "inspections.jsonl")


def _started(rows: Iterator[InspectionAnswer]) -> Iterator[InspectionAnswer]:
    """Take the first row at once: what is wrong must be said before a status is sent."""
    first = next(rows, None)

    def all_of_them() -> Iterator[InspectionAnswer]:
        if first is not None:
            yield first
            yield from rows

    return all_of_them()


def _download(lines: Iterator[str], media_type: str, name: str) -> StreamingResponse:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(lines, media_type=media_type, headers=headers)


async def _judge(
    station: Station, target: Target, given: Given, content: bytes, name: str, actor: str
) -> InspectionAnswer:
    """Judge one picture without holding a thread while it waits."""
    picture = await run_in_threadpool(
        incoming,
        station,
        content,
        name,
        source=given.source,
        category=given.category,
        part_id=given.part_id,
    )
    judged = await asyncio.wrap_future(submit(station, target, picture))
    made = await run_in_threadpool(keep, station, target, picture, judged, actor)
    return fresh(made, target)


def _target(station: Station, recipe: str | None) -> Target:
    with station.database.read() as session:
        return target_of(session, recipe)


def _found(station: Station, uid: str) -> Inspection:
    with station.database.read() as session:
        return find_inspection(session, uid)


def _map(station: Station, found: Inspection) -> bytes:
    if found.map_sha256 is None:
        raise Refusal(404, "the picture could not be judged: there is no map")
    return station.store.get(found.map_sha256)


def _names(session: Any, found: Inspection) -> tuple[str, int]:
    recipe = session.get_one(Recipe, found.recipe_id)
    return recipe.name, session.get_one(RecipeVersion, found.version_id).number


def _lasting(content: bytes, media_type: str = "image/png") -> Response:
    """Return a picture that never changes: the browser may keep it."""
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(content, media_type=media_type, headers=headers)
