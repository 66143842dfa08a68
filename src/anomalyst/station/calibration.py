"""The pictures that calibrated a recipe, which a bundle knows by their hashes alone.

Teaching calibrates anew by the same pictures, so the station wants them back: a picture is taken
for one of them by its hash and by nothing else.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from anomalyst.errors import InputError
from anomalyst.station import history
from anomalyst.station.bundles import promise_of
from anomalyst.station.history import Model
from anomalyst.station.recipes import active_version, find_recipe

if TYPE_CHECKING:
    from anomalyst.station.core import Station


def pictures(station: Station, recipe: str, category: str | None) -> dict[str, Any]:
    """Return how many pictures calibrated a category, and how many of them are here."""
    model = _model(station, recipe)
    name = history.category_of(station.settings, model, category)
    known = history.knowledge(station.settings, model, name).calibration
    hashes = () if known is None else known.images
    here = sum(station.store.has(each) for each in hashes)
    return {"category": name, "pictures": len(hashes), "here": here}


def give_back(station: Station, recipe: str, content: bytes) -> dict[str, Any]:
    """Keep one of those pictures, and return what `pictures` does of its category.

    Raises
    ------
    InputError
        It is none of them.
    """
    model = _model(station, recipe)
    digest = hashlib.sha256(content).hexdigest()
    calibrations, _ = promise_of(station.settings, model.sha256, model.kind)
    name = next((name for name, known in calibrations.items() if digest in known.images), None)
    if name is None:
        raise InputError(
            f"not one of the pictures that calibrated {recipe!r}: give the very files, or inspect "
            "good parts and decide them good"
        )
    station.store.put(content)
    return pictures(station, recipe, name)


def _model(station: Station, recipe: str) -> Model:
    with station.database.read() as session:
        return Model.of(active_version(session, find_recipe(session, recipe)))
