"""Textures of pseudo-anomalies: each source, and the ten changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalyst.errors import InputError
from anomalyst.methods import textures
from anomalyst.methods.textures import FromImages, Procedural, Shuffled, augment, find_textures
from conftest import save

SIZES = [(224, 224), (300, 300), (97, 160), (16, 16)]


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def flat(folder: Path, name: str, colour: tuple[int, int, int]) -> Path:
    return save(folder / name, np.full((20, 30, 3), colour, dtype=np.uint8))


def colour_of(texture: np.ndarray) -> tuple[int, ...]:
    (found,) = np.unique(texture.reshape(-1, 3), axis=0)
    return tuple(int(level) for level in found)


# ---- every source -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["procedural", "shuffled", "others", "folder"])
def test_a_texture_has_the_images_size_and_is_settled_by_the_generator(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    paths = [save(tmp_path / f"{k}.png", noise((33, 20), k)) for k in range(3)]
    source = find_textures(str(tmp_path) if name == "folder" else name, {"cup": paths})
    image = noise(size)
    before = image.copy()
    for seed in range(6):
        first, again = (source.draw(image, "cup", np.random.default_rng(seed)) for _ in range(2))
        assert first.shape == image.shape and first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("procedual", r"unknown source or folder of textures 'procedual': did you mean 'procedu"),
        ("nowhere/dtd", r"'nowhere/dtd'.*Known: others, procedural, shuffled"),
        ("others", r"textures of others: there are no images.*procedural"),
    ],
)
def test_a_name_that_gives_no_texture_is_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        find_textures(name, {"cup": []})
    assert "\n" not in str(refused.value)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "readme.txt").write_text("none")
    with pytest.raises(InputError, match=r"no images in this folder.*or procedural") as refused:
        find_textures(str(tmp_path), {})
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


# ---- images as textures -------------------------------------------------------------------------


def test_textures_come_from_other_categories(tmp_path: Path) -> None:
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    images = {
        "cup": [flat(tmp_path, "cup.png", red)],
        "pot": [flat(tmp_path, "pot.png", green)],
        "lid": [flat(tmp_path, "lid.png", blue)],
    }
    source, rng, image = FromImages(images), np.random.default_rng(0), noise((12, 9))
    drawn = {colour_of(source.draw(image, "cup", rng)) for _ in range(30)}
    assert drawn == {green, blue}
    assert {colour_of(source.draw(image, None, rng)) for _ in range(40)} == {red, green, blue}


def test_without_another_category_any_image_will_do(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0)]
    paths = [flat(tmp_path, f"{k}.png", colour) for k, colour in enumerate(colours)]
    source, rng = FromImages({"cup": paths}), np.random.default_rng(0)
    assert {colour_of(source.draw(noise((9, 9)), "cup", rng)) for _ in range(20)} == set(colours)


def test_a_folder_is_searched_to_the_bottom_and_belongs_to_no_category(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0)]
    flat(tmp_path / "banded", "a.png", colours[0])
    flat(tmp_path / "dotted" / "deep", "b.png", colours[1])
    source, rng = find_textures(str(tmp_path), {"banded": []}), np.random.default_rng(0)
    drawn = {colour_of(source.draw(noise((9, 9)), "banded", rng)) for _ in range(20)}
    assert drawn == set(colours)


def test_a_damaged_texture_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    source = find_textures(str(tmp_path), {})
    with pytest.raises(InputError, match=r"torn\.png"):
        source.draw(noise((9, 9)), None, np.random.default_rng(0))


# ---- the shuffled image -------------------------------------------------------------------------


def test_a_shuffled_image_is_its_own_cells_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures, "augment", lambda image, rng: image)
    image = noise((48, 80))
    drawn = Shuffled().draw(image, None, np.random.default_rng(0))

    def cells(picture: np.ndarray) -> list[bytes]:
        blocks = picture.reshape(8, 6, 8, 10, 3).swapaxes(1, 2).reshape(64, -1)
        return [block.tobytes() for block in blocks]

    before, after = cells(image), cells(drawn)
    assert sorted(before) == sorted(after)
    assert sum(a == b for a, b in zip(before, after, strict=True)) < 10


@pytest.mark.parametrize("size", [(97, 160), (50, 9), (5, 20)])
def test_cells_of_uneven_size_stay_whole(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a cell, neighbours stay neighbours, but at the image's end where a cell is short."""
    monkeypatch.setattr(textures, "augment", lambda image, rng: image)
    places = np.moveaxis(np.indices((*size, 1))[:2, :, :, 0], 0, 2).astype(np.uint8)
    image = np.dstack([places, np.zeros(size, dtype=np.uint8)])
    drawn = Shuffled().draw(image, None, np.random.default_rng(1)).astype(int)
    for axis in (0, 1):
        steps = np.diff(drawn[:, :, axis], axis=axis)
        borders = {k * size[axis] // 8 for k in range(1, 8)}
        within = [k for k in range(size[axis] - 1) if k + 1 not in borders]
        kept = np.take(steps, within, axis=axis)
        last = np.take(drawn[:, :, axis], within, axis=axis) == size[axis] - 1
        assert ((kept == 1) | last).all()


# ---- the ten changes ----------------------------------------------------------------------------


def test_three_different_changes_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def recorder(number: int):
        return lambda picture, rng: used.append(number) or picture

    monkeypatch.setattr(textures, "_CHANGES", tuple(recorder(k) for k in range(10)))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        used.clear()
        augment(noise((8, 8)), rng)
        assert len(used) == 3 == len(set(used))
        seen.add(tuple(used))
    assert {number for three in seen for number in three} == set(range(10))
    assert any(three != tuple(sorted(three)) for three in seen)


@pytest.mark.parametrize("change", textures._CHANGES, ids=lambda change: change.__name__)
def test_a_change_keeps_the_form_and_does_something(change: textures._Change) -> None:
    image = noise((15, 22))
    for flat_one in (False, True):
        picture = Image.fromarray(np.full_like(image, 90) if flat_one else image)
        rng = np.random.default_rng(0)
        found = [np.asarray(change(picture, rng)) for _ in range(12)]
        assert all(one.shape == image.shape and one.dtype == np.uint8 for one in found)
        assert flat_one or any((one != image).any() for one in found)


def test_changes_of_levels_are_what_they_say() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    picture = Image.fromarray(ramp)
    for seed in range(20):
        power = np.random.default_rng(seed).uniform(0.5, 2, 3)
        found = np.asarray(textures._gamma(picture, np.random.default_rng(seed)))
        wanted = 255 * (ramp / 255.0) ** power
        assert np.abs(found - wanted).max() <= 0.5 + 1e-9
        rng = np.random.default_rng(seed)
        times, plus = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
        found = np.asarray(textures._brightness(picture, np.random.default_rng(seed)))
        assert np.abs(found - (times * ramp + plus).clip(0, 255)).max() <= 0.5 + 1e-9


def test_solarize_and_mirror_do_nothing_every_second_time() -> None:
    image = noise((10, 14))
    picture, rng = Image.fromarray(image), np.random.default_rng(0)
    for change in (textures._solarize, textures._mirror):
        same = sum((np.asarray(change(picture, rng)) == image).all() for _ in range(300))
        assert 115 < same < 185


def test_drawn_textures_are_of_five_families() -> None:
    """Flat ones have one colour, checkers and hard stripes two, soft ones and clouds many."""
    rng, image = np.random.default_rng(0), noise((64, 64))
    drawn = [Procedural().draw(image, None, rng) for _ in range(60)]
    colours = [len(np.unique(one.reshape(-1, 3), axis=0)) for one in drawn]
    assert min(colours) == 1 and colours.count(2) > 5 and max(colours) > 1000
    assert any(8 < count <= 100 for count in colours)
    assert len({one.tobytes() for one in drawn}) == 60


@pytest.mark.parametrize("family", textures._FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (16, 16)])
def test_any_size_can_be_drawn(family, size: tuple[int, int]) -> None:
    for seed in range(5):
        drawn = family(size, np.random.default_rng(seed))
        assert drawn.shape == (*size, 3) and drawn.dtype == np.uint8
