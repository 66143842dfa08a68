"""What a training that was stopped, or forgotten, leaves behind: nothing of it may be lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from anomalyst import Detector, load_dataset, preset
from anomalyst.errors import InputError
from anomalyst.methods.base import find_method, make_options
from anomalyst.training_setup import CHECKPOINT, TrainingSetup
from conftest import DEEP, Run

FEW = ["--image-size", 96, "--steps", 3, "--set", "batch_size=2", "--calibration", 0]
SMALL = {"steps": 3, "batch_size": 2, "width": 64, "heads": 4, "hidden": 64}


def detector(weights: str, **options: object) -> Detector:
    return Detector(
        "onenip", backbone=DEEP, weights=weights, image_size=96, options={**SMALL, **options}
    )


@pytest.fixture
def samples(make_parts: Callable[..., Path]) -> tuple:
    return load_dataset(make_parts()).train


def test_stopped_behind_the_last_step_no_step_is_lost(
    deep_weights: str, samples: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = TrainingSetup(tmp_path / "run")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Detector, "enroll", stopped)
    with pytest.raises(KeyboardInterrupt):
        detector(deep_weights).fit(samples, training=setup, calibration=0)
    monkeypatch.undo()
    assert (setup.folder / CHECKPOINT).exists()
    resumed, whole = detector(deep_weights), detector(deep_weights)
    steps: list[str] = []
    resumed.fit(
        samples,
        training=TrainingSetup(setup.folder, resume=True),
        calibration=0,
        progress=lambda stage, *_, **__: steps.append(stage),
    )
    assert "train" not in steps  # all steps were taken before
    whole.fit(samples, calibration=0)
    for name, value in whole.method.tensors().items():
        assert value.equal(resumed.method.tensors()[name]), name


def test_a_forgotten_resume_does_not_cost_the_training(
    deep_weights: str, make_parts: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    bundle, folder = tmp_path / "b", tmp_path / "b.training"
    folder.mkdir()
    (folder / CHECKPOINT).write_bytes(b"an unfinished training")
    words = ["fit", "onenip", make_parts(), "-o", bundle, "--backbone", DEEP]
    code, _, err = run(*words, "--weights", deep_weights, *FEW)
    assert code == 2
    assert "holds an unfinished training; go on with --resume" in err
    assert (folder / CHECKPOINT).read_bytes() == b"an unfinished training"
    assert not bundle.exists()


def test_a_bundle_that_is_replaced_is_named(
    deep_weights: str,
    make_parts: Callable[..., Path],
    run: Run,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["fit", "anomaly-dino", make_parts(), "-o", tmp_path / "b", "--backbone", DEEP]
    more = ("--weights", deep_weights, "--image-size", 96, "--shots", 1, "--calibration", 0)
    run(*words, *more)
    assert "replaced" not in caplog.text
    run(*words, *more)
    assert f"{tmp_path / 'b'}: the bundle there is replaced" in caplog.text


def test_what_cannot_work_is_said_before_any_feature_is_computed(
    deep_weights: str, samples: tuple
) -> None:
    stages: list[str] = []
    with pytest.raises(InputError, match=r"textures 'shufled': did you mean 'shuffled'"):
        detector(deep_weights, textures="shufled").fit(
            samples, calibration=0, progress=lambda stage, *_, **__: stages.append(stage)
        )
    assert stages == []


def test_shots_are_refused_where_a_method_cannot_learn_from_few(samples: tuple) -> None:
    with pytest.raises(InputError, match=r"onenip cannot learn from 1 image a category.*few_shot"):
        Detector("onenip", backbone="no-such-backbone").fit(samples, shots=1)


def test_none_is_a_value_of_options_that_may_be_none() -> None:
    onenip = find_method("onenip").load()
    assert make_options(onenip, {"clip": "none"}).clip is None
    with pytest.raises(InputError, match="option width='none' of onenip"):
        make_options(onenip, {"width": "none"})


def test_a_preset_is_keyword_arguments() -> None:
    chosen = preset("onenip", "fast")
    assert Detector("onenip", **chosen).options == chosen["options"]
    chosen["options"].clear()  # a copy: the method's own stands
    assert preset("onenip", "fast")["options"]["steps"] == 1500
    with pytest.raises(InputError, match=r"unknown preset of onenip 'fas': did you mean 'fast'"):
        preset("onenip", "fas")
