"""Golden samples: pictures that every change of a recipe must judge as expected, or it is blocked.

A must-pass sample holds when it is judged OK; a must-fail one when it is not let through, NG or for
review. A change breaks a sample that holds now and would not after it: one that fails already, such
as a defect that is about to be taught, blocks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from anomalyst.errors import InputError
from anomalyst.station import history
from anomalyst.station.confusion import verdict
from anomalyst.station.history import Model
from anomalyst.station.recipes import active_version, find_recipe
from anomalyst.station.refusals import Refusal
from anomalyst.station.tables import Golden, Inspection, Recipe, RecipeVersion
from anomalyst.types import Verdict

if TYPE_CHECKING:
    from anomalyst.station.bundles import Kept
    from anomalyst.station.core import Station
    from anomalyst.station.database import Change
    from anomalyst.station.verdicts import Thresholds

Judge = Callable[[str, Sequence[str]], Mapping[str, tuple[float, Verdict | None]]]
"""Score and verdict of pictures of a category by their hashes; those without are missing."""


@dataclass(frozen=True)
class Held:
    """A golden sample, before and after a change; ``inspection`` is one of its picture."""

    sample: Golden
    inspection: str | None
    score: float | None
    verdict: Verdict | None
    holds: bool
    held_before: bool

    @property
    def broken(self) -> bool:
        """Whether the change breaks it."""
        return self.held_before and not self.holds

    def to_dict(self) -> dict[str, Any]:
        """Return it as the API says it."""
        return {
            "id": self.sample.id,
            "inspection": self.inspection,
            "image_sha256": self.sample.image_sha256,
            "category": self.sample.category,
            "expected": self.sample.expected,
            "note": self.sample.note,
            "score": self.score,
            "verdict": self.verdict,
            "holds": self.holds,
            "held_before": self.held_before,
        }


def holds(expected: str, said: Verdict | None) -> bool:
    """Tell whether a verdict is as expected; none at all never is."""
    return said == "ok" if expected == "pass" else said in ("ng", "review")


def by(station: Station, model: Model) -> Judge:
    """Return how a version judges golden samples."""

    def judge(category: str, pictures: Sequence[str]) -> Mapping[str, tuple[float, Verdict | None]]:
        try:
            known = history.knowledge(station.settings, model, category)
        except InputError:  # a bundle that does not know the product passes nothing
            return {}
        limits = known.limits(category, model.thresholds)
        scores = history.scores(station, model, category, pictures)
        return {picture: (score, verdict(limits, score)) for picture, score in scores.items()}

    return judge


def check(station: Station, recipe: Recipe, after: Judge) -> list[Held]:
    """Judge a recipe's samples as its active version does, and as it would after a change."""
    with station.database.read() as session:
        query = select(Golden).where(Golden.recipe_id == recipe.id).order_by(Golden.id)
        samples = session.scalars(query).all()
        version = session.get(RecipeVersion, recipe.active_version_id or 0)
        shown = _inspections(session, recipe, [sample.image_sha256 for sample in samples])
    before = after if version is None else by(station, Model.of(version))
    found: list[Held] = []
    for category in dict.fromkeys(sample.category for sample in samples):
        own = [sample for sample in samples if sample.category == category]
        pictures = [sample.image_sha256 for sample in own]
        was, now = before(category, pictures), after(category, pictures)
        for sample in own:
            held = holds(sample.expected, was.get(sample.image_sha256, (None, None))[1])
            score, said = now.get(sample.image_sha256, (None, None))
            holding = holds(sample.expected, said)
            inspection = shown.get(sample.image_sha256)
            found.append(Held(sample, inspection, score, said, holding, held))
    return found


def _inspections(session: Session, recipe: Recipe, pictures: Sequence[str]) -> dict[str, str]:
    """Return the newest inspection in a recipe of each picture, by its hash."""
    query = (
        select(Inspection.image_sha256, Inspection.uid)
        .where(Inspection.recipe_id == recipe.id, Inspection.image_sha256.in_(pictures))
        .order_by(Inspection.id)
    )
    return {picture: uid for picture, uid in session.execute(query) if picture is not None}


def refuse_broken(found: Sequence[Held]) -> None:
    """Raise where a change breaks samples.

    Raises
    ------
    Refusal
        409, with the list.
    """
    broken = [each for each in found if each.broken]
    if broken:
        first, some = broken[0], f"{len(broken)} golden sample{'s' * (len(broken) != 1)}"
        named = f"must {first.sample.expected}, would be judged {first.verdict or 'not at all'}"
        raise Refusal(
            409,
            f"{some} would break (the first {named}); nothing was changed",
            broken=[each.to_dict() for each in broken],
        )


def require(station: Station, recipe: str, kept: Kept, thresholds: Thresholds | None) -> None:
    """Raise a `Refusal` (409) where a recipe with that bundle and thresholds breaks samples."""
    with station.database.read() as session:
        found = find_recipe(session, recipe)
    model = Model(kept.sha256, kept.kind, thresholds)
    refuse_broken(check(station, found, by(station, model)))


def add(station: Station, recipe: str, uid: str, expected: str, note: str, actor: str) -> Golden:
    """Make an inspected picture a golden sample of its category.

    Raises
    ------
    Refusal
        404: no such recipe or inspection; 409: it is one already; 422: it has no category.
    """
    with station.database.change(actor) as change:
        found = find_recipe(change.session, recipe)
        query = select(Inspection).where(Inspection.uid == uid, Inspection.recipe_id == found.id)
        part = change.session.scalars(query).first()
        if part is None:
            raise Refusal(404, f"recipe {recipe!r} has no inspection {uid!r}")
        if part.image_sha256 is None or part.category is None:
            raise Refusal(422, f"inspection {uid}: a golden sample needs a picture and a category")
        sample = Golden(
            recipe_id=found.id,
            category=part.category,
            image_sha256=part.image_sha256,
            expected=expected,
            note=note,
            created_by=actor,
        )
        change.session.add(sample)
        try:
            change.session.flush()
        except IntegrityError:
            raise Refusal(
                409, f"inspection {uid}: its picture is a golden sample already; delete that first"
            ) from None
        _record(change, "golden.add", recipe, sample)
        return sample


def delete(station: Station, recipe: str, number: int, actor: str) -> None:
    """Take a sample away; the log keeps that it was one.

    Raises
    ------
    Refusal
        404: there is no such.
    """
    with station.database.change(actor) as change:
        found = find_recipe(change.session, recipe)
        sample = change.session.get(Golden, number)
        if sample is None or sample.recipe_id != found.id:
            raise Refusal(404, f"recipe {recipe!r} has no golden sample {number}")
        _record(change, "golden.delete", recipe, sample)
        change.session.delete(sample)


def _record(change: Change, action: str, recipe: str, sample: Golden) -> None:
    change.record(
        action,
        f"golden:{sample.id}",
        recipe=recipe,
        category=sample.category,
        image_sha256=sample.image_sha256,
        expected=sample.expected,
        note=sample.note,
    )


def listed(station: Station, recipe: str) -> list[Held]:
    """Return a recipe's samples as they are judged now."""
    with station.database.read() as session:
        found = find_recipe(session, recipe)
        model = Model.of(active_version(session, found))
    return check(station, found, by(station, model))
