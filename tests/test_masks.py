"""Masks on the patch grid and at the size of a network's input, against pixel-by-pixel forms."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anomalyst.data.masks import Box, mask_at, network_mask, patch_coverage
from anomalyst.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from anomalyst.enrolment import defect_mask
from anomalyst.errors import InputError
from anomalyst.methods.residuals import shifted_pooling


def blank(height: int, width: int, *pixels: tuple[int, int]) -> np.ndarray:
    """A mask that marks those pixels."""
    mask = np.zeros((height, width), dtype=bool)
    for row, column in pixels:
        mask[row, column] = True
    return mask


def overlap(start: Fraction, size: Fraction, pixel: int) -> Fraction:
    return max(Fraction(0), min(start + size, Fraction(pixel + 1)) - max(start, Fraction(pixel)))


def exact_coverage(mask: np.ndarray, box: Box, grid: tuple[int, int]) -> list[list[Fraction]]:
    """Every patch's covered share, pixel by pixel in rational numbers."""
    top, left, height, width = (Fraction(x) for x in box)
    down, across = height / grid[0], width / grid[1]
    marked = [(int(r), int(c)) for r, c in np.argwhere(mask)]
    return [
        [
            sum(
                (
                    overlap(top + i * down, down, r) * overlap(left + j * across, across, c)
                    for r, c in marked
                ),
                Fraction(0),
            )
            / (down * across)
            for j in range(grid[1])
        ]
        for i in range(grid[0])
    ]


# ---- coverage of patches ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "box", "grid"),
    [
        ((12, 16), (0.0, 0.0, 12.0, 16.0), (3, 4)),  # whole pixels
        ((13, 17), (0.0, 0.0, 13.0, 17.0), (5, 4)),  # edges between pixels
        ((5, 4), (0.0, 0.0, 5.0, 4.0), (7, 9)),  # patches smaller than pixels
        ((16, 15), (2.75, 1.5, 10.25, 11.125), (4, 6)),  # a crop between pixels
        ((9, 11), (3.0, 0.0, 4.0, 11.0), (2, 3)),  # a crop in height alone
    ],
)
def test_coverage_is_the_exact_share_of_each_patch(
    size: tuple[int, int], box: Box, grid: tuple[int, int]
) -> None:
    for seed in range(3):
        mask = np.random.default_rng(seed).random(size) < (0.05, 0.3, 0.9)[seed]
        found = patch_coverage(mask, box, grid)
        expected = np.array(exact_coverage(mask, box, grid), dtype=float)
        assert found.dtype == np.float32 and found.shape == grid
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "grid", "pixels"),
    [
        ((6, 6), (7, 7), [(0, 0)]),
        ((900, 900), (28, 28), [(225, 225), (225, 226), (226, 225)]),
        ((900, 900), (28, 28), [(36, 658), (621, 731)]),
        ((700, 1000), (22, 32), [(99, 431)]),
    ],
)
def test_a_patch_that_a_mask_does_not_touch_has_no_coverage_at_all(
    size: tuple[int, int], grid: tuple[int, int], pixels: list[tuple[int, int]]
) -> None:
    """Whatever is above 0 counts as defect, so rounding must not leave a trace."""
    box = (0.0, 0.0, float(size[0]), float(size[1]))
    mask = blank(*size, *pixels)
    touched = np.array(exact_coverage(mask, box, grid), dtype=float) > 0
    assert 0 < touched.sum() <= 4 * len(pixels)
    np.testing.assert_array_equal(patch_coverage(mask, box, grid) > 0, touched)


def test_single_pixels_lie_in_their_patches() -> None:
    for pixel, patch in ((0, 0), (13, 0), (14, 1), (447, 31)):
        mask = blank(448, 448, (pixel, pixel))
        found = patch_coverage(mask, (0.0, 0.0, 448.0, 448.0), (32, 32))
        assert np.argwhere(found).tolist() == [[patch, patch]]
        assert found.max() == pytest.approx(1 / 196)


def test_one_pixel_of_a_large_image_still_counts() -> None:
    mask = blank(1000, 1500, (617, 1210))
    found = patch_coverage(mask, (0.0, 0.0, 1000.0, 1500.0), (3, 4))
    assert np.argwhere(found).tolist() == [[1, 3]]
    assert found.max() == pytest.approx(12 / 1.5e6, rel=1e-6)


def test_everything_covers_all_and_nothing_covers_none() -> None:
    for size, grid in (((13, 29), (5, 3)), ((31, 7), (4, 4))):
        box = (0.0, 0.0, float(size[0]), float(size[1]))
        np.testing.assert_allclose(patch_coverage(np.ones(size, bool), box, grid), 1, atol=1e-6)
        assert not patch_coverage(blank(*size), box, grid).any()


def test_shares_add_up_to_the_marked_area() -> None:
    mask = np.random.default_rng(0).random((37, 53)) < 0.2
    found = patch_coverage(mask, (0.0, 0.0, 37.0, 53.0), (8, 11))
    assert found.sum() * 37 * 53 / 88 == pytest.approx(mask.sum(), rel=1e-5)


def test_what_lies_outside_of_the_box_does_not_count() -> None:
    mask = blank(20, 20, (0, 0), (4, 10), (15, 15), (19, 3))
    found = patch_coverage(mask, (5.0, 5.0, 10.0, 10.0), (2, 2))
    assert not found.any()
    assert patch_coverage(blank(20, 20, (14, 5)), (5.0, 5.0, 10.0, 10.0), (2, 2))[1, 0] > 0


# ---- masks at another size ----------------------------------------------------------------------


def test_a_mask_at_its_own_size_is_itself() -> None:
    mask = np.random.default_rng(0).random((9, 13)) < 0.4
    np.testing.assert_array_equal(mask_at(mask, (0.0, 0.0, 9.0, 13.0), (9, 13)), mask)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0.0, 0.0, 11.0, 14.0), (28, 42)),
        ((0.0, 0.0, 11.0, 14.0), (3, 5)),
        ((1.5, 2.25, 7.0, 9.5), (14, 14)),
    ],
)
def test_each_pixel_of_a_resized_mask_is_the_one_under_its_centre(
    box: Box, size: tuple[int, int]
) -> None:
    mask = np.random.default_rng(0).random((11, 14)) < 0.4
    found = mask_at(mask, box, size)
    top, left, height, width = (Fraction(x) for x in box)
    assert found.dtype == bool and found.shape == size
    for i in range(size[0]):
        for j in range(size[1]):
            row = floor(top + (i + Fraction(1, 2)) * height / size[0])
            column = floor(left + (j + Fraction(1, 2)) * width / size[1])
            assert found[i, j] == mask[row, column]


@pytest.mark.parametrize(
    ("square", "resize", "size"),
    [(False, None, (60, 91)), (True, None, (60, 91)), (False, 64, (130, 77))],
)
def test_both_forms_of_a_mask_see_the_same_part_of_the_image(
    square: bool, resize: int | None, size: tuple[int, int]
) -> None:
    """What the resized mask shows in a patch covers some of that patch."""
    preprocess = Preprocess(56, 14, IMAGENET_MEAN, IMAGENET_STD, square=square, resize=resize)
    height, width = preprocess.output_size(*size)
    grid, box = (height // 14, width // 14), preprocess.box(*size)
    mask = np.random.default_rng(0).random(size) < 0.004
    shown = mask_at(mask, box, (height, width)).reshape(grid[0], 14, grid[1], 14).any((1, 3))
    covered = patch_coverage(mask, box, grid) > 0
    assert shown.any() and not covered.all()
    assert not (shown & ~covered).any()


def test_a_mask_at_the_size_of_a_network_never_loses_a_defect_nor_invents_one() -> None:
    box, size = (5.0, 5.0, 20.0, 20.0), (4, 4)
    dot = blank(30, 30, (6, 11))
    np.testing.assert_array_equal(network_mask(dot, box, size), blank(4, 4, (0, 1)))
    large = np.zeros((30, 30), bool)
    large[10:20, 10:20] = True
    np.testing.assert_array_equal(network_mask(large, box, size), mask_at(large, box, size))
    assert not network_mask(blank(30, 30, (1, 1)), box, size).any()
    assert not network_mask(blank(30, 30), box, size).any()


# ---- the authors' pooling -----------------------------------------------------------------------


def pooled_by_convolution(mask: np.ndarray, patch: int) -> np.ndarray:
    """Sums of a filter of ones with a border of one zero around the mask, where above 0."""
    framed = np.pad(mask, 1)
    rows = (framed.shape[0] - patch) // patch + 1
    columns = (framed.shape[1] - patch) // patch + 1
    found = np.zeros((rows, columns))
    for r in range(rows):
        for c in range(columns):
            found[r, c] = framed[patch * r : patch * (r + 1), patch * c : patch * (c + 1)].sum()
    return found > 0


@pytest.mark.parametrize(
    ("size", "patch"), [((84, 84), 14), ((70, 112), 14), ((64, 48), 16), ((24, 32), 8)]
)
def test_shifted_pooling_is_the_authors_convolution(size: tuple[int, int], patch: int) -> None:
    for seed in range(4):
        mask = np.random.default_rng(seed).random(size) < (0.001, 0.005, 0.02, 0.5)[seed]
        found = shifted_pooling(torch.from_numpy(mask).float(), patch).numpy()
        expected = pooled_by_convolution(mask, patch)
        assert found.shape == (size[0] // patch, size[1] // patch)
        np.testing.assert_array_equal(found > 0, expected)
        assert set(np.unique(found)) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("pixel", "patch"), [(0, 0), (12, 0), (13, 1), (14, 1), (26, 1), (446, 31), (447, None)]
)
def test_shifted_pooling_is_one_pixel_off_and_never_sees_the_last(
    pixel: int, patch: int | None
) -> None:
    mask = torch.from_numpy(blank(448, 448, (pixel, pixel)))
    expected = [] if patch is None else [[patch, patch]]
    assert torch.nonzero(shifted_pooling(mask, 14)).tolist() == expected


# ---- masks that come with a reference -----------------------------------------------------------


def item(height: int, width: int) -> SimpleNamespace:
    return SimpleNamespace(name="part.png", size=(height, width))


def test_any_value_above_0_of_a_mask_array_marks() -> None:
    values = np.array([[0, 1, 0], [255, 0, 7]], dtype=np.uint8)
    found = defect_mask(values, item(2, 3))
    np.testing.assert_array_equal(found, [[False, True, False], [True, False, True]])


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.eye(4, 5), r"part\.png.*shape \[4, 5\].*4 rows and 6 columns"),
        (np.ones((4, 6, 3)), r"part\.png.*shape \[4, 6, 3\]"),
        (np.zeros((4, 6)), r"part\.png.*marks no pixel"),
        (np.ones((4, 6), bool), r"part\.png.*whole image"),
    ],
)
def test_a_mask_array_that_says_nothing_is_refused(mask: np.ndarray, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        defect_mask(mask, item(4, 6))
