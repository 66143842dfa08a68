"""The one preprocessing function: sizes, values and where the tensor lies on the image."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from anomalyst.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone

RNG = np.random.default_rng(11)
USUAL = Preprocess(280, 14, IMAGENET_MEAN, IMAGENET_STD)
_CLIP = find_backbone("clip-vit-l-14")
CLIP = Preprocess(280, 14, _CLIP.mean, _CLIP.std)


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalised(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    values = (pixels / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
    return values.transpose(2, 0, 1)  # (h, w, 3) -> (3, h, w), float64


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (280, 280)),
        ((1, 1), (280, 280)),
        ((448, 896), (280, 560)),
        ((896, 448), (560, 280)),
        ((320, 800), (280, 700)),
        ((448, 600), (280, 378)),  # 375 lies between 364 and 378
        ((280, 287), (280, 294)),  # half a patch: up
        ((280, 286), (280, 280)),
        ((10, 320), (280, 8960)),  # 32:1, the longest
    ],
)
def test_aspect_is_kept(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert USUAL.output_size(*size) == expected
    assert USUAL(noise(*size)).shape == (3, *expected)
    assert USUAL.box(*size) == (0, 0, *size)


def test_sides_are_multiples_and_the_distortion_is_under_half_a_patch() -> None:
    for _ in range(300):
        multiple = int(RNG.integers(1, 33))
        image_size = multiple * int(RNG.integers(1, 20))
        height, width = (int(side) for side in RNG.integers(100, 2000, 2))
        preprocess = replace(USUAL, image_size=image_size, multiple=multiple)
        out = preprocess.output_size(height, width)
        assert min(out) == image_size
        assert all(side % multiple == 0 for side in out)
        exact = image_size * max(height, width) / min(height, width)
        assert abs(max(out) - exact) <= multiple / 2
        assert (out[0] < out[1]) <= (height < width)


def test_values_are_pillows_bicubic_then_normalised() -> None:
    image = noise(100, 150)
    resized = np.asarray(Image.fromarray(image).resize((420, 280), Image.Resampling.BICUBIC))
    tensor = USUAL(image)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    np.testing.assert_allclose(tensor, normalised(resized, USUAL), atol=1e-6)


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    image = noise(280, 560)
    np.testing.assert_allclose(USUAL(image), normalised(image, USUAL), atol=1e-6)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((560, 560, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    grey = Preprocess(28, 14, (0, 0, 0), (1, 1, 1))(stripes)
    np.testing.assert_allclose(grey, 0.5, atol=0.01)


def test_read_only_input_and_repeated_calls() -> None:
    image = noise(300, 200)
    before = image.copy()
    image.setflags(write=False)
    np.testing.assert_array_equal(USUAL(image), USUAL(image))
    np.testing.assert_array_equal(image, before)


def test_square_distorts() -> None:
    preprocess = replace(USUAL, square=True)
    image = noise(100, 5000)
    assert preprocess.output_size(100, 5000) == (280, 280)
    assert preprocess(image).shape == (3, 280, 280)
    assert preprocess.box(100, 5000) == (0, 0, 100, 5000)


def test_resize_then_crop() -> None:
    preprocess = replace(USUAL, image_size=28, resize=32)
    image = noise(64, 128)
    resized = np.asarray(Image.fromarray(image).resize((64, 32), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(
        preprocess(image), normalised(resized[2:30, 18:46], preprocess), atol=1e-6
    )
    assert preprocess.output_size(64, 128) == (28, 28)
    assert preprocess.box(64, 128) == (4, 36, 56, 56)


def test_square_resize_then_crop() -> None:
    preprocess = replace(USUAL, image_size=28, resize=32, square=True)
    image = noise(64, 128)
    resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(
        preprocess(image), normalised(resized[2:30, 2:30], preprocess), atol=1e-6
    )
    assert preprocess.box(64, 128) == (4, 8, 56, 112)


# ---- back to pixels -----------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [USUAL, CLIP], ids=["imagenet", "clip"])
def test_every_level_of_every_channel_comes_back(statistics: Preprocess) -> None:
    image = np.stack([np.roll(np.arange(256), 85 * k).reshape(16, 16) for k in range(3)], axis=2)
    image = image.astype(np.uint8)
    tensor = replace(statistics, image_size=16, multiple=1)(image)
    back = statistics.pixels(tensor)
    assert back.dtype == np.uint8 and back.flags.c_contiguous
    np.testing.assert_array_equal(back, image)


@pytest.mark.parametrize("statistics", [USUAL, CLIP], ids=["imagenet", "clip"])
@pytest.mark.parametrize(
    ("change", "size", "corner"),
    [
        ({}, (280, 462), (0, 0)),
        ({"square": True}, (280, 280), (0, 0)),
        ({"resize": 300}, (300, 500), (10, 110)),
        ({"resize": 300, "square": True}, (300, 300), (10, 10)),
    ],
)
def test_the_resized_and_cropped_image_comes_back(
    statistics: Preprocess, change: dict[str, int], size: tuple[int, int], corner: tuple[int, int]
) -> None:
    preprocess, image = replace(statistics, **change), noise(96, 160)
    tensor = preprocess(image)
    pixels = preprocess.pixels(tensor)
    height, width = preprocess.output_size(96, 160)
    bicubic = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    cropped = np.asarray(bicubic)[corner[0] :, corner[1] :][:height, :width]
    np.testing.assert_array_equal(pixels, cropped)
    np.testing.assert_array_equal(preprocess.normalized(pixels), tensor)
    assert preprocess.normalized(pixels).dtype == np.float32


def test_values_between_levels_and_beyond_the_range_take_the_nearest_level() -> None:
    image = noise(28, 42)
    tensor = USUAL.normalized(image)
    level = 1 / (255 * np.array(USUAL.std, dtype=np.float32))[:, None, None]
    for shift in (-0.49, 0.49):
        np.testing.assert_array_equal(USUAL.pixels(tensor + shift * level), image)
    np.testing.assert_array_equal(USUAL.pixels(tensor + 300 * level), 255)
    np.testing.assert_array_equal(USUAL.pixels(tensor - 300 * level), 0)
    assert USUAL.pixels(tensor).flags.writeable


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("preprocess", [USUAL, replace(USUAL, resize=300)])
@pytest.mark.parametrize("size", [(1, 33), (33, 1), (10, 100_000)])
def test_images_over_32_to_1_are_refused(preprocess: Preprocess, size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[1]}x{size[0]} pixels is more than 32 times"):
        preprocess(np.zeros((*size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "nearest"), [(300, "294 and 308"), (281, "280 and 294"), (5, "14 and 28"), (0, "14")]
)
def test_a_size_that_is_no_multiple_names_the_nearest(size: int, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"image size {size} .*{nearest}"):
        replace(USUAL, image_size=size)


def test_values_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="resize 200 is smaller than the crop of 280"):
        replace(USUAL, resize=200)
    with pytest.raises(InputError, match="multiple 0"):
        replace(USUAL, multiple=0)
    with pytest.raises(InputError, match="std above 0"):
        replace(USUAL, std=(0.2, 0, 0.2))


def test_json_round_trip() -> None:
    for preprocess in (USUAL, replace(USUAL, square=True, resize=300)):
        assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_sise": 3}, "did you mean 'image_size'"),
        ({"image_size": "280"}, "image_size must be a whole number"),
        ({"image_size": True}, "image_size must be a whole number"),
        ({"square": 1}, "square must be true or false"),
        ({"mean": [1, 2]}, "mean must be three numbers"),
        ({"std": ["a", 1, 1]}, "std must be three numbers"),
        ({"resize": 1.5}, "resize must be a whole number"),
    ],
)
def test_damaged_descriptions_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Preprocess.from_dict({**USUAL.to_dict(), **change})


def test_a_missing_value_is_named() -> None:
    values = USUAL.to_dict()
    del values["std"], values["square"]
    with pytest.raises(InputError, match="no value for std, square"):
        Preprocess.from_dict(values)


def test_the_data_modules_need_no_torch() -> None:
    code = (
        "import sys, anomalyst.data.layouts, anomalyst.data.transforms; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
