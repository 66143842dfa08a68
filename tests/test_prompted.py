"""OneNIP's training data: which prompts are drawn, and pseudo-anomalies with masks that fit."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anomalyst.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from anomalyst.engine import Engine
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureCache
from anomalyst.methods import prompted
from anomalyst.methods.prompted import Prompted
from anomalyst.methods.synthesis import Synthesizer, Synthetic
from anomalyst.methods.textures import Procedural, Shuffled, Textures
from anomalyst.methods.views import PLAIN
from anomalyst.training_data import TrainingFeatures
from anomalyst.types import Sample
from conftest import save

PREPROCESS = Preprocess(32, 8, IMAGENET_MEAN, IMAGENET_STD)  # a square image has 4 x 4 patches
TWO = {"nut": 6, "cap": 4}
SQUARE, WIDE = (40, 40), (40, 60)


class Patches:
    """A backbone whose features are the patches' means and squares, and that counts its images."""

    identity, weights_sha256, layers = "patches", "0", (0,)

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> list[Tensor]:
        self.seen += len(images)
        both = torch.cat([images, images.square() + 1], dim=1)
        return [torch.nn.functional.avg_pool2d(both, 8)]


def features_of(pixels: np.ndarray) -> np.ndarray:
    """The same of a picture ``[H, W, 3]`` at the network's size, without the library's help."""
    values = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    both = np.concatenate([values, values**2 + 1], axis=2)
    height, width = both.shape[0] // 8, both.shape[1] // 8
    return both.reshape(height, 8, width, 8, 6).mean((1, 3)).transpose(2, 0, 1)


class Call(NamedTuple):
    """What a pseudo-anomaly was asked for with, and what came of it."""

    image: np.ndarray
    category: str | None
    source: np.ndarray | None
    made: Synthetic


class Maker:
    """A synthesizer that remembers what it made."""

    def __init__(self, recipe: str = "hybrid", textures: Textures | None = None) -> None:
        self.recipe = recipe
        self._make = Synthesizer("hybrid", textures or Procedural())
        self.calls: list[Call] = []

    def __call__(
        self,
        image: np.ndarray,
        rng: np.random.Generator,
        category: str | None = None,
        source: np.ndarray | None = None,
    ) -> Synthetic:
        made = self._make(image, rng, category)
        self.calls.append(Call(image, category, source, made))
        return made

    def masks(self) -> set[bytes]:
        return {call.made.mask.tobytes() for call in self.calls}


class Black(Maker):
    """Paints everything black, and says so from a call on."""

    hidden = 0

    def __call__(self, image: np.ndarray, *_: object) -> Synthetic:
        self.hidden -= 1
        return Synthetic(0 * image, np.full(image.shape[:2], self.hidden < 0))


def picture(seed: int, size: tuple[int, int] = SQUARE) -> np.ndarray:
    """Blocks of random colours, no two pictures alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR))


Make = Callable[..., TrainingFeatures]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache here has to outlive a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def features(tmp_path: Path) -> Make:
    """Training features of so many images a category, cached in a folder or not."""

    def make(
        counts: dict[str, int] = TWO,
        sizes: Sequence[tuple[int, int]] = (SQUARE,),
        cache: str | None = "cache",
        first: int = 0,
        max_bytes: int = 2**30,
    ) -> TrainingFeatures:
        samples = []
        for category, count in counts.items():
            for k in range(count):
                seed = first + len(samples)
                path = tmp_path / f"data{first}" / category / f"{k}.png"
                save(path, picture(seed, sizes[k % len(sizes)]))
                samples.append(Sample(path, category, 0, "good"))
        kept = None if cache is None else FeatureCache(tmp_path / cache, max_bytes)
        engine = Engine(Patches(), PREPROCESS, torch.device("cpu"), kept)
        return TrainingFeatures(engine, samples, (PLAIN,))

    return make


def prompted_by(
    features: TrainingFeatures,
    maker: Any = None,
    pool: int = 0,
    draw: str = "random",
    seed: int = 3,
) -> Prompted:
    return Prompted(features, maker, pool, draw, seed)


def singly(source: Prompted, number: int, step: int) -> list[Tensor]:
    """Maps, pseudo-anomaly's maps, mask and prompt's maps of one image, fetched alone."""
    (found,) = source.fetch([number], step)
    return [tensor[0] for tensor in found]


def recognised(features: TrainingFeatures, maps: Tensor) -> int:
    """The number of the training image that maps are of."""
    count = len(features.samples)
    (found,) = (n for n in range(count) if torch.equal(features.fetch([n])[0][0][0], maps))
    return found


def prompt_of(source: Prompted, features: TrainingFeatures, number: int, step: int = 0) -> int:
    return recognised(features, singly(source, number, step)[3])


def same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    pairs = [pair for parts in zip(first, second, strict=True) for pair in zip(*parts, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def files(features: TrainingFeatures) -> set[str]:
    assert features.engine.cache is not None
    return {path.name for path in features.engine.cache.folder.rglob("*.safetensors")}


# ---- prompts (the sheet's T24) ------------------------------------------------------------------


def test_random_prompts_are_any_images_of_the_category_itself_included(features: Make) -> None:
    known = features()
    source = prompted_by(known)
    drawn = Counter((n, prompt_of(source, known, n, step)) for n in (1, 8) for step in range(150))
    assert {pair for pair in drawn if pair[0] == 1} == {(1, n) for n in range(6)}
    assert {pair for pair in drawn if pair[0] == 8} == {(8, n) for n in range(6, 10)}
    assert min(drawn.values()) > 10  # of 25 and 37


def test_the_fixed_prompt_is_the_categorys_first_image(features: Make) -> None:
    known = features()
    source = prompted_by(known, draw="fixed")
    for step in (0, 7):
        assert [prompt_of(source, known, n, step) for n in range(10)] == [0] * 6 + [6] * 4


def test_the_nearest_prompt_is_the_most_similar_other_image(features: Make) -> None:
    known = features(sizes=(SQUARE, WIDE))
    source = prompted_by(known, draw="nearest")
    unit = []
    for number in range(10):
        patches = known.fetch([number])[0][0][0].double().numpy().reshape(6, -1).T
        mean = np.mean([patch / np.linalg.norm(patch) for patch in patches], axis=0)
        unit.append(mean / np.linalg.norm(mean))
    for number, sample in enumerate(known.samples):
        others = [
            n for n in range(10) if n != number and known.samples[n].category == sample.category
        ]
        expected = max(others, key=lambda n: unit[n] @ unit[number])
        maps = singly(source, number, 0)[3]
        wanted = known.fetch([expected])[0][0]
        assert maps.shape[-2:] == known.fetch([number])[0][0].shape[-2:]
        size = tuple(maps.shape[-2:])
        resized = torch.nn.functional.interpolate(wanted, size, mode="bilinear", align_corners=True)
        torch.testing.assert_close(maps, resized[0])


@pytest.mark.parametrize("draw", ["random", "fixed", "nearest"])
def test_a_single_image_is_its_own_prompt(features: Make, draw: str) -> None:
    known = features({"nut": 1, "cap": 3})
    assert prompt_of(prompted_by(known, draw=draw), known, 0) == 0


@pytest.mark.parametrize("pool", [0, 3])
def test_all_draws_follow_from_seed_step_and_number_alone(features: Make, pool: int) -> None:
    known = features(sizes=(SQUARE, WIDE))
    source = prompted_by(known, Maker(), pool)
    (square, wide) = source.fetch([4, 1, 8, 9, 0], 5)
    for part, numbers in ((square, (4, 8, 0)), (wide, (1, 9))):
        for row, number in enumerate(numbers):
            for again in (source, prompted_by(known, Maker(), pool)):
                alone = singly(again, number, 5)
                assert all(torch.equal(a[row], b) for a, b in zip(part, alone, strict=True))
    for seed, step in ((4, 5), (3, 6)):
        other = prompted_by(known, Maker(), pool, seed=seed).fetch([4, 1, 8, 9, 0], step)
        for k in (1, 2, 3):
            assert any(
                not torch.equal(a[k], b[k]) for a, b in zip((square, wide), other, strict=True)
            )


def test_drawing_touches_no_global_generator(features: Make) -> None:
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    prompted_by(features(), Maker(), draw="nearest").fetch(range(10), 0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])


def test_a_prompt_of_another_shape_is_brought_to_the_images(features: Make) -> None:
    known = features({"nut": 2}, sizes=(SQUARE, WIDE))
    found = singly(prompted_by(known, draw="fixed"), 1, 0)[3].numpy()
    first = known.fetch([0])[0][0][0].numpy()
    assert first.shape == (6, 4, 4) and found.shape == (6, 4, 6)
    for line, expected in zip(found.reshape(24, 6), first.reshape(24, 4), strict=True):
        between = np.interp(np.linspace(0, 3, 6), np.arange(4), expected)
        np.testing.assert_allclose(line, between, atol=1e-5)


# ---- what a step holds --------------------------------------------------------------------------


def test_images_of_several_shapes_are_parts_in_order(features: Make) -> None:
    known = features(sizes=(SQUARE, WIDE, (60, 40)))
    numbers = [5, 0, 4, 9, 1, 7, 6, 3]
    parts = prompted_by(known, Maker()).fetch(numbers, 0)
    assert [tuple(part[0].shape[-2:]) for part in parts] == [(6, 4), (4, 4), (4, 6)]
    found = [[recognised(known, maps) for maps in part[0]] for part in parts]
    assert found == [[5], [0, 9, 6, 3], [4, 1, 7]]
    for maps, pseudo, masks, prompts in parts:
        assert maps.shape == pseudo.shape == prompts.shape == (len(maps), 6, *maps.shape[-2:])
        assert masks.shape == (len(maps), 8 * maps.shape[-2], 8 * maps.shape[-1])
        assert all(t.dtype == torch.float32 for t in (maps, pseudo, masks, prompts))
        assert not any(t.is_inference() for t in (maps, pseudo, masks, prompts))


@pytest.mark.parametrize("cache", ["cache", None])
@pytest.mark.parametrize("pool", [0, 2])
def test_masks_and_maps_are_those_of_what_was_made(
    features: Make, cache: str | None, pool: int
) -> None:
    known, maker = features(sizes=(SQUARE, WIDE), cache=cache), Maker()
    parts = prompted_by(known, maker, pool).fetch(range(10), 1)
    made = {call.made.mask.tobytes(): call for call in maker.calls}
    assert len(made) == 10
    for clean, pseudo, masks, _ in parts:
        for before, after, mask in zip(clean, pseudo, masks, strict=True):
            assert set(mask.unique().tolist()) == {0.0, 1.0}
            call = made.pop(mask.numpy().astype(bool).tobytes())
            sample = known.samples[recognised(known, before)]
            assert call.category == sample.category and call.source is None
            with Image.open(sample.path) as stored:
                seen = stored.resize(mask.shape[::-1], Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(call.image, np.asarray(seen))
            np.testing.assert_allclose(after, features_of(call.made.image), rtol=1e-3, atol=2e-3)
            touched = torch.nn.functional.max_pool2d(mask[None], 8)[0] > 0
            torch.testing.assert_close(
                before[:, ~touched], after[:, ~touched], rtol=1e-3, atol=2e-3
            )
    assert not made


def test_without_a_synthesizer_images_stand_for_themselves(features: Make) -> None:
    known = features(sizes=(SQUARE, WIDE))
    for numbers, step in (([2, 1, 9], 0), (range(10), 4)):
        for clean, pseudo, masks, _ in prompted_by(known, None, 3).fetch(numbers, step):
            assert torch.equal(clean, pseudo)
            assert masks.shape[1:] == (32, 8 * clean.shape[-1])
            assert masks.dtype == torch.float32 and not masks.any()


def test_nsa_takes_its_patches_from_another_image_of_the_category(features: Make) -> None:
    source = prompted_by(features({"nut": 4, "cap": 1}), (maker := Maker("nsa")))
    for step in range(30):
        source.fetch([0, 2, 4], step)
    pixels = [PREPROCESS.pixels(PREPROCESS(picture(n))).tobytes() for n in range(5)]
    drawn = {tuple(pixels.index(x.tobytes()) for x in (c.image, c.source)) for c in maker.calls}
    others = {(0, n) for n in (1, 2, 3)} | {(2, n) for n in (0, 1, 3)}
    assert drawn == others | {(4, 4)}  # where there is no other, it has to do


@pytest.mark.parametrize("cache", ["cache", None])
def test_an_image_that_cannot_be_read_is_named(features: Make, cache: str | None) -> None:
    known = features(cache=cache)
    source = prompted_by(known, Maker(), pool=2)
    source.fetch([0, 1], 0)
    known.samples[3].path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^training image: .*nut/3\.png"):
        source.fetch([0, 3], 0)
    known.samples[3].path.unlink()
    with pytest.raises(InputError, match=r"^training image: .*nut/3\.png"):
        source.fetch([3], 1)


# ---- pools --------------------------------------------------------------------------------------


def test_a_pool_makes_each_of_its_pseudo_anomalies_once(features: Make) -> None:
    known, maker = features(), Maker()
    source, backbone = prompted_by(known, maker, pool=3), known.engine.backbone
    assert backbone.seen == 10 and not maker.calls
    drawn: list[set[bytes]] = [set() for _ in range(10)]
    for step in range(25):
        made, seen = len(maker.calls), backbone.seen
        ((_, pseudo, masks, _),) = source.fetch(range(10), step)
        for number in range(10):
            drawn[number].add(masks[number].numpy().tobytes() + pseudo[number].numpy().tobytes())
        assert len(maker.calls) - made == backbone.seen - seen
    assert [len(each) for each in drawn] == [3] * 10
    assert len(maker.calls) == backbone.seen - 10 == 30
    assert len(files(known)) == 40


def test_a_pool_is_the_same_whoever_fills_it_and_in_whatever_order(features: Make) -> None:
    known, elsewhere = features(), features(cache="elsewhere")
    first, second = (prompted_by(one, Maker(), pool=2) for one in (known, elsewhere))
    expected = [first.fetch(range(10), step) for step in range(6)]
    for step in (5, 0, 3):
        assert same(second.fetch(range(10), step), expected[step])
    maker, seen = Maker(), known.engine.backbone.seen
    assert same(prompted_by(known, maker, pool=2).fetch(range(10), 4), expected[4])
    assert len(maker.calls) == 10 and known.engine.backbone.seen == seen  # features were there
    other = Maker()
    prompted_by(elsewhere, other, pool=2, seed=4).fetch(range(10), 4)
    assert not other.masks() & maker.masks()


def test_flat_images_of_the_same_bytes_and_other_shapes_stay_apart(features: Make) -> None:
    known = features({"nut": 2}, sizes=(WIDE, WIDE[::-1]))
    source = prompted_by(known, Black(), pool=1)
    for number in (0, 1):
        clean, pseudo, _, _ = singly(source, number, 0)
        assert clean.shape == pseudo.shape


def test_without_a_cache_a_pool_is_the_same_within_half_precision(features: Make) -> None:
    cached, fresh = features(), features(cache=None)
    first, second = (prompted_by(one, Maker(), pool=2) for one in (cached, fresh))
    for step in range(4):
        ((*maps, masks, prompts),) = first.fetch(range(10), step)
        ((*others, their_masks, their_prompts),) = second.fetch(range(10), step)
        assert torch.equal(masks, their_masks)
        for a, b in zip((*maps, prompts), (*others, their_prompts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_was_evicted_is_made_again_and_still_fits(features: Make) -> None:
    known, maker = features(), Maker()
    source = prompted_by(known, maker, pool=2)
    expected = [source.fetch(range(10), step) for step in range(5)]
    made, masks = len(maker.calls), maker.masks()
    assert known.engine.cache is not None
    for folder in known.engine.cache.folder.iterdir():
        shutil.rmtree(folder)
    for step in range(5):
        assert same(source.fetch(range(10), step), expected[step])
    assert len(maker.calls) == 2 * made and maker.masks() == masks


def test_a_cache_too_small_for_a_pool_changes_nothing(features: Make) -> None:
    roomy, cramped = features(), features(cache="cramped", max_bytes=2000)
    first, second = (prompted_by(one, Maker(), pool=3) for one in (roomy, cramped))
    for step in range(8):
        assert same(first.fetch([step, 9, 5], step), second.fetch([step, 9, 5], step))
    assert len(files(cramped)) < 10


def test_without_a_pool_every_step_has_fresh_ones_and_keeps_none(features: Make) -> None:
    known, maker = features(), Maker()
    source, before = prompted_by(known, maker), files(known)
    found = [source.fetch(range(10), step) for step in range(8)]
    assert len(maker.calls) == known.engine.backbone.seen - 10 == 80
    assert len({call.made.image.tobytes() for call in maker.calls}) == 80
    assert files(known) == before and not source._masks
    assert same(source.fetch(range(10), 6), found[6])


@pytest.mark.parametrize("pool", [0, 2])
def test_a_cache_that_several_share_mixes_nothing(features: Make, pool: int) -> None:
    """Other textures of the same images, and other images of the same names."""
    kinds = (0, Procedural()), (0, Shuffled()), (50, Procedural())
    shared = [prompted_by(features(first=k), Maker("hybrid", t), pool) for k, t in kinds]
    apart = [
        prompted_by(features(first=k, cache=f"own{i}"), Maker("hybrid", t), pool)
        for i, (k, t) in enumerate(kinds)
    ]
    for step in range(5):
        found = [source.fetch(range(10), step) for source in shared]
        for mine, theirs in zip(found, apart, strict=True):
            assert same(mine, theirs.fetch(range(10), step))
        assert not same(found[0], found[1]) and not same(found[0], found[2])


# ---- before and after the steps -----------------------------------------------------------------


def test_pseudo_anomalies_that_never_show_are_refused(features: Make) -> None:
    known = features()
    prompted_by(known, None).require_visible()
    (maker := Black()).hidden = 9
    prompted_by(known, maker).require_visible()
    maker.hidden = 10
    with pytest.raises(InputError, match=r"no pseudo-anomaly shows on any of 10 .*another recipe"):
        prompted_by(known, maker).require_visible()


@pytest.mark.parametrize("most", [512, 4])
def test_statistics_are_those_of_all_patches(
    features: Make, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompted, "_STATISTICS", most)
    known = features(sizes=(SQUARE, WIDE))
    numbers = range(10) if most == 512 else (0, 3, 6, 9)
    patches = np.concatenate([known.fetch([n])[0][0][0].numpy().reshape(6, -1).T for n in numbers])
    mean, deviation = prompted_by(known).statistics()
    assert mean.dtype == deviation.dtype == torch.float32
    np.testing.assert_allclose(mean, patches.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deviation, patches.std(0, dtype=np.float64), rtol=1e-5)


def test_a_channel_that_never_varies_has_no_deviation(
    features: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = features()
    values = torch.tensor([1.1133, 1.3607, 2.2266, 1000 / 3, 0.0, -1.1133])  # rounding shows here
    constant = [[values[None, :, None, None].expand(1, 6, 3, 7)]]
    monkeypatch.setattr(known, "fetch", lambda numbers, step=0: constant)
    mean, deviation = prompted_by(known).statistics()
    torch.testing.assert_close(mean, values)
    assert (deviation < 1e-4).all() and deviation.isfinite().all()


@pytest.mark.parametrize("pool", [0, 3])
def test_held_out_pseudo_anomalies_were_never_trained_on(features: Make, pool: int) -> None:
    known, maker = features(), Maker()
    source = prompted_by(known, maker, pool)
    for step in range(12):
        source.fetch(range(10), step)
    trained = {call.made.image.tobytes() for call in maker.calls}
    maker.calls.clear()
    before = files(known)
    parts = list(source.held_out(10, 4))
    assert len(maker.calls) == 10 and len(trained) > 20
    assert not trained & {call.made.image.tobytes() for call in maker.calls}
    assert files(known) == before
    assert all(same([a], [b]) for a, b in zip(parts, source.held_out(10, 4), strict=True))


@pytest.mark.parametrize(
    ("count", "numbers"),
    [(64, range(10)), (10, range(10)), (5, range(0, 10, 2)), (3, (0, 3, 6, 9)), (1, [0])],
)
def test_about_as_many_images_as_wanted_are_held_out(
    features: Make, count: int, numbers: Sequence[int]
) -> None:
    known = features(sizes=(SQUARE, WIDE))
    parts = list(prompted_by(known, Maker()).held_out(count, 3))
    assert all(len({len(tensor) for tensor in part}) == 1 and len(part[0]) <= 3 for part in parts)
    found = [recognised(known, maps) for part in parts for maps in part[0]]
    assert sorted(found) == list(numbers)
