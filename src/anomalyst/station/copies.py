"""A copy of a recipe's detector that is taught and calibrated anew; the line never sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anomalyst.scoring import Calibration, Decision, normals_needed
from anomalyst.station import history, lesson
from anomalyst.station.bundles import bundle_folder
from anomalyst.station.confusion import verdict
from anomalyst.station.history import Knowledge, Labelled, Model
from anomalyst.station.lesson import Lesson, Seen
from anomalyst.station.verdicts import Thresholds
from anomalyst.types import Verdict

if TYPE_CHECKING:
    from anomalyst.station.core import Station


@dataclass(frozen=True)
class Recalibrated:
    """What became of a category's calibration, in pictures.

    ``before`` and ``after`` calibrated it; of the latter ``kept`` did so before, ``history`` are
    parts decided good. ``others`` are categories that lost theirs too, because their scores depend
    on all references.
    """

    before: int
    after: int
    kept: int
    history: int
    by_hand_ended: bool
    others: tuple[str, ...] = ()

    def to_dict(self, decision: Decision, used: Sequence[Labelled]) -> dict[str, Any]:
        """Return the figures and what they mean; ``used`` are the parts of history."""
        needed = {
            f"{alpha:g}": max(0, normals_needed(alpha) - self.after)
            for alpha in (decision.alpha, decision.alpha_review)
        }
        return {
            "before": self.before,
            "after": self.after,
            "kept": self.kept,
            "history": self.history,
            "needed_for": needed,
            "words": " ".join(self._words(decision, used)),
        }

    def _words(self, decision: Decision, used: Sequence[Labelled]) -> list[str]:
        """Say what is lost, and how it comes back."""
        said = []
        lost = self.before - self.kept
        if not self.after:
            said.append(
                "Not calibrated after this: scores, but no verdicts, because a calibration belongs "
                "to its references."
            )
        elif self.after < normals_needed(decision.alpha):
            missing = normals_needed(decision.alpha) - self.after
            said.append(
                f"Calibrated on {self.after} pictures: for NG at {decision.alpha:g} "
                f"{missing} more good ones are needed."
            )
        else:
            said.append(f"Calibrated on {self.after} pictures.")
        if lost > 0:
            said.append(
                f"{lost} of the {self.before} pictures that calibrated it are not here: give them "
                "back, or inspect good parts, decide them good and let those calibrate."
            )
        if self.history:
            said.append(
                f"{self.history} parts decided good calibrate; each is judged here without itself."
            )
            flagged = sum(part.flagged for part in used)
            usual = decision.alpha_review * len(used)
            if flagged > usual + 3 * (usual * (1 - decision.alpha_review)) ** 0.5:
                said.append(
                    f"{flagged} of them were decided because they had been flagged: such parts "
                    "score high, and levels made of them let more defects pass. Decide ordinary "
                    "parts good too."
                )
        if self.by_hand_ended:
            said.append("The limits set by hand end: they are scores of the old references.")
        if self.others:
            said.append(f"Calibrated anew as well: {', '.join(self.others)}.")
        return said


class Copy:
    """A detector of one's own, that learns a lesson and says what would follow.

    ``thresholds`` are those that still mean something: limits by hand are scores, and end with the
    references that they were set for.
    """

    def __init__(self, station: Station, model: Model) -> None:
        self._station = station
        self._model = model
        place = bundle_folder(station.settings, model.sha256)
        self.detector = lesson.load(place, station.settings.device)
        self.thresholds: Thresholds | None = model.thresholds
        self._ended: dict[str, Calibration] = {}
        self._seen: dict[tuple[str, str], Seen] = {}

    @property
    def decision(self) -> Decision:
        """The levels asked for."""
        return self.detector.decision

    def learn(self, taught: Lesson) -> None:
        """Take in a lesson.

        Raises
        ------
        InputError
            A picture or mask is of no use.
        """
        self._ended = self._station.judges.run(lambda: lesson.learn(self.detector, taught))
        changed = {taught.category, *self._ended}
        kept = {k: v for k, v in (self.thresholds or {}).items() if k not in changed}
        self.thresholds = kept or None

    def calibrate(self, category: str, more: Collection[str]) -> Recalibrated:
        """Calibrate what lost its calibration by the same pictures, as far as they are here.

        ``more`` are further pictures of that category, which must be good.
        """
        store, kept = self._station.store, 0
        for name, known in {category: None, **self._ended}.items():
            own = [] if known is None else [p for p in known.images if store.has(p)]
            extra = [p for p in more if p not in own] if name == category else []
            learned = lesson.references(self.detector, name)
            own, extra = ([p for p in each if p not in learned] for each in (own, extra))
            if name == category:
                kept = len(own)
            lesson.calibrate(self.detector, name, self.look(name, [*own, *extra]))
        before, after = self._ended.get(category), self.detector.calibration.get(category)
        count = 0 if after is None else after.count
        return Recalibrated(
            before=0 if before is None else before.count,
            after=count,
            kept=kept,
            history=count - kept,
            by_hand_ended=category in (self._model.thresholds or {}),
            others=tuple(name for name in self._ended if name != category),
        )

    def look(self, category: str, pictures: Collection[str]) -> dict[str, Seen]:
        """Return what is seen of pictures by their hashes; those that are gone are missing."""
        store = self._station.store
        wanted = list(dict.fromkeys(pictures))
        missing = [p for p in wanted if (category, p) not in self._seen and store.has(p)]

        def work(some: Sequence[str]) -> list[Seen]:
            return lesson.look(self.detector, [store.path(p) for p in some], category)

        for some, seen in history.in_turns(self._station.judges, work, missing):
            self._seen |= {(category, p): s for p, s in zip(some, seen, strict=True)}
        return {p: self._seen[category, p] for p in wanted if (category, p) in self._seen}

    def knowledge(self, category: str) -> Knowledge:
        """Return what the copy knows of a category."""
        return Knowledge(
            self.detector.calibration.get(category),
            self.decision,
            frozenset(lesson.references(self.detector, category)),
        )

    def judge_golden(
        self, category: str, pictures: Sequence[str]
    ) -> Mapping[str, tuple[float, Verdict | None]]:
        """Return how it judges golden samples."""
        if not self.detector.knows(category):
            return {}
        limits = self.knowledge(category).limits(category, self.thresholds)
        seen = self.look(category, pictures)
        return {p: (each.score, verdict(limits, each.score)) for p, each in seen.items()}

    def remember(self, sha256: str) -> None:
        """Keep the scores under the hash of the bundle that the copy was saved as."""
        for (category, picture), seen in self._seen.items():
            history.keep_score(sha256, category, picture, seen.score)
