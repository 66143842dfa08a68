"""How far the same part, inspected again, gets the same score and verdict.

One-way analysis of variance with parts as the random factor: the repeatability ("equipment
variation") of AIAG, Measurement Systems Analysis, 4th edition, 2010, chapter III. An automatic
inspection has no appraisers, so its gauge R&R is its repeatability. With unequal numbers of looks
the part variance is the ANOVA estimator of S. Searle, G. Casella and C. McCulloch, Variance
Components, 1992, chapter 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from anomalyst.types import Verdict


@dataclass(frozen=True)
class Look:
    """One inspection of a part; without a verdict where nothing is calibrated."""

    score: float
    verdict: Verdict | None


@dataclass(frozen=True)
class PartSpread:
    """Looks at one part; ``flips`` are those whose verdict is not the part's most frequent one."""

    part_id: str
    n: int
    mean: float
    sd: float
    flips: int | None


@dataclass(frozen=True)
class Study:
    """What looks at some parts, two or more each, say of the inspection.

    Attributes
    ----------
    parts
        In the order given.
    repeatability_sd
        Standard deviation of a score from look to look at the same part, None without any part.
    part_sd
        Standard deviation between parts, None of fewer than two.
    flip_rate
        Share of looks that do not agree with their part's usual verdict, None without verdicts.
    grr_percent
        100 times the repeatability over the total deviation; None where either is unknown.
    distinct
        Number of distinct categories, 1.41 times part over repeatability, cut; None likewise, and
        where looks do not differ at all.
    """

    parts: tuple[PartSpread, ...]
    repeatability_sd: float | None
    part_sd: float | None
    flip_rate: float | None
    grr_percent: float | None
    distinct: int | None


def study(looks: Mapping[str, Sequence[Look]]) -> Study:
    """Return the study of parts by their looks; parts with fewer than two are left out."""
    kept = {name: found for name, found in looks.items() if len(found) > 1}
    parts = tuple(_spread(name, found) for name, found in kept.items())
    if not parts:
        return Study((), None, None, None, None, None)
    within, between = _variances(parts)
    percent = distinct = None
    if between is not None and within + between > 0:
        percent = 100 * sqrt(within / (within + between))
        distinct = int(1.41 * sqrt(between / within)) if within > 0 else None
    flips = [part.flips for part in parts if part.flips is not None]
    looked = sum(part.n for part in parts if part.flips is not None)
    return Study(
        parts,
        sqrt(within),
        None if between is None else sqrt(between),
        sum(flips) / looked if flips else None,
        percent,
        distinct,
    )


def _spread(name: str, looks: Sequence[Look]) -> PartSpread:
    scores = [look.score for look in looks]
    verdicts = [look.verdict for look in looks if look.verdict is not None]
    flips = None
    if len(verdicts) == len(looks):
        flips = len(looks) - Counter(verdicts).most_common(1)[0][1]
    return PartSpread(name, len(looks), fmean(scores), stdev(scores), flips)


def _variances(parts: Sequence[PartSpread]) -> tuple[float, float | None]:
    """Return the variance within parts, and between them (not under 0; None of one part)."""
    total, groups = sum(part.n for part in parts), len(parts)
    within = sum((part.n - 1) * part.sd**2 for part in parts) / (total - groups)
    if groups < 2:
        return within, None
    grand = sum(part.n * part.mean for part in parts) / total
    mean_square = sum(part.n * (part.mean - grand) ** 2 for part in parts) / (groups - 1)
    looks_a_part = (total - sum(part.n**2 for part in parts) / total) / (groups - 1)
    return within, max((mean_square - within) / looks_a_part, 0.0)


def in_words(found: Study, same_pictures: int) -> str:
    """Say what a study means; ``same_pictures`` looks were pictures given again, left out."""
    if not found.parts:
        said = "give the same part at least twice, under one part id, a new picture each time"
    elif found.grr_percent is None:
        said = "one part shows the spread of its scores; GR&R needs two parts or more, better ten"
    else:
        level = (
            "good (under 10 %)"
            if found.grr_percent < 10
            else "acceptable for some uses (10 to 30 %)"
            if found.grr_percent <= 30
            else "not acceptable (over 30 %)"
        )
        said = f"GR&R {found.grr_percent:.1f} % of the total spread: {level} by AIAG MSA"
        if len(found.parts) < 10:
            said += f"; {len(found.parts)} parts are few, ten are usual"
    if same_pictures:
        left = f"{same_pictures} look{'s' * (same_pictures != 1)}"
        said += f"; {left} at a picture that was there before left out: a file repeats itself"
    return said
