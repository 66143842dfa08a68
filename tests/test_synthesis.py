"""Pseudo-anomalies: the contract of every maker, and each against a form of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import cos, floor, pi, sin, sqrt
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from anomalyst.errors import InputError
from anomalyst.methods import synthesis
from anomalyst.methods.perlin import perlin_mask, perlin_noise
from anomalyst.methods.synthesis import (
    RECIPES,
    Synthesizer,
    Synthetic,
    contact_sheet,
    cut_paste,
    foreground_mask,
    perlin_texture,
    scar,
    seamless_clone,
)
from anomalyst.methods.textures import Procedural
from anomalyst.overlay import TRUTH_COLOUR
from conftest import Run, save, texture

Size = tuple[int, int]
SIZES = [(224, 224), (300, 300), (97, 160), (16, 16)]


def noise(size: Size, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def disc(size: Size, share: float = 0.35) -> np.ndarray:
    rows, columns = np.ogrid[: size[0], : size[1]]
    middle = (size[0] - 1) / 2, (size[1] - 1) / 2
    return np.hypot(rows - middle[0], columns - middle[1]) < share * min(size)


def part(size: Size, seed: int = 0) -> np.ndarray:
    """A noisy dark disc on white."""
    where = disc(size)
    picture = np.full((*size, 3), 250, dtype=np.uint8)
    picture[where] = 40 + noise(size, seed)[where] // 4
    return picture


PICTURES: dict[str, Callable[[Size], np.ndarray]] = {
    "noise": noise,
    "part": part,
    "black": lambda size: np.zeros((*size, 3), dtype=np.uint8),
    "grey": lambda size: np.full((*size, 3), 128, dtype=np.uint8),
}


def filled(image: np.ndarray, rng: np.random.Generator, where: np.ndarray | None) -> Synthetic:
    return perlin_texture(image, rng, Procedural().draw(image, None, rng), where)


def cloned(image: np.ndarray, rng: np.random.Generator, where: np.ndarray | None) -> Synthetic:
    return seamless_clone(image, np.ascontiguousarray(image[::-1]), rng, where)


MAKERS = {"cut_paste": cut_paste, "scar": scar, "perlin": filled, "nsa": cloned}


def check(image: np.ndarray, made: Synthetic, where: np.ndarray | None = None) -> None:
    """What every pseudo-anomaly must be."""
    assert made.image.shape == image.shape and made.image.dtype == np.uint8
    assert made.mask.shape == image.shape[:2] and made.mask.dtype == bool
    np.testing.assert_array_equal(made.image[~made.mask], image[~made.mask])
    assert where is None or not (made.mask & ~where).any()
    assert not np.shares_memory(made.image, image)


# ---- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("maker", MAKERS)
def test_outside_the_mask_nothing_changes(maker: str, picture: str, size: Size) -> None:
    image = PICTURES[picture](size)
    image.setflags(write=False)  # as read_image gives them
    for seed in range(2):
        for where in (None, disc(size)):
            made, again = (
                MAKERS[maker](image, np.random.default_rng(seed), where) for _ in range(2)
            )
            check(image, made, where)
            np.testing.assert_array_equal(made.image, again.image)
            np.testing.assert_array_equal(made.mask, again.mask)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_shows_or_leaves_the_image_as_it_was(recipe: str, size: Size) -> None:
    for foreground in (False, True):
        draw = Synthesizer(recipe, Procedural(), foreground)
        for name, picture in PICTURES.items():
            image, rng = picture(size), np.random.default_rng(1)
            before = image.copy()
            made = draw(image, rng, "cup", picture(size)[:, ::-1])
            check(image, made)
            change = np.abs(made.image.astype(int) - image)[made.mask]
            assert not made.mask.any() or change.mean() >= 1, name
            np.testing.assert_array_equal(image, before)


def test_draws_differ_and_leave_the_global_generators_alone() -> None:
    image, state, other = part((64, 64)), np.random.get_state()[1].copy(), random.getstate()
    rng = np.random.default_rng(0)
    for recipe in RECIPES:
        drawn = [Synthesizer(recipe, Procedural())(image, rng, None, image) for _ in range(8)]
        assert len({made.image.tobytes() for made in drawn}) == 8
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert random.getstate() == other


# ---- Perlin noise -------------------------------------------------------------------------------


def looped_noise(shape: Size, cells: Size, rng: np.random.Generator) -> np.ndarray:
    """Perlin's noise pixel by pixel, corner by corner."""
    angle = rng.uniform(0, 2 * pi, (cells[0] + 1, cells[1] + 1))
    found = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            y, x = i * cells[0] / shape[0], j * cells[1] / shape[1]
            for row in (floor(y), floor(y) + 1):
                for column in (floor(x), floor(x) + 1):
                    dy, dx = y - row, x - column
                    dot = dy * sin(angle[row, column]) + dx * cos(angle[row, column])
                    for gap in (abs(dy), abs(dx)):
                        dot *= 1 - (6 * gap**5 - 15 * gap**4 + 10 * gap**3)
                    found[i, j] += sqrt(2) * dot
    return found


@pytest.mark.parametrize(
    ("shape", "cells"),
    [((12, 12), (3, 4)), ((17, 30), (4, 2)), ((25, 11), (8, 8)), ((9, 9), (1, 2))],
)
def test_noise_is_what_loops_over_pixels_and_corners_give(shape: Size, cells: Size) -> None:
    found = perlin_noise(shape, cells, np.random.default_rng(5))
    wanted = looped_noise(shape, cells, np.random.default_rng(5))
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("shape", [(224, 224), (256, 256), (300, 300), (518, 518), (97, 160)])
def test_noise_of_any_size_is_zero_on_the_lattice_bounded_and_unbroken(shape: Size) -> None:
    rng = np.random.default_rng(0)
    for cells in [(2, 2), (2, 32), (16, 4), (32, 32)]:
        found = perlin_noise(shape, cells, rng)
        assert found.shape == shape and found.dtype == np.float64
        assert 0.4 < np.abs(found).max() <= 1
        on_rows = np.arange(shape[0]) * cells[0] % shape[0] == 0
        on_columns = np.arange(shape[1]) * cells[1] % shape[1] == 0
        assert (found[np.ix_(on_rows, on_columns)] == 0).all()
        for axis in (0, 1):  # no slope is steeper than sqrt(2) * (1 + 2 * 15 / 8) a cell
            step = np.abs(np.diff(found, axis=axis)).max()
            assert step <= sqrt(2) * 4.75 * cells[axis] / shape[axis]


@pytest.mark.parametrize(
    ("size", "settings", "empty", "area"),
    [(224, {}, (0, 0.02), 0.053), (256, {"exponents": (0, 5), "degrees": 90}, (0.03, 0.07), 0.051)],
)
def test_masks_are_as_large_and_as_seldom_empty_as_the_papers(
    size: int, settings: dict, empty: tuple[float, float], area: float
) -> None:
    rng = np.random.default_rng(0)
    shares = np.array([perlin_mask((size, size), rng, **settings).mean() for _ in range(500)])
    assert empty[0] <= (shares == 0).mean() <= empty[1]
    assert abs(shares[shares > 0].mean() - area) < 0.007


def test_the_threshold_parts_the_noise() -> None:
    low, high = (
        perlin_mask((64, 64), np.random.default_rng(0), (2, 2), 0.0, level) for level in (0.2, 0.5)
    )
    rng = np.random.default_rng(0)
    rng.integers(2, 2, 2, endpoint=True)
    np.testing.assert_array_equal(low, perlin_noise((64, 64), (4, 4), rng) > 0.2)
    assert high.sum() < low.sum() and not (high & ~low).any()


# ---- Perlin blobs -------------------------------------------------------------------------------


def test_blobs_are_a_blend_of_the_texture_and_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "augment", lambda given, rng: given)
    image, given, shares = noise((64, 64), 1), noise((64, 64), 2), []
    for seed in range(60):
        made = perlin_texture(image, np.random.default_rng(seed), given)
        if not made.mask.any():
            continue
        out, plain, drawn = (x[made.mask].astype(float) for x in (made.image, image, given))
        kept = float(((out - drawn) * (plain - drawn)).sum() / ((plain - drawn) ** 2).sum())
        assert np.abs(out - (1 - kept) * drawn - kept * plain).max() < 0.6
        shares.append(kept)
    assert len(shares) > 50 and -0.01 < min(shares) < 0.1 and 0.7 < max(shares) < 0.805


def test_the_texture_is_varied_first() -> None:
    image, given = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), (200, 90, 30), np.uint8)
    hues = set()
    for seed in range(12):
        made = perlin_texture(image, np.random.default_rng(seed), given)
        inside = made.image[made.mask].reshape(-1, 3)
        hues |= {tuple(np.rint(4 * one / max(one.max(), 1)).astype(int)) for one in inside}
    assert len(hues) > 4


# ---- CutPaste -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (97, 160), (24, 400)])
def test_a_patch_is_a_rectangle_of_2_to_15_percent(size: Size) -> None:
    image, areas, aspects = noise(size), [], []
    for seed in range(150):
        made = cut_paste(image, np.random.default_rng(seed))
        rows, columns = np.flatnonzero(made.mask.any(1)), np.flatnonzero(made.mask.any(0))
        height, width = len(rows), len(columns)
        assert made.mask.sum() == height * width
        assert rows[-1] - rows[0] + 1 == height and columns[-1] - columns[0] + 1 == width
        slack = (height + width + 1) / 2
        assert 0.02 * made.mask.size - slack <= height * width <= 0.15 * made.mask.size + slack
        areas.append(height * width / made.mask.size)
        aspects.append(width / height)
    assert min(areas) < 0.03 and max(areas) > 0.13
    if size[0] > 50:
        assert 0.28 < min(aspects) < 0.4 and 2.5 < max(aspects) < 3.5
        assert 50 < sum(aspect < 1 for aspect in aspects) < 100


def test_without_jitter_a_patch_is_found_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "_jittered", lambda patch, rng: Image.fromarray(patch))
    image = noise((40, 50))
    for seed in range(10):
        made = cut_paste(image, np.random.default_rng(seed))
        rows, columns = np.flatnonzero(made.mask.any(1)), np.flatnonzero(made.mask.any(0))
        patch = made.image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        places = np.argwhere((image == patch[0, 0]).all(axis=2))
        height, width = patch.shape[:2]
        assert any((image[r : r + height, c : c + width] == patch).all() for r, c in places)


def test_jitter_is_torchvisions() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    for seed in range(40):
        patch = noise((9, 12), seed) // (1 + seed % 3)
        rng = np.random.default_rng(seed)
        factors, hue = rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)
        wanted = Image.fromarray(patch)
        for number in rng.permutation(4):
            name = ("brightness", "contrast", "saturation", "hue")[number]
            factor = hue if name == "hue" else factors[number]
            wanted = getattr(functional, f"adjust_{name}")(wanted, factor)
        found = synthesis._jittered(patch, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("side", [224, 448, 97])
def test_a_scar_is_2_to_16_by_10_to_25_pixels_at_224(side: int) -> None:
    image, drawn, whole = noise((side, side)), [], 0
    for seed in range(80):
        mask = scar(image, np.random.default_rng(seed)).mask
        rng = np.random.default_rng(seed)
        length, width = rng.integers(10, 25, endpoint=True), rng.integers(2, 16, endpoint=True)
        drawn.append((length, width))
        down, across = max(1, round(length * side / 224)), max(1, round(width * side / 224))
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1
        assert max(mask.any(1).sum(), mask.any(0).sum()) <= np.hypot(down, across) + 2
        assert mask.sum() <= down * across * 1.1 + 3
        if (mask == np.pad(mask[1:-1, 1:-1], 1)).all():  # nothing was cut off at the border
            whole += 1
            assert mask.sum() >= down * across * 0.9 - 3
    assert whole > 50
    assert np.ptp(drawn, axis=0).tolist() == [15, 14]


def test_scars_are_turned() -> None:
    """Of a turned rectangle the bounding box is larger than itself."""
    full = 0
    for seed in range(100):
        mask = scar(noise((224, 224)), np.random.default_rng(seed)).mask
        full += mask.any(1).sum() * mask.any(0).sum() == mask.sum()
    assert full < 30


# ---- the object ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (97, 160)])
def test_the_object_is_found_with_its_holes_filled(size: Size) -> None:
    picture = part(size)
    np.testing.assert_array_equal(foreground_mask(picture), disc(size))
    picture[disc(size, 0.1)] = 250
    picture[2:5, 2:5] = 0  # a speck is no object
    np.testing.assert_array_equal(foreground_mask(picture), disc(size))


def test_an_object_may_be_told_by_its_colour_alone() -> None:
    picture = np.full((60, 60, 3), (90, 120, 60), dtype=np.uint8)
    picture[disc((60, 60))] = (90, 60, 120)
    np.testing.assert_array_equal(foreground_mask(picture), disc((60, 60)))


@pytest.mark.parametrize("share", [0.12, 0.8])
def test_no_object_is_found_where_it_would_be_next_to_nothing_or_everything(share: float) -> None:
    picture = np.full((80, 80, 3), 250, dtype=np.uint8)
    picture[disc((80, 80), share)] = 20
    if share > 0.5:
        picture[1:-1, 1:-1] = 20
    assert foreground_mask(picture) is None
    assert foreground_mask(np.full((80, 80, 3), 128, dtype=np.uint8)) is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_pseudo_anomalies_keep_to_the_object_where_there_is_one(recipe: str) -> None:
    image, other, rng = part((96, 96), 1), part((96, 96), 2), np.random.default_rng(0)
    draw = Synthesizer(recipe, Procedural(), foreground=True)
    for _ in range(15):
        check(image, draw(image, rng, None, other), disc((96, 96)))
    plain = noise((96, 96)) // 8 + 100
    assert foreground_mask(np.full_like(plain, 100)) is None
    flat = np.full_like(plain, 100)
    drawn = [Synthesizer("perlin", Procedural(), foreground=True)(flat, rng) for _ in range(20)]
    assert np.logical_or.reduce([made.mask for made in drawn])[:8].any()


def test_a_quarter_of_a_patch_lies_on_the_object() -> None:
    image, where = noise((100, 100)), disc((100, 100), 0.2)
    for seed in range(60):
        free = cut_paste(image, np.random.default_rng(seed)).mask.sum()  # the same patch
        held = cut_paste(image, np.random.default_rng(seed), where).mask.sum()
        assert free / 4 <= held <= free


# ---- patches of another image -------------------------------------------------------------------


def test_a_patch_from_the_same_place_of_the_same_image_leaves_no_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, box = noise((70, 90)), np.s_[12:40, 20:75]
    monkeypatch.setattr(synthesis, "_places", lambda *given: (box, box))
    made = seamless_clone(image, image, np.random.default_rng(0))
    assert not made.mask.any()
    np.testing.assert_array_equal(made.image, image)


def test_a_clone_follows_its_source_and_joins_at_the_border(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step in the source stays a step of that height; level and border are the image's."""
    image, source = (np.full((60, 60, 3), level, dtype=np.uint8) for level in (120, 60))
    source[25:35, 25:35] = 110
    box = np.s_[15:45, 15:45]
    monkeypatch.setattr(synthesis, "_places", lambda *given: (box, box))
    made = seamless_clone(image, source, np.random.default_rng(0))
    assert abs(int(made.image[30, 30, 0]) - 170) <= 8 and made.mask[30, 30]
    assert (made.image[[14, 45]] == 120).all() and not made.mask[:15].any()


def test_a_clone_is_marked_where_it_changed_more_than_a_level() -> None:
    image, area = noise((30, 40)) // 2 + 50, np.zeros((30, 40), dtype=bool)
    area[4:26, 3:33] = True
    change = np.random.default_rng(1).integers(-2, 3, image.shape)
    picture = (image + change).astype(np.uint8)
    picture[10:15, 10:20] += 9
    made = synthesis._labelled(image, picture, area)
    wanted = np.zeros_like(area)
    changed = np.abs(picture.astype(int) - image).mean(axis=2) > 1
    for row, column in np.argwhere(area):
        window = [
            0 <= r < 30 and 0 <= c < 40 and changed[r, c] and area[r, c]
            for r in range(row - 2, row + 3)
            for c in range(column - 2, column + 3)
        ]
        wanted[row, column] = np.median(window) > 0
    np.testing.assert_array_equal(made.mask, wanted)
    np.testing.assert_array_equal(made.image, np.where(wanted[:, :, None], picture, image))
    assert 40 < wanted.sum() < area.sum()


def test_cloned_patches_come_from_the_object_and_go_to_it() -> None:
    size, rng = (120, 120), np.random.default_rng(0)
    left, right = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    left[:, :50], right[:, 70:] = True, True
    for _ in range(40):
        taken, goal = synthesis._places(size, rng, right, left)
        assert left[taken].mean() >= 0.7 and right[goal].mean() >= 0.25
        for box in (taken, goal):
            assert all(0 <= s.start < s.stop <= 120 and s.stop - s.start >= 9 for s in box)
        sides = [[s.stop - s.start for s in box] for box in (taken, goal)]
        assert all(0.65 * a - 1 <= b <= max(1.35 * a + 1, 9) for a, b in zip(*sides, strict=True))
    assert synthesis._places(size, rng, np.zeros(size, dtype=bool), left) is None
    image = noise(size)
    made = seamless_clone(image, noise(size, 1), rng, None, np.zeros(size, dtype=bool))
    assert not made.mask.any() and (made.image == image).all()


def test_one_to_three_patches_are_cloned(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, places = [], synthesis._places

    def counted(*given):
        counts[-1] += 1
        return places(*given)

    monkeypatch.setattr(synthesis, "_places", counted)
    rng, image = np.random.default_rng(0), noise((24, 24))
    for _ in range(200):
        counts.append(0)
        seamless_clone(image, image, rng)
    found = np.bincount(counts, minlength=4)
    assert found[0] == 0 and abs(found[2] - 100) < 30 and min(found[1], found[3]) > 25


def test_without_opencv_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    image = noise((32, 32))
    with pytest.raises(InputError, match=r"OpenCV.*pip install 'anomalyst\[train\]'"):
        seamless_clone(image, image, np.random.default_rng(0))


def test_a_source_of_another_size_is_fitted_by_the_recipe_alone() -> None:
    image, source = noise((48, 64)), noise((100, 30), 1)
    with pytest.raises(ValueError, match="same size"):
        seamless_clone(image, source, np.random.default_rng(0))
    made = Synthesizer("nsa", Procedural())(image, np.random.default_rng(0), None, source)
    assert made.mask.any()


# ---- recipes ------------------------------------------------------------------------------------


class Same:
    """Gives the image itself as its texture, which nobody sees; then something else."""

    name = "same"

    def __init__(self, times: int) -> None:
        self.times, self.drawn = times, 0

    def draw(self, image: np.ndarray, category: str | None, rng: np.random.Generator) -> np.ndarray:
        self.drawn += 1
        return image if self.drawn <= self.times else 255 - image


@pytest.mark.parametrize(("times", "drawn"), [(0, 1), (3, 4), (10, 11), (11, 11)])
def test_what_nobody_sees_is_drawn_again_ten_times(
    times: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "augment", lambda given, rng: given)
    image, textures = part((64, 64)), Same(times)
    made = Synthesizer("perlin", textures)(image, np.random.default_rng(3))
    assert textures.drawn == drawn
    assert made.mask.any() == (times < 11)
    if times == 11:
        np.testing.assert_array_equal(made.image, image)
        made.image[:] = 0  # the caller's own
        assert image.any()


@pytest.mark.parametrize(
    ("recipe", "shares"),
    [
        ("hybrid", {"perlin_texture": 0.5, "cut_paste": 0.25, "scar": 0.25}),
        ("cutpaste", {"cut_paste": 0.5, "scar": 0.5}),
        ("perlin", {"perlin_texture": 1.0}),
        ("nsa", {"seamless_clone": 1.0}),
    ],
)
def test_a_recipe_mixes_its_kinds(
    recipe: str, shares: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, used = noise((8, 8)), []
    for name in ("perlin_texture", "cut_paste", "scar", "seamless_clone"):

        def maker(*given, name: str = name) -> Synthetic:
            used.append(name)
            return Synthetic(255 - image, np.ones((8, 8), dtype=bool))

        monkeypatch.setattr(synthesis, name, maker)
    draw, rng = Synthesizer(recipe, Procedural()), np.random.default_rng(0)
    for _ in range(1000):
        draw(image, rng)
    assert set(used) == set(shares)
    for name, share in shares.items():
        assert abs(used.count(name) / 1000 - share) < 0.05


def test_without_a_source_the_mirrored_image_is_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def maker(image, source, *rest) -> Synthetic:
        given.append(source)
        return Synthetic(255 - image, np.ones(image.shape[:2], dtype=bool))

    monkeypatch.setattr(synthesis, "seamless_clone", maker)
    image = noise((8, 9))
    Synthesizer("nsa", Procedural())(image, np.random.default_rng(0))
    np.testing.assert_array_equal(given[0], image[:, ::-1])


def test_a_synthesizer_knows_its_recipe() -> None:
    with pytest.raises(InputError, match=r"unknown recipe.*'perlim': did you mean 'perlin'"):
        Synthesizer("perlim", Procedural())


# ---- the sheet ----------------------------------------------------------------------------------


def test_a_sheet_shows_original_result_and_outline() -> None:
    image, mask = noise((40, 40)), disc((40, 40), 0.2)
    made = Synthetic(np.where(mask[:, :, None], 255 - image, image), mask)
    sheet = np.asarray(contact_sheet([(image, made), (image, made)], cell=40))
    assert sheet.shape == (8 + 2 * 48, 8 + 3 * 48, 3)
    for top in (8, 56):
        first, second, third = (sheet[top : top + 40, left : left + 40] for left in (8, 56, 104))
        np.testing.assert_array_equal(first, image)
        np.testing.assert_array_equal(second, made.image)
        line = (third == TRUTH_COLOUR).all(axis=2)
        np.testing.assert_array_equal(
            line, ndimage.binary_dilation(mask, iterations=2) & ~mask | line
        )
        assert not (line & mask).any() and line.sum() > 40
        np.testing.assert_array_equal(third[~line], made.image[~line])
    assert (sheet[:8] == 255).all() and (sheet[:, 48:56] == 255).all()


def test_a_sheet_keeps_proportions() -> None:
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([(image, Synthetic(image, np.zeros((20, 40), bool)))], 80))
    assert (sheet[28:68, 8:88] == 0).all() and (sheet[:28] == 255).all()
    assert (sheet[68:] == 255).all()


# ---- the command --------------------------------------------------------------------------------


def test_the_command_draws_a_sheet(
    run: Run, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data, sheet = make_parts(("plate", "rod")), tmp_path / "new" / "sheet.png"
    for recipe in RECIPES:
        words = ("--recipe", recipe, "--count", 5, "--image-size", 64, "--foreground")
        code, out, err = run("pseudo-anomalies", data, "-o", sheet, *words)
        assert code == 0 and not err, err
        assert out.strip() == f"{sheet}: 5 pseudo-anomalies, 0 came out empty"
        assert Image.open(sheet).size == (3 * 72 + 8, 5 * 72 + 8)
    assert [path.name for path in sheet.parent.iterdir()] == ["sheet.png"]


def test_the_command_is_settled_by_its_seed(run: Run, tmp_path: Path) -> None:
    for k in range(3):
        save(tmp_path / "gear" / f"{k}.png", texture(k))
    sheets = []
    for seed, source in ((0, "others"), (0, "others"), (1, "others"), (0, "shuffled")):
        path = tmp_path / f"{len(sheets)}.png"
        words = ("--textures", source, "--recipe", "perlin", "--seed", seed, "--count", 4)
        assert run("pseudo-anomalies", tmp_path / "gear", "-o", path, *words)[0] == 0
        sheets.append(path.read_bytes())
    assert sheets[0] == sheets[1] and len(set(sheets)) == 3


def test_the_command_takes_images_from_everywhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(10):
        save(tmp_path / "gear" / f"{k}.png", np.full((32, 32, 3), 10 * k, dtype=np.uint8))
    sheet = tmp_path / "sheet.png"
    words = ("--count", 5, "--image-size", 32)
    assert run("pseudo-anomalies", tmp_path / "gear", "-o", sheet, *words)[0] == 0
    shown = np.asarray(Image.open(sheet))[8 + 16 :: 40, 8 + 16, 0]
    assert shown.tolist() == [0, 20, 40, 60, 80]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--recipe", "nza"), "unknown recipe of pseudo-anomalies 'nza': did you mean 'nsa'"),
        (("--textures", "dtd"), "unknown source or folder of textures 'dtd'"),
        (("--textures", "EMPTY"), "no images in this folder"),
        (("-o", "sheet.jpg"), "sheet.jpg: the sheet is a PNG file"),
        (("--count", "0"), "Invalid value for '--count'"),
    ],
)
def test_bad_wishes_are_answered_in_one_line(
    run: Run, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    save(tmp_path / "gear" / "a.png", texture(0))
    (tmp_path / "none").mkdir()
    given = [str(tmp_path / "none") if word == "EMPTY" else word for word in words]
    sheet = tmp_path / "sheet.png"
    code, out, err = run("pseudo-anomalies", tmp_path / "gear", "-o", sheet, *given)
    assert code == 2 and not out and not sheet.exists()
    assert err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_a_folder_without_images_is_answered_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    code, _, err = run("pseudo-anomalies", tmp_path / "none", "-o", tmp_path / "sheet.png")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
