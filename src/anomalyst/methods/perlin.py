"""Perlin noise of any size, and the blob-shaped masks that pseudo-anomalies are cut out with.

Perlin: *Improving Noise*, SIGGRAPH 2002 (the fade); the masks are those of DRAEM (Zavrtanik et al.,
ICCV 2021) with the settings of OneNIP (Gao, ECCV 2024).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from anomalyst.types import BoolArray

Noise = npt.NDArray[np.float64]


def perlin_noise(shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> Noise:
    """Return gradient noise ``[H, W]`` in [-1, 1], of any size and number of cells an axis.

    It is 0 on lattice points. Pixels find their cell by floor, so the cells need not divide the
    size.
    """
    angle = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    weight_y, ramp_y = _axis(shape[0], cells[0])
    weight_x, ramp_x = _axis(shape[1], cells[1])
    # The four corners of a cell, weighted, are separable: one matrix an axis sums them all.
    noise: Noise = ramp_y @ np.sin(angle) @ weight_x.T + weight_y @ np.cos(angle) @ ramp_x.T
    noise *= np.sqrt(2)  # unit gradients alone stay within sqrt(1/2)
    return noise


def perlin_mask(
    shape: tuple[int, int],
    rng: np.random.Generator,
    exponents: tuple[int, int] = (1, 5),
    degrees: float = 5.0,
    threshold: float = 0.5,
) -> BoolArray:
    """Return where turned noise is above a threshold, ``[H, W]``; one draw in a hundred is empty.

    Parameters
    ----------
    exponents
        The lowest and the highest e: each axis has 2^e cells, drawn independently.
    degrees
        The noise is turned by up to so much, either way; the corners turned in are outside.
    """
    low, high = exponents
    rows, columns = (int(2**e) for e in rng.integers(low, high, 2, endpoint=True))
    noise = Image.fromarray(perlin_noise(shape, (rows, columns), rng).astype(np.float32))
    turned = noise.rotate(rng.uniform(-degrees, degrees), Image.Resampling.BILINEAR)
    return np.asarray(turned) > threshold


def _axis(pixels: int, cells: int) -> tuple[Noise, Noise]:
    """Return what each pixel takes of each lattice point, ``[pixels, cells + 1]``, of one axis.

    First the faded weights of the two points beside the pixel, then those times the signed
    distance from the point.
    """
    # Whole numbers, so that a pixel on a lattice point is exactly there.
    cell, rest = np.divmod(np.arange(pixels) * cells, pixels)
    place = rest / pixels
    fade = place**3 * (place * (6 * place - 15) + 10)
    weight, ramp = np.zeros((2, pixels, cells + 1))
    every = np.arange(pixels)
    weight[every, cell], weight[every, cell + 1] = 1 - fade, fade
    ramp[every, cell], ramp[every, cell + 1] = (1 - fade) * place, fade * (place - 1)
    return weight, ramp
