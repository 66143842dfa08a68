"""Heat maps over images in fixed units: a colour means the same value in every image.

A colour depends on value / unit alone, never on an image's own minimum and maximum, so a good
image looks calm. numpy only: the torch-free runtime shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isfinite

import numpy as np

from anomalyst.errors import InputError
from anomalyst.types import BoolArray, ByteArray, FloatArray, Region

REGION_COLOUR = (255, 255, 255)
TRUTH_COLOUR = (0, 150, 255)
_CASING = (24, 24, 27)  # a dark rim, so that a line shows on bright and dark images alike
_SATURATION = 2.0  # in units: everything from here on has the last colour
# (value / unit, red, green, blue, opacity). Lightness falls all the way, for the colour-blind too.
_RAMP = (
    (0.0, 255, 236, 110, 0.0),
    (0.6, 255, 236, 110, 0.0),
    (0.85, 255, 224, 70, 0.12),
    (1.0, 255, 214, 30, 0.40),
    (1.4, 250, 140, 30, 0.52),
    (1.7, 226, 60, 70, 0.58),
    (2.0, 170, 0, 120, 0.64),
)
_STRIP_PIXELS = 1 << 19  # bounds the memory of intermediate arrays, whatever the image's size


def heat_overlay(
    image: ByteArray,
    score_map: FloatArray,
    unit: float,
    regions: Sequence[Region],
    mask: BoolArray | None = None,
) -> ByteArray:
    """Return the image under its heat map, with outlines of the regions and of the ground truth.

    Parameters
    ----------
    image
        uint8 ``[H, W, 3]``; it is not changed.
    score_map
        ``[H, W]``, raw scores.
    unit
        The score at which a pixel becomes suspicious: the pixel threshold of a calibrated
        detector, else a fixed number of its method. Colours saturate at twice the unit.
    regions
        In pixels of ``image``. Inside their boxes the area above ``unit`` is outlined.
    mask
        ``[H, W]``, the ground truth to outline.

    Raises
    ------
    InputError
        If ``unit`` is not a positive number.
    """
    size = image.shape[:2]
    if score_map.shape != size or (mask is not None and mask.shape != size):
        raise ValueError(f"image {size}, map {score_map.shape} and mask must have the same size")
    picture = _blend(image, score_map, _check_unit(unit))
    width = max(1, round(min(size) / 200))
    if mask is not None:
        _draw(picture, mask, width, TRUTH_COLOUR)
    if regions:
        _draw(picture, _above(score_map, unit, regions), width, REGION_COLOUR)
    return picture


def outline(mask: BoolArray, width: int) -> BoolArray:
    """Return the ring of ``width`` pixels just outside a mask, ``[H, W]``.

    It hides nothing of the mask, except along the image's border, where the mask's own border
    pixels close the ring.
    """
    ring = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return ring
    near = (
        slice(max(rows[0] - width, 0), rows[-1] + width + 1),
        slice(max(columns[0] - width, 0), columns[-1] + width + 1),
    )
    ring[near] = _dilate(mask[near], width) & ~mask[near]
    for border in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        ring[border] |= mask[border]
    return ring


def colour_bar(
    unit: float, width: int = 256, height: int = 12
) -> tuple[ByteArray, tuple[tuple[float, str], ...]]:
    """Return the legend of `heat_overlay`: a strip from 0 to twice the unit, and its ticks.

    Returns
    -------
    strip
        uint8 ``[height, width, 4]``, RGBA.
    ticks
        (position, text) at 0, 1 and 2 units; positions run from 0 (left) to 1 (right).
    """
    times, at_least = "\N{MULTIPLICATION SIGN}", "\N{GREATER-THAN OR EQUAL TO}"
    texts = ("0", f"1{times} = {_check_unit(unit):.3g}", f"{at_least} 2{times} = {2 * unit:.3g}")
    shades = np.linspace(0, 255, width).round().astype(np.uint8)
    strip = np.broadcast_to(_rgba()[shades], (height, width, 4)).copy()
    return strip, tuple(zip((0.0, 0.5, 1.0), texts, strict=True))


def _check_unit(unit: float) -> float:
    if not (isfinite(unit) and unit > 0):
        raise InputError(
            f"heat-map unit {unit} is not a positive number: calibrate the detector again on "
            "held-out normal images that are not all alike"
        )
    return unit


@lru_cache(maxsize=1)
def _rgba() -> ByteArray:
    """Return the colours of 256 steps from 0 to saturation, uint8 ``[256, 4]``."""
    stops = np.array(_RAMP)
    steps = np.linspace(0, _SATURATION, 256)
    channels = [np.interp(steps, stops[:, 0], stops[:, i]) for i in range(1, 5)]
    channels[3] = channels[3] * 255
    rgba: ByteArray = np.stack(channels, axis=1).round().astype(np.uint8)
    return rgba


def _blend(image: ByteArray, score_map: FloatArray, unit: float) -> ByteArray:
    """Return the image with the ramp's colours over it, strip by strip."""
    colours = _rgba().astype(np.uint16)
    alpha = colours[:, 3:]
    added = colours[:, :3] * alpha + 127
    kept = 255 - alpha
    visible = int(np.flatnonzero(alpha)[0])
    picture: ByteArray = image.copy()
    rows = max(1, _STRIP_PIXELS // image.shape[1])
    for top in range(0, len(image), rows):
        strip = picture[top : top + rows]
        scaled = score_map[top : top + rows] * np.float32(255 / (_SATURATION * unit))
        shade = np.rint(scaled.clip(0, 255)).astype(np.uint8)
        coloured = shade >= visible
        shade = shade[coloured]
        strip[coloured] = (strip[coloured] * kept[shade] + added[shade]) // 255
    return picture


def _above(score_map: FloatArray, unit: float, regions: Sequence[Region]) -> BoolArray:
    """Return where the map exceeds the unit inside the regions' boxes."""
    area = np.zeros(score_map.shape, dtype=bool)
    for region in regions:
        x, y, width, height = region.bbox
        box = np.s_[y : y + height, x : x + width]
        area[box] = score_map[box] > unit
    return area


def _draw(picture: ByteArray, mask: BoolArray, width: int, colour: tuple[int, int, int]) -> None:
    """Draw the mask's outline in place, a thin dark rim outside it."""
    line = outline(mask, width)
    rim = outline(mask | line, max(1, width // 2)) & ~line
    picture[rim] = _CASING
    picture[line] = colour


def _dilate(mask: BoolArray, width: int) -> BoolArray:
    """Grow a mask by ``width`` pixels, by turns along the axes and the diagonals: an octagon."""
    grown: BoolArray = mask.copy()
    for step in range(width):
        before = grown.copy()
        grown[1:] |= before[:-1]
        grown[:-1] |= before[1:]
        if step % 2:
            before = grown.copy()
        grown[:, 1:] |= before[:, :-1]
        grown[:, :-1] |= before[:, 1:]
    return grown
