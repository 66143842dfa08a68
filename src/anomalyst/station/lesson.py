"""What teaching does to a copy of a recipe's detector: references in, scores and a bundle out.

Calibration stays honest: it is thrown away with the old references, and made anew only of pictures
that are no references, each by its content.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyst.data.images import read_image
from anomalyst.errors import InputError
from anomalyst.methods.base import find_method
from anomalyst.scoring import Calibration
from anomalyst.types import BoolArray

if TYPE_CHECKING:
    from anomalyst.detector import Detector


@dataclass(frozen=True)
class Teachable:
    """What a recipe can be taught, and in one line why not."""

    normal: bool
    abnormal: bool
    why_not: str | None = None
    why_no_defects: str | None = None


@dataclass(frozen=True)
class Lesson:
    """Pictures to learn of one category: good ones, and defective ones with where the defect is."""

    category: str
    normal: tuple[Path, ...] = ()
    abnormal: tuple[tuple[Path, BoolArray], ...] = ()


@dataclass(frozen=True)
class Seen:
    """A picture's score and the highest value of its map."""

    score: float
    highest: float


def teachable(kind: str, method: str, options: Mapping[str, Any] | None = None) -> Teachable:
    """Tell what a bundle or an export of a method can be taught.

    Raises
    ------
    InputError
        There is no such method.
    """
    if kind == "export":
        why = (
            "an exported bundle only judges pictures: make the recipe of the bundle that it was "
            "exported from"
        )
        return Teachable(False, False, why, why)
    spec = find_method(method)
    if method == "inp-former" and not (options or {}).get("stored"):
        why = (
            "inp-former compares with no references: fit it again with the new good pictures, or "
            "with --set stored=2000"
        )
        return Teachable(False, False, why, why)
    if not spec.abnormal_references:
        why = f"{method} learns from good pictures only; a recipe of method nagl learns defects"
        return Teachable(True, False, None, why)
    return Teachable(True, True)


def box_mask(box: Sequence[int], height: int, width: int) -> BoolArray:
    """Return the mask ``[height, width]`` of a box (x, y, w, h), cut at the picture's border.

    Raises
    ------
    InputError
        The box is empty, or lies outside.
    """
    x, y, across, down = box
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[max(y, 0) : max(y + down, 0), max(x, 0) : max(x + across, 0)] = True
    if across < 1 or down < 1 or not mask.any():
        raise InputError(
            f"box {list(box)}: marks nothing of a picture of {width}x{height} pixels; "
            "give x, y, width and height"
        )
    return mask


def png_mask(text: str, height: int, width: int) -> BoolArray:
    """Return where a picture, base64 text, is above 0: a mask at the size of its picture.

    Raises
    ------
    InputError
        It cannot be read, or has another size.
    """
    try:
        content = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("mask: no base64 text of a PNG") from None
    pixels = read_image(content, "mask")
    if pixels.shape[:2] != (height, width):
        raise InputError(
            f"mask: {pixels.shape[1]}x{pixels.shape[0]} pixels, its picture has "
            f"{width}x{height}; draw it at the picture's size"
        )
    marked: BoolArray = np.any(pixels > 0, axis=2)
    return marked


def load(bundle: Path, device: str = "auto") -> Detector:
    """Return a copy of a bundle's detector, which nobody else judges with."""
    from anomalyst.detector import Detector
    from anomalyst.station.remembered import FEATURES

    return Detector.load(bundle, device=device, feature_cache=FEATURES)


def learn(detector: Detector, lesson: Lesson) -> dict[str, Calibration]:
    """Take in a lesson, and return the calibrations that ended with it, by category.

    Raises
    ------
    InputError
        A picture or mask is of no use, or known in the other role; the detector is as it was.
    """
    before = dict(detector.calibration)
    detector.enroll(lesson.category, list(lesson.normal), list(lesson.abnormal))
    return {name: known for name, known in before.items() if name not in detector.calibration}


def look(detector: Detector, pictures: Sequence[Path], category: str) -> list[Seen]:
    """Score pictures as a category.

    Raises
    ------
    InputError
        One cannot be judged.
    """
    found = []
    for prediction in detector.predict(list(pictures), category=category):
        if prediction.error or prediction.score is None or prediction.map is None:
            raise InputError(prediction.error or f"{prediction.image}: no score")
        found.append(Seen(prediction.score, float(prediction.map.max())))
    return found


def references(detector: Detector, category: str) -> set[str]:
    """Return the hashes of the pictures that a category is compared with."""
    known = (*detector.references.get(category, []), *detector.abnormal.get(category, []))
    return {record.sha256 for record in (*known, *detector.trained_on)}


def calibrate(detector: Detector, category: str, seen: Mapping[str, Seen]) -> None:
    """Calibrate a category by pictures under their hashes; references are left out.

    Without any the category stays uncalibrated.
    """
    learned = references(detector, category)
    kept = {sha256: each for sha256, each in seen.items() if sha256 not in learned}
    if kept:
        detector.calibration[category] = Calibration.of(
            (each.score for each in kept.values()),
            (each.highest for each in kept.values()),
            kept,
        )
