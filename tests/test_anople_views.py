"""What AnoPLe's steps see: views, masks, noise boxes, and that each follows from its step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from anomalyst import training_data
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.inference import read_item
from anomalyst.methods import anople_views
from anomalyst.methods.anople_views import Views, noise_boxes, quarters, shrunk_mask
from anomalyst.methods.synthesis import Synthesizer, Synthetic
from anomalyst.methods.textures import Shuffled
from anomalyst.types import Sample
from conftest import save, texture

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PLAIN = Preprocess(64, 16, MEAN, STD)
STEPS = range(12)
Make = Callable[..., Views]


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """A colourful picture without detail finer than a dozen pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two square images, two wide ones, one tall; two categories."""
    sizes = [(128, 128), (96, 96), (96, 160), (128, 210), (200, 100)]
    return [
        Sample(save(tmp_path / f"{k}.png", smooth(k, *size)), ("plate", "nut")[k % 2], 0, "good")
        for k, size in enumerate(sizes)
    ]


@pytest.fixture
def make(samples: list[Sample]) -> Make:
    def build(
        count: int = 5,
        pixels: float = 0.5,
        seed: int = 0,
        preprocess: Preprocess = PLAIN,
        maker: Callable[..., Synthetic] | None = None,
        of: Sequence[Sample] = samples,
    ) -> Views:
        engine = SimpleNamespace(preprocess=preprocess, device=torch.device("cpu"))
        features = SimpleNamespace(samples=list(of), engine=engine)
        return Views(features, maker or Synthesizer("hybrid", Shuffled()), count, pixels, seed)

    return build


def one(views: Views, number: int, step: int) -> list[Tensor]:
    """What a step sees of one image."""
    ((clean, pseudo, masks, noise, place),) = views.fetch([number], step)
    return [clean[0], pseudo[0], masks[0], noise[0], place[0]]


def reassembled(views: Tensor) -> Tensor:
    """The four quadrants ``[5, ..., h, w]`` as the picture ``[..., 2 h, 2 w]`` that they are of."""
    upper = torch.cat([views[1], views[2]], dim=-1)
    return torch.cat([upper, torch.cat([views[3], views[4]], dim=-1)], dim=-2)


# ---- views --------------------------------------------------------------------------------------


def test_quadrants_make_up_the_whole_again() -> None:
    large = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    whole = np.zeros((4, 6, 3), np.uint8)
    views = quarters(large, whole)
    assert len(views) == 5 and views[0] is whole
    for view, rows, columns in zip(views[1:], (0, 0, 4, 4), (0, 6, 0, 6), strict=True):
        assert view.shape == (4, 6, 3)
        for i in range(4):
            for j in range(6):
                np.testing.assert_array_equal(view[i, j], large[rows + i, columns + j])


def test_a_mask_is_shrunk_to_where_any_of_four_pixels_is_marked() -> None:
    mask = np.random.default_rng(1).random((10, 14)) < 0.2
    found = shrunk_mask(mask)
    for i in range(5):
        for j in range(7):
            four = [mask[2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)]
            assert found[i, j] == any(four)
    assert 0 < found.sum() < 35
    parts = quarters(mask, found)
    assert sum(part.sum() for part in parts[1:]) == mask.sum()


@pytest.mark.parametrize(
    ("number", "size"), [(0, (64, 64)), (1, (64, 64)), (2, (64, 112)), (4, (128, 64))]
)
def test_views_are_the_image_at_both_sizes(
    make: Make, samples: list[Sample], number: int, size: tuple[int, int]
) -> None:
    clean, *_ = one(make(), number, 0)
    assert clean.shape == (5, 3, *size)
    double = read_item(samples[number], "", Preprocess(128, 32, MEAN, STD)).tensor
    np.testing.assert_allclose(reassembled(clean), double, rtol=0, atol=1e-5)
    judged = read_item(samples[number], "", PLAIN).tensor  # as when it is judged
    gap = np.abs(clean[0].numpy() - judged) * 255 * np.array(STD)[:, None, None]
    assert gap.mean() < 1 and gap.max() < 6  # grey levels


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(64, 16, MEAN, STD, square=True),
        Preprocess(48, 16, MEAN, STD, resize=60),
        Preprocess(48, 16, MEAN, STD, square=True, resize=64),
    ],
    ids=["square", "crop", "square crop"],
)
def test_so_they_are_squared_or_cropped(
    make: Make, samples: list[Sample], preprocess: Preprocess
) -> None:
    views, side = make(preprocess=preprocess), preprocess.image_size
    (parts,) = views.fetch(range(5), 0)  # all of one shape
    for k, clean in enumerate(parts[0]):
        assert clean.shape == (5, 3, side, side)
        judged = read_item(samples[k], "", preprocess).tensor
        gap = np.abs(clean[0].numpy() - judged) * 255 * np.array(STD)[:, None, None]
        assert gap.mean() < 2
        small = reassembled(clean).unflatten(1, (side, 2)).unflatten(3, (side, 2)).mean((2, 4))
        assert (small - clean[0]).abs().mean() < 0.02


def test_one_view_is_the_first_of_five(make: Make) -> None:
    for step in STEPS:
        five, single = one(make(), 2, step), one(make(1), 2, step)
        assert [len(part) for part in single[:4]] == [1, 1, 1, 1]
        for k in (0, 1) + ((2,) if not five[3].any() else ()):
            assert torch.equal(single[k], five[k][:1])


def test_red_is_the_first_channel_in_training_and_judging(make: Make, tmp_path: Path) -> None:
    red = np.zeros((64, 64, 3), np.uint8)
    red[:, :, 0] = 255
    sample = Sample(save(tmp_path / "red.png", red), "plate", 0, "good")
    clean, *_ = one(make(pixels=0.0, of=[sample]), 0, 0)
    judged = torch.from_numpy(read_item(sample, "", PLAIN).tensor)
    expected = [(c - m) / s for c, m, s in zip((1, 0, 0), MEAN, STD, strict=True)]
    for image in (*clean, judged):
        for channel, value in zip(image, expected, strict=True):
            np.testing.assert_allclose(channel, value, rtol=1e-5)


# ---- pseudo-anomalies ---------------------------------------------------------------------------


def test_in_pixels_it_lies_where_the_masks_say(make: Make) -> None:
    views, areas = make(pixels=1.0), []
    for step in STEPS:
        clean, pseudo, masks, noise, _ = one(views, step % 5, step)
        assert not noise.any() and masks.shape == (5, *clean.shape[2:])
        assert set(masks.unique().tolist()) <= {0.0, 1.0}
        large, changed = reassembled(masks), reassembled(pseudo) != reassembled(clean)
        assert not changed[:, large == 0].any()
        assert changed.any(0).sum() > 0.3 * large.sum()
        np.testing.assert_array_equal(masks[0], shrunk_mask(large.numpy() > 0))
        assert masks[1:].sum() == large.sum()
        areas.append(large.mean().item())
    assert min(areas) > 0 and max(areas) < 1 and len(set(areas)) > 8
    far = ndimage.binary_dilation(
        masks[0].numpy() > 0, iterations=4
    )  # what is shrunk spreads a bit
    assert torch.equal(pseudo[0][:, ~torch.from_numpy(far)], clean[0][:, ~torch.from_numpy(far)])


def test_an_empty_mask_leaves_the_picture(make: Make) -> None:
    def nothing(image: np.ndarray, rng: object, category: str | None) -> Synthetic:
        return Synthetic(image.copy(), np.zeros(image.shape[:2], bool))

    clean, pseudo, masks, noise, _ = one(make(pixels=1.0, maker=nothing), 0, 0)
    assert torch.equal(clean, pseudo) and not masks.any() and not noise.any()


def test_the_maker_sees_the_large_picture_and_its_category(make: Make) -> None:
    seen = []

    def corner(image: np.ndarray, rng: object, category: str | None) -> Synthetic:
        seen.append((image.shape, category))
        mask = np.zeros(image.shape[:2], bool)
        mask[:6, -10:] = True
        spoilt = image.copy()
        spoilt[mask] = 255 - spoilt[mask]
        return Synthetic(spoilt, mask)

    for number, (shape, category) in {0: ((128, 128), "plate"), 3: ((128, 224), "nut")}.items():
        clean, pseudo, masks, _, _ = one(make(pixels=1.0, maker=corner), number, 0)
        assert seen.pop() == ((*shape, 3), category) and not seen
        assert masks.flatten(1).sum(1).tolist() == [15, 0, 60, 0, 0]
        assert masks[0, :3, -5:].all() and masks[2, :6, -10:].all()
        assert [torch.equal(a, b) for a, b in zip(clean, pseudo, strict=True)] == [
            False,
            True,
            False,
            True,
            True,
        ]


def test_latent_ones_leave_the_pixels_and_mark_patches_in_every_view(make: Make) -> None:
    views, seen = make(pixels=0.0), set()
    for step in STEPS:
        clean, pseudo, masks, noise, _ = one(views, step % 5, step)
        assert torch.equal(clean, pseudo)
        assert noise.shape == (5, clean.shape[2] // 16, clean.shape[3] // 16)
        assert noise.flatten(1).any(1).all() and set(noise.unique().tolist()) <= {0.0, 1.0}
        for mask, patches in zip(masks, noise, strict=True):
            np.testing.assert_array_equal(mask, np.kron(patches, np.ones((16, 16))))
        seen |= {tuple(each.flatten().tolist()) for each in noise}
    assert len(seen) > 20  # each view has boxes of its own


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 0.3, 0.7), (1.0, 1, 1)])
def test_the_share_made_in_pixels(make: Make, share: float, low: float, high: float) -> None:
    views = make(1, share)
    latent = [one(views, 1, step)[3].any().item() for step in range(60)]
    assert low <= 1 - np.mean(latent) <= high


def test_noise_boxes_cover_one_to_thirty_percent_in_three_boxes_at_most() -> None:
    rng = np.random.default_rng(0)
    shares, parts = [], []
    for _ in range(300):
        mask = noise_boxes((40, 60), rng)
        assert mask.shape == (40, 60) and mask.dtype == bool
        shares.append(mask.mean())
        parts.append(ndimage.label(mask)[1])
    assert min(shares) > 0.005 and max(shares) < 0.32 and np.mean(shares) > 0.1
    assert set(parts) == {1, 2, 3}
    for _ in range(50):
        assert noise_boxes((1, 1), rng).all()
        assert 1 <= noise_boxes((5, 5), rng).sum() <= 14
        assert noise_boxes((1, 9), rng).any()


# ---- what it depends on -------------------------------------------------------------------------


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_step_depends_on_seed_step_and_number_alone(make: Make) -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    views, others = make(seed=3), make(seed=3)
    for step in (4, 0, 3):  # in any order, whatever was fetched before
        one(others, step, step)
    for step in range(4):
        for number in (0, 3):
            assert same(one(views, number, step), one(others, number, step))
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])
    first = [one(views, 0, step)[1:4] for step in range(6)]
    for made in (
        [one(views, 0, step)[1:4] for step in range(6, 12)],
        [one(make(seed=4), 0, step)[1:4] for step in range(6)],
        [
            one(make(seed=3, of=views._samples[1:] + views._samples[:1]), 4, k)[1:4]
            for k in range(6)
        ],
    ):
        assert not any(same(a, b) for a, b in zip(first, made, strict=True))


def test_images_of_a_shape_come_together_and_keep_their_order(make: Make) -> None:
    views = make()
    order = [3, 0, 4, 1, 2]
    parts = views.fetch(order, 5)
    assert len(views) == 5 and views.categories == ["plate", "nut"]
    assert [list(part[0].shape[-2:]) for part in parts] == [[64, 112], [64, 64], [128, 64]]
    for part, numbers in zip(parts, ([3, 2], [0, 1], [4]), strict=True):
        assert all(len(each) == len(numbers) for each in part)
        assert part[4].tolist() == [number % 2 for number in numbers]
        for k, number in enumerate(numbers):
            assert same([each[k] for each in part], one(views, number, 5))


def test_forgotten_images_are_read_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [one(make(), number, 2) for number in range(5)]
    monkeypatch.setattr(anople_views, "_REMEMBERED", 2)
    views = make()
    for number in (0, 1, 2, 3, 4, 0, 3, 2, 1):
        assert same(one(views, number, 2), expected[number])
        assert len(views._decoded) <= 2


def test_images_are_decoded_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        training_data, "read_item", lambda *given: read.append(given[1]) or read_item(*given)
    )
    views = make()
    for step in range(3):
        views.fetch([0, 1], step)
    assert len(read) == 2


def test_an_image_that_cannot_be_read_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    views = make(of=[Sample(tmp_path / "bad.png", "plate", 0, "good")])
    with pytest.raises(InputError, match=r"training image: .*bad\.png") as error:
        views.fetch([0], 0)
    assert "\n" not in str(error.value)


def test_the_picture_remembered_is_not_written_to(make: Make, tmp_path: Path) -> None:
    sample = Sample(save(tmp_path / "t.png", texture(0, 64, 64)), "plate", 0, "good")
    for recipe in ("hybrid", "cutpaste", "perlin"):
        views = make(pixels=1.0, maker=Synthesizer(recipe, Shuffled()), of=[sample])
        first = one(views, 0, 0)[0]
        for step in range(1, 5):
            assert torch.equal(one(views, 0, step)[0], first)
