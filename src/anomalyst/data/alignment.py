"""How far a part lies from where it lies on a golden sample, by normalised cross-correlation.

numpy only: the runtime finds the same shift. Whole pixels, no rotation.
"""

from __future__ import annotations

from math import ceil

import numpy as np
import numpy.typing as npt

from anomalyst.types import ByteArray

_Grid = npt.NDArray[np.float64]

_WINDOW = 512  # longest side that is searched at full resolution
_DETAIL = 16  # pixels that a reduced template keeps along its short side
_FLAT = 1e-3  # sum of squares under which a place shows nothing


def grey(image: ByteArray) -> ByteArray:
    """Return the luma of RGB pixels, uint8 ``[H, W, 3]`` -> ``[H, W]``."""
    luma = image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.asarray(luma.round(), dtype=np.uint8)


def find_shift(
    image: ByteArray, template: ByteArray, place: tuple[int, int], search: int
) -> tuple[int, int, float]:
    """Return how far right and down a template lies from its place, and how well it fits there.

    Parameters
    ----------
    image
        RGB pixels ``[H, W, 3]``, at least as large as the template.
    template
        Grey pixels ``[h, w]`` of the golden sample.
    place
        (x, y) of the template's corner there.
    search
        Largest shift that is tried in each direction, in pixels; what leaves the image is not.

    Returns
    -------
    tuple
        Right, down, and the correlation in [-1, 1]. Of no place within reach of the image, -1.
    """
    height, width = template.shape
    left, top = max(place[0] - search, 0), max(place[1] - search, 0)
    right = min(place[0] + search, image.shape[1] - width)
    bottom = min(place[1] + search, image.shape[0] - height)
    if right < left or bottom < top:
        return 0, 0, -1.0
    window = grey(image[top : bottom + height, left : right + width]).astype(np.float64)
    wanted = template.astype(np.float64)
    factor = min(ceil(max(window.shape) / _WINDOW), min(height, width) // _DETAIL)
    row = column = 0
    if factor > 1:
        row, column, _ = _best(_reduced(window, factor), _reduced(wanted, factor))
        row, column = (max(factor * (k - 2), 0) for k in (row, column))
        reach = 4 * factor
        window = window[row : row + height + reach, column : column + width + reach]
    down, across, fit = _best(window, wanted)
    return left + column + across - place[0], top + row + down - place[1], fit


def _reduced(values: _Grid, factor: int) -> _Grid:
    """Return the means of blocks of ``factor`` pixels; what is left over at the ends is cut."""
    height, width = (side // factor for side in values.shape)
    blocks = values[: height * factor, : width * factor].reshape(height, factor, width, factor)
    means: _Grid = blocks.mean(axis=(1, 3))
    return means


def _best(window: _Grid, template: _Grid) -> tuple[int, int, float]:
    """Return row, column and value of the highest correlation of any place in a window."""
    height, width = template.shape
    pattern = template - template.mean()
    centred = window - window.mean()
    size = window.shape
    spectrum = np.fft.rfft2(centred) * np.fft.rfft2(pattern, size).conj()
    product = np.fft.irfft2(spectrum, size)[: size[0] - height + 1, : size[1] - width + 1]
    total, squares = _sums(centred, height, width), _sums(centred**2, height, width)
    spread = squares - total**2 / template.size  # of each place around its own mean
    energy = np.sqrt(spread.clip(min=_FLAT) * (pattern**2).sum())
    fit = np.where(spread > _FLAT, product / energy, 0.0)
    row, column = divmod(int(fit.argmax()), fit.shape[1])
    return row, column, float(fit[row, column])


def _sums(values: _Grid, height: int, width: int) -> _Grid:
    """Return the sum over each place of ``height`` by ``width``."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    table[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    down: _Grid = table[height:] - table[:-height]
    found: _Grid = down[:, width:] - down[:, :-width]
    return found
