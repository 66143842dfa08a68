"""From a method's score map to pixels, regions and a decision. numpy only: the runtime shares it.

Three separate things, so that changing one never touches another: the raw score (`render`,
`find_regions`), what normal scores look like (`Calibration`) and the levels asked for (`Decision`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor

import numpy as np

from anomalyst.components import find_runs
from anomalyst.errors import InputError
from anomalyst.types import FloatArray, Region, ScoreMap, Verdict

# A product such as 100 * 0.01 may fall a hair short of the integer that it stands for.
_ROUNDING = 1e-9


@lru_cache(maxsize=16)
def _upsampler(cells: int, pixels: int, start: float, extent: float, sigma: float) -> FloatArray:
    """Return the matrix ``[pixels, cells]`` that upsamples bilinearly and then smooths one axis.

    The grid's ``cells`` cover the pixels from ``start`` to ``start + extent``. Both steps are
    linear, so one small matrix an axis does both at once and exactly: half-pixel centres with
    clamped edges (torch's ``align_corners=False``), then a Gaussian of ``sigma`` pixels, cut at
    4 sigma, with mirrored borders (scipy's ``reflect``).
    """
    position = (np.arange(pixels) + 0.5 - start) * (cells / extent) - 0.5
    position = position.clip(0, cells - 1)
    below = np.minimum(position.astype(np.int64), max(cells - 2, 0))
    above = np.minimum(below + 1, cells - 1)
    part = position - below
    matrix = np.zeros((pixels, cells))
    np.add.at(matrix, (np.arange(pixels), below), 1 - part)
    np.add.at(matrix, (np.arange(pixels), above), part)
    radius = int(4 * sigma + 0.5)
    if radius:
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        weights /= weights.sum()
        padded = np.pad(matrix, ((radius, radius), (0, 0)), mode="symmetric")
        matrix = sum(w * padded[k : k + pixels] for k, w in enumerate(weights))
    return np.ascontiguousarray(matrix, dtype=np.float32)


def upsampled(values: FloatArray, height: int, width: int) -> FloatArray:
    """Return a map ``[h, w]`` at another size, bilinearly."""
    rows = _upsampler(values.shape[0], height, 0.0, height, 0.0)
    found: FloatArray = rows @ values @ _upsampler(values.shape[1], width, 0.0, width, 0.0).T
    return found


def render(score_map: ScoreMap, height: int, width: int) -> FloatArray:
    """Return the smoothed map over the whole image at ``[height, width]``, in raw units.

    Pixels outside the part of the image that the method saw, and ignored ones, get the map's
    lowest value.
    """
    grid_h, grid_w = score_map.values.shape
    scale_y, scale_x = height / score_map.size[0], width / score_map.size[1]
    top, left = score_map.box[0] * scale_y, score_map.box[1] * scale_x
    box_h, box_w = score_map.box[2] * scale_y, score_map.box[3] * scale_x
    rows = _upsampler(grid_h, height, top, box_h, score_map.sigma * box_h / grid_h)
    columns = _upsampler(grid_w, width, left, box_w, score_map.sigma * box_w / grid_w)
    full: FloatArray = rows @ score_map.values @ columns.T  # (H, h) (h, w) (w, W) -> (H, W)
    whole = (0.0, 0.0, float(score_map.size[0]), float(score_map.size[1]))
    lowest = full.min()
    if score_map.ignored is not None:
        full[score_map.ignored.at(whole, (height, width))] = lowest
    if score_map.box != whole:
        full[: round(top)] = lowest
        full[round(top + box_h) :] = lowest
        full[:, : round(left)] = lowest
        full[:, round(left + box_w) :] = lowest
    return full


def find_regions(full_map: FloatArray, threshold: float) -> tuple[Region, ...]:
    """Return the 8-connected areas where the map exceeds ``threshold``, largest score first."""
    mask = full_map > threshold
    runs = find_runs(mask)
    if runs.total == 0:
        return ()
    lengths = runs.right - runs.left
    peaks = np.maximum.reduceat(full_map[mask], np.cumsum(lengths) - lengths)
    order = np.argsort(runs.region, kind="stable")
    starts = np.searchsorted(runs.region[order], np.arange(runs.total))
    top = runs.row[order][starts]
    left = np.minimum.reduceat(runs.left[order], starts)
    bottom = np.maximum.reduceat(runs.row[order], starts)
    right = np.maximum.reduceat(runs.right[order], starts)
    area = np.add.reduceat(lengths[order], starts)
    peak = np.maximum.reduceat(peaks[order], starts)
    found = [
        Region(
            bbox=(
                int(left[i]),
                int(top[i]),
                int(right[i] - left[i]),
                int(bottom[i] - top[i]) + 1,
            ),
            area=int(area[i]),
            score=float(peak[i]),
        )
        for i in range(runs.total)
    ]
    return tuple(sorted(found, key=lambda region: -region.score))


def normals_needed(alpha: float) -> int:
    """Return how many held-out normal images a false-reject rate of ``alpha`` needs at least."""
    return ceil(1 / alpha - _ROUNDING) - 1


def check_level(alpha: float) -> float:
    """Return ``alpha`` if it is a rate between 0 and 1, both excluded."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha {alpha} is not a rate: give one between 0 and 1, such as 0.01")
    return alpha


@dataclass(frozen=True)
class Decision:
    """The two false-reject rates that make three verdicts."""

    alpha: float = 0.01
    alpha_review: float = 0.05

    def __post_init__(self) -> None:
        check_level(self.alpha)
        check_level(self.alpha_review)
        if self.alpha_review < self.alpha:
            raise InputError(
                f"alpha_review {self.alpha_review} is under alpha {self.alpha}: nothing could be "
                "sent to review; give at least as much"
            )

    def verdict(self, p_value: float) -> Verdict:
        """Return ``ng`` at or under ``alpha``, ``review`` at or under ``alpha_review``."""
        if p_value <= self.alpha + _ROUNDING:
            return "ng"
        return "review" if p_value <= self.alpha_review + _ROUNDING else "ok"


@dataclass(frozen=True)
class Calibration:
    """Split conformal calibration of one category, from normal images that the detector never saw.

    If those and a new normal image are exchangeable, ``p_value(s) <= alpha`` happens for at most a
    share ``alpha`` of new normal images (Vovk et al. 2005; Lei et al. 2018), whatever the method.

    Attributes
    ----------
    scores
        Image scores of the held-out normal images, ascending.
    maxima
        Maximum of each such image's smoothed map at its original size, ascending.
    images
        SHA-256 of those images, so that no test counts them.
    """

    scores: tuple[float, ...]
    maxima: tuple[float, ...]
    images: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, scores: Iterable[float], maxima: Iterable[float], images: Iterable[str] = ()
    ) -> Calibration:
        """Return the calibration of these scores, in any order."""
        return cls(tuple(sorted(scores)), tuple(sorted(maxima)), tuple(sorted(images)))

    @property
    def count(self) -> int:
        """The number of held-out normal images."""
        return len(self.scores)

    def p_value(self, score: float) -> float:
        """Return ``(1 + #{s_i >= score}) / (n + 1)``."""
        not_below = self.count - int(np.searchsorted(self.scores, score, side="left"))
        return (1 + not_below) / (self.count + 1)

    def supports(self, alpha: float) -> bool:
        """Tell whether so many held-out images can promise a false-reject rate of ``alpha``."""
        return self.count >= normals_needed(alpha)

    def threshold(self, alpha: float) -> float | None:
        """Return the score above which ``p_value <= alpha``; None where ``supports`` is False."""
        return _conformal_quantile(self.scores, alpha)

    @property
    def smallest_level(self) -> float:
        """The smallest false-reject rate that so many images support, rounded up."""
        return ceil(10_000 / (self.count + 1)) / 10_000

    def pixel_threshold(self, decision: Decision) -> float | None:
        """Return the map value above which a pixel belongs to a region.

        At most a share ``decision.alpha`` of good images shows any region; where the held-out
        images cannot support that rate, a share ``alpha_review``; where not that either, None.
        """
        strict = _conformal_quantile(self.maxima, decision.alpha)
        return _conformal_quantile(self.maxima, decision.alpha_review) if strict is None else strict


def _conformal_quantile(ascending: tuple[float, ...], alpha: float) -> float | None:
    """Return the ceil((n + 1)(1 - alpha))-th smallest value, None where that is past the last."""
    above = floor((len(ascending) + 1) * alpha + _ROUNDING)  # how many may lie above, the new too
    return None if above < 1 else ascending[len(ascending) - above]
