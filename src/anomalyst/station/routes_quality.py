"""What a quality manager asks: history, thresholds, teaching, golden samples, drift, the shift."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from anomalyst.station import calibration, golden, line, shift, teaching, thresholds
from anomalyst.station.access import Engineer, StationHere, Viewer
from anomalyst.station.core import Station
from anomalyst.station.limits import Short
from anomalyst.station.schemas import CHANGES, Error, Version
from anomalyst.station.schemas_quality import (
    Broken,
    CalibrationPictures,
    DriftAnswer,
    GoldenAnswer,
    GoldenTaken,
    History,
    Lesson,
    LessonSaved,
    NoteTaken,
    RepeatabilityAnswer,
    TeachAnswer,
    ThresholdsAnswer,
    ThresholdsSaved,
    ThresholdsTaken,
)
from anomalyst.station.tables import RecipeVersion
from anomalyst.station.teaching import Defect
from anomalyst.station.thresholds import Levels
from anomalyst.station.uploads import BODY, picture_of

router = APIRouter(prefix="/recipes", tags=["quality"])

_BLOCKED: dict[int | str, dict[str, Any]] = {
    **CHANGES,
    409: {"model": Broken, "description": "Golden samples would break, or it was changed since"},
}
_CANNOT: dict[int | str, dict[str, Any]] = {
    **CHANGES,
    409: {"model": Error, "description": "It cannot be done with this recipe, or was done already"},
}
_PAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {}}}}
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
Category = Annotated[Short | None, Query(description="The only one there is, by default")]
Number = Annotated[int, Path(ge=1, le=1 << 53)]
Parts = Annotated[list[Short] | None, Query(max_length=500)]


@router.get("/{name}/history")
def history(
    name: Short, station: StationHere, caller: Viewer, category: Category = None
) -> History:
    """Return decided parts as the active version scores them, beside its calibration."""
    return History.model_validate(thresholds.past(station, name, category))


@router.post("/{name}/thresholds/preview", responses=_CANNOT)
def preview_thresholds(
    name: Short, taken: ThresholdsTaken, station: StationHere, caller: Engineer
) -> ThresholdsAnswer:
    """Say how history and golden samples would be judged under other thresholds."""
    levels = Levels(taken.category, taken.ng, taken.review)
    return ThresholdsAnswer.model_validate(thresholds.preview(station, name, levels))


@router.post("/{name}/thresholds", status_code=201, responses=_BLOCKED)
def save_thresholds(
    name: Short, taken: ThresholdsSaved, station: StationHere, caller: Engineer
) -> Version:
    """Let a new version with these thresholds judge from now on."""
    levels = Levels(taken.category, taken.ng, taken.review)
    return _version(station, thresholds.save(station, name, levels, taken.note, caller.name))


@router.post("/{name}/teach/preview", responses=_CANNOT)
def preview_teaching(
    name: Short, taken: Lesson, station: StationHere, caller: Engineer
) -> TeachAnswer:
    """Teach a copy, and say how history and golden samples would be judged by it."""
    return TeachAnswer.model_validate(teaching.preview(station, name, _request(taken)))


@router.post("/{name}/teach", status_code=201, responses=_BLOCKED)
def teach(name: Short, taken: LessonSaved, station: StationHere, caller: Engineer) -> Version:
    """Let what a preview learned judge from now on; without a token, what is given here."""
    token = taken.token
    if token is None:
        token = str(teaching.preview(station, name, _request(taken))["token"])
    return _version(station, teaching.save(station, name, token, taken.note, caller.name))


@router.get("/{name}/calibration")
def calibration_pictures(
    name: Short, station: StationHere, caller: Viewer, category: Category = None
) -> CalibrationPictures:
    """Say how many of the pictures that calibrated a category the station has."""
    return CalibrationPictures(**calibration.pictures(station, name, category))


@router.post("/{name}/calibration", openapi_extra=BODY, responses=_CANNOT)
async def give_calibration_picture(
    request: Request, name: Short, station: StationHere, caller: Engineer
) -> CalibrationPictures:
    """Give back a picture that calibrated the recipe, so that teaching can calibrate it anew."""
    content, _ = await picture_of(request, station.settings.max_image)
    found = await run_in_threadpool(calibration.give_back, station, name, content)
    return CalibrationPictures(**found)


@router.get("/{name}/golden")
def list_golden(name: Short, station: StationHere, caller: Viewer) -> list[GoldenAnswer]:
    """Return the golden samples as they are judged now."""
    return [GoldenAnswer(**each.to_dict()) for each in golden.listed(station, name)]


@router.post("/{name}/golden", status_code=201, responses=_CANNOT)
def add_golden(
    name: Short, taken: GoldenTaken, station: StationHere, caller: Engineer
) -> GoldenAnswer:
    """Make an inspected picture a sample that every change must judge as expected."""
    made = golden.add(station, name, taken.inspection, taken.expected, taken.note, caller.name)
    found = next(each for each in golden.listed(station, name) if each.sample.id == made.id)
    return GoldenAnswer(**found.to_dict())


@router.delete("/{name}/golden/{number}", status_code=204, responses=_CANNOT)
def delete_golden(name: Short, number: Number, station: StationHere, caller: Engineer) -> Response:
    """Take a golden sample away."""
    golden.delete(station, name, number, caller.name)
    return Response(status_code=204)


@router.get("/{name}/drift")
def drift(
    name: Short, station: StationHere, caller: Viewer, category: Category = None
) -> DriftAnswer:
    """Say whether parts still look like those of the calibration."""
    return DriftAnswer.model_validate(line.drift_of(station, name, category))


@router.post("/{name}/drift/seen", responses=_CANNOT)
def see_drift(name: Short, taken: NoteTaken, station: StationHere, caller: Engineer) -> DriftAnswer:
    """Note what was found about an alarm; watching begins anew."""
    line.note_drift(station, name, taken.note, caller.name)
    return DriftAnswer.model_validate(line.drift_of(station, name, None))


@router.get("/{name}/repeatability")
def repeatability(
    name: Short, station: StationHere, caller: Viewer, part_id: Parts = None
) -> RepeatabilityAnswer:
    """Say how far the same part gets the same score and verdict; all parts seen twice, or some."""
    found = line.repeatability_of(station, name, part_id or [])
    return RepeatabilityAnswer.model_validate(found)


@router.get("/{name}/shift", response_class=Response, responses=_PAGE)
def shift_report(
    name: Short,
    station: StationHere,
    caller: Viewer,
    since: datetime | None = None,
    until: datetime | None = None,
) -> HTMLResponse:
    """Return a page to print on what was judged, decided and changed; the last eight hours."""
    page = shift.report(station, name, since, until)
    return HTMLResponse(page, headers={"Content-Security-Policy": _REPORT_POLICY})


def _request(taken: Lesson) -> teaching.Request:
    return teaching.Request(
        taken.category,
        tuple(taken.normal),
        tuple(Defect(each.id, each.box, each.mask) for each in taken.abnormal),
        taken.calibration,
    )


def _version(station: Station, row: RecipeVersion) -> Version:
    with station.database.read() as session:
        parent = session.get(RecipeVersion, row.parent_id or 0)
    return Version.of(row, None if parent is None else parent.number, True)
