"""Parts whose truth an operator said, judged again by any version of the recipe.

Scores of a bundle are kept by its hash and the picture's, so that a threshold may be dragged over
history without judging anything twice. Pictures are judged in turns with the line's own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from anomalyst.errors import unknown
from anomalyst.scoring import Calibration, Decision
from anomalyst.station.bundles import categories_of, manifest_of
from anomalyst.station.confusion import Label, verdict
from anomalyst.station.tables import Inspection, Recipe, RecipeVersion
from anomalyst.station.verdicts import Limits, Thresholds, limits_of
from anomalyst.types import Verdict

if TYPE_CHECKING:
    from anomalyst.station.core import Station
    from anomalyst.station.judges import Judges
    from anomalyst.station.settings import Settings

NEWEST = 200
"""Parts of each label that are judged again; older ones say less of the line as it is."""

_TURN = 8  # pictures after which the line's own come first
_KEPT_SCORES = 200_000
_T = TypeVar("_T")
_R = TypeVar("_R")


class Model(NamedTuple):
    """What judges: a bundle or an export by its hash, and limits by hand."""

    sha256: str
    kind: str
    thresholds: Thresholds | None

    @classmethod
    def of(cls, version: RecipeVersion) -> Model:
        """Return what a version judges with."""
        return cls(version.bundle_sha256, version.kind, version.thresholds)


@dataclass(frozen=True)
class Labelled:
    """A part whose truth was said; ``flagged`` if it had been judged NG or for review."""

    uid: str
    image_sha256: str
    label: Label
    flagged: bool
    decided_at: str


@dataclass(frozen=True)
class Knowledge:
    """What a bundle knows of one category: its calibration, levels, and all its pictures."""

    calibration: Calibration | None
    decision: Decision
    references: frozenset[str]

    def limits(self, category: str, thresholds: Thresholds | None) -> Limits:
        """Return the limits that judge a category under thresholds by hand, if there are any."""
        known = {} if self.calibration is None else {category: self.calibration}
        return limits_of(known, self.decision, thresholds, category)


def knowledge(settings: Settings, model: Model, category: str) -> Knowledge:
    """Return what a bundle says of a category.

    Raises
    ------
    InputError
        It does not know that category.
    """
    manifest = manifest_of(settings, model.sha256, model.kind)
    known = manifest["categories"].get(category)
    if known is None:
        raise unknown("category", category, manifest["categories"])
    calibration = None
    if known["calibration_scores"]:
        calibration = Calibration.of(
            known["calibration_scores"], known["calibration_maxima"], known["calibration_sha256"]
        )
    learned = [*manifest.get("trained_on", []), *known.get("abnormal", [])]
    learned += known["references"] if model.kind == "bundle" else []
    hashes = frozenset(record["sha256"] for record in learned)
    return Knowledge(calibration, Decision(manifest["alpha"], manifest["alpha_review"]), hashes)


def category_of(settings: Settings, model: Model, category: str | None) -> str:
    """Return a category of a bundle: the one named, or the only one.

    Raises
    ------
    InputError
        It is not known, or none was named and there are several.
    """
    names = [row["name"] for row in categories_of(settings, model.sha256, model.kind)]
    if category is None and len(names) == 1:
        return str(names[0])
    if category is None or category not in names:
        raise unknown("category", category or "", names)
    return category


def labelled(session: Session, recipe: Recipe, category: str) -> list[Labelled]:
    """Return the newest decided parts of a category, newest first, each picture once.

    Of a picture that was decided several times the newest decision counts.
    """
    query = (
        select(Inspection)
        .where(
            Inspection.recipe_id == recipe.id,
            Inspection.category == category,
            Inspection.image_sha256.is_not(None),
            Inspection.score.is_not(None),
        )
        .order_by(Inspection.decided_at.desc(), Inspection.id.desc())
    )
    found: dict[str, Labelled] = {}
    labels: tuple[Label, ...] = ("good", "defect")
    for label in labels:
        rows = session.scalars(query.where(Inspection.decision == label).limit(NEWEST))
        for row in rows:
            image = cast("str", row.image_sha256)
            each = Labelled(
                row.uid,
                image,
                label,
                row.verdict in ("ng", "review"),
                row.decided_at or "",
            )
            if image not in found or found[image].decided_at < each.decided_at:
                found[image] = each
    return sorted(found.values(), key=lambda part: part.decided_at, reverse=True)


# ---- scores -------------------------------------------------------------------------------------


class _Scores:
    """Scores by bundle, category and picture; all three fix a score, so they never age."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str, str]) -> float | None:
        with self._lock:
            return self._known.get(key)

    def put(self, key: tuple[str, str, str], score: float) -> None:
        with self._lock:
            self._known[key] = score
            while len(self._known) > _KEPT_SCORES:
                self._known.popitem(last=False)


_scores = _Scores()


def keep_score(sha256: str, category: str, picture: str, score: float) -> None:
    """Remember what a bundle said of a picture."""
    _scores.put((sha256, category, picture), score)


def scores(
    station: Station, model: Model, category: str, pictures: Collection[str]
) -> dict[str, float]:
    """Return the scores of pictures by their hashes; those that cannot be judged are missing."""
    wanted = list(dict.fromkeys(pictures))
    place = (model.sha256, category)
    found = {p: s for p in wanted if (s := _scores.get((*place, p))) is not None}
    missing = [picture for picture in wanted if picture not in found]
    with station.database.read() as session:
        found |= _recorded(session, model, category, missing)
    missing = [
        picture for picture in missing if picture not in found and station.store.has(picture)
    ]

    def judge(some: Sequence[str]) -> list[float | None]:
        contents = [station.store.get(picture) for picture in some]
        judged = station.judges.judge_images(model.sha256, model.kind, contents, category)
        return [each.prediction.score for each in judged]

    for some, scored in in_turns(station.judges, judge, missing):
        found |= {p: s for p, s in zip(some, scored, strict=True) if s is not None}
    for picture, score in found.items():
        _scores.put((*place, picture), score)
    return found


def _recorded(
    session: Session, model: Model, category: str, pictures: Sequence[str]
) -> dict[str, float]:
    """Return scores that inspections by the same bundle wrote down."""
    found: dict[str, float] = {}
    for first in range(0, len(pictures), 500):
        query = select(Inspection.image_sha256, Inspection.score).where(
            Inspection.image_sha256.in_(pictures[first : first + 500]),
            Inspection.bundle_sha256 == model.sha256,
            Inspection.category == category,
            Inspection.score.is_not(None),
        )
        found |= {str(image): float(score or 0) for image, score in session.execute(query)}
    return found


def in_turns(
    judges: Judges, work: Callable[[Sequence[_T]], _R], items: Sequence[_T]
) -> Iterator[tuple[Sequence[_T], _R]]:
    """Do work on the judging thread, some items at a time, so that the line never waits long."""
    for first in range(0, len(items), _TURN):
        some = items[first : first + _TURN]
        yield some, judges.run(lambda some=some: work(some))  # type: ignore[misc]


# ---- verdicts -----------------------------------------------------------------------------------


def unseen_verdict(known: Knowledge, limits: Limits, picture: str, score: float) -> Verdict | None:
    """Return a part's verdict, by a calibration without it where it is one of its pictures.

    A part among those that set a level would be judged too kindly by it.
    """
    calibration = known.calibration
    if limits.by_hand or calibration is None or picture not in calibration.images:
        return verdict(limits, score)
    others = list(calibration.scores)
    others.remove(min(others, key=lambda other: abs(other - score)))
    return known.decision.verdict(Calibration.of(others, ()).p_value(score))
