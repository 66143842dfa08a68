"""The known good picture that a picture is most like, to look at side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session, undefer

from anomalyst.station.bundles import reference_hashes
from anomalyst.station.refusals import Refusal
from anomalyst.station.tables import Inspection, RecipeVersion
from anomalyst.types import FloatArray

if TYPE_CHECKING:
    from anomalyst.station.core import Station

_MOST = 300  # of each kind, the newest


def nearest_good(station: Station, session: Session, inspection: Inspection) -> Inspection:
    """Return the nearest picture that the station has of a normal reference of the same category.

    Where it has none, the nearest that an operator called good.

    Raises
    ------
    Refusal
        404: the station has no such picture.
    """
    query = descriptor_of(inspection)
    if query is None:
        raise Refusal(404, "this picture has no descriptor to look for its like with")
    version = session.get(RecipeVersion, inspection.version_id)
    assert version is not None
    known = reference_hashes(
        station.settings, version.bundle_sha256, version.kind, inspection.category or ""
    )
    kinds = [Inspection.decision == "good"]
    if known:
        kinds.insert(0, Inspection.image_sha256.in_(sorted(known)[:5000]))
    for kind in kinds:
        found = _nearest(session, inspection, kind, query)
        if found is not None:
            return found
    raise Refusal(404, "the station has no picture of a good part of this category yet")


def descriptor_of(inspection: Inspection) -> FloatArray | None:
    """Return the unit vector of an inspection's picture; None where its model makes none."""
    packed = inspection.descriptor
    return None if packed is None else np.frombuffer(packed, dtype="<f2").astype(np.float32)


def _nearest(
    session: Session, inspection: Inspection, kind: ColumnElement[bool], query: FloatArray
) -> Inspection | None:
    choice = (
        select(Inspection)
        .options(undefer(Inspection.descriptor))
        .where(
            kind,
            or_(Inspection.decision.is_(None), Inspection.decision == "good"),
            Inspection.recipe_id == inspection.recipe_id,
            Inspection.category == inspection.category,
            Inspection.image_sha256 != inspection.image_sha256,
            Inspection.descriptor.is_not(None),
        )
        .order_by(Inspection.id.desc())
        .limit(_MOST)
    )
    rows = [(row, descriptor_of(row)) for row in session.scalars(choice)]
    alike = [(row, each) for row, each in rows if each is not None and each.shape == query.shape]
    if not alike:
        return None
    return max(alike, key=lambda pair: float(pair[1] @ query))[0]
