"""Recipes: names that a line switches, each a row of versions of which one judges."""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from anomalyst.errors import InputError
from anomalyst.station.bundles import Kept
from anomalyst.station.database import Change
from anomalyst.station.refusals import Refusal
from anomalyst.station.tables import Recipe, RecipeVersion
from anomalyst.station.verdicts import Thresholds

_NAME = re.compile(r"\w[\w .+-]{0,99}")


def recipe_name(name: str) -> str:
    """Return a name that a recipe may have; it stands in addresses, so a slash is none."""
    if not _NAME.fullmatch(name) or name.endswith(" "):
        raise InputError(
            f"{name!r} is no name for a recipe: letters, digits, spaces and . _ + - "
            "(up to 100, the first a letter or digit)"
        )
    return name


def name_of_path(path: Path) -> str:
    """Return the recipe's name of a bundle's folder or ``.zip``."""
    place = path.resolve()
    return recipe_name(place.stem if place.suffix == ".zip" else place.name)


def find_recipe(session: Session, name: str | None) -> Recipe:
    """Return a recipe by its name; without one, the only one that there is.

    Raises
    ------
    Refusal
        404: there is none of that name; 400: no name, and several to choose from.
    """
    if name is None:
        recipes = session.scalars(select(Recipe).order_by(Recipe.id).limit(2)).all()
        if len(recipes) == 1:
            return recipes[0]
        if not recipes:
            raise Refusal(404, "there is no recipe yet: upload a bundle, or start with one")
        raise Refusal(400, "several recipes are here: name one with ?recipe=NAME")
    found = session.scalars(select(Recipe).where(Recipe.name == name)).first()
    if found is None:
        known = session.scalars(select(Recipe.name).order_by(Recipe.name).limit(20)).all()
        raise Refusal(404, f"no recipe {name!r}; there are: {', '.join(known) or 'none'}")
    return found


def active_version(session: Session, recipe: Recipe) -> RecipeVersion:
    """Return the version that judges."""
    found = session.get(RecipeVersion, recipe.active_version_id or 0)
    if found is None:
        raise Refusal(404, f"recipe {recipe.name!r} has no version yet")
    return found


def find_version(session: Session, recipe: Recipe, number: int) -> RecipeVersion:
    """Return a version by its number."""
    query = select(RecipeVersion).where(
        RecipeVersion.recipe_id == recipe.id, RecipeVersion.number == number
    )
    found = session.scalars(query).first()
    if found is None:
        raise Refusal(404, f"recipe {recipe.name!r} has no version {number}")
    return found


def same_version(session: Session, recipe: Recipe, kept: Kept) -> RecipeVersion | None:
    """Return the version with that bundle and no thresholds by hand, if there is one."""
    query = select(RecipeVersion).where(
        RecipeVersion.recipe_id == recipe.id,
        RecipeVersion.bundle_sha256 == kept.sha256,
        RecipeVersion.thresholds.is_(None),
    )
    return session.scalars(query.order_by(RecipeVersion.number)).first()


def get_or_add_recipe(change: Change, name: str) -> Recipe:
    """Return the recipe of a name, a new one where there is none."""
    query = select(Recipe).where(Recipe.name == recipe_name(name))
    found = change.session.scalars(query).first()
    if found is None:
        found = Recipe(name=name)
        change.session.add(found)
        change.session.flush()
        change.record("recipe.add", f"recipe:{name}", id=found.id)
    return found


def add_version(
    change: Change,
    recipe: Recipe,
    kept: Kept,
    *,
    thresholds: Thresholds | None = None,
    note: str = "",
    make_active: bool = True,
) -> RecipeVersion:
    """Add a version after the last one, with its row of the audit log; nothing is committed yet."""
    session = change.session
    session.refresh(recipe, with_for_update=session.get_bind().dialect.name != "sqlite")
    last = session.scalar(
        select(func.max(RecipeVersion.number)).where(RecipeVersion.recipe_id == recipe.id)
    )
    levels = None if thresholds is None else {k: dict(v) for k, v in thresholds.items()}
    version = RecipeVersion(
        recipe_id=recipe.id,
        number=(last or 0) + 1,
        bundle_sha256=kept.sha256,
        kind=kept.kind,
        method=kept.method,
        thresholds=levels,
        note=note,
        parent_id=recipe.active_version_id,
        created_by=change.actor,
    )
    session.add(version)
    session.flush()
    change.record(
        "recipe.version",
        f"recipe:{recipe.name}",
        number=version.number,
        bundle_sha256=kept.sha256,
        kind=kept.kind,
        method=kept.method,
        thresholds=levels,
        note=note,
    )
    if make_active:
        activate(change, recipe, version, note)
    return version


def activate(change: Change, recipe: Recipe, version: RecipeVersion, note: str = "") -> None:
    """Let a version judge from now on."""
    former = change.session.get(RecipeVersion, recipe.active_version_id or 0)
    recipe.active_version_id = version.id
    change.record(
        "recipe.activate",
        f"recipe:{recipe.name}",
        number=version.number,
        former=None if former is None else former.number,
        note=note,
    )
