"""Heat maps: fixed units, calm good images, outlines, bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from anomalyst.errors import InputError
from anomalyst.overlay import REGION_COLOUR, TRUTH_COLOUR, colour_bar, heat_overlay, outline
from anomalyst.scoring import find_regions
from anomalyst.types import Region


def grey(height: int, width: int, value: int = 128) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_a_colour_depends_on_value_and_unit_only() -> None:
    values = np.linspace(0, 3, 60, dtype=np.float32).reshape(6, 10)
    hotter = np.vstack([values, np.full((6, 10), 1e6, dtype=np.float32)])
    alone = heat_overlay(grey(6, 10), values, 1.0, ())
    np.testing.assert_array_equal(alone, heat_overlay(grey(12, 10), hotter, 1.0, ())[:6])
    np.testing.assert_array_equal(alone, heat_overlay(grey(6, 10), 4 * values, 4.0, ()))
    assert (alone != heat_overlay(grey(6, 10), values, 2.0, ())).any()


def test_good_images_stay_as_they_are_and_colours_saturate_at_twice_the_unit() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    before = image.copy()
    calm = heat_overlay(image, np.full((40, 50), 1.4, dtype=np.float32), 2.5, ())
    np.testing.assert_array_equal(calm, image)
    twice, more = (
        heat_overlay(grey(4, 4), np.full((4, 4), v, np.float32), 2.5, ()) for v in (5, 9)
    )
    np.testing.assert_array_equal(twice, more)
    below = heat_overlay(grey(4, 4), np.full((4, 4), -7, np.float32), 2.5, ())
    np.testing.assert_array_equal(below, grey(4, 4))
    np.testing.assert_array_equal(image, before)


def test_the_blend_is_the_bars_colour_at_its_opacity() -> None:
    bar, ticks = colour_bar(0.5, width=256, height=3)
    assert bar.shape == (3, 256, 4)
    assert [position for position, _ in ticks] == [0.0, 0.5, 1.0]
    assert ticks[1][1].endswith("= 0.5") and ticks[2][1].endswith("= 1")
    values = np.arange(256, dtype=np.float32)[None] / 255  # 0 to twice the unit
    alpha = bar[:1, :, 3:] / 255
    expected = bar[:1, :, :3] * alpha + 128 * (1 - alpha)
    found = heat_overlay(grey(1, 256), values, 0.5, ())
    np.testing.assert_allclose(found, expected, atol=0.51)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("vision", VISION)
def test_above_the_unit_the_ramp_gets_darker_for_the_colour_blind_too(vision: str) -> None:
    rgb = colour_bar(1.0)[0][0, 128:, :3] / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISION[vision]).T, 0, 1)
    luminance = seen @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()
    assert (np.diff(colour_bar(1.0)[0][0, :, 3].astype(int)) >= 0).all()


@pytest.mark.parametrize("unit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_unit_that_is_no_positive_number_is_refused(unit: float) -> None:
    with pytest.raises(InputError, match="not a positive number"):
        heat_overlay(grey(4, 4), np.zeros((4, 4), np.float32), unit, ())


def test_map_and_mask_must_fit_the_image() -> None:
    with pytest.raises(ValueError, match="same size"):
        heat_overlay(grey(4, 4), np.zeros((4, 5), np.float32), 1.0, ())
    with pytest.raises(ValueError, match="same size"):
        heat_overlay(grey(4, 4), np.zeros((4, 4), np.float32), 1.0, (), np.zeros((5, 4), bool))


def test_outline_of_a_single_pixel_is_its_four_neighbours() -> None:
    mask = np.zeros((5, 5), dtype=bool)
    mask[2, 2] = True
    expected = np.zeros((5, 5), dtype=bool)
    expected[[1, 2, 2, 3], [2, 1, 3, 2]] = True
    np.testing.assert_array_equal(outline(mask, 1), expected)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_outline_is_what_scipys_dilation_adds(width: int) -> None:
    blobs = ndimage.gaussian_filter(np.random.default_rng(width).random((60, 80)), 4) > 0.51
    blobs[:8] = blobs[-8:] = False
    blobs[:, :8] = blobs[:, -8:] = False
    grown = blobs
    for step in range(width):
        structure = ndimage.generate_binary_structure(2, 1 + step % 2)
        grown = ndimage.binary_dilation(grown, structure)
    np.testing.assert_array_equal(outline(blobs, width), grown & ~blobs)


def test_outline_closes_along_the_border_and_none_is_none() -> None:
    full = outline(np.ones((6, 7), dtype=bool), 1)
    assert full.sum() == 2 * 7 + 2 * 4 and not full[1:-1, 1:-1].any()
    assert not outline(np.zeros((6, 7), dtype=bool), 2).any()


def test_regions_and_ground_truth_are_outlined_in_their_colours() -> None:
    values = np.zeros((50, 60), dtype=np.float32)
    values[10:20, 10:20] = 1.5
    values[30:40, 40:50] = 1.5
    mask = np.zeros((50, 60), dtype=bool)
    mask[30:40, 10:20] = True
    first = find_regions(values, 1.0)[0].bbox
    picture = heat_overlay(grey(50, 60), values, 1.0, [Region(first, 100, 1.5)], mask)
    white = (picture == REGION_COLOUR).all(axis=2)
    np.testing.assert_array_equal(white, outline(values > 1, 1) & (np.arange(60) < 30))
    blue = (picture == TRUTH_COLOUR).all(axis=2)
    np.testing.assert_array_equal(blue, outline(mask, 1))


def test_without_regions_nothing_is_outlined() -> None:
    values = np.zeros((20, 20), dtype=np.float32)
    values[5:9, 5:9] = 3.0
    picture = heat_overlay(grey(20, 20), values, 1.0, ())
    np.testing.assert_array_equal((picture != 128).any(axis=2), values > 0)


def test_memory_stays_near_the_picture_itself() -> None:
    values = np.full((1500, 2000), 1.2, dtype=np.float32)
    image = grey(1500, 2000)
    tracemalloc.start()
    heat_overlay(image, values, 1.0, ())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < image.nbytes + 24 * 2**20
