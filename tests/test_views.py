"""Views: where `Affine` puts a picture's points, and the 22 variants of few-shot training."""

from __future__ import annotations

from math import atan2, hypot, pi, sin

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalyst.methods.views import PLAIN, Affine, variants


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def spot(height: int, width: int, right: float, down: float, sigma: float = 4.0) -> Tensor:
    """A round spot, so many pixels right of and below the centre, ``[1, 3, H, W]``."""
    y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2 - down
    x = torch.arange(width, dtype=torch.float64)[None] - (width - 1) / 2 - right
    one = torch.exp(-(x**2 + y**2) / (2 * sigma**2)).float()
    return one.expand(1, 3, height, width).contiguous()


def place(image: Tensor) -> tuple[float, float]:
    """Centre of mass, in pixels right of and below the centre of the canvas.

    Taken inside the largest circle: beyond it, turned canvases show the mirrored border.
    """
    mass = image[0, 0].double()
    height, width = mass.shape
    y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64)[None] - (width - 1) / 2
    mass = mass * (x**2 + y**2 < (min(height, width) / 2) ** 2)
    return float((mass * x).sum() / mass.sum()), float((mass * y).sum() / mass.sum())


# ---- Affine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 57)])
def test_the_defaults_change_nothing(height: int, width: int) -> None:
    images = noise(height, width)
    torch.testing.assert_close(Affine()(images), images, rtol=0, atol=1e-4)
    assert torch.equal(PLAIN.apply(images), images)


@pytest.mark.parametrize(("height", "width"), [(120, 120), (100, 180), (180, 100)])
@pytest.mark.parametrize("angle", [0.3, -0.8, pi / 2])
def test_a_turn_keeps_distances_and_shapes_on_any_canvas(
    height: int, width: int, angle: float
) -> None:
    turned = Affine(angle=angle)(spot(height, width, 24, 10))
    x, y = place(turned)
    assert hypot(x, y) == pytest.approx(26, abs=0.05)  # 24, 10, 26
    moved = (atan2(y, x) - atan2(10, 24) + pi) % (2 * pi) - pi
    assert abs(moved) == pytest.approx(abs(angle), abs=0.005)
    # A round spot stays round: an equal one is drawn where the turn has put it.
    window = (..., *(slice(side // 2 - 45, side // 2 + 45) for side in (height, width)))
    assert (turned - spot(height, width, x, y))[window].abs().max() < 0.03


def test_opposite_angles_turn_opposite_ways() -> None:
    sides = [place(Affine(angle=angle)(spot(100, 140, 30, 0)))[1] for angle in (0.4, -0.4)]
    assert sides[0] == pytest.approx(-sides[1], abs=0.05)
    assert abs(sides[0]) == pytest.approx(30 * sin(0.4), abs=0.05)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (80, 160)])
def test_shifts_are_shares_of_half_a_side(height: int, width: int) -> None:
    image = spot(height, width, 0, 0)
    for share in (0.3, -0.1):
        x, y = place(Affine(right=share)(image))
        assert (abs(x), y) == pytest.approx((abs(share) * width / 2, 0), abs=0.02)
        x, y = place(Affine(down=share)(image))
        assert (x, abs(y)) == pytest.approx((0, abs(share) * height / 2), abs=0.02)


def test_a_shift_to_the_right_and_down_moves_the_picture_right_and_down() -> None:
    x, y = place(Affine(right=0.2, down=0.1)(spot(100, 100, 0, 0)))
    assert (x, y) == pytest.approx((10, 5), abs=0.02)


def test_beyond_the_border_lies_the_mirrored_picture() -> None:
    images = noise(20, 30)
    shifted = Affine(right=0.4)(images)  # 6 pixels
    wide = torch.cat([images.flip(3), images, images.flip(3)], dim=3)
    same = [torch.allclose(shifted, wide[..., start : start + 30], atol=1e-4) for start in (24, 36)]
    assert same.count(True) == 1


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 57)])
def test_a_mirrored_image_is_flipped_left_to_right(height: int, width: int) -> None:
    images = noise(height, width)
    torch.testing.assert_close(Affine(mirror=True)(images), images.flip(3), rtol=0, atol=1e-4)


# ---- the 22 variants ----------------------------------------------------------------------------

# In the specification's order: itself, rotations, shifts, mirrored, grey, quarter turns.
ROTATIONS, SHIFTS, MIRRORED, GREY, TURNS = range(1, 9), range(9, 17), 17, 18, range(19, 22)


@pytest.mark.parametrize(("height", "width"), [(56, 56), (42, 70)])
def test_there_are_22_different_variants_and_the_image_is_the_first(
    height: int, width: int
) -> None:
    views, images = variants(), noise(height, width)
    assert len(views) == 22
    assert len({view.name for view in views}) == 22
    made = [view.apply(images) for view in views]
    assert torch.equal(made[0], images)
    for k, image in enumerate(made):
        assert image.shape == images.shape
        assert image.isfinite().all()
        assert all((image - other).abs().max() > 0.1 for other in made[:k]), k


def test_variants_change_each_image_of_a_batch_by_itself() -> None:
    images = noise(28, 28)
    for view in variants():
        torch.testing.assert_close(view.apply(images)[1:], view.apply(images[1:]))


def test_small_rotations_go_both_ways_in_steps_of_a_sixteenth_of_half_a_turn() -> None:
    image = spot(140, 140, 40, 0)
    found = [place(variants()[k].apply(image)) for k in ROTATIONS]
    expected = sorted(sign * k * pi / 16 for sign in (1, -1) for k in (1, 2, 3, 4))
    assert sorted(atan2(y, x) for x, y in found) == pytest.approx(expected, abs=0.003)
    assert [hypot(x, y) for x, y in found] == pytest.approx([40] * 8, abs=0.05)


def test_shifts_go_every_diagonal_way_by_39_and_20_pixels_of_392() -> None:
    image = spot(392, 392, 0, 0)
    places = [place(variants()[k].apply(image)) for k in SHIFTS]
    found = {(round(x, 1), round(y, 1)) for x, y in places}
    assert found == {(x * d, y * d) for d in (39.2, 19.6) for x in (1, -1) for y in (1, -1)}


def test_the_mirrored_variant_is_the_flipped_image() -> None:
    images = noise(42, 70)
    mirrored = variants()[MIRRORED].apply(images)
    torch.testing.assert_close(mirrored, images.flip(3), rtol=0, atol=1e-4)


def test_the_grey_variant_has_the_luma_in_three_equal_channels() -> None:
    images = noise(14, 28)
    grey = variants()[GREY].apply(images)
    red, green, blue = images.double().numpy().transpose(1, 0, 2, 3)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    for channel in range(3):
        np.testing.assert_allclose(grey[:, channel].numpy(), luma, rtol=0, atol=1e-6)


def test_the_last_three_variants_are_the_quarter_turns() -> None:
    images = noise(56, 56)
    turned = [variants()[k].apply(images) for k in TURNS]
    found = [
        [k for k in range(4) if torch.allclose(image, images.rot90(k, (2, 3)), atol=1e-3)]
        for image in turned
    ]
    assert found in ([[1], [2], [3]], [[3], [2], [1]])


@pytest.mark.parametrize(("height", "width"), [(56, 56), (42, 70)])
def test_half_a_turn_twice_is_the_image_again(height: int, width: int) -> None:
    images, half = noise(height, width), variants()[TURNS[1]]
    torch.testing.assert_close(half.apply(images), images.flip(2, 3), rtol=0, atol=1e-3)
    torch.testing.assert_close(half.apply(half.apply(images)), images, rtol=0, atol=1e-3)
