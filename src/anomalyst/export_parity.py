"""The parity gate: real images through torch and through an export, and how far they are apart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anomalyst.data.images import read_image
from anomalyst.errors import InputError
from anomalyst.inference import ImageSource
from anomalyst.judging import unwarned
from anomalyst.scoring import Calibration
from anomalyst.types import Prediction

if TYPE_CHECKING:
    from anomalyst.detector import Detector
    from anomalyst.runtime import Runtime

TOLERANCE = 1e-4
"""Largest difference of a map's value or an image score, as a share of their category's span."""

SPEARMAN = 0.99
"""Least rank correlation of image scores before and after int8, in every category."""

_LEAST_SPAN = 0.1  # of a category's maps, in heat units: images may equal the references
_LEAST_RANKED = 5  # images whose order tells something


class DriftError(Exception):
    """How far an export is from its original, in one line."""


@dataclass(frozen=True)
class Parity:
    """The content of ``parity.json``.

    Errors are shares of the category's span: the largest range of any of its maps here, a tenth of
    the method's heat unit at least. Verdicts and rank correlation are those of whole images; with
    int8 the verdicts are those of the calibration images alone. ``int8_layers`` are those in int8,
    and all that multiply by weights. ``seconds`` are of all images, reading included.
    """

    images: int
    calibration_images: int
    sizes: list[tuple[int, int]]
    max_map_error: float
    max_score_error: float
    tolerance: float | None
    verdicts_flipped: int
    spearman: float | None
    seconds: dict[str, float]
    int8_layers: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Case:
    """One image to compare; ``category`` is None where both shall find it themselves."""

    name: str
    source: ImageSource
    category: str | None = None


class _Pair(NamedTuple):
    """An image, what torch says of it, and what the export says."""

    case: _Case
    torch: Prediction
    export: Prediction


class Gate:
    """What torch says of real images; every export of the detector is held against it.

    Parameters
    ----------
    names
        The categories that are exported.

    Raises
    ------
    InputError
        An image is bad, or none shows a category that is exported.
    """

    def __init__(self, detector: Detector, paths: Sequence[Path], names: Sequence[str]) -> None:
        self._detector = detector
        self._names = names
        cases = [*(_Case(str(path), path) for path in paths), *_cut(paths)]
        if detector.spec.needs_class_name and detector.method.judges_unseen:  # nothing tells it
            cases = [replace(case, category=names[k % len(names)]) for k, case in enumerate(cases)]
        began = time.perf_counter()
        judged = _judged(detector, cases)
        seen = {found.category for _, found in judged}
        judged += _judged(detector, [replace(cases[0], category=n) for n in names if n not in seen])
        self._seconds = time.perf_counter() - began
        bad = [found for case, found in judged if found.error and isinstance(case.source, Path)]
        if bad:
            raise InputError(
                f"an image to compare: {bad[0].error} (in all {len(bad)} such images: leave them "
                "out)"
            )
        # A part of an image may lie outside the region that is looked at.
        judged = [pair for pair in judged if not pair[1].error]
        self._judged = [(case, found) for case, found in judged if found.category in (*names, None)]
        if not self._judged:
            raise InputError("none of the images shows a category that is exported; give others")
        self._spans = self._measure()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that most of the images have as the network's input."""
        return Counter(self._size(found) for _, found in self._judged).most_common(1)[0][0]

    def images(self, size: tuple[int, int] | None) -> Iterator[tuple[ImageSource, str | None]]:
        """Yield the images of that ``size`` as the network's input, or all, and what they show."""
        for case, found in self._judged:
            if size in (None, self._size(found)):
                yield case.source, found.category

    def check(self, runtime: Runtime, size: tuple[int, int] | None, int8: bool) -> Parity:
        """Return how near an export is, by images of that ``size`` alone where it takes no other.

        Raises
        ------
        DriftError
            It is too far away; says where and by how much.
        InputError
            The images given cannot tell.
        """
        kept = [(c, found) for c, found in self._judged if size in (None, self._size(found))]
        if not any(isinstance(case.source, Path) for case, _ in kept):
            shape = "" if size is None else f"{size[0]}x{size[1]}"
            raise InputError(
                f"none of the images is {shape} (height x width) as the network's "
                "input, and the export takes no other; give such images, or another --size"
            )
        began = time.perf_counter()
        found = _through(runtime, [case for case, _ in kept])
        seconds = {
            "torch": self._seconds * len(kept) / len(self._judged),
            "runtime": time.perf_counter() - began,
        }
        pairs = [_Pair(*pair, said) for pair, (_, said) in zip(kept, found, strict=True)]
        for pair in pairs:
            _require_comparable(pair)
        calibrated = [pair for pair in pairs if self._calibrated_on(pair)]
        if int8:
            self.require_calibration()
            runtime.calibration = _calibrations(calibrated)
        errors = [self._errors(pair) for pair in pairs]
        if not int8:
            _require_near(pairs, errors)
        after = runtime.calibration
        flipped = [p for p in (calibrated if int8 else pairs) if self._flipped(p, after)]
        if flipped:
            raise DriftError(self._told_of(flipped[0], after, len(flipped)))
        return Parity(
            images=len(pairs),
            calibration_images=len(calibrated),
            sizes=sorted({self._size(pair.torch) for pair in pairs}),
            max_map_error=max(error[0] for error in errors),
            max_score_error=max(error[1] for error in errors),
            tolerance=None if int8 else TOLERANCE,
            verdicts_flipped=len(flipped),
            spearman=self._require_order(pairs) if int8 else None,
            seconds=seconds,
        )

    def _size(self, found: Prediction) -> tuple[int, int]:
        assert found.score_map is not None
        return self._detector.engine.preprocess.input_sizes(*found.score_map.size)[0]

    def _measure(self) -> dict[str | None, float]:
        """Return each category's span."""
        spans: dict[str | None, float] = {}
        for _, found in self._judged:
            assert found.score_map is not None
            least = _LEAST_SPAN * self._detector.method.heat_unit(found.category)
            before = spans.get(found.category, least)
            spans[found.category] = max(before, float(np.ptp(found.score_map.values)))
        return spans

    def _errors(self, pair: _Pair) -> tuple[float, float]:
        """Return the largest difference in the map, and that of the score, in spans."""
        one, two = pair.torch.score_map, pair.export.score_map
        assert one is not None and two is not None
        assert pair.torch.score is not None and pair.export.score is not None
        span = self._spans[pair.torch.category]
        score = abs(pair.torch.score - pair.export.score)
        return float(np.abs(one.values - two.values).max()) / span, score / span

    def _require_order(self, pairs: Sequence[_Pair]) -> float:
        """Return the least rank correlation of any category's scores.

        References are left out: that they score nothing, but for rounding, has no order.

        Raises
        ------
        DriftError
            It is too low.
        InputError
            A category has too few images.
        """
        from scipy.stats import spearmanr

        least = 1.0
        wanted: Sequence[str | None] = self._names or [None]
        for name in wanted:
            own = {each.sha256 for each in self._detector.references.get(name or "", [])}
            shown = [p for p in pairs if p.torch.category == name and p.torch.sha256 not in own]
            both = [(p.torch.score, p.export.score) for p in shown]
            of = "" if name is None else f" of {name!r}"
            if len(both) < _LEAST_RANKED:
                raise InputError(
                    f"int8 is checked by the order of image scores: give {_LEAST_RANKED} "
                    f"images{of} or more that are no references, defects among them"
                )
            found = float(spearmanr(*zip(*both, strict=True)).statistic)
            if not found >= SPEARMAN:
                raise DriftError(
                    f"int8 changes the order of the {len(both)} images{of}: rank correlation "
                    f"{found:.4f}, {SPEARMAN} is needed"
                )
            least = min(least, found)
        return least

    def _calibrated_on(self, pair: _Pair) -> bool:
        known = self._detector.calibration.get(pair.torch.category or "")
        return known is not None and pair.torch.sha256 in known.images

    def require_calibration(self) -> None:
        """Raise unless all calibration images of the exported categories are among the images.

        An int8 export is calibrated anew, on the same images.
        """
        seen = {found.sha256 for _, found in self._judged}
        for name in self._names:
            known = self._detector.calibration.get(name)
            if known is not None and (missing := set(known.images) - seen):
                raise InputError(
                    f"an int8 export is calibrated anew: give all {known.count} calibration images "
                    f"of {name!r} with --images ({len(missing)} are missing)"
                )

    def _flipped(self, pair: _Pair, after: Mapping[str, Calibration]) -> bool:
        """Tell whether the verdict differs."""
        one, two = self._verdicts(pair, after)
        return one != two

    def _verdicts(
        self, pair: _Pair, after: Mapping[str, Calibration]
    ) -> tuple[str | None, str | None]:
        """Return the verdict of torch and that of the export, by their calibrations.

        A calibration image is compared with the others alone: its own score stands in the
        calibration, and the last bit of it would decide.
        """
        name = pair.torch.category or ""
        both = self._detector.calibration.get(name), after.get(name)
        verdicts: list[str | None] = []
        for known, found in zip(both, (pair.torch, pair.export), strict=True):
            if known is None or found.score is None:
                return None, None
            if self._calibrated_on(pair):
                rest = list(known.scores)
                # Of exports whose calibration is torch's, the score that torch gave.
                own = pair.torch.score if known is both[0] else found.score
                assert own is not None
                rest.pop(min(range(len(rest)), key=lambda k: abs(rest[k] - own)))
                known = Calibration.of(rest, ())
            verdicts.append(self._detector.decision.verdict(known.p_value(found.score)))
        return verdicts[0], verdicts[1]

    def _told_of(self, pair: _Pair, after: Mapping[str, Calibration], count: int) -> str:
        one, two = self._verdicts(pair, after)
        return (
            f"{count} {'verdicts differ' if count > 1 else 'verdict differs'}: {pair.case.name} is "
            f"{two!r} (score {pair.export.score:.6g}) instead of {one!r} ({pair.torch.score:.6g})"
        )


def _calibrations(pairs: Sequence[_Pair]) -> dict[str, Calibration]:
    """Return what the export's own scores of the calibration images say, by category."""
    found: dict[str, dict[str, Prediction]] = {}
    for pair in pairs:
        found.setdefault(pair.torch.category or "", {})[pair.torch.sha256] = pair.export
    return {
        name: Calibration.of(
            [p.score for p in each.values() if p.score is not None],
            [float(p.map.max()) for p in each.values() if p.map is not None],
            each,
        )
        for name, each in found.items()
    }


def _cut(paths: Sequence[Path]) -> Iterator[_Case]:
    """Yield parts of two images, so that there is more than one size to compare."""
    pixels = read_image(paths[0])
    yield _Case(f"the upper part of {paths[0]}", pixels[: max(len(pixels) * 2 // 3, 1)].copy())
    pixels = read_image(paths[-1])
    width = max(pixels.shape[1] * 3 // 4, 1)
    yield _Case(f"the left part of {paths[-1]}", pixels[:, :width].copy())


def _judged(judge: Detector | Runtime, cases: Sequence[_Case]) -> list[tuple[_Case, Prediction]]:
    found: list[tuple[_Case, Prediction]] = []
    with unwarned():  # images are compared with themselves
        for category, group in groupby(cases, key=lambda case: case.category):
            part = list(group)
            sources = [case.source for case in part]
            found += zip(part, judge.predict(sources, category=category), strict=True)
    return found


def _through(runtime: Runtime, cases: Sequence[_Case]) -> list[tuple[_Case, Prediction]]:
    """Return what the export says; a graph that breaks is too far from torch too."""
    try:
        return _judged(runtime, cases)
    except InputError:
        raise
    except Exception as error:  # each engine has error classes of its own
        line = " ".join(str(error).split())
        raise DriftError(f"the graph breaks on these images ({line[:200]})") from error


def _require_comparable(pair: _Pair) -> None:
    """Raise where the export says something of another kind than torch does."""
    one, two = pair.torch, pair.export
    if two.error or two.score_map is None:
        raise DriftError(f"{pair.case.name}: {two.error}")
    assert one.score_map is not None
    if one.category != two.category:
        raise DriftError(f"{pair.case.name}: taken for {two.category!r}, not {one.category!r}")
    shapes = one.score_map.values.shape, two.score_map.values.shape
    if shapes[0] != shapes[1]:
        raise DriftError(f"{pair.case.name}: its map is {shapes[1]} large, not {shapes[0]}")
    if not np.isfinite(two.score_map.values).all() or not np.isfinite(two.score or 0.0):
        raise DriftError(f"{pair.case.name}: values that are no numbers")


def _require_near(pairs: Sequence[_Pair], errors: Sequence[tuple[float, float]]) -> None:
    """Raise where a map or a score is out of tolerance."""
    for number, what in enumerate(("map", "image score")):
        worst = max(range(len(pairs)), key=lambda k: errors[k][number])
        if (error := errors[worst][number]) > TOLERANCE:
            raise DriftError(
                f"{pairs[worst].case.name}: its {what} differs by {error:.2g} of the category's "
                f"span, {TOLERANCE:g} is allowed"
            )
