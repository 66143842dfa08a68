"""WinCLIP as a user meets it: by the name alone, with references too, saved, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalyst.data.layouts import load_dataset
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureCache
from anomalyst.types import Prediction, Sample
from conftest import CLIP, DEEP, Run, blot, save, texture

GOOD = [texture(k) for k in range(3)]
QUERY = blot(texture(9), 30, 30, 24)


@pytest.fixture
def make(clip_weights: str) -> Callable[..., Detector]:
    def build(**options: Any) -> Detector:
        return Detector(
            "winclip", backbone=CLIP, weights=clip_weights, image_size=96, options=options
        )

    return build


def judge(detector: Detector, category: str | None = "plate") -> Prediction:
    (found,) = detector.predict(QUERY, category=category)
    return found


def same(one: Prediction, other: Prediction) -> bool:
    return one.score == other.score and bool((one.map == other.map).all())


def test_without_references_any_product_is_judged_by_its_name(make) -> None:
    detector = make()
    plate, nut = judge(detector, "plate"), judge(detector, "metal nut")
    assert plate.map.shape == (96, 96) and 0 < plate.score < 1
    assert plate.score != nut.score


def test_references_of_one_product_close_the_others_unless_zero_shot(make) -> None:
    detector = make()
    alone = judge(detector)
    detector.enroll("plate", GOOD)
    assert not same(judge(detector), alone)
    with pytest.raises(InputError, match="unknown category 'nut'"):
        judge(detector, "nut")
    by_name = make(zero_shot=True)
    by_name.enroll("plate", GOOD)
    assert same(judge(by_name), judge(detector))  # a product that is enrolled has references
    assert judge(by_name, "nut").score == judge(make(), "nut").score


def test_references_may_come_one_by_one_in_any_order(make) -> None:
    once, apart = make(), make()
    once.enroll("plate", GOOD)
    for image in GOOD[::-1]:
        apart.enroll("plate", [image])
    one, other = judge(once), judge(apart)
    assert one.score == pytest.approx(other.score, rel=1e-5)
    np.testing.assert_allclose(one.map, other.map, rtol=1e-5)


def test_names_give_a_number_its_words(make) -> None:
    assert "'01' is no class name" in judge(make(), "01").error
    assert same(judge(make(names={"01": "metal plate"}), "01"), judge(make(), "metal_plate"))
    assert same(judge(make(names="01:metal plate"), "01"), judge(make(), "metal_plate"))


def test_no_name_at_all_is_refused(make) -> None:
    with pytest.raises(InputError, match="winclip needs a class name"):
        judge(make(), None)


def test_with_references_the_nearest_names_the_product(make) -> None:
    detector = make()
    detector.enroll("plate", GOOD)
    detector.enroll("noise", [np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)])
    found = judge(detector, None)
    assert found.category == "plate" and same(found, judge(detector))


def test_a_backbone_that_reads_no_text_is_refused(deep_weights: str) -> None:
    detector = Detector("winclip", backbone=DEEP, weights=deep_weights, image_size=96)
    with pytest.raises(InputError, match=r"not a CLIP .* take clip-vit-b-16-plus-240"):
        judge(detector)


@pytest.mark.parametrize("options", [{"windows": "shared"}, {"fusion": "community"}])
def test_choices_change_the_result_and_stay_in_the_bundle(make, tmp_path: Path, options) -> None:
    detector, plain = make(**options), make()
    for each in (detector, plain):
        each.enroll("plate", GOOD)
    found = judge(detector)
    assert not np.allclose(found.map, judge(plain).map, rtol=1e-3)
    detector.save(tmp_path / "bundle")
    assert same(judge(Detector.load(tmp_path / "bundle")), found)


def test_a_bundle_keeps_its_windows(make, tmp_path: Path) -> None:
    detector = make()
    detector.enroll("plate", GOOD)
    detector.save(tmp_path / "bundle")
    with pytest.raises(InputError, match="not enrolled with windows=shared"):
        Detector.load(tmp_path / "bundle", options={"windows": "shared"})


def test_one_cache_serves_both_kinds_of_windows(make, clip_weights: str, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for windows in ("exact", "shared"):
        kept = Detector(
            "winclip",
            backbone=CLIP,
            weights=clip_weights,
            image_size=96,
            options={"windows": windows},
            feature_cache=cache,
        )
        found, fresh = judge(kept), judge(make(windows=windows))
        assert found.score == pytest.approx(fresh.score, rel=5e-3)
        np.testing.assert_allclose(found.map, fresh.map, rtol=5e-3)
    assert cache.hits == 0 and cache.misses == 2


def test_fit_enrolls_or_leaves_it_to_the_name(make, make_parts) -> None:
    train = load_dataset(make_parts()).train
    few = make().fit(train, shots=2)
    assert len(few.references["plate"]) == 2
    by_name = make(zero_shot=True).fit(train)
    assert not by_name.references and by_name.ready
    assert same(judge(by_name), judge(make()))


def test_the_papers_preset_is_a_square_of_240() -> None:
    from anomalyst.methods.winclip import WinClip

    detector = Detector("winclip", **WinClip.presets["paper"])
    assert (detector.backbone_id, detector.image_size, detector.square) == (
        "clip-vit-b-16-plus-240",
        240,
        True,
    )


def test_from_the_command_line(make_parts, run: Run, clip_weights: str, tmp_path: Path) -> None:
    data = make_parts()
    network = ["--backbone", CLIP, "--weights", clip_weights, "--image-size", 80]
    code, _, err = run("fit", "winclip", data, "-o", tmp_path / "few", "--shots", 1, *network)
    assert code == 0, err
    code, _, err = run(
        "fit", "winclip", data, "-o", tmp_path / "name", "--set", "zero_shot=true", *network,
    )  # fmt: skip
    assert code == 0, err
    for bundle in ("few", "name"):
        judged = ["predict", tmp_path / bundle, data / "plate" / "test", "-o", tmp_path / "out"]
        code, _, err = run(*judged, "--category", "plate")
        assert code == 0, err


def test_a_name_that_cannot_be_used_is_refused_when_it_is_enrolled(make) -> None:
    detector = make()
    detector.enroll("plate", GOOD)
    for name, reason in (("01", "no class name"), ("nut " * 80, "CLIP reads 75 at most")):
        with pytest.raises(InputError, match=reason):
            detector.enroll(name.strip(), GOOD)
    assert detector.categories == ("plate",)


def test_one_image_of_a_bad_name_leaves_the_others(make, tmp_path: Path) -> None:
    samples = [
        Sample(save(tmp_path / f"{k}.png", texture(k)), name)
        for k, name in enumerate(("nut", "01", "nut"))
    ]
    found = list(make(zero_shot=True).predict(samples))
    assert [p.error is None for p in found] == [True, False, True]
    assert "'01' is no class name" in found[1].error


def test_by_name_alone_no_category_is_guessed(make) -> None:
    detector = make(zero_shot=True)
    detector.enroll("plate", GOOD)
    with pytest.raises(InputError, match="needs a class name"):
        judge(detector, None)
