"""Recipes: list, upload, switch."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from anomalyst.errors import InputError
from anomalyst.station.access import Engineer, StationHere, Viewer
from anomalyst.station.bundles import Kept, categories_of, keep_bundle, manifest_of
from anomalyst.station.core import Station
from anomalyst.station.judges import load_model
from anomalyst.station.lesson import teachable
from anomalyst.station.limits import Note, Short
from anomalyst.station.recipes import (
    activate,
    active_version,
    add_version,
    find_recipe,
    find_version,
    get_or_add_recipe,
    recipe_name,
    same_version,
)
from anomalyst.station.refusals import Refusal
from anomalyst.station.schemas import CHANGES, RecipeAnswer, Version
from anomalyst.station.tables import Recipe, RecipeVersion
from anomalyst.station.uploads import BUNDLE, bundle_of

router = APIRouter(prefix="/recipes", tags=["recipes"])
Name = Annotated[Short, Path(description="A recipe's name")]


class Activation(BaseModel):
    """Which version shall judge from now on, and why."""

    number: Annotated[int, Query(ge=1, le=1_000_000)]
    note: Note = ""


@router.get("")
def list_recipes(station: StationHere, _: Viewer) -> list[RecipeAnswer]:
    """List recipes with the version that judges and what it can promise."""
    with station.database.read() as session:
        recipes = session.scalars(select(Recipe).order_by(Recipe.name)).all()
        ready = [recipe for recipe in recipes if recipe.active_version_id is not None]
        return [_answer(station, session, recipe) for recipe in ready]


@router.get("/{name}/versions")
def list_versions(station: StationHere, _: Viewer, name: Name) -> list[Version]:
    """List a recipe's versions, newest first."""
    with station.database.read() as session:
        return _versions(session, find_recipe(session, name))


@router.post("", status_code=201, openapi_extra=BUNDLE, responses=CHANGES)
async def upload_recipe(
    request: Request,
    station: StationHere,
    caller: Engineer,
    name: Annotated[Short, Query(description="A new recipe, or one that gets a new version")],
    note: Annotated[Note, Query()] = "",
) -> RecipeAnswer:
    """Take in a bundle's or export's ``.zip``: every hash is checked and the model is loaded."""
    recipe_name(name)
    path = await bundle_of(request, station.uploads)
    try:
        kept = await run_in_threadpool(_keep, station, path)
    finally:
        path.unlink(missing_ok=True)
    return await run_in_threadpool(_add, station, caller.name, name, note, kept)


@router.post("/{name}/activate", responses=CHANGES)
def activate_version(
    station: StationHere, caller: Engineer, name: Name, body: Activation
) -> RecipeAnswer:
    """Let another version judge: forward, or back to an old one."""
    with station.database.read() as session:
        version = find_version(session, find_recipe(session, name), body.number)
        kept = _kept(version)
    station.check_change(name, kept, version.thresholds)
    station.judges.run(lambda: station.judges.judge(kept.sha256, kept.kind))
    with station.database.change(caller.name) as change:
        recipe = find_recipe(change.session, name)
        activate(change, recipe, find_version(change.session, recipe, body.number), body.note)
    return _one(station, name)


def _keep(station: Station, path: Any) -> Kept:
    """Keep an uploaded bundle that can be loaded; errors name the upload, not a file here."""
    try:
        kept = keep_bundle(station.settings, path)
        station.judges.run(lambda: load_model(station.settings, kept.sha256, kept.kind))
    except InputError as error:
        words = str(error).replace(f"{path}/", "").replace(str(path), "the upload")
        raise InputError(words.replace(path.name, "the upload")) from error
    return kept


def _add(station: Station, actor: str, name: str, note: str, kept: Kept) -> RecipeAnswer:
    with station.database.read() as session:
        found = session.scalars(select(Recipe).where(Recipe.name == name)).first()
        if found is not None and (known := same_version(session, found, kept)) is not None:
            raise Refusal(409, f"this bundle is version {known.number} of {name!r} already")
    if found is not None:
        station.check_change(name, kept, None)
    with station.database.change(actor) as change:
        add_version(change, get_or_add_recipe(change, name), kept, note=note)
    return _one(station, name)


def _one(station: Station, name: str) -> RecipeAnswer:
    with station.database.read() as session:
        return _answer(station, session, find_recipe(session, name))


def _kept(version: RecipeVersion) -> Kept:
    kind: Any = version.kind
    return Kept(version.bundle_sha256, kind, version.method)


def _answer(station: Station, session: Session, recipe: Recipe) -> RecipeAnswer:
    version = active_version(session, recipe)
    query = select(func.count()).where(RecipeVersion.recipe_id == recipe.id)
    parent = session.get(RecipeVersion, version.parent_id or 0)
    shown = Version.of(version, None if parent is None else parent.number, True)
    known = manifest_of(station.settings, version.bundle_sha256, version.kind)
    lessons = teachable(version.kind, version.method, known["options"])
    categories: Any = categories_of(station.settings, version.bundle_sha256, version.kind)
    return RecipeAnswer(
        name=recipe.name,
        active=shown,
        versions=session.scalar(query) or 0,
        categories=categories,
        method=version.method,
        kind=shown.kind,
        can_teach=lessons.normal,
        why_not=lessons.why_not,
        why_no_defects=lessons.why_no_defects,
    )


def _versions(session: Session, recipe: Recipe) -> list[Version]:
    query = select(RecipeVersion).where(RecipeVersion.recipe_id == recipe.id)
    rows = session.scalars(query.order_by(RecipeVersion.number.desc())).all()
    numbers = {row.id: row.number for row in rows}
    active = recipe.active_version_id
    return [Version.of(row, numbers.get(row.parent_id or 0), row.id == active) for row in rows]
