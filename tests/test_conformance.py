"""What every registered method must do. A new method is picked up from the registry."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalyst.data.frame import Frame
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureCache
from anomalyst.methods import REGISTRY
from anomalyst.types import Prediction, Sample
from conftest import CLIP, DEEP, blot, save, texture

pytestmark = pytest.mark.parametrize("method", sorted(REGISTRY))
GOOD = [texture(k) for k in range(4)]
# What a method trains with here beside `make`'s own: what passes with room to spare, in no time.
QUICK: dict[str, dict[str, Any]] = {
    "anople": {"steps": 4, "batch_size": 2},
    "nagl": {"steps": 10, "normals": 2, "abnormals": 1},
    "onenip": {
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 6e-3,
        "standardize": True,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "width": 64,
        "heads": 4,
        "hidden": 128,
    },
}


@pytest.fixture(autouse=True)
def no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opens a connection fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def make(
    deep_weights: str,
    clip_weights: str,
    good_samples: list[Sample],
    bad_samples: list[Sample],
) -> object:
    """A detector that has taken its gradient steps, if its method takes any, and no references."""

    def build(method: str, **more: Any) -> Detector:
        spec = REGISTRY[method]
        if spec.trains_on is not None:
            usual = {"steps": 40, "warmup": 5, "batch_size": 4, **QUICK.get(method, {})}
            more["options"] = {**usual, **more.get("options", {})}
        clip = spec.backbone.startswith("clip")
        backbone, weights = (CLIP, clip_weights) if clip else (DEEP, deep_weights)
        detector = Detector(method, backbone=backbone, weights=weights, image_size=96, **more)
        if spec.trains_on is not None:
            detector.train(good_samples + (bad_samples if spec.abnormal_references else []))
        return detector

    return build


@pytest.fixture(scope="module")
def good_samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("good")
    paths = [save(folder / f"{k}.png", image) for k, image in enumerate(GOOD)]
    return [Sample(path, "plate", 0, "good") for path in paths]


@pytest.fixture(scope="module")
def bad_samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("bad")
    samples = []
    for k in range(4):
        image = save(folder / f"{k}.png", blot(texture(20 + k), 8 + 16 * k, 40, 24))
        mask = save(
            folder / f"{k}_mask.png", blot(np.zeros((96, 96, 3), np.uint8), 8 + 16 * k, 40, 24)
        )
        samples.append(Sample(image, "plate", 1, "blot", mask))
    return samples


def enrolled(detector: Detector, images: list[np.ndarray] = GOOD) -> Detector:
    detector.enroll("plate", images)
    return detector


def judge(detector: Detector, *images: np.ndarray, batch_size: int = 8) -> list[Prediction]:
    return list(detector.predict(list(images), category="plate", batch_size=batch_size))


def test_shapes_and_types(method: str, make) -> None:
    (found,) = judge(enrolled(make(method)), texture(9))
    assert isinstance(found.score, float)
    assert found.map.shape == (96, 96)
    assert found.map.dtype == np.float32
    assert np.isfinite(found.map).all()
    assert not found.calibrated and found.p_value is None and found.verdict is None


@pytest.mark.parametrize("size", [(96, 160), (200, 70), (5, 5), (1, 1), (33, 64)])
def test_images_of_any_shape(method: str, make, size: tuple[int, int]) -> None:
    detector = make(method)
    detector.enroll("plate", [texture(k, *size) for k in range(2)])
    (found,) = judge(detector, texture(9, *size))
    assert found.error is None
    assert found.map.shape == size


def test_the_batch_does_not_matter(method: str, make) -> None:
    detector = enrolled(make(method))
    images = [texture(k, 96, 96 if k % 2 else 128) for k in range(10, 15)]
    together = judge(detector, *images)
    for found, alone in zip(together, (judge(detector, image)[0] for image in images), strict=True):
        assert found.score == pytest.approx(alone.score, rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(found.map, alone.map, rtol=1e-3, atol=1e-4)


def test_the_order_of_references_does_not_matter(method: str, make) -> None:
    """Without a coreset, whose greedy start is a drawn position in the bank."""
    options = {"coreset": 1} if method == "patchcore" else {}
    query = blot(texture(9), 30, 30, 20)
    forward, backward = (
        judge(enrolled(make(method, options=options), images), query)[0]
        for images in (GOOD, GOOD[::-1])
    )
    assert forward.score == pytest.approx(backward.score, rel=1e-5)
    np.testing.assert_allclose(forward.map, backward.map, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers(method: str, make) -> None:
    import torch

    before = torch.random.get_rng_state()
    state = np.random.get_state()[1].copy()
    first, second = (judge(enrolled(make(method, seed=3)), texture(9))[0] for _ in range(2))
    assert first.score == second.score
    np.testing.assert_array_equal(first.map, second.map)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize("name", ["bundle", "bundle.zip"])
def test_saved_is_loaded_bit_for_bit(method: str, make, tmp_path: Path, name: str) -> None:
    detector = enrolled(make(method))
    before = judge(detector, texture(9), blot(texture(8), 20, 20, 30))
    detector.save(tmp_path / name)
    after = judge(Detector.load(tmp_path / name), texture(9), blot(texture(8), 20, 20, 30))
    for a, b in zip(before, after, strict=True):
        assert a.score == b.score
        np.testing.assert_array_equal(a.map, b.map)


def test_cached_features_give_the_same_result(method: str, make, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    fresh = judge(enrolled(make(method)), blot(texture(9), 20, 20, 30))[0]
    first, second = (
        judge(enrolled(make(method, feature_cache=cache)), blot(texture(9), 20, 20, 30))[0]
        for _ in range(2)
    )
    assert cache.hits > 0
    assert first.score == second.score
    np.testing.assert_array_equal(first.map, second.map)
    scale = float(np.abs(fresh.map).max())
    np.testing.assert_allclose(first.map, fresh.map, atol=5e-3 * scale)


def test_the_first_view_of_an_image_is_the_image(method: str, make) -> None:
    """Retrieval and the feature cache count on it."""
    from anomalyst.methods.base import TrainedMethod
    from anomalyst.methods.views import PLAIN

    made = make(method).method
    assert made.reference_views[0] is PLAIN
    if isinstance(made, TrainedMethod):
        assert made.training_views(few_shot=True)[0] is PLAIN


def test_ignored_pixels_change_nothing(method: str, make) -> None:
    """Neither those of references nor those of the image that is judged."""
    random, where = np.random.default_rng(0), np.zeros((96, 96), dtype=bool)
    where[30:75, 44:92] = True
    frame = Frame(ignore=where)

    def scrambled(image: np.ndarray) -> np.ndarray:
        other = image.copy()
        other[where] = random.integers(0, 256, (int(where.sum()), 3))
        return other

    image = blot(texture(9), 4, 8, 24)
    plain = judge(enrolled(make(method, frame=frame)), image)[0]
    other = judge(
        enrolled(make(method, frame=frame), [scrambled(good) for good in GOOD]), scrambled(image)
    )[0]
    assert plain.score == other.score
    np.testing.assert_array_equal(plain.map, other.map)
    assert (plain.map[where] == plain.map.min()).all()


def test_one_tile_is_the_image(method: str, make) -> None:
    """Training, references and judging alike, but for the rounding of batches of other sizes."""
    image = blot(texture(9), 20, 20, 30)
    whole, tiled = (judge(enrolled(make(method, tile=tile)), image)[0] for tile in (None, 96))
    assert whole.score == pytest.approx(tiled.score, rel=1e-3)
    np.testing.assert_allclose(whole.map, tiled.map, rtol=1e-3, atol=1e-5)


def test_an_easy_defect_is_found_in_tiles(method: str, make, bad_samples: list[Sample]) -> None:
    detector = enrolled(make(method, tile=64, overview=True))
    if REGISTRY[method].abnormal_references:
        detector.enroll("plate", (), [(sample, sample.mask) for sample in bad_samples[:1]])
    good, bad = judge(detector, texture(9, 96, 160), blot(texture(9, 96, 160), 40, 100, 24))
    assert bad.score > good.score and bad.score_map.box == (0, 0, 96, 160)
    row, column = np.unravel_index(bad.map.argmax(), bad.map.shape)
    assert 32 <= row < 72 and 92 <= column < 132


def test_an_easy_defect_is_found_and_placed(method: str, make) -> None:
    good, bad = judge(enrolled(make(method)), texture(9), blot(texture(9), 32, 48, 24))
    assert bad.score > 1.3 * good.score
    row, column = np.unravel_index(bad.map.argmax(), bad.map.shape)
    assert 24 <= row < 64 and 40 <= column < 80


def test_scores_are_raw(method: str, make) -> None:
    """The same image scores the same, whatever it is judged beside; nothing is rescaled."""
    detector = enrolled(make(method))
    alone = judge(detector, texture(9))[0].score
    beside = judge(detector, texture(9), np.zeros((96, 96, 3), np.uint8), batch_size=1)[0].score
    assert alone == beside


def test_what_the_method_lacks_is_refused_before_any_work(method: str, make) -> None:
    if REGISTRY[method].abnormal_references:
        return
    detector = Detector(method, backbone="no-such-backbone")
    with pytest.raises(InputError, match="abnormal references"):
        detector.enroll("plate", GOOD, [(GOOD[0], None)])


def test_unknown_options_name_the_nearest(method: str, make) -> None:
    known = next(iter(REGISTRY[method].load().Options.model_fields))
    detector = Detector(method, backbone=DEEP, options={known + "x": 1})
    with pytest.raises(InputError, match=f"did you mean '{known}'"):
        detector.enroll("plate", GOOD)


def taught(detector: Detector, bad_samples: list[Sample]) -> Detector:
    pairs = [(sample, sample.mask) for sample in bad_samples]
    detector.enroll("plate", GOOD, pairs)
    return detector


def test_abnormal_references_in_any_order_or_batch_and_saved(
    method: str, make, bad_samples: list[Sample], tmp_path: Path
) -> None:
    if not REGISTRY[method].abnormal_references:
        return
    images = [texture(9), blot(texture(8), 20, 20, 30)]
    detector = taught(make(method), bad_samples[:3])
    first = judge(detector, *images)
    detector.save(tmp_path / "bundle")
    again = judge(Detector.load(tmp_path / "bundle"), *images)
    assert [p.score for p in first] == [p.score for p in again]
    other = make(method)
    other.enroll("plate", GOOD[::-1])
    for sample in bad_samples[2::-1]:  # one after the other, the last first
        other.enroll("plate", (), [(sample, sample.mask)])
    for one, two in zip(first, judge(other, *images, batch_size=1), strict=True):
        assert one.score == pytest.approx(two.score, rel=1e-4)
        np.testing.assert_allclose(one.map, two.map, rtol=1e-3, atol=1e-5)
    assert other.abnormal["plate"][0].mask == "given"
