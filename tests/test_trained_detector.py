"""Detectors whose method takes gradient steps: fit, zero-shot, several data sets, bundles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomalyst.cli import main
from anomalyst.data.layouts import load_dataset, load_together
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import evaluate
from anomalyst.features.cache import FeatureCache
from anomalyst.training_setup import TrainingSetup
from conftest import DEEP, TINY, blot, save, texture


@pytest.fixture
def inp(deep_weights: str) -> Callable[..., Detector]:
    def build(**options: Any) -> Detector:
        chosen = {"steps": 6, "warmup": 2, "batch_size": 4, **options}
        return Detector(
            "inp-former", backbone=DEEP, weights=deep_weights, image_size=64, options=chosen, seed=1
        )

    return build


def weights(detector: Detector) -> dict[str, torch.Tensor]:
    return detector.method.tensors()


def test_one_model_of_several_categories(inp, make_parts) -> None:
    data = load_dataset(make_parts(("plate", "sheet")))
    detector = inp(steps=40).fit(data.train, calibration=0.25)
    assert detector.setting == "multi" and detector.categories == ("plate", "sheet")
    assert {name: c.count for name, c in detector.calibration.items()} == {"plate": 3, "sheet": 3}
    assert detector.seconds["train"] > 0 and detector.trained_on == []
    result = evaluate(detector, data).metrics
    assert result["setting"] == "multi" and result["seconds"]["train"] > 0
    assert result["mean"]["i_auroc"] == 1.0


def test_one_category_is_single_and_shots_are_few(inp, make_parts) -> None:
    data = load_dataset(make_parts(("plate", "sheet")))
    assert inp().fit(data.only(["plate"]).train).setting == "single"
    few = inp(steps=2).fit(data.train, shots=2)
    assert few.setting == "few-shot-multi" and few.shots == 2
    assert inp(steps=2).fit(data.only(["plate"]).train, shots=1).setting == "few-shot"


def test_few_shots_are_trained_on_in_22_variants(inp, make_parts, tmp_path: Path) -> None:
    data = load_dataset(make_parts())
    for shots, augment, files in ((2, "few-shot", 44), (2, "never", 2), (None, "few-shot", 12)):
        cache = FeatureCache(tmp_path / f"{shots}-{augment}")
        detector = inp(augment=augment, steps=1)
        detector.feature_cache = cache
        detector.fit(data.train, shots=shots, calibration=0)
        assert len(list(cache.folder.rglob("*.safetensors"))) == files


def test_cached_features_train_the_same_weights_within_half_precision(inp, make_parts) -> None:
    data = load_dataset(make_parts())
    first, second, fresh = inp(), inp(), inp()
    first.train(data.train)
    second.train(data.train)
    fresh.train(data.train, setup=TrainingSetup(cached=False))
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])
    image = blot(texture(900), 30, 30, 20)
    (a,), (b,) = (list(d.predict(image)) for d in (first, fresh))
    assert a.score == pytest.approx(b.score, rel=0.01)
    np.testing.assert_allclose(a.map, b.map, atol=0.01 * float(np.abs(b.map).max()))


def test_a_cache_that_forgets_changes_nothing(inp, make_parts, tmp_path: Path) -> None:
    data = load_dataset(make_parts())
    roomy, cramped = inp(), inp()
    cramped.feature_cache = FeatureCache(tmp_path / "cramped", max_bytes=20_000)
    roomy.train(data.train)
    cramped.train(data.train)
    assert len(list(cramped.feature_cache.folder.rglob("*.safetensors"))) < 12
    assert all(torch.equal(v, weights(cramped)[name]) for name, v in weights(roomy).items())


def test_images_of_several_shapes_train_together(inp, tmp_path: Path) -> None:
    for k, size in enumerate([(64, 64), (64, 96), (80, 64), (64, 64), (64, 96)]):
        save(tmp_path / "plate" / "good" / f"{k}.png", texture(k, *size))
    detector = inp(batch_size=5).fit(load_dataset(tmp_path).train, calibration=0)
    assert len(detector.references["plate"]) == 5
    (found,) = detector.predict(texture(9, 64, 128))
    assert found.map.shape == (64, 128)


def test_a_single_image_is_enough_to_train_on(inp, tmp_path: Path) -> None:
    save(tmp_path / "plate" / "good" / "1.png", texture(1))
    before = weights(inp())
    after = weights(inp(augment="never").fit(load_dataset(tmp_path).train, calibration=0))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_unreadable_training_image_is_named(inp, make_parts) -> None:
    root = make_parts()
    (root / "plate" / "train" / "good" / "003.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"training image: .*003\.png"):
        inp().fit(load_dataset(root).train)


def test_a_backbone_of_too_few_blocks_is_refused_by_name(tiny_weights: str, make_parts) -> None:
    data = load_dataset(make_parts())
    with pytest.raises(InputError, match=f"8 blocks or more, and {TINY} has 6"):
        Detector("inp-former", backbone=TINY, weights=tiny_weights).fit(data.train)


def test_nothing_is_judged_enrolled_or_saved_before_training(inp, tmp_path: Path) -> None:
    detector = inp()
    with pytest.raises(InputError, match="learned nothing yet"):
        detector.predict(texture(1))
    with pytest.raises(InputError, match="not trained yet"):
        detector.enroll("plate", [texture(1)])
    with pytest.raises(InputError, match="learned nothing yet"):
        detector.save(tmp_path / "bundle")


def test_a_failed_training_leaves_the_detector_as_it_was(inp, make_parts) -> None:
    data = load_dataset(make_parts())
    detector = inp().fit(data.train)
    before = next(detector.predict(texture(3))).score
    (make_parts() / "plate" / "train" / "good" / "003.png").write_bytes(b"no image")
    with pytest.raises(InputError):
        detector.fit(data.train)
    assert next(detector.predict(texture(3))).score == before


def test_zero_shot_judges_what_it_was_never_trained_on(inp, make_parts, tmp_path: Path) -> None:
    data = load_dataset(make_parts(("plate", "sheet")))
    detector = inp(score="prototypes", steps=40).fit(data.only(["sheet"]).train)
    assert detector.setting == "zero-shot" and detector.categories == ()
    assert len(detector.trained_on) == 12, "nothing is held out for categories never judged"
    detector.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle")
    assert loaded.trained_on == detector.trained_on
    target = data.only(["plate"])
    result = evaluate(loaded, target)
    assert result.metrics["setting"] == "zero-shot"
    assert result.metrics["categories"]["plate"]["n_anomalous"] == 3
    (nameless,) = loaded.predict(texture(7))
    assert nameless.category is None and not nameless.calibrated
    assert loaded.calibrate(target.train) == {"plate": 12}
    (named,) = loaded.predict(texture(7))
    assert named.category == "plate" and named.calibrated and named.p_value is not None
    (other,) = loaded.predict(texture(7), category="sheet")
    assert other.category == "sheet" and not other.calibrated


def test_a_misspelt_category_of_a_joint_model_is_not_judged(inp, make_parts) -> None:
    data = load_dataset(make_parts(("plate", "sheet")))
    detector = inp().fit(data.train)
    with pytest.raises(InputError, match="did you mean 'plate'"):
        detector.predict(texture(7), category="plat")


def test_a_plain_folder_calibrates_a_zero_shot_detector_under_the_name_given(
    monkeypatch, deep_weights, make_parts, tmp_path: Path, capsys
) -> None:
    data, bundle = make_parts(("plate", "sheet")), tmp_path / "bundle"
    words = fit(deep_weights, data / "sheet", bundle, "--steps", 2, "--set", "score=prototypes")
    assert run(monkeypatch, *words) == 0
    assert "no category yet" in capsys.readouterr().err
    good = data / "plate" / "train" / "good"
    assert run(monkeypatch, "calibrate", bundle, good, "--category", "gear") == 0
    assert Detector.load(bundle).calibration["gear"].count == 12
    assert run(monkeypatch, "predict", bundle, good / "000.png", "-o", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    assert record["category"] == "gear" and record["calibrated"]


def test_images_trained_on_never_calibrate(inp, make_parts) -> None:
    data = load_dataset(make_parts(("plate",)))
    detector = inp(score="prototypes").fit(data.train)
    with pytest.raises(InputError, match="references of this detector"):
        detector.calibrate(data.train)


def test_images_trained_on_never_count_as_a_test(inp, make_parts) -> None:
    root = make_parts(("plate", "sheet"))
    copy = root / "plate" / "test" / "good" / "000.png"
    copy.write_bytes((root / "sheet" / "train" / "good" / "000.png").read_bytes())
    data = load_dataset(root)
    detector = inp(score="prototypes").fit(data.only(["sheet"]).train)
    counts = evaluate(detector, data.only(["plate"])).metrics["categories"]["plate"]
    assert (counts["n_normal"], counts["n_anomalous"]) == (2, 3)


def test_data_sets_together_keep_their_categories_apart(make_parts, tmp_path: Path) -> None:
    first = make_parts(("plate", "sheet")).rename(tmp_path / "one")
    second = make_parts(("plate", "ring")).rename(tmp_path / "two")
    names = {sample.category for sample in load_together([first, second]).train}
    assert names == {"one/plate", "sheet", "two/plate", "ring"}
    assert {sample.category for sample in load_together([first]).train} == {"plate", "sheet"}


def test_a_category_of_a_joint_model_is_found_in_its_own_data_set(
    inp, make_parts, tmp_path: Path
) -> None:
    first = make_parts(("plate",)).rename(tmp_path / "one")
    second = make_parts(("plate",)).rename(tmp_path / "two")
    detector = inp().fit(load_together([first, second]).train, calibration=0.25)
    result = evaluate(detector, load_dataset(second)).metrics
    assert list(result["categories"]) == ["two/plate"]
    assert result["categories"]["two/plate"]["n_anomalous"] == 3


# ---- the command line ---------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["anomalyst", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def fit(deep_weights: str, data: Path, bundle: Path, *more: object) -> tuple[object, ...]:
    settings = ("--set", "warmup=2", "--set", "batch_size=4", "--image-size", 64, "--seed", 1)
    return (
        *("fit", "inp-former", data, "-o", bundle, "--backbone", DEEP, "--weights", deep_weights),
        *("--calibration", 0, *settings, *more),
    )


def test_fit_evaluate_predict(monkeypatch, deep_weights, make_parts, tmp_path: Path) -> None:
    data, bundle = make_parts(("plate", "sheet")), tmp_path / "bundle"
    assert run(monkeypatch, *fit(deep_weights, data, bundle, "--steps", 5)) == 0
    log = (tmp_path / "bundle.training" / "log.csv").read_text().splitlines()
    assert len(log) == 6
    assert [p.name for p in (tmp_path / "bundle.training").iterdir()] == ["log.csv"]
    assert run(monkeypatch, "evaluate", bundle, data, "-o", tmp_path / "results") == 0
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["setting"] == "multi" and metrics["options"]["steps"] == 5
    page = (tmp_path / "results" / "report.html").read_text()
    assert page.count('<img class="strip"') == 12, "one for each picture that is shown"
    assert run(monkeypatch, "predict", bundle, data / "plate" / "test", "-o", tmp_path / "out") == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 6


def test_epochs_count_passes(monkeypatch, deep_weights, make_parts, tmp_path: Path) -> None:
    words = fit(deep_weights, make_parts(), tmp_path / "bundle", "--epochs", 2)
    assert run(monkeypatch, *words) == 0
    log = (tmp_path / "bundle.training" / "log.csv").read_text().splitlines()
    assert len(log) - 1 == 2 * (12 // 4)


def test_interrupted_fit_is_resumed(
    monkeypatch, deep_weights, make_parts, tmp_path: Path, caplog
) -> None:
    import os
    import signal

    from anomalyst.training_data import TrainingFeatures

    data, bundle = make_parts(), tmp_path / "bundle"
    fetch, calls = TrainingFeatures.fetch, []

    def interrupt(self: TrainingFeatures, numbers: list[int], step: int = 0) -> object:
        calls.append(numbers)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return fetch(self, numbers)

    monkeypatch.setattr(TrainingFeatures, "fetch", interrupt)
    words = fit(deep_weights, data, bundle, "--steps", 6)
    assert run(monkeypatch, *words) == 130
    assert "the checkpoint of step 3 is kept" in caplog.text and "--resume" in caplog.text
    assert not bundle.exists()
    assert run(monkeypatch, *words, "--resume") == 0
    assert len(calls) == 6
    whole = tmp_path / "whole"
    assert run(monkeypatch, *fit(deep_weights, data, whole, "--steps", 6)) == 0
    resumed, uninterrupted = (weights(Detector.load(path)) for path in (bundle, whole))
    assert all(torch.equal(value, uninterrupted[name]) for name, value in resumed.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", 3, "--epochs", 2], "give one of them"),
        (["--precision", "16"], "give 32-true or bf16-mixed"),
        (["--set", "gama=1"], "did you mean 'gamma'"),
        (["--set", "prototypes=-1"], "prototypes='-1'"),
        (["--devices", 5, "--steps", 1], "cannot be shared among 5 devices"),
    ],
)
def test_slips_are_one_line_and_exit_code_2(
    monkeypatch, deep_weights, make_parts, tmp_path: Path, capsys, words, message
) -> None:
    assert run(monkeypatch, *fit(deep_weights, make_parts(), tmp_path / "bundle", *words)) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert message in line


def test_training_words_are_refused_of_a_method_without_training(
    monkeypatch, make_parts, tmp_path: Path, capsys
) -> None:
    for words in (["--steps", 3], ["--resume"], ["--tensorboard"], ["--precision", "bf16-mixed"]):
        code = run(monkeypatch, "fit", "patchcore", make_parts(), "-o", tmp_path / "b", *words)
        assert code == 2 and "takes no gradient steps" in capsys.readouterr().err
