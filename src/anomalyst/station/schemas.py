"""What the API answers, as pydantic models: the OpenAPI is made of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from anomalyst.station.inspections import Target
from anomalyst.station.keys import Role
from anomalyst.station.tables import AuditRow, Inspection, RecipeVersion

PREFIX = "/api/v1"
Source = Literal["api", "watch", "page"]
Verdict = Literal["ok", "review", "ng"]
DecisionWord = Literal["good", "defect"]


class Error(BaseModel):
    """What is wrong, in one line."""

    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Error, "description": text}
    for code, text in {
        400: "The request makes no sense here",
        401: "No key, or a wrong one",
        403: "The key's role does not suffice",
        404: "There is no such thing",
        422: "A value or a picture cannot be used",
        429: "Too many requests",
        503: "Not now: the queue is full, or the database is gone",
    }.items()
}
CHANGES: dict[int | str, dict[str, Any]] = {
    409: {"model": Error, "description": "It would break something, or was done already"},
    413: {"model": Error, "description": "Too large"},
    415: {"model": Error, "description": "Not a picture or bundle by its Content-Type"},
    507: {"model": Error, "description": "The disk is full; nothing was stored"},
}


class Me(BaseModel):
    """Who asks."""

    name: str
    role: Role
    open: bool


class Category(BaseModel):
    """What a recipe knows of a category; ``needed_for``: normal images missing, by rate."""

    name: str
    calibrated: bool
    n_normal: int
    n_abnormal: int
    n_calibration: int
    needed_for: dict[str, int]


class Version(BaseModel):
    """One version of a recipe."""

    number: int
    bundle_sha256: str
    kind: Literal["bundle", "export"]
    method: str
    thresholds: dict[str, dict[str, float | None]] | None
    note: str
    parent: int | None
    created_by: str
    created_at: str
    active: bool

    @classmethod
    def of(cls, row: RecipeVersion, parent: int | None, active: bool) -> Version:
        """Return a version of a table's row."""
        return cls(
            number=row.number,
            bundle_sha256=row.bundle_sha256,
            kind="export" if row.kind == "export" else "bundle",
            method=row.method,
            thresholds=row.thresholds,
            note=row.note,
            parent=parent,
            created_by=row.created_by,
            created_at=row.created_at,
            active=active,
        )


class RecipeAnswer(BaseModel):
    """A recipe, its active version, what that knows, and why it cannot be taught (defects)."""

    name: str
    active: Version
    versions: int
    categories: list[Category]
    method: str
    kind: Literal["bundle", "export"]
    can_teach: bool
    why_not: str | None
    why_no_defects: str | None


class RegionAnswer(BaseModel):
    """A connected area above the pixel threshold, in pixels of the picture."""

    bbox: tuple[int, int, int, int]
    area: int
    score: float


class Links(BaseModel):
    """Addresses of what belongs to an inspection; null where there is nothing."""

    self: str
    image: str | None
    map: str | None
    overlay: str | None
    nearest: str | None


class InspectionAnswer(BaseModel):
    """An inspection: first the keys of ``predictions.jsonl``, then what the station knows."""

    id: str
    image: str
    category: str | None
    score: float | None
    p_value: float | None
    verdict: Verdict | None
    threshold: float | None
    calibrated: bool
    regions: list[RegionAnswer]
    map: str | None
    overlay: str | None
    error: str | None
    recipe: str
    version: int
    bundle_sha256: str
    image_sha256: str | None
    part_id: str | None
    threshold_review: float | None
    by_hand: bool
    similarity: float | None
    source: Source
    seconds: float
    actor: str
    created_at: str
    decision: DecisionWord | None
    decision_reason: str | None
    decided_by: str | None
    decided_at: str | None
    links: Links


_SAME = (
    *("category", "score", "p_value", "verdict", "threshold", "calibrated", "regions", "error"),
    *("bundle_sha256", "image_sha256", "part_id", "threshold_review", "by_hand", "similarity"),
    *("source", "seconds", "actor", "created_at"),
    *("decision", "decision_reason", "decided_by", "decided_at"),
)


def answer(row: Inspection, recipe: str, version: int) -> InspectionAnswer:
    """Return an inspection of a table's row, with the names of its recipe and version."""
    home = f"{PREFIX}/inspections/{row.uid}"
    drawn = row.map_sha256 is not None
    links = Links(
        self=home,
        image=f"{home}/image" if drawn else None,
        map=f"{home}/map" if drawn else None,
        overlay=f"{home}/overlay" if drawn else None,
        nearest=f"{home}/nearest" if row.similarity is not None else None,
    )
    return InspectionAnswer(
        id=row.uid,
        image=row.image_name,
        recipe=recipe,
        version=version,
        map=links.map,
        overlay=links.overlay,
        links=links,
        **{name: getattr(row, name) for name in _SAME},
    )


def fresh(row: Inspection, target: Target) -> InspectionAnswer:
    """Return an inspection that was just made."""
    return answer(row, target.recipe, target.number)


class BatchError(BaseModel):
    """A picture of a batch that was not judged, and why."""

    image: str
    error: str


class Page(BaseModel):
    """Inspections, newest first; ``next`` is the ``before`` of the following page."""

    items: list[InspectionAnswer]
    next: int | None


class WatchAnswer(BaseModel):
    """A watched folder."""

    folder: str
    recipe: str
    category: str | None
    created_by: str
    created_at: str
    inspected: int
    error: str | None


class AuditAnswer(BaseModel):
    """A row of the audit log; ``detail`` is JSON as it was hashed."""

    seq: int
    at: str
    actor: str
    action: str
    subject: str
    detail: str
    previous: str
    hash: str

    @classmethod
    def of(cls, row: AuditRow) -> AuditAnswer:
        """Return an answer of a table's row."""
        return cls(**{name: getattr(row, name) for name in cls.model_fields})


class AuditPage(BaseModel):
    """Rows, newest first; ``next`` is the ``before`` of the following page."""

    items: list[AuditAnswer]
    next: int | None


class Verification(BaseModel):
    """Whether the log and the records hold, and every fault that was found (the first 100)."""

    ok: bool
    rows: int
    inspections: int
    head: str
    faults: list[str]


class Health(BaseModel):
    """The station answers, and its database does."""

    status: Literal["ok"]
