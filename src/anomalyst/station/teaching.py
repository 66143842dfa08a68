"""Teaching a recipe from inspected parts: seen first, then saved as a new version.

A preview learns in a copy, judges history and golden samples by it, and keeps it under a token, so
that saving computes nothing again. Meanwhile the line is judged by the active version.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from PIL import Image as Picture
from sqlalchemy import select

from anomalyst.bundle import bundle_hash
from anomalyst.errors import InputError
from anomalyst.files import replace_file
from anomalyst.station import drafts, golden, history, lesson
from anomalyst.station.bundles import Kept, keep_bundle, manifest_of
from anomalyst.station.confusion import Label, confusion, ordered
from anomalyst.station.copies import Copy
from anomalyst.station.history import Labelled, Model
from anomalyst.station.lesson import Lesson
from anomalyst.station.recipes import active_version, add_version, find_recipe
from anomalyst.station.refusals import Refusal
from anomalyst.station.tables import Golden, Image, Inspection, Recipe, RecipeVersion, Teaching
from anomalyst.types import BoolArray, Verdict

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from anomalyst.station.core import Station

_T = TypeVar("_T")


@dataclass(frozen=True)
class Defect:
    """A defective part and where its defect is: a box (x, y, w, h), or a PNG as base64 text."""

    id: str
    box: tuple[int, int, int, int] | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Request:
    """What to teach of inspected parts; ``calibration`` says what calibrates the new version.

    ``kept``: the pictures that calibrated the old one, those of them that the station has.
    ``history``: parts decided good as well, which are no references and no golden samples.
    """

    category: str | None
    normal: tuple[str, ...] = ()
    abnormal: tuple[Defect, ...] = ()
    calibration: Literal["kept", "history"] = "kept"


@dataclass(frozen=True)
class _Taught:
    """A picture to learn."""

    uid: str
    image_sha256: str
    mask: BoolArray | None = None


@dataclass(frozen=True)
class _Start:
    """All that a preview reads from the database."""

    recipe: Recipe
    version: RecipeVersion
    category: str
    taught: list[_Taught]
    parts: list[Labelled]
    golden: frozenset[str]


# ---- preview ------------------------------------------------------------------------------------


def preview(station: Station, recipe: str, request: Request) -> dict[str, Any]:
    """Teach a copy, and return how history and golden samples would be judged by it.

    Raises
    ------
    Refusal
        404: no such recipe or inspection; 409: this recipe cannot be taught that.
    InputError
        A part, box or mask is of no use.
    """
    start = _start(station, recipe, request)
    copy = Copy(station, Model.of(start.version))
    _learn(station, copy, start)
    spared = start.golden | {each.image_sha256 for each in start.taught}
    used = [
        part
        for part in start.parts
        if request.calibration == "history"
        and part.label == "good"
        and part.image_sha256 not in spared
    ]
    calibrated = copy.calibrate(start.category, [part.image_sha256 for part in used])
    held = golden.check(station, start.recipe, copy.judge_golden)
    found = {
        "category": start.category,
        **foresee(station, Model.of(start.version), copy, start.category, start.parts),
        "golden": [each.to_dict() for each in held],
        "blocked": any(each.broken for each in held),
        "calibration": calibrated.to_dict(copy.decision, used),
    }
    folder = drafts.new(station.settings, copy.detector)
    copy.remember(bundle_hash(drafts.bundle(folder)))
    facts = {
        "recipe": start.recipe.id,
        "base": start.version.id,
        "category": start.category,
        "thresholds": copy.thresholds,
        "taught": [_noted(each, k, folder) for k, each in enumerate(start.taught)],
        "result": {key: found[key] for key in ("before", "after", "calibration")},
    }
    drafts.note(folder, facts)
    return {"token": folder.name, **found}


def foresee(
    station: Station, before: Model, copy: Copy, category: str, parts: Sequence[Labelled]
) -> dict[str, Any]:
    """Return what becomes of labelled parts: counted and in order, before and after.

    Parts that either of the two compares with are left out of both.
    """
    was, now = history.knowledge(station.settings, before, category), copy.knowledge(category)
    limits = was.limits(category, before.thresholds), now.limits(category, copy.thresholds)
    parts = [p for p in parts if p.image_sha256 not in was.references | now.references]
    pictures = [part.image_sha256 for part in parts]
    scored = history.scores(station, before, category, pictures), copy.look(category, pictures)
    rows: list[tuple[Labelled, tuple[float, float], tuple[Verdict | None, Verdict | None]]] = []
    for part in parts:
        picture = part.image_sha256
        if picture in scored[0] and picture in scored[1]:
            pair = scored[0][picture], scored[1][picture].score
            said = (
                history.unseen_verdict(was, limits[0], picture, pair[0]),
                history.unseen_verdict(now, limits[1], picture, pair[1]),
            )
            rows.append((part, pair, said))

    def told(side: int) -> dict[str, Any]:
        counts = confusion((part.label, said[side]) for part, _, said in rows)
        return {**counts.to_dict(), "ordered": ordered((p.label, s[side]) for p, s, _ in rows)}

    return {
        "before": told(0),
        "after": told(1),
        "changed": [
            {
                "id": part.uid,
                "label": part.label,
                "before": said[0],
                "after": said[1],
                "score_before": pair[0],
                "score_after": pair[1],
            }
            for part, pair, said in rows
            if said[0] != said[1]
        ],
    }


def _start(station: Station, recipe: str, request: Request) -> _Start:
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        version = active_version(session, found)
        model = Model.of(version)
        _require_teachable(station, version, request)
        category = history.category_of(station.settings, model, request.category)
        marked = [(uid, None) for uid in request.normal]
        taught = [_taught(session, found, category, uid, each) for uid, each in marked]
        taught += [_taught(session, found, category, each.id, each) for each in request.abnormal]
        samples = session.scalars(
            select(Golden.image_sha256).where(
                Golden.recipe_id == found.id, Golden.category == category
            )
        )
        parts = history.labelled(session, found, category)
        return _Start(found, version, category, taught, parts, frozenset(samples))


def _require_teachable(station: Station, version: RecipeVersion, request: Request) -> None:
    options = manifest_of(station.settings, version.bundle_sha256, version.kind).get("options")
    can = lesson.teachable(version.kind, version.method, options)
    for wanted, why in ((request.normal, can.why_not), (request.abnormal, can.why_no_defects)):
        if wanted and why is not None:
            raise Refusal(409, why)
    if not request.normal and not request.abnormal:
        raise InputError("nothing to teach: give ids of inspections as normal or abnormal")


def _taught(
    session: Session, recipe: Recipe, category: str, uid: str, defect: Defect | None
) -> _Taught:
    """Return an inspected part as what it is to be learned as."""
    query = select(Inspection).where(Inspection.uid == uid, Inspection.recipe_id == recipe.id)
    part = session.scalars(query).first()
    if part is None:
        raise Refusal(404, f"recipe {recipe.name!r} has no inspection {uid!r}")
    picture = session.get(Image, part.image_sha256 or "")
    if picture is None:
        raise InputError(f"inspection {uid}: its picture could not be read")
    if part.category != category:
        raise InputError(f"inspection {uid}: of category {part.category!r}, not {category!r}")
    contrary: Label = "defect" if defect is None else "good"
    if part.decision == contrary:
        raise InputError(f"inspection {uid}: was decided {contrary}; change the decision first")
    if defect is None:
        return _Taught(uid, picture.sha256)
    if (defect.box is None) == (defect.mask is None):
        raise InputError(f"inspection {uid}: mark the defect by a box or a mask")
    size = (picture.height, picture.width)
    try:
        if defect.box is not None:
            return _Taught(uid, picture.sha256, lesson.box_mask(defect.box, *size))
        return _Taught(uid, picture.sha256, lesson.png_mask(defect.mask or "", *size))
    except InputError as error:
        raise InputError(f"inspection {uid}: {error}") from None


def _learn(station: Station, copy: Copy, start: _Start) -> None:
    """Let a copy learn; errors name inspections, not files of the store."""
    named = [(station.store.path(each.image_sha256), each) for each in start.taught]
    normal = tuple(path for path, each in named if each.mask is None)
    abnormal = tuple((path, each.mask) for path, each in named if each.mask is not None)
    try:
        copy.learn(Lesson(start.category, normal, abnormal))
    except InputError as error:
        words = str(error)
        for path, each in named:
            words = words.replace(str(path), f"inspection {each.uid}")
        raise InputError(words) from error


def _noted(taught: _Taught, number: int, folder: Path) -> dict[str, Any]:
    """Write a mask into the draft, and return what is noted of the picture."""
    name = None
    if taught.mask is not None:
        blob, name = io.BytesIO(), f"mask-{number}.png"
        Picture.fromarray(taught.mask).save(blob, "PNG")
        replace_file(folder / name, blob.getvalue())
    return {"id": taught.uid, "image_sha256": taught.image_sha256, "mask": name}


# ---- save ---------------------------------------------------------------------------------------


def save(station: Station, recipe: str, token: str, note: str, actor: str) -> RecipeVersion:
    """Make a preview the recipe's new version, which judges from now on.

    Raises
    ------
    Refusal
        404: the preview is gone; 409: the recipe has changed since, or golden samples would break.
    """
    folder, facts = drafts.find(station.settings, token)
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        _require_unchanged(found, facts)
    kept = keep_bundle(station.settings, drafts.bundle(folder))
    golden.require(station, recipe, kept, facts["thresholds"])
    masks = [
        None if each["mask"] is None else station.store.put((folder / each["mask"]).read_bytes())
        for each in facts["taught"]
    ]
    version = _add(station, recipe, kept, facts, masks, note, actor)
    drafts.drop(folder)
    return version


def _add(
    station: Station,
    recipe: str,
    kept: Kept,
    facts: dict[str, Any],
    masks: Sequence[str | None],
    note: str,
    actor: str,
) -> RecipeVersion:
    with station.database.change(actor) as change:
        found = find_recipe(change.session, recipe)
        _require_unchanged(found, facts)
        version = add_version(change, found, kept, thresholds=facts["thresholds"], note=note)
        for taught, mask in zip(facts["taught"], masks, strict=True):
            change.session.add(
                Teaching(
                    recipe_id=found.id,
                    image_sha256=taught["image_sha256"],
                    category=facts["category"],
                    label="normal" if mask is None else "abnormal",
                    mask_sha256=mask,
                    created_by=actor,
                    version_id=version.id,
                )
            )
        change.record(
            "recipe.teach",
            f"recipe:{recipe}",
            number=version.number,
            category=facts["category"],
            taught=[{**each, "mask": m} for each, m in zip(facts["taught"], masks, strict=True)],
            **facts["result"],
        )
        return version


def _require_unchanged(recipe: Recipe, facts: dict[str, Any]) -> None:
    if recipe.id != facts["recipe"]:
        raise Refusal(404, f"this preview is not of recipe {recipe.name!r}")
    if recipe.active_version_id != facts["base"]:
        raise Refusal(409, "the recipe has changed since this preview: preview again")
