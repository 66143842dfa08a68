"""Episodes: what is drawn, from which images, and what is refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anomalyst.data.masks import mask_at, patch_coverage
from anomalyst.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.episodes import Draw, Episode, Episodes
from anomalyst.methods.nagl import Nagl, NaglNetwork, NaglOptions
from anomalyst.training_data import Place
from anomalyst.types import Sample

SIZE = (30, 45)  # of every image; the network sees 16 x 24, a grid of 4 x 6
FIXED = Draw(normals=2, abnormals=1, varied=False, pair=False)
VARIED = Draw(normals=3, abnormals=2, varied=True, pair=True)


class Features:
    """Training features whose maps hold their image's number everywhere."""

    def __init__(self, samples: Sequence[Sample], resize: int | None = None) -> None:
        self.samples = list(samples)
        preprocess = Preprocess(16, 4, IMAGENET_MEAN, IMAGENET_STD, resize=resize)
        self.engine = SimpleNamespace(preprocess=preprocess, device=torch.device("cpu"))

    def place(self, number: int) -> Place:
        preprocess = self.engine.preprocess
        return Place(SIZE, preprocess.box(*SIZE), preprocess.output_size(*SIZE), None)

    def fetch(self, numbers: Sequence[int], step: int = 0) -> list[list[Tensor]]:
        return [[torch.stack([torch.full((3, 4, 6), float(n)) for n in numbers])]]


def write_mask(path: Path, mask: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Features]:
    """Features of a source, its counts given as {category: {type: images}}, `good` for normal."""

    def make(
        counts: dict[str, dict[str, int]], size: tuple[int, int] = SIZE, masked: bool = True
    ) -> Features:
        samples = []
        for category, types in counts.items():
            for defect, count in types.items():
                for k in range(count):
                    name = f"{category}/{defect}/{k:02d}.png"
                    mask = None
                    if defect != "good" and masked:
                        marked = np.zeros(size, bool)
                        marked[3 * k % 20 : 3 * k % 20 + 7, 5 : 12 + k] = True
                        mask = write_mask(tmp_path / "masks" / name, marked)
                    label = int(defect != "good")
                    samples.append(Sample(tmp_path / name, category, label, defect, mask))
        return Features(samples)

    return make


TWO = {"nut": {"good": 6, "bent": 4, "cut": 5}, "cap": {"good": 5, "poke": 4}}


def numbers(maps: Sequence[Tensor]) -> list[int]:
    """The images behind maps."""
    return [int(one[0, 0, 0]) for one in maps]


def all_of(episodes: Episodes) -> list[Episode]:
    ((found,),) = episodes.fetch(range(len(episodes)))
    return found


def told(episode: Episode) -> tuple[list[int], list[int], list[int]]:
    """Normal references, abnormal references and queries, by number."""
    abnormals = [maps for maps, _, _ in episode.abnormals]
    return numbers(episode.normals), numbers(abnormals), numbers(episode.queries)


# ---- what is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [FIXED, VARIED])
def test_an_episode_is_fixed_by_its_number_and_the_seed(
    source: Callable[..., Features], draw: Draw
) -> None:
    features = source(TWO)
    expected = [told(one) for one in all_of(Episodes(features, 40, draw, 3))]
    again = Episodes(features, 50, draw, 3)
    for number in (39, 0, 17, 0):  # in any order, of any number of episodes
        ((found,),) = again.fetch([number])
        assert told(found[0]) == expected[number]
    other = [told(one) for one in all_of(Episodes(features, 40, draw, 4))]
    assert sum(a != b for a, b in zip(expected, other, strict=True)) > 30
    assert len({str(one) for one in expected}) > 30


def test_drawing_touches_no_global_generator(source: Callable[..., Features]) -> None:
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    all_of(Episodes(source(TWO), 20, VARIED, 0))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])


@pytest.mark.parametrize("draw", [FIXED, VARIED])
def test_no_image_is_twice_in_an_episode(source: Callable[..., Features], draw: Draw) -> None:
    features = source(TWO)
    for episode in all_of(Episodes(features, 400, draw, 0)):
        normals, abnormals, queries = told(episode)
        everything = [*normals, *abnormals, *queries]
        assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("draw", [FIXED, VARIED])
def test_references_are_of_one_product_and_one_defect(
    source: Callable[..., Features], draw: Draw
) -> None:
    samples = (features := source(TWO)).samples
    for episode in all_of(Episodes(features, 300, draw, 0)):
        normals, abnormals, queries = told(episode)
        assert len({samples[n].category for n in [*normals, *abnormals, *queries]}) == 1
        assert {samples[n].defect for n in normals} == {"good"}
        assert len({samples[n].defect for n in abnormals}) == 1
        assert {samples[n].label for n in abnormals} == {1}


def test_fixed_episodes_have_all_their_references_and_a_query_of_their_type(
    source: Callable[..., Features],
) -> None:
    samples = (features := source(TWO)).samples
    labels = []
    for episode in all_of(Episodes(features, 400, FIXED, 0)):
        normals, abnormals, (query,) = told(episode)
        assert (len(normals), len(abnormals)) == (2, 1)
        labels.append(samples[query].label)
        if labels[-1] == 1:
            assert samples[query].defect == samples[abnormals[0]].defect
    assert 160 < sum(labels) < 240  # a fair coin


def test_varied_episodes_have_any_number_of_references_up_to_the_most(
    source: Callable[..., Features],
) -> None:
    found = [told(one) for one in all_of(Episodes(source(TWO), 300, VARIED, 0))]
    counts = Counter((len(normals), len(abnormals)) for normals, abnormals, _ in found)
    assert set(counts) == {(k1, k2) for k1 in (1, 2, 3) for k2 in (1, 2)}
    assert min(counts.values()) > 25  # of 50 each


def test_half_of_the_varied_queries_have_any_type_of_defect(
    source: Callable[..., Features],
) -> None:
    samples = (features := source({"nut": TWO["nut"]})).samples
    others = 0
    for episode in all_of(Episodes(features, 400, VARIED, 0)):
        _, abnormals, (_, bad) = told(episode)
        others += samples[bad].defect != samples[abnormals[0]].defect
    assert 70 < others < 130  # one of two types in half of 400


def test_a_type_too_rare_for_references_is_still_asked_about(
    source: Callable[..., Features],
) -> None:
    samples = (features := source({"nut": {"good": 6, "bent": 4, "rare": 1}})).samples
    asked = Counter()
    for episode in all_of(Episodes(features, 200, VARIED, 0)):
        _, abnormals, (_, bad) = told(episode)
        assert {samples[n].defect for n in abnormals} == {"bent"}
        asked[samples[bad].defect] += 1
    assert asked["rare"] > 20


def test_a_pair_is_a_normal_query_and_then_an_abnormal_one(
    source: Callable[..., Features],
) -> None:
    samples = (features := source(TWO)).samples
    for draw in (VARIED, Draw(1, 1, varied=False, pair=True)):
        for episode in all_of(Episodes(features, 60, draw, 0)):
            assert [samples[n].label for n in told(episode)[2]] == [0, 1]
            assert not episode.masks[0].any() and episode.masks[1].any()


def test_classes_and_then_types_are_drawn_evenly(source: Callable[..., Features]) -> None:
    counts = {"nut": {"good": 9, "bent": 9, "cut": 3}, "cap": {"good": 3, "poke": 2}}
    samples = (features := source(counts)).samples
    found = Counter(
        samples[told(one)[1][0]].defect for one in all_of(Episodes(features, 800, FIXED, 0))
    )
    for defect, expected in (("poke", 400), ("bent", 200), ("cut", 200)):
        assert found[defect] == pytest.approx(expected, abs=60)


def test_every_image_has_its_turn_as_reference_and_as_query(
    source: Callable[..., Features],
) -> None:
    features = source(TWO)
    found = [told(one) for one in all_of(Episodes(features, 600, FIXED, 0))]
    references = {n for normals, abnormals, _ in found for n in [*normals, *abnormals]}
    assert references == {n for _, _, queries in found for n in queries}
    assert references == set(range(len(features.samples)))


# ---- what an episode holds ----------------------------------------------------------------------


def test_masks_and_coverage_are_those_of_the_images(source: Callable[..., Features]) -> None:
    features = source(TWO)
    box = (0.0, 0.0, 30.0, 45.0)
    for episode in all_of(Episodes(features, 30, VARIED, 0)):
        for maps, coverage, mask in episode.abnormals:
            with Image.open(features.samples[int(maps[0, 0, 0])].mask) as picture:
                marked = np.asarray(picture) > 0
            np.testing.assert_array_equal(coverage, patch_coverage(marked, box, (4, 6)))
            np.testing.assert_array_equal(mask, mask_at(marked, box, (16, 24)))
        (good, bad), (none, mask) = episode.queries, episode.masks
        assert good.shape == bad.shape == (3, 4, 6)
        assert none.shape == mask.shape == (16, 24)
        assert mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0.0, 1.0}


def test_fetched_episodes_are_one_part_of_a_step(source: Callable[..., Features]) -> None:
    episodes = Episodes(source(TWO), 12, FIXED, 0)
    assert len(episodes) == 12
    found = episodes.fetch([3, 5, 3])
    assert len(found) == 1 and len(found[0]) == 1 and len(found[0][0]) == 3
    assert told(found[0][0][0]) == told(found[0][0][2])


@pytest.mark.parametrize(
    ("options", "count", "queries"),
    [
        ({"epochs": 2, "episodes": 13, "batch_size": 5}, 2 * 3 * 5, 2),
        ({"steps": 7, "batch_size": 3}, 21, 2),
        ({**Nagl.presets["paper"]["options"]}, 1260 * 8, 1),
    ],
)
def test_the_options_say_how_many_episodes_and_of_which_kind(
    source: Callable[..., Features], options: dict[str, object], count: int, queries: int
) -> None:
    method = Nagl(NaglOptions(**options), find_backbone("dinov2-small"), [11], 0)
    episodes = method.source(source({"nut": TWO["nut"]}))
    assert len(episodes) == count
    ((found,),) = episodes.fetch(range(30))
    assert {len(one.queries) for one in found} == {queries}
    most = method.options.normals, method.options.abnormals
    assert max((len(one.normals), len(one.abnormals)) for one in found) == most


def test_a_defect_of_one_pixel_still_makes_its_query_abnormal(tmp_path: Path) -> None:
    """The mask at the network's size is what the losses take an image's label from."""
    mask = np.zeros(SIZE, bool)
    mask[1, 1] = True
    path = write_mask(tmp_path / "dot.png", mask)
    samples = [Sample(tmp_path / f"good{k}.png", "nut", 0, "good") for k in range(3)]
    samples += [Sample(tmp_path / f"dot{k}.png", "nut", 1, "dot", path) for k in range(3)]
    draw = Draw(1, 1, varied=False, pair=True)
    ((episode,),) = Episodes(Features(samples), 1, draw, 0).fetch([0])[0]
    assert (episode.abnormals[0][1] > 0).any()
    assert episode.masks[1].any()


# ---- sources that cannot be drawn from ----------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "masked"),
    [
        ({"nut": {"good": 9}}, True),  # nothing abnormal
        ({"nut": {"bent": 9}}, True),  # nothing normal
        ({"nut": {"good": 9, "bent": 9}}, False),  # no masks
        ({"nut": {"good": 2, "bent": 9}}, True),  # no normal image left for a query
        ({"nut": {"good": 9, "bent": 1, "cut": 1}}, True),  # nor an abnormal one
        ({"nut": {"good": 9, "bent": 1}, "cap": {"good": 2, "poke": 9}}, True),
    ],
)
def test_a_source_with_too_few_images_is_refused(
    source: Callable[..., Features], counts: dict[str, dict[str, int]], masked: bool
) -> None:
    with pytest.raises(InputError) as error:
        Episodes(source(counts, masked=masked), 10, FIXED, 0)
    message = str(error.value)
    assert "more than 2 normal images" in message
    assert "more than 1 images of one defect with masks" in message
    assert "options normals, abnormals" in message and "\n" not in message


def test_one_image_more_than_the_references_is_enough(source: Callable[..., Features]) -> None:
    features = source({"nut": {"good": 3, "bent": 2}})
    for draw in (FIXED, Draw(2, 1, varied=True, pair=True)):
        assert len(all_of(Episodes(features, 20, draw, 0))) == 20


def test_categories_and_types_that_are_too_small_are_passed_over(
    source: Callable[..., Features],
) -> None:
    features = source({"cap": {"good": 2, "poke": 9}, "nut": {"good": 9, "bent": 9, "cut": 1}})
    for episode in all_of(Episodes(features, 50, FIXED, 0)):
        assert {features.samples[n].defect for n in told(episode)[1]} == {"bent"}


def test_a_mask_of_the_wrong_size_is_named(source: Callable[..., Features]) -> None:
    features = source({"nut": {"good": 3, "bent": 2}}, size=(30, 44))
    episodes = Episodes(features, 5, FIXED, 0)
    with pytest.raises(InputError, match=r"masks/nut/bent/0\d\.png.*44x30.*45x30"):
        all_of(episodes)


def test_a_reference_whose_mask_is_black_ends_in_no_error_of_the_arithmetic(
    tmp_path: Path,
) -> None:
    """Either the file is named, or such an image is worked around; sheet, sections 14 and 15."""
    path = write_mask(tmp_path / "black.png", np.zeros(SIZE, bool))
    samples = [Sample(tmp_path / f"good{k}.png", "nut", 0, "good") for k in range(3)]
    samples += [Sample(tmp_path / f"dot{k}.png", "nut", 1, "dot", path) for k in range(3)]
    options = NaglOptions(proxies=2, heads=1)
    episodes = Episodes(Features(samples), 1, Draw(1, 1, varied=False, pair=True), 0)
    try:
        losses = NaglNetwork(3, options, 4)(episodes.fetch([0])[0])
    except InputError as error:
        assert "black.png" in str(error)
    else:
        assert all(loss.isfinite() for loss in losses.values())


def test_a_defect_in_the_border_that_a_preset_crops_is_refused(tmp_path: Path) -> None:
    """Learned from, it would call the healthy middle of its image a defect."""
    edge, middle = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    edge[:, -1] = True
    middle[10:20, 20:30] = True
    outside = write_mask(tmp_path / "edge.png", edge)
    inside = write_mask(tmp_path / "middle.png", middle)
    samples = [Sample(tmp_path / f"good{k}.png", "nut", 0, "good") for k in range(3)]
    samples += [Sample(tmp_path / f"cut{k}.png", "nut", 1, "cut", inside) for k in range(2)]
    samples += [Sample(tmp_path / "edge.png", "nut", 1, "cut", outside)]
    features = Features(samples, resize=20)
    assert features.engine.preprocess.box(*SIZE)[3] < SIZE[1]
    episodes = Episodes(features, 60, Draw(1, 1, varied=False, pair=True), 0)
    with pytest.raises(InputError, match=r"edge\.png: its defect lies outside.*\(the preset crops"):
        all_of(episodes)
