"""One picture in, one record out: judged, stored, committed, and only then acknowledged."""

from __future__ import annotations

import math
import re
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from anomalyst.errors import InputError
from anomalyst.predictions import to_record
from anomalyst.station.bundles import promise_of
from anomalyst.station.database import Change
from anomalyst.station.judges import Judged
from anomalyst.station.limits import check_pixels, shown_name
from anomalyst.station.pictures import media_type, pack_map
from anomalyst.station.recipes import active_version, find_recipe
from anomalyst.station.refusals import Refusal
from anomalyst.station.tables import Image, Inspection, now
from anomalyst.station.verdicts import Thresholds, limits_of, verdict_of

if TYPE_CHECKING:
    from anomalyst.station.core import Station


@dataclass(frozen=True)
class Target:
    """The version of a recipe that judges a picture, as it was when the picture came."""

    recipe_id: int
    recipe: str
    version_id: int
    number: int
    bundle_sha256: str
    kind: str
    thresholds: Thresholds | None


@dataclass(frozen=True)
class Incoming:
    """A picture and what its sender says of it."""

    content: bytes
    name: str
    category: str | None
    part_id: str | None
    source: str
    began: float


FACTS = (
    "uid",
    "recipe_id",
    "version_id",
    "bundle_sha256",
    "image_sha256",
    "image_name",
    "part_id",
    "category",
    "score",
    "p_value",
    "verdict",
    "threshold",
    "threshold_review",
    "calibrated",
    "by_hand",
    "regions",
    "map_sha256",
    "similarity",
    "source",
    "error",
    "actor",
    "created_at",
)
"""What the audit log holds of an inspection, and `verification` compares."""
DECIDED = ("decision", "decision_reason", "decided_by", "decided_at")
"""What it holds of a decision."""


def target_of(session: Session, recipe: str | None) -> Target:
    """Return what judges now, of a recipe or the only one."""
    found = find_recipe(session, recipe)
    version = active_version(session, found)
    return Target(
        found.id,
        found.name,
        version.id,
        version.number,
        version.bundle_sha256,
        version.kind,
        version.thresholds,
    )


def incoming(
    station: Station,
    content: bytes,
    name: str,
    *,
    source: str,
    category: str | None = None,
    part_id: str | None = None,
) -> Incoming:
    """Return a picture that may be judged; `InputError` or `Refusal` (413) where it may not."""
    name, limit = shown_name(name) or "image", station.settings.max_image
    if len(content) > limit:
        raise Refusal(413, f"{name}: over the limit of {limit >> 20} MiB a picture")
    check_pixels(content, name, station.settings.max_pixels)
    return Incoming(content, name, category or None, part_id or None, source, time.perf_counter())


def submit(station: Station, target: Target, picture: Incoming) -> Future[Judged]:
    """Let a picture wait to be judged."""
    return station.judges.submit(
        target.bundle_sha256, target.kind, picture.content, picture.category
    )


def inspect(station: Station, target: Target, picture: Incoming, actor: str) -> Inspection:
    """Judge a picture and store the result; when this returns, it is on the disk."""
    return keep(station, target, picture, submit(station, target, picture).result(), actor)


def keep(
    station: Station, target: Target, picture: Incoming, judged: Judged, actor: str
) -> Inspection:
    """Store a judged picture: files first, then rows in one transaction."""
    made = stored(station, target, picture, judged, actor)
    with station.database.change(actor) as change:
        write(change, made, picture, judged)
    count(station, target, made, picture)
    return made


def stored(
    station: Station, target: Target, picture: Incoming, judged: Judged, actor: str
) -> Inspection:
    """Return the record of a judged picture whose files are on the disk; it has no row yet.

    Raises
    ------
    InputError
        The picture could not be judged.
    """
    found = judged.prediction
    if found.error is not None:
        raise InputError(fault_of(picture, found.error))
    assert found.score_map is not None and found.score is not None
    if not math.isfinite(found.score):
        raise InputError(f"{picture.name}: the model's score is no number")
    promise = promise_of(station.settings, target.bundle_sha256, target.kind)
    levels = limits_of(*promise, target.thresholds, found.category)
    image = station.store.put(picture.content)
    packed = station.store.put(pack_map(found.score_map, judged.heat_unit))
    record: dict[str, Any] = to_record(found)
    half = None if judged.descriptor is None else judged.descriptor.astype(np.dtype("<f2"))
    return Inspection(
        uid=uuid.uuid4().hex,
        recipe_id=target.recipe_id,
        version_id=target.version_id,
        bundle_sha256=target.bundle_sha256,
        image_sha256=image,
        image_name=picture.name,
        part_id=picture.part_id,
        category=found.category,
        score=float(found.score),
        p_value=found.p_value,
        verdict=verdict_of(levels, found),
        threshold=levels.ng,
        threshold_review=levels.review,
        calibrated=levels.calibrated,
        by_hand=levels.by_hand,
        regions=record["regions"],
        map_sha256=packed,
        similarity=judged.similarity,
        descriptor=None if half is None else half.tobytes(),
        source=picture.source,
        seconds=time.perf_counter() - picture.began,
        actor=actor,
        created_at=now(),
    )


def fault_of(picture: Incoming, error: str) -> str:
    """Return what is wrong with a picture under its own name; the judge knows its number only."""
    return re.sub(r"^image-\d+", lambda _: picture.name, error)


def unreadable(target: Target, name: str, error: str, digest: str | None, actor: str) -> Inspection:
    """Return the record of a watched file that cannot be judged."""
    return Inspection(
        uid=uuid.uuid4().hex,
        recipe_id=target.recipe_id,
        version_id=target.version_id,
        bundle_sha256=target.bundle_sha256,
        image_sha256=digest,
        image_name=shown_name(name),
        calibrated=False,
        by_hand=False,
        regions=[],
        source="watch",
        error=error,
        seconds=0.0,
        actor=actor,
        created_at=now(),
    )


def write(
    change: Change, made: Inspection, picture: Incoming | None, judged: Judged | None
) -> None:
    """Add a record's rows to a transaction."""
    if picture is not None and judged is not None and judged.prediction.score_map is not None:
        size = judged.prediction.score_map.size
        remember_image(change.session, made.image_sha256 or "", picture.content, size)
    change.session.add(made)
    change.session.flush()
    facts = {name: getattr(made, name) for name in FACTS}
    change.record("inspect", f"inspection:{made.uid}", **facts)


def remember_image(session: Session, sha256: str, content: bytes, size: tuple[int, int]) -> None:
    """Add the row of a picture of the store, where there is none; ``size`` is (height, width)."""
    values = {
        "sha256": sha256,
        "bytes": len(content),
        "height": size[0],
        "width": size[1],
        "media_type": media_type(content),
        "created_at": now(),
    }
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    session.execute(insert(Image).values(**values).on_conflict_do_nothing())


def count(station: Station, target: Target, made: Inspection, picture: Incoming | None) -> None:
    """Count a stored record for the metrics."""
    word = "error" if made.error else made.verdict or "none"
    station.metrics.inspections.labels(target.recipe, word, made.source).inc()
    if picture is not None:
        station.metrics.seconds.observe(time.perf_counter() - picture.began)


def find_inspection(session: Session, uid: str) -> Inspection:
    """Return an inspection by its id, or a `Refusal` (404)."""
    found = session.scalars(select(Inspection).where(Inspection.uid == uid)).first()
    if found is None:
        raise Refusal(404, f"no inspection {uid!r}")
    return found


def image_bytes(station: Station, inspection: Inspection) -> bytes:
    """Return the bytes of an inspection's picture, or a `Refusal` (404)."""
    if inspection.image_sha256 is None:
        raise Refusal(404, "the picture could not be read when it came, and was not kept")
    return station.store.get(inspection.image_sha256)


def decide(station: Station, uid: str, decision: str, reason: str, actor: str) -> Inspection:
    """Store what an operator says of a part; the log keeps what was said before."""
    with station.database.change(actor) as change:
        query = select(Inspection).where(Inspection.uid == uid)
        if not station.database.sqlite:
            query = query.with_for_update()
        found = change.session.scalars(query).first()
        if found is None:
            raise Refusal(404, f"no inspection {uid!r}")
        found.decision, found.decision_reason = decision, reason
        found.decided_by, found.decided_at = actor, now()
        facts = {name: getattr(found, name) for name in DECIDED}
        change.record("decide", f"inspection:{uid}", **facts)
    station.metrics.decisions.labels(decision).inc()
    return found
