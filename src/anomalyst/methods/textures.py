"""Where the texture of a pseudo-anomaly comes from, and how it is varied.

`augment` is DRAEM's list (Zavrtanik et al., ICCV 2021) as OneNIP has it (Gao, ECCV 2024). DRAEM
takes textures from the photographs of DTD. Three sources stand in for them: drawn textures,
MemSeg's shuffled image (Yang et al., EAAI 2023), and other images (NSA, Schlueter et al., ECCV
2022). Numbers measured with one source say little about another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from anomalyst.data.images import list_images, read_image
from anomalyst.errors import InputError, unknown
from anomalyst.methods.perlin import Noise, perlin_noise
from anomalyst.types import ByteArray, Sample

SOURCES = ("procedural", "shuffled", "others")
_GRID = 8  # cells an axis that `Shuffled` permutes
_OCTAVES = 4
_DECODED = 32  # images that are kept ready


class Textures(Protocol):
    """A source of textures."""

    def draw(self, image: ByteArray, category: str | None, rng: np.random.Generator) -> ByteArray:
        """Return a texture for an image, uint8 ``[H, W, 3]`` at the image's size."""


def by_category(samples: Iterable[Sample]) -> dict[str, list[Path]]:
    """Return the image files of each category."""
    images: dict[str, list[Path]] = {}
    for sample in samples:
        images.setdefault(sample.category or "", []).append(sample.path)
    return images


def find_textures(name: str, images: Mapping[str, Sequence[Path]]) -> Textures:
    """Return the source of that name, or the images of the folder of that name and below.

    Parameters
    ----------
    images
        For ``others``: category -> image files.

    Raises
    ------
    InputError
        Neither a source nor a folder, a folder without images, or no images for ``others``.
    """
    if name == "procedural":
        return Procedural()
    if name == "shuffled":
        return Shuffled()
    if name == "others":
        if not any(images.values()):
            raise InputError(
                "textures of others: there are no images to take them from; "
                "take procedural, shuffled or a folder of textures"
            )
        return FromImages(images)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise unknown("source or folder of textures", name, SOURCES)
    try:
        return FromImages({"": list_images(folder, recursive=True)})
    except InputError as error:
        raise InputError(
            f"textures: {error}; give another folder, or procedural, shuffled or others"
        ) from None


# ---- varying a texture --------------------------------------------------------------------------


def augment(texture: ByteArray, rng: np.random.Generator) -> ByteArray:
    """Return a texture ``[H, W, 3]`` after 3 of 10 changes of colour or orientation, in any order.

    Changes: gamma 0.5 to 2 a channel; brightness times 0.8 to 1.2 plus -30 to 30; sharpness; hue
    and saturation by up to 50 levels; solarize (every second time, from level 32 to 128);
    posterize; invert; autocontrast; equalize; mirror (every second time).
    """
    picture = Image.fromarray(texture)
    for number in rng.choice(len(_CHANGES), 3, replace=False):
        picture = _CHANGES[number](picture, rng)
    return np.asarray(picture)


_Table = npt.NDArray[np.floating[Any]] | npt.NDArray[np.int_]
_Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _gamma(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    levels = np.arange(256) / 255
    return _mapped(picture, *(255 * levels**power for power in rng.uniform(0.5, 2, 3)))


def _brightness(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    levels = np.arange(256) * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30)
    return _mapped(picture, levels, levels, levels)


def _mapped(picture: Image.Image, *tables: _Table) -> Image.Image:
    """Send every level of each channel through its table of 256 levels."""
    return picture.point(np.concatenate(tables).round().clip(0, 255).astype(int).tolist())


def _sharpness(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Sharpness(picture).enhance(rng.uniform(0, 2))


def _hue_and_saturation(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    hue, saturation = rng.integers(-50, 50, 2, endpoint=True)
    levels = np.arange(256)
    turned = _mapped(picture.convert("HSV"), (levels + hue) % 256, levels + saturation, levels)
    return turned.convert("RGB")


def _solarize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    threshold = int(rng.integers(32, 128, endpoint=True))
    return ImageOps.solarize(picture, threshold) if rng.random() < 0.5 else picture


def _posterize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.posterize(picture, int(rng.integers(1, 8, endpoint=True)))


def _invert(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.invert(picture)


def _autocontrast(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.equalize(picture)


def _mirror(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(picture) if rng.random() < 0.5 else picture


_CHANGES: tuple[_Change, ...] = (
    _gamma,
    _brightness,
    _sharpness,
    _hue_and_saturation,
    _solarize,
    _posterize,
    _invert,
    _autocontrast,
    _equalize,
    _mirror,
)


# ---- the sources --------------------------------------------------------------------------------


class Procedural:
    """Drawn textures: clouds, stripes, a checkerboard, Voronoi cells or one flat colour."""

    def draw(self, image: ByteArray, category: str | None, rng: np.random.Generator) -> ByteArray:
        """Return a texture of a random family; neither image nor category has a say in it."""
        family = _FAMILIES[rng.integers(len(_FAMILIES))]
        return family(image.shape[:2], rng)


_Places = npt.NDArray[np.int_]


class Shuffled:
    """MemSeg's "structure": the image itself, augmented, its 8 x 8 cells in random order."""

    def draw(self, image: ByteArray, category: str | None, rng: np.random.Generator) -> ByteArray:
        """Return the image's own cells, each from a random place, unturned."""
        order = rng.permutation(_GRID * _GRID).reshape(_GRID, _GRID)
        down, across = (np.arange(_GRID + 1) * side // _GRID for side in image.shape[:2])
        row, row_within = _cell_of(image.shape[0], down)
        column, column_within = _cell_of(image.shape[1], across)
        source = order[row[:, None], column]  # (8, 8) -> (H, W)
        # Cells differ by a pixel where 8 does not divide a side: the last one must not run out.
        from_row = np.minimum(down[source // _GRID] + row_within[:, None], image.shape[0] - 1)
        from_column = np.minimum(across[source % _GRID] + column_within, image.shape[1] - 1)
        shuffled: ByteArray = augment(image, rng)[from_row, from_column]
        return shuffled


def _cell_of(pixels: int, edges: _Places) -> tuple[_Places, _Places]:
    """Return each pixel's cell along an axis and its place in that cell."""
    every = np.arange(pixels)
    cell = np.searchsorted(edges, every, side="right") - 1
    return cell, every - edges[cell]


class FromImages:
    """Image files as textures: of another category than the image's where there are any.

    Parameters
    ----------
    images
        Category -> image files.
    """

    def __init__(self, images: Mapping[str, Sequence[Path]]) -> None:
        self._pairs = [(category, path) for category in images for path in images[category]]

    def draw(self, image: ByteArray, category: str | None, rng: np.random.Generator) -> ByteArray:
        """Return one of the images, scaled to the size of ``image``; it must not be written to.

        Raises
        ------
        InputError
            The drawn file cannot be read.
        """
        others = [path for owner, path in self._pairs if owner != category]
        paths = others or [path for _, path in self._pairs]
        return _scaled(paths[rng.integers(len(paths))], *image.shape[:2])


@lru_cache(maxsize=_DECODED)
def _scaled(path: Path, height: int, width: int) -> ByteArray:
    picture = Image.fromarray(read_image(path))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


# ---- drawn textures -----------------------------------------------------------------------------

_Size = tuple[int, int]


def _colour(rng: np.random.Generator) -> ByteArray:
    return rng.integers(0, 256, 3, dtype=np.uint8)


def _flat(size: _Size, rng: np.random.Generator) -> ByteArray:
    return np.full((*size, 3), _colour(rng))


def _clouds(size: _Size, rng: np.random.Generator) -> ByteArray:
    """Perlin noise in each channel, every octave twice as fine and half as strong."""
    coarsest = int(rng.integers(1, 4, endpoint=True))
    octaves = [2 ** (coarsest + k) for k in range(_OCTAVES)]
    channels = [
        sum(perlin_noise(size, (cells, cells), rng) / cells for cells in octaves) for _ in range(3)
    ]
    noise = np.stack(channels, axis=2)
    peak = np.abs(noise).max(axis=(0, 1)).clip(min=1e-9)  # 0 where every pixel is a lattice point
    levels: ByteArray = np.rint(127.5 + 127.5 * noise / peak).astype(np.uint8)
    return levels


def _stripes(size: _Size, rng: np.random.Generator) -> ByteArray:
    """Stripes at any angle, hard or soft, between two colours."""
    across, _ = _turned(size, rng)
    wave = np.sin(2 * np.pi * across)
    share = (1 + np.sign(wave)) / 2 if rng.random() < 0.5 else (1 + wave) / 2
    return _between(share, rng)


def _checker(size: _Size, rng: np.random.Generator) -> ByteArray:
    across, along = _turned(size, rng)
    return _between((np.floor(2 * across) + np.floor(2 * along)) % 2, rng)


def _turned(size: _Size, rng: np.random.Generator) -> tuple[Noise, Noise]:
    """Return coordinates along two turned axes, in periods of 3 to 25 % of the short side."""
    period = max(2.0, min(size) * rng.uniform(0.03, 0.25))
    angle, shift = rng.uniform(0, np.pi), rng.random(2)
    rows, columns = np.arange(size[0])[:, None] / period, np.arange(size[1]) / period
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * columns + sine * rows + shift[0], cosine * rows - sine * columns + shift[1]


def _between(share: Noise, rng: np.random.Generator) -> ByteArray:
    """Return the mixture of two random colours by shares ``[H, W]`` in [0, 1]."""
    first, second = _colour(rng).astype(float), _colour(rng).astype(float)
    mixed: ByteArray = np.rint(first + share[:, :, None] * (second - first)).astype(np.uint8)
    return mixed


def _voronoi(size: _Size, rng: np.random.Generator) -> ByteArray:
    """Give every pixel the colour of the nearest of 10 to 100 random points."""
    from scipy.ndimage import distance_transform_edt

    count = int(rng.integers(10, 100, endpoint=True))
    away = np.ones(size, dtype=bool)
    away[rng.integers(0, size[0], count), rng.integers(0, size[1], count)] = False
    row, column = distance_transform_edt(away, return_distances=False, return_indices=True)
    cells: ByteArray = rng.integers(0, 256, (*size, 3), dtype=np.uint8)[row, column]
    return cells


_FAMILIES: tuple[Callable[[_Size, np.random.Generator], ByteArray], ...] = (
    _clouds,
    _stripes,
    _checker,
    _voronoi,
    _flat,
)
