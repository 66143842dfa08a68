"""NAGL as a user meets it: train on a source, teach a product and a defect, judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalyst.data.layouts import load_dataset
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import evaluate
from anomalyst.training_setup import TrainingSetup
from anomalyst.types import Sample
from conftest import TINY, Run, blot, save, texture

SHORT = {"steps": 6, "warmup": 2, "batch_size": 2, "normals": 2, "abnormals": 1}
GOOD = [texture(k) for k in range(3)]
BAD = blot(texture(30), 32, 40, 24)
MASK = np.zeros((96, 96), np.uint8)
MASK[32:56, 40:64] = 255


def nagl(weights: str, **more: object) -> Detector:
    options = {**SHORT, **more}
    return Detector("nagl", backbone=TINY, weights=weights, image_size=96, options=options)


@pytest.fixture
def trained(tiny_weights: str, make_parts: Callable[..., Path]) -> Detector:
    data = load_dataset(make_parts(("plate", "sheet")))
    return nagl(tiny_weights).fit((*data.train, *data.test))


def test_a_generalist_knows_its_source_and_no_product(trained: Detector, tmp_path: Path) -> None:
    assert trained.setting == "generalist" and trained.categories == ()
    assert len(trained.trained_on) == 2 * (12 + 6)
    with pytest.raises(InputError, match="is trained but knows no product yet"):
        trained.predict(GOOD)
    again = Detector.load(trained.save(tmp_path / "bundle"))
    again.enroll("gear", GOOD)
    trained.enroll("gear", GOOD)
    assert next(again.predict(BAD)).score == next(trained.predict(BAD)).score


def test_without_abnormal_references_it_is_the_nearest_normal_patch(
    trained: Detector, tiny_weights: str
) -> None:
    plain = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96)
    for detector in (trained, plain):
        detector.enroll("gear", GOOD)
    mine, theirs = (next(detector.predict(BAD)) for detector in (trained, plain))
    assert mine.score == pytest.approx(theirs.score / 2, rel=1e-4)  # half of 1 - cos
    np.testing.assert_allclose(mine.map, theirs.map / 2, atol=1e-5)


def test_a_perfectly_normal_image_scores_0_whatever_defects_are_known(trained: Detector) -> None:
    trained.enroll("gear", GOOD, [(BAD, MASK)])
    assert next(trained.predict(GOOD[0])).score == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mask", [None, MASK])
def test_a_defect_taught_later_stands_out_more_when_it_comes_again(
    trained: Detector, mask: np.ndarray | None
) -> None:
    trained.enroll("gear", GOOD)
    images = [texture(9), blot(texture(31), 10, 16, 20)]
    before = [found.score for found in trained.predict(images)]
    trained.enroll("gear", (), [(BAD, mask)])
    after = [found.score for found in trained.predict(images)]
    assert after[1] / after[0] > 1.1 * before[1] / before[0]
    assert trained.abnormal["gear"][0].mask == ("found" if mask is None else "given")


def test_the_defect_is_found_where_no_mask_is_given(trained: Detector) -> None:
    trained.enroll("gear", GOOD, [(BAD, None)])
    _, found, given = trained.method._defects["gear"][0]
    rows, columns = torch.nonzero(found, as_tuple=True)
    patch = 96 / found.shape[0]
    assert not given and rows.min() * patch >= 16 and rows.max() * patch < 64
    assert columns.min() * patch >= 24 and columns.max() * patch < 72


def test_a_reference_takes_one_backbone_pass_and_a_query_one(
    trained: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    backbone = trained.engine.backbone
    original = type(backbone).__call__
    monkeypatch.setattr(
        type(backbone),
        "__call__",
        lambda self, images: passes.append(len(images)) or original(self, images),
    )
    trained.enroll("gear", GOOD, [(BAD, MASK)])
    assert sum(passes) == 4
    passes.clear()
    list(trained.predict([texture(40), texture(41)]))
    assert sum(passes) == 2


def test_references_do_not_count_when_it_is_measured(
    trained: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts(("plate",)))
    detector = trained
    detector.trained_on = []  # here the source is the target
    reference = next(sample for sample in data.test if sample.label == 1)
    detector.enroll("plate", data.train[:2], [(reference, reference.mask)])
    found = evaluate(detector, data)
    assert found.metrics["categories"]["plate"]["n_anomalous"] == 2
    assert found.metrics["setting"] == "generalist"


@pytest.mark.parametrize(
    ("bad", "mask", "said"),
    [
        (BAD, np.zeros((96, 96)), "marks no pixel; mark the defect"),
        (BAD, np.ones((96, 96)), "marks the whole image"),
        (BAD, np.ones((90, 96)), "give a mask of the same size"),
        (GOOD[1], MASK, "given as abnormal, but it is a normal reference"),
        (np.zeros((2, 2, 2, 2), np.uint8), MASK, "abnormal reference of 'gear'"),
    ],
)
def test_a_bad_reference_is_refused_and_nothing_is_lost(
    trained: Detector, bad: np.ndarray, mask: np.ndarray, said: str
) -> None:
    trained.enroll("gear", GOOD[:2])
    before = next(trained.predict(BAD))
    with pytest.raises(InputError, match=said):
        trained.enroll("gear", GOOD, [(bad, mask)])
    assert len(trained.references["gear"]) == 2 and not trained.abnormal
    assert next(trained.predict(BAD)).score == before.score


def test_another_product_is_refused_as_a_defect(
    trained: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.enroll("gear", GOOD)
    dark = blot(np.full((96, 96, 3), 5, np.uint8), 40, 40, 20)
    trained.enroll("night", [np.full((96, 96, 3), 5, np.uint8)])
    with pytest.raises(InputError, match=r"looks like 'night' \(similarity .*not like 'gear'"):
        trained.enroll("gear", (), [(dark, None)])
    monkeypatch.setattr("anomalyst.retrieval.SAME_PRODUCT", 1.01)
    with pytest.raises(InputError, match="looks like another product than 'gear'"):
        trained.enroll("gear", (), [(BAD, MASK)])


def test_a_known_defect_is_refused_as_a_normal_reference(trained: Detector) -> None:
    trained.enroll("gear", GOOD, [(BAD, MASK)])
    with pytest.raises(InputError, match="given as normal, but it is an abnormal reference"):
        trained.enroll("gear", [BAD])


def test_a_known_defect_calibrates_nothing(trained: Detector, tmp_path: Path) -> None:
    """Counted as a good part it would lift the threshold over the very defect that was taught."""
    bad = save(tmp_path / "bad.png", BAD)
    good = save(tmp_path / "good.png", texture(40))
    trained.enroll("gear", GOOD, [(bad, MASK)])
    with pytest.raises(InputError, match=r"bad\.png: an abnormal reference of 'gear'"):
        trained.calibrate([Sample(good, "gear"), Sample(bad, "gear")])
    assert not trained.calibration


def test_a_mask_of_more_than_half_the_image_may_be_inverted(
    trained: Detector, caplog: pytest.LogCaptureFixture
) -> None:
    trained.enroll("gear", GOOD, [(BAD, MASK == 0)])
    assert "is it inverted?" in caplog.text


def test_a_misspelt_product_is_named_where_a_defect_is_taught(trained: Detector) -> None:
    trained.enroll("gear", GOOD)
    with pytest.raises(InputError, match="did you mean 'gear'"):
        trained.enroll("geer", (), [(BAD, MASK)])


def test_a_defect_without_any_normal_reference_is_refused(trained: Detector) -> None:
    with pytest.raises(InputError, match="at least one normal reference"):
        trained.enroll("gear", (), [(BAD, MASK)])


def test_a_reference_that_is_known_is_passed_over(trained: Detector) -> None:
    trained.enroll("gear", GOOD, [(BAD, MASK)])
    with pytest.raises(InputError, match="has all 4 images given already"):
        trained.enroll("gear", GOOD, [(BAD, MASK)])


def test_untrained_it_enrolls_nothing(tiny_weights: str) -> None:
    with pytest.raises(InputError, match="not trained yet"):
        nagl(tiny_weights).enroll("gear", GOOD)


def test_shots_are_no_word_for_a_source(tiny_weights: str, make_parts: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="enroll shots later"):
        nagl(tiny_weights).fit(load_dataset(make_parts()).train, shots=2)


def test_heads_must_divide_the_width(tiny_weights: str) -> None:
    with pytest.raises(InputError, match="give a divisor of the 64 channels"):
        _ = nagl(tiny_weights, heads=7).method


@pytest.mark.parametrize("cached", [True, False])
def test_cached_and_uncached_training_agree(
    tiny_weights: str, make_parts: Callable[..., Path], cached: bool
) -> None:
    data = load_dataset(make_parts(("plate",)))
    detector = nagl(tiny_weights)
    detector.fit((*data.train, *data.test), training=TrainingSetup(cached=cached))
    detector.enroll("gear", GOOD, [(BAD, MASK)])
    score = next(detector.predict(blot(texture(31), 10, 16, 20))).score
    assert score == pytest.approx(_SCORES.setdefault("score", score), rel=2e-3)


_SCORES: dict[str, float] = {}


@pytest.mark.parametrize("preset", ["paper", "compat"])
def test_the_presets_train_and_judge(
    tiny_weights: str, make_parts: Callable[..., Path], preset: str
) -> None:
    from anomalyst.methods.nagl import Nagl

    options = {**Nagl.presets[preset]["options"], **SHORT, "normals": 1}
    data = load_dataset(make_parts(("plate",)))
    detector = nagl(tiny_weights, **options).fit((*data.train, *data.test))
    detector.enroll("gear", GOOD[:1], [(BAD, MASK)])
    good, bad = detector.predict([texture(9), blot(texture(9), 20, 20, 30)])
    assert 0 <= good.score < bad.score <= 1


def test_resumed_it_ends_at_the_same_weights(
    tiny_weights: str, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_dataset(make_parts(("plate",)))
    samples = (*data.train, *data.test)
    whole = nagl(tiny_weights).fit(samples)

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "training"
    parts = nagl(tiny_weights)
    with pytest.raises(KeyboardInterrupt):
        setup = TrainingSetup(folder, checkpoint_seconds=0)
        parts.fit(samples, training=setup, progress=stop)
    parts.fit(samples, training=TrainingSetup(folder, resume=True))
    for name, value in whole.method.tensors().items():
        torch.testing.assert_close(parts.method.tensors()[name], value, rtol=1e-5, atol=1e-6)


def test_on_the_command_line(
    run: Run, tiny_weights: str, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    bundle, source = tmp_path / "bundle", make_parts(("plate", "sheet"))
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    tiny = ("--backbone", TINY, "--weights", tiny_weights, "--image-size", 96, *settings)
    code, _, err = run("fit", "nagl", source, "-o", bundle, *tiny)
    assert code == 0 and "give it a product's references with `anomalyst enroll`" in err
    code, _, err = run("fit", "nagl", source, "-o", tmp_path / "b", "--alpha", 0.1)
    assert code == 2 and "enrolled later" in err
    good = [save(tmp_path / f"ok{k}.png", picture) for k, picture in enumerate(GOOD)]
    bad, mask = save(tmp_path / "bad.png", BAD), save(tmp_path / "mask.png", MASK)
    code, _, err = run("enroll", bundle, "gear", "--normal", good[0], "--normal", good[1])
    assert code == 0, err
    code, out, _ = run("enroll", bundle, "gear", "--abnormal", bad, "--mask", mask, "--json")
    assert code == 0 and json.loads(out)["categories"][0]["abnormal"] == 1
    code, _, err = run("enroll", bundle, "gear", "--abnormal", good[0])
    assert code == 2 and "ok0.png" in err and "normal reference" in err
    code, _, err = run("predict", bundle, bad, "-o", tmp_path / "out", "--category", "gear")
    assert code == 0, err


def test_a_new_bundle_starts_from_the_shipped_generalist(
    run: Run, packaged: str, tmp_path: Path
) -> None:
    good = [save(tmp_path / "ok" / f"{k}.png", picture) for k, picture in enumerate(GOOD)]
    bad, mask = save(tmp_path / "bad.png", BAD), save(tmp_path / "mask.png", MASK)
    line = ("--normal", good[0].parent, "--abnormal", bad, "--mask", mask)
    code, _, err = run("enroll", tmp_path / "line3", "gear", *line)
    assert code == 0 and "from the generalist that ships with anomalyst" in err
    detector = Detector.load(tmp_path / "line3")
    normal, defect = detector.predict([texture(9), blot(texture(9), 20, 20, 30)])
    assert defect.score > 1.3 * normal.score
