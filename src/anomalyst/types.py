"""What flows through anomalyst: samples in, predictions out. Plain frozen records, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from anomalyst.data.masks import Ignored

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Verdict = Literal["ok", "review", "ng"]


class Progress(Protocol):
    """What long work calls as it goes on: on the command line a bar or a line."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Take note that ``done`` of ``total`` parts of a stage are done, with a word beside it."""


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it.

    Attributes
    ----------
    path
        The image file.
    category
        The product or organ, for example ``bottle``; None when it is not known.
    label
        0 normal, 1 anomalous, None when it is not known.
    defect
        The defect's name, ``good`` for a normal image, None when it is not known.
    mask
        The ground-truth mask file of an anomalous image; None where there is none.
    """

    path: Path
    category: str | None = None
    label: int | None = None
    defect: str | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class References:
    """Samples of one category that a detector keeps to compare with."""

    category: str
    normal: tuple[Sample, ...]
    abnormal: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Region:
    """A connected area of the score map above the pixel threshold, in original pixels.

    ``bbox`` is (x, y, width, height), ``area`` a pixel count, ``score`` the map's maximum inside.
    """

    bbox: tuple[int, int, int, int]
    area: int
    score: float


@dataclass(frozen=True)
class ScoreMap:
    """Raw scores of one image on the method's own grid, and where on the image that grid lies.

    Attributes
    ----------
    values
        float32 ``[h, w]``, one score per patch, higher is more anomalous.
    size
        (height, width) of the original image, in pixels.
    sigma
        Standard deviation of the Gaussian that smooths the upsampled map, in patches.
    box
        (top, left, height, width) of the part of the original image that the grid covers, in
        pixels. Differs from the whole image only where a region or a preset crops.
    ignored
        What of the image counts for nothing, where anything does.
    """

    values: FloatArray
    size: tuple[int, int]
    sigma: float
    box: tuple[float, float, float, float]
    ignored: Ignored | None = None

    def at(self, height: int, width: int) -> FloatArray:
        """Return the smoothed map at another size, float32 ``[height, width]``, same raw units."""
        from anomalyst.scoring import render

        return render(self, height, width)


@dataclass(frozen=True)
class Prediction:
    """What a detector says of one image. Scores are raw: never clamped, squashed or rescaled.

    Attributes
    ----------
    image
        The path as it was given, or a name made up for an array.
    category
        Given by the caller or retrieved by similarity.
    score
        Image score, higher is more anomalous.
    p_value
        Conformal p-value in (0, 1]; None when the detector is not calibrated for the category.
    verdict
        ``ng``, ``review`` or ``ok``; None when not calibrated.
    threshold
        Image score above which the verdict is ``ng``; None when not calibrated, or when the
        held-out normal images are too few for the level asked for.
    regions
        Areas above the pixel threshold, largest score first; empty when not calibrated.
    error
        One line when the image could not be judged; every other field is then empty.
    sha256
        Hash of the bytes that were judged.
    pixels
        The decoded image, uint8 ``[H, W, 3]``, where the caller asked to keep it.
    """

    image: str
    category: str | None = None
    score: float | None = None
    p_value: float | None = None
    verdict: Verdict | None = None
    threshold: float | None = None
    calibrated: bool = False
    regions: tuple[Region, ...] = ()
    score_map: ScoreMap | None = field(default=None, repr=False, compare=False)
    error: str | None = None
    sha256: str = field(default="", repr=False)
    pixels: ByteArray | None = field(default=None, repr=False, compare=False)

    @cached_property
    def map(self) -> FloatArray | None:
        """Smoothed score map at the original size, float32 ``[H, W]``, raw units."""
        return None if self.score_map is None else self.score_map.at(*self.score_map.size)
