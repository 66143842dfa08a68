"""Pseudo-anomalies: defects put into normal images, with their masks, to train on.

CutPaste (Li et al., CVPR 2021), Perlin blobs of a texture (DRAEM, Zavrtanik et al., ICCV 2021),
both as OneNIP mixes them (Gao, ECCV 2024), and patches of another image blended in seamlessly (NSA,
Schlueter et al., ECCV 2022).

Every maker takes an image uint8 ``[H, W, 3]`` at the size at which the network sees it, before
normalisation, and leaves it as it is. In what comes back, pixels outside the mask are bit for bit
the input's. All randomness comes from the one generator: its state settles the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from anomalyst.errors import InputError, unknown
from anomalyst.methods.perlin import perlin_mask
from anomalyst.methods.textures import Textures, augment
from anomalyst.overlay import TRUTH_COLOUR, outline
from anomalyst.types import BoolArray, ByteArray

RECIPES = ("hybrid", "cutpaste", "perlin", "nsa")

_AREA = (0.02, 0.15)  # of a CutPaste patch, in shares of the image
_SCAR_SIDE = 224  # image side at which a scar's pixels are meant
_PLACES = 100  # tries to put a patch on the foreground
_ON_FOREGROUND = 0.25  # least share of a patch that must lie there
_CLONES = 3  # patches that are cloned in at most
_CLONE_TRIES = 200
_SOURCE_OBJECT = 0.7  # least share of a cloned patch that is object where it comes from
_SMALLEST_CLONE = 9  # pixels a side: OpenCV keeps a rim of 4 as it was
_REDRAWS = 10
_MARGIN = 8  # of the contact sheet, in pixels

_Size = tuple[int, int]
_Box = tuple[slice, slice]


class Synthetic(NamedTuple):
    """A picture with a pseudo-anomaly, uint8 ``[H, W, 3]``, and where it is, bool ``[H, W]``."""

    image: ByteArray
    mask: BoolArray


@dataclass(frozen=True)
class Synthesizer:
    """Draws pseudo-anomalies by a recipe, each of which shows.

    Attributes
    ----------
    recipe
        ``hybrid``: half Perlin blobs, a quarter patches, a quarter scars, as OneNIP; ``cutpaste``:
        patches and scars; ``perlin``; ``nsa``.
    textures
        What Perlin blobs are filled with.
    foreground
        Keep to the object: see `foreground_mask`.

    Raises
    ------
    InputError
        An unknown recipe.
    """

    recipe: str
    textures: Textures
    foreground: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise unknown("recipe of pseudo-anomalies", self.recipe, RECIPES)

    def __call__(
        self,
        image: ByteArray,
        rng: np.random.Generator,
        category: str | None = None,
        source: ByteArray | None = None,
    ) -> Synthetic:
        """Return an image ``[H, W, 3]`` with a pseudo-anomaly.

        A draw that is empty, or changes its pixels by less than one grey level on average, is drawn
        again, ten times at most. If none shows, the image comes back unchanged with an empty mask:
        a normal sample.

        Parameters
        ----------
        category
            The product, so that textures can come from others.
        source
            Another normal image, for ``nsa``; the image itself, mirrored, where there is none.
        """
        where = foreground_mask(image) if self.foreground else None
        for _ in range(1 + _REDRAWS):
            made = self._draw(image, rng, category, source, where)
            if _shows(image, made):
                return made
        return Synthetic(image.copy(), np.zeros(image.shape[:2], dtype=bool))

    def _draw(
        self,
        image: ByteArray,
        rng: np.random.Generator,
        category: str | None,
        source: ByteArray | None,
        where: BoolArray | None,
    ) -> Synthetic:
        if self.recipe == "nsa":
            other = _fitted(image[:, ::-1] if source is None else source, image.shape[:2])
            return seamless_clone(
                image, other, rng, where, foreground_mask(other) if self.foreground else None
            )
        if self.recipe == "perlin" or (self.recipe == "hybrid" and rng.random() < 0.5):
            texture = self.textures.draw(image, category, rng)
            return perlin_texture(image, rng, texture, where)
        return (cut_paste if rng.random() < 0.5 else scar)(image, rng, where)


# ---- CutPaste -----------------------------------------------------------------------------------


def cut_paste(
    image: ByteArray, rng: np.random.Generator, foreground: BoolArray | None = None
) -> Synthetic:
    """Return the image with a jittered copy of a rectangle elsewhere (CutPaste, Li et al. 2021).

    The rectangle covers 2 to 15 % of the image, its sides 0.3 to 3.3 times each other.
    """
    height, width = image.shape[:2]
    area = rng.uniform(*_AREA) * height * width
    aspect = rng.uniform(0.3, 1) if rng.random() < 0.5 else rng.uniform(1, 3.3)
    down = float(np.clip(np.sqrt(area / aspect), area / width, height))  # fits narrow images too
    sides = max(1, round(down)), max(1, round(area / down))
    patch = _jittered(_cut(image, sides, rng), rng)
    return _paste(image, np.asarray(patch.convert("RGBA")), sides, rng, foreground)


def scar(
    image: ByteArray, rng: np.random.Generator, foreground: BoolArray | None = None
) -> Synthetic:
    """Return the image with a thin, jittered, turned strip of itself elsewhere (CutPaste's scar).

    2 to 16 by 10 to 25 pixels at a short side of 224, in proportion at others; turned by up to 45
    degrees. One that reaches over the border is cut off there.
    """
    scale = min(image.shape[:2]) / _SCAR_SIDE
    length, width = rng.integers(10, 25, endpoint=True), rng.integers(2, 16, endpoint=True)
    sides = max(1, round(length * scale)), max(1, round(width * scale))
    patch = _jittered(_cut(image, sides, rng), rng).convert("RGBA")
    turned = patch.rotate(rng.uniform(-45, 45), expand=True)  # corners turned in are transparent
    return _paste(image, np.asarray(turned), sides, rng, foreground)


def _cut(image: ByteArray, sides: _Size, rng: np.random.Generator) -> ByteArray:
    return image[_somewhere(sides, image.shape[:2], rng)]


def _somewhere(sides: _Size, size: _Size, rng: np.random.Generator) -> _Box:
    """Return a box of those sides at a uniformly drawn place in an image of that size."""
    top = int(rng.integers(0, size[0] - sides[0], endpoint=True))
    left = int(rng.integers(0, size[1] - sides[1], endpoint=True))
    return slice(top, top + sides[0]), slice(left, left + sides[1])


def _jittered(patch: ByteArray, rng: np.random.Generator) -> Image.Image:
    """Return a patch after torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1), parts in any order."""
    picture = Image.fromarray(patch)
    factors = rng.uniform(0.6, 1.4, 3)
    hue = rng.uniform(-0.1, 0.1)
    for part in rng.permutation(4):
        picture = (
            _enhanced(picture, int(part), factors[part]) if part < 3 else _tinted(picture, hue)
        )
    return picture


def _enhanced(picture: Image.Image, part: int, factor: float) -> Image.Image:
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    return kinds[part](picture).enhance(factor)


def _tinted(picture: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by a share of the full circle."""
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(level + int(turn * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _paste(
    image: ByteArray,
    patch: ByteArray,
    sides: _Size,
    rng: np.random.Generator,
    foreground: BoolArray | None,
) -> Synthetic:
    """Put the opaque part of a patch RGBA ``[h, w, 4]`` where a box of those sides fits.

    With a foreground, a place is drawn again until a quarter of the patch lies on it; after a
    hundred tries the last one stays.
    """
    opaque = patch[:, :, 3] > 0
    enough = _ON_FOREGROUND * np.count_nonzero(opaque)
    for _ in range(_PLACES):
        rows, columns = _somewhere(sides, image.shape[:2], rng)
        mask = np.zeros(image.shape[:2], dtype=bool)
        under = mask[rows.start : rows.start + len(patch), columns.start :][:, : patch.shape[1]]
        under[:] = opaque[: under.shape[0], : under.shape[1]]
        if foreground is None:
            break
        mask &= foreground
        if np.count_nonzero(mask) >= enough:
            break
    picture = image.copy()
    inside = np.nonzero(mask)
    picture[inside] = patch[inside[0] - rows.start, inside[1] - columns.start, :3]
    return Synthetic(picture, mask)


# ---- Perlin blobs of a texture ------------------------------------------------------------------


def perlin_texture(
    image: ByteArray,
    rng: np.random.Generator,
    texture: ByteArray,
    foreground: BoolArray | None = None,
) -> Synthetic:
    """Return the image with blobs of an augmented texture (DRAEM, Zavrtanik et al. 2021).

    Blended as (1 - b) texture + b image in levels of 8 bits, b uniform in [0, 0.8): never after
    normalisation, where the texture would dwarf the image. One mask in a hundred is empty.
    """
    mask = perlin_mask(image.shape[:2], rng)
    if foreground is not None:
        mask = mask & foreground
    kept = rng.uniform(0, 0.8)
    filling = augment(texture, rng)[mask]
    picture = image.copy()
    picture[mask] = np.rint((1 - kept) * filling + kept * image[mask]).astype(np.uint8)
    return Synthetic(picture, mask)


# ---- patches of another image, blended in -------------------------------------------------------


def seamless_clone(
    image: ByteArray,
    source: ByteArray,
    rng: np.random.Generator,
    foreground: BoolArray | None = None,
    source_foreground: BoolArray | None = None,
) -> Synthetic:
    """Return the image with 1 to 3 patches of another blended in (NSA, Schlueter et al. 2022).

    Poisson blending hides the seams. The mask is where patches changed the image by more than a
    grey level, smoothed by a 5 x 5 median. Images under 9 pixels a side stay as they are.

    Parameters
    ----------
    source
        Another normal image of the same size.
    foreground, source_foreground
        Where the object is in either: of a patch 70 % must come from the source's, and 25 % must
        come to lie on the image's. Not found in 200 tries, the patch is left out.

    Raises
    ------
    InputError
        OpenCV is not installed.
    """
    if source.shape != image.shape:
        raise ValueError(f"image {image.shape} and source {source.shape} must have the same size")
    picture, area = image, np.zeros(image.shape[:2], dtype=bool)
    for number in range(_CLONES):
        if number and rng.random() < 0.5:
            continue
        found = _places(image.shape[:2], rng, foreground, source_foreground)
        if found is not None:
            taken, goal = found
            picture = _cloned(picture, _fitted(source[taken], _sides_of(goal)), goal)
            area[goal] = True
    return _labelled(image, picture, area if foreground is None else area & foreground)


def _places(
    size: _Size,
    rng: np.random.Generator,
    foreground: BoolArray | None,
    source_foreground: BoolArray | None,
) -> tuple[_Box, _Box] | None:
    """Return where a patch comes from and where it goes, or None where no try fits."""
    if min(size) < _SMALLEST_CLONE:
        return None
    for _ in range(_CLONE_TRIES):
        half = (0.03 + rng.gamma(2, 0.05, 2)).clip(0.03, 0.4) * size
        taken = _somewhere(_within(2 * half, size), size, rng)
        if _share(source_foreground, taken) < _SOURCE_OBJECT:
            continue
        scale = np.clip(rng.normal(1, 0.5), 0.7, 1.3)
        goal = _somewhere(_within(scale * np.array(_sides_of(taken)), size), size, rng)
        if _share(foreground, goal) >= _ON_FOREGROUND:
            return taken, goal
    return None


def _within(sides: npt.NDArray[np.float64], size: _Size) -> _Size:
    height, width = np.rint(sides).astype(int).clip(_SMALLEST_CLONE, size)
    return int(height), int(width)


def _sides_of(box: _Box) -> _Size:
    return box[0].stop - box[0].start, box[1].stop - box[1].start


def _share(foreground: BoolArray | None, box: _Box) -> float:
    """Return which share of a box is foreground; all of it where everything is."""
    return 1.0 if foreground is None else float(foreground[box].mean())


def _cloned(image: ByteArray, patch: ByteArray, goal: _Box) -> ByteArray:
    """Return the image with a patch blended into a box of the patch's size."""
    try:
        import cv2
    except ImportError:
        raise InputError(
            "pseudo-anomalies of nsa need OpenCV; install it with: pip install 'anomalyst[train]'"
        ) from None

    height, width = patch.shape[:2]
    inner = np.zeros((height, width), dtype=np.uint8)
    inner[1:-1, 1:-1] = 255
    centre = goal[1].start + width // 2, goal[0].start + height // 2
    blended = cv2.seamlessClone(patch, np.ascontiguousarray(image), inner, centre, cv2.NORMAL_CLONE)
    return np.asarray(blended, dtype=np.uint8)


def _labelled(image: ByteArray, picture: ByteArray, area: BoolArray) -> Synthetic:
    """Mask what changed visibly in an area, and restore everything else."""
    changed = _difference(image, picture).mean(axis=2) > 1
    share = ndimage.uniform_filter((changed & area).astype(float), 5, mode="constant")
    mask = (share > 0.5) & area  # the median of 25 truths is what 13 of them say
    return Synthetic(np.where(mask[:, :, None], picture, image), mask)


# ---- the object ---------------------------------------------------------------------------------


def foreground_mask(image: ByteArray) -> BoolArray | None:
    """Return where the object is, ``[H, W]``, or None where there is none to tell from its ground.

    Otsu's threshold on the distance to the border's median colour; of that the largest connected
    part, its holes filled. Under 10 % or over 90 % of the image it is taken for a texture: None.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    distance = np.sqrt(((image - np.median(border, axis=0)) ** 2).sum(axis=2))
    parts, _ = ndimage.label(distance > _otsu(distance))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    filled: BoolArray = ndimage.binary_fill_holes(parts == sizes.argmax())
    return filled if 0.1 <= filled.mean() <= 0.9 else None


def _otsu(values: npt.NDArray[np.float64]) -> float:
    """Return the threshold that parts values into two classes of least variance (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    below = counts.cumsum()
    above = below[-1] - below
    total = (counts * edges[:-1]).cumsum()
    # The variance between the classes, up to a constant factor.
    gap = (total[-1] * below - total * below[-1]) ** 2 / (below * above).clip(min=1)
    return float(edges[gap.argmax() + 1])


# ---- looking ------------------------------------------------------------------------------------


def contact_sheet(rows: Sequence[tuple[ByteArray, Synthetic]], cell: int = 224) -> Image.Image:
    """Return a picture with a row an image: original, pseudo-anomaly, and that with its outline.

    Images keep their proportions in square cells of so many pixels, on white.
    """
    step = cell + _MARGIN
    size = 3 * step + _MARGIN, len(rows) * step + _MARGIN
    sheet = Image.new("RGB", size, "white")
    for row, (image, made) in enumerate(rows):
        panels = [_shown(pixels, cell) for pixels in (image, made.image)]
        for column, panel in enumerate([*panels, _outlined(panels[1], made.mask)]):
            left = _MARGIN + column * step + (cell - panel.width) // 2
            sheet.paste(panel, (left, _MARGIN + row * step + (cell - panel.height) // 2))
    return sheet


def _shown(pixels: ByteArray, cell: int) -> Image.Image:
    return ImageOps.contain(Image.fromarray(pixels), (cell, cell), Image.Resampling.BICUBIC)


def _outlined(panel: Image.Image, mask: BoolArray) -> Image.Image:
    """Return a picture with the outline of a mask of any size, two pixels wide."""
    scaled = np.asarray(Image.fromarray(mask).resize(panel.size, Image.Resampling.NEAREST))
    pixels = np.array(panel)
    pixels[outline(scaled, 2)] = TRUTH_COLOUR
    return Image.fromarray(pixels)


# ---- shared -------------------------------------------------------------------------------------


def _shows(image: ByteArray, made: Synthetic) -> bool:
    changed = _difference(image, made.image)[made.mask]
    return changed.size > 0 and float(changed.mean()) >= 1


def _difference(first: ByteArray, second: ByteArray) -> npt.NDArray[np.int16]:
    gap: npt.NDArray[np.int16] = np.abs(first.astype(np.int16) - second)
    return gap


def _fitted(image: ByteArray, size: _Size) -> ByteArray:
    """Return an image at a size (height, width)."""
    if image.shape[:2] == size:
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
