"""OneNIP as a user meets it: train once, teach products by an image each, judge, be warned."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalyst.data.layouts import load_dataset
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import evaluate
from anomalyst.features.cache import FeatureCache
from anomalyst.inference import read_item
from anomalyst.methods.onenip import OneNip
from anomalyst.methods.prompted import Prompted
from anomalyst.methods.synthesis import Synthesizer
from anomalyst.methods.textures import Procedural
from anomalyst.methods.views import PLAIN
from anomalyst.retrieval import SAME_PRODUCT
from anomalyst.training_data import TrainingFeatures
from anomalyst.training_setup import TrainingSetup
from anomalyst.types import Sample
from conftest import DEEP, Run, blot, save, texture

SIZE = {"width": 16, "heads": 2, "hidden": 32, "encoder_layers": 1, "decoder_layers": 1, "side": 4}
SHORT = {**SIZE, "batch_size": 4, "steps": 6}
ABLE = {"width": 32, "learning_rate": 3e-3, "standardize": True, "steps": 12}
Build = Callable[..., Detector]


def turned(seed: int) -> np.ndarray:
    """A good part whose stripes lie across, as the category `sheet` has them."""
    return np.ascontiguousarray(np.rot90(texture(seed)))


GOOD, BAD = texture(9), blot(texture(9), 32, 40, 24)
DARK = np.full((96, 96, 3), 5, np.uint8)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache here has to outlive a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def onenip(deep_weights: str) -> Build:
    def build(seed: int = 1, **options: object) -> Detector:
        chosen = {**SHORT, **options}
        return Detector(
            "onenip", backbone=DEEP, weights=deep_weights, image_size=64, options=chosen, seed=seed
        )

    return build


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Sample]:
    """Six good images of `plate` and of `sheet`."""
    root = tmp_path_factory.mktemp("samples")
    for k in range(6):
        save(root / "plate" / "good" / f"{k}.png", texture(k))
        save(root / "sheet" / "good" / f"{k}.png", turned(1000 + k))
    return load_dataset(root).train


@pytest.fixture(scope="module")
def bundle(
    onenip: Build, samples: Sequence[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return onenip().fit(samples, calibration=0).save(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def taught(bundle: Path) -> Detector:
    """Trained on both categories, each with a prompt."""
    return Detector.load(bundle)


def learned(detector: Detector) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in detector.method.tensors().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )


def scores(detector: Detector, *images: np.ndarray, **more: object) -> list[float]:
    return [found.score for found in detector.predict(list(images), **more)]


# ---- train, teach, judge ------------------------------------------------------------------------


def test_one_model_of_several_categories(onenip: Build, make_parts: Callable[..., Path]) -> None:
    data = load_dataset(make_parts(("plate", "sheet")))
    detector = onenip(**ABLE).fit(data.train, calibration=0.25)
    assert detector.setting == "multi" and detector.categories == ("plate", "sheet")
    assert {name: c.count for name, c in detector.calibration.items()} == {"plate": 3, "sheet": 3}
    assert detector.trained_on == [] and detector.seconds["train"] > 0
    result = evaluate(detector, data).metrics
    assert result["setting"] == "multi" and result["mean"]["i_auroc"] == 1.0
    assert result["mean"]["p_auroc"] > 0.9


def test_one_category_is_single(onenip: Build, samples: Sequence[Sample]) -> None:
    plates = [sample for sample in samples if sample.category == "plate"]
    detector = onenip().fit(plates, calibration=0.2)
    assert detector.setting == "single" and detector.calibration["plate"].count == 1
    (found,) = detector.predict(texture(9, 96, 160))
    assert found.category == "plate" and found.map.shape == (96, 160)
    assert found.p_value is not None


def test_a_new_product_takes_one_image_and_no_training(
    onenip: Build, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_dataset(make_parts(("plate", "sheet"), good=6))
    detector = onenip(**ABLE)
    detector.train(data.only(["plate"]).train)
    with pytest.raises(InputError, match="is trained but knows no product yet"):
        detector.predict(GOOD)
    before = learned(detector)
    detector.enroll("plate", data.only(["plate"]).train[:1])
    detector.enroll("sheet", data.only(["sheet"]).train[:1])
    after = learned(detector)
    assert equal(before, {name: after[name] for name in before})
    assert set(after) - set(before) == {"prompts.plate", "prompts.sheet"}
    images = [GOOD, turned(9), BAD, np.ascontiguousarray(np.rot90(BAD))]
    nameless = list(detector.predict(images))
    assert [found.category for found in nameless] == ["plate", "sheet"] * 2
    for found, image in zip(nameless, images, strict=True):
        (named,) = detector.predict(image, category=found.category)
        assert named.score == pytest.approx(found.score, rel=1e-5)
    assert nameless[2].score > 1.2 * nameless[0].score
    assert nameless[3].score > 1.2 * nameless[1].score
    result = evaluate(detector, data).metrics["categories"]
    assert result["plate"]["i_auroc"] == result["sheet"]["i_auroc"] == 1.0
    again = Detector.load(detector.save(tmp_path / "bundle"))
    assert equal(learned(again), after)
    for one, two in zip(nameless, again.predict(images), strict=True):
        assert (one.category, one.score) == (two.category, two.score)
        np.testing.assert_array_equal(one.map, two.map)


def test_the_fusion_scale_is_the_middle_of_the_errors_on_new_pseudo_anomalies(
    onenip: Build, samples: Sequence[Sample], tmp_path: Path
) -> None:
    detector = onenip(pool=2, recipe="perlin")
    detector.feature_cache = FeatureCache(tmp_path / "cache")
    detector.train(samples)
    features = TrainingFeatures(detector.engine, samples, (PLAIN,))
    maker = Synthesizer("perlin", Procedural())
    lengths = []
    network = detector.method.network
    with torch.no_grad():
        for _, pseudo, _, prompts in Prompted(features, maker, 2, "random", 1).held_out(64, 4):
            rebuilt = network._decode(network.encode(pseudo), network.encode(prompts), (4, 4))
            lengths.append(np.sqrt(((pseudo - rebuilt).double().numpy() ** 2).sum(1)))
    assert sum(len(each) for each in lengths) == len(samples) == 12
    low, high = min(each.min() for each in lengths), max(each.max() for each in lengths)
    assert detector.heat_unit("plate") == pytest.approx((low + high) / 2, rel=1e-5)
    assert float(network.scale) == detector.heat_unit(None) != 1


def test_scores_do_not_depend_on_what_else_is_judged_or_known(taught: Detector) -> None:
    images = [GOOD, turned(8), BAD, texture(10, 96, 144), texture(11)]
    expected = scores(taught, *images, batch_size=1)
    backward = scores(taught, DARK, *images[::-1], batch_size=4)[:0:-1]
    assert backward == pytest.approx(expected, rel=1e-4)
    taught.enroll("night", [DARK])
    assert scores(taught, *images, batch_size=1) == expected


def test_prompts_are_added_up_to_the_number_kept(onenip: Build, samples: Sequence[Sample]) -> None:
    detector, kept = onenip(prompts=2), []
    detector.train(samples)
    for images in ([texture(1)], [texture(2), texture(3)], [texture(4)]):
        detector.enroll("gear", images)
        kept.append(len(detector.method.tensors()["prompts.gear"]))
    assert kept == [1, 2, 2] and len(detector.references["gear"]) == 4


def test_a_category_without_a_prompt_is_refused_in_one_line(
    taught: Detector, samples: Sequence[Sample]
) -> None:
    with pytest.raises(InputError) as error:
        taught.predict(GOOD, category="plat")
    message = "unknown category 'plat': did you mean 'plate'? Known: plate, sheet"
    assert str(error.value) == message
    bad, good = taught.predict([replace(samples[0], category="plat"), samples[0]])
    assert bad.error == message and good.error is None and good.score > 0


# ---- other products -----------------------------------------------------------------------------


def likeness(detector: Detector, image: np.ndarray) -> dict[str, str]:
    """Similarities to the categories as a warning puts them."""
    item = read_item(image, "x", detector.engine.preprocess)
    (found,) = detector.index.similarities(detector.engine.features([item]))
    return {name: f"{value:.2f}" for name, value in found.items()}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of since the last call."""
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    caplog.clear()
    return found


def test_the_wrong_products_prompt_is_warned_of_once_with_both_similarities(
    taught: Detector, caplog: pytest.LogCaptureFixture
) -> None:
    images = [GOOD, *(turned(k) for k in range(20, 24))]
    judged = list(taught.predict(images, category="plate", batch_size=2))
    like = likeness(taught, images[1])
    assert warnings(caplog) == [
        f"image-1: looks like 'sheet' (similarity {like['sheet']}), not 'plate' ({like['plate']}); "
        "judged as 'plate' all the same, and so are others like it, unnamed"
    ]
    assert {found.category for found in judged} == {"plate"}
    assert all(found.error is None for found in judged)
    list(taught.predict(images[1], category="plate"))
    assert len(warnings(caplog)) == 1  # a new call says it again


def test_each_category_is_warned_of(
    taught: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [save(tmp_path / f"{k}.png", image) for k, image in enumerate((GOOD, turned(9)))]
    wrong = [Sample(paths[0], "sheet"), Sample(paths[1], "plate")] * 2
    assert len(list(taught.predict(wrong))) == 4
    first, second = warnings(caplog)
    assert first.startswith(f"{paths[0]}: looks like 'plate'")
    assert second.startswith(f"{paths[1]}: looks like 'sheet'")


def test_an_image_unlike_everything_is_warned_of_whether_its_category_is_given_or_found(
    taught: Detector, caplog: pytest.LogCaptureFixture
) -> None:
    like = likeness(taught, DARK)
    assert float(like["sheet"]) < float(like["plate"]) < SAME_PRODUCT
    for category in (None, "plate"):
        (found,) = taught.predict(DARK, category=category)
        assert found.category == "plate"
        (said,) = warnings(caplog)
        assert f"unlike all references of 'plate' (similarity {like['plate']})" in said


def test_nothing_is_said_of_the_right_product_good_or_bad(
    taught: Detector, caplog: pytest.LogCaptureFixture
) -> None:
    images = [GOOD, BAD, blot(texture(4), 5, 5, 40), texture(4)]
    list(taught.predict(images, category="plate"))
    list(taught.predict([*images, turned(4)]))
    assert warnings(caplog) == []


@pytest.mark.parametrize(("method", "count"), [("anomaly-dino", 1), ("inp-former", 0)])
def test_methods_that_do_not_compare_with_a_category_say_nothing(
    deep_weights: str,
    samples: Sequence[Sample],
    caplog: pytest.LogCaptureFixture,
    method: str,
    count: int,
) -> None:
    options = {"steps": 1} if method == "inp-former" else {}
    detector = Detector(
        method, backbone=DEEP, weights=deep_weights, image_size=64, options=options
    ).fit(samples, calibration=0)
    list(detector.predict(DARK, category="plate"))
    assert len(warnings(caplog)) == count


def test_a_stranger_among_a_categorys_references_is_warned_of_and_taken(
    taught: Detector, caplog: pytest.LogCaptureFixture
) -> None:
    warnings(caplog)
    like = [likeness(taught, image) for image in (DARK, turned(5))]
    taught.enroll("plate", [texture(30), DARK, turned(5)])
    assert warnings(caplog) == [
        f"image-1: looks unlike all references of 'plate' (similarity {like[0]['plate']}); "
        "taken as normal all the same",
        f"image-2: looks like 'sheet' (similarity {like[1]['sheet']}), not 'plate' "
        f"({like[1]['plate']}); taken as normal all the same",
    ]
    assert len(taught.references["plate"]) == 9
    assert likeness(taught, DARK)["plate"] == "1.00"
    taught.enroll("night", [DARK])  # a new category has nothing that it could be unlike
    assert warnings(caplog) == []


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": 2},
        {"refiner": False},
        {"restoration": False, "refiner": False},
        {"decoder": "query"},
        {"decoder": "legacy"},
        {"decoder": "static", "masked": "encoder", "draw": "fixed"},
        {"recipe": "nsa", "draw": "nearest", "foreground": True},
        {"textures": "others", "loss": "paper", "prompts": 3, "choice": "mean"},
        {**OneNip.presets["fast"]["options"], **SHORT},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_every_variant_trains_judges_and_is_saved(
    onenip: Build, samples: Sequence[Sample], tmp_path: Path, options: dict[str, object]
) -> None:
    detector = onenip(**options)
    first = learned(detector)
    detector.fit(samples, calibration=0, training=TrainingSetup(tmp_path / "training"))
    last = learned(detector)
    assert all(value.isfinite().all() for value in last.values())
    moved = {name.split(".")[1] for name in first if not torch.equal(first[name], last[name])}
    assert moved >= {"project", "rebuild", "encoder", "decoder", "code", "scale"}
    assert ("refiner" in moved) == options.get("refiner", True)
    lines = (tmp_path / "training" / "log.csv").read_text().splitlines()
    assert len(lines) == 7 and ("restoration" in lines[0]) == options.get("restoration", True)
    good, bad = scores(detector, GOOD, BAD)
    assert 0 < good != bad > 0
    again = Detector.load(detector.save(tmp_path / "bundle"))
    assert scores(again, GOOD, BAD) == [good, bad]


def test_images_of_several_shapes_train_together(onenip: Build, tmp_path: Path) -> None:
    for k, size in enumerate([(64, 64), (64, 96), (80, 64), (64, 64), (64, 96)]):
        save(tmp_path / "plate" / "good" / f"{k}.png", texture(k, *size))
    detector = onenip(batch_size=5).fit(load_dataset(tmp_path).train, calibration=0)
    (found,) = detector.predict(texture(9, 64, 128))
    assert found.map.shape == (64, 128)


def test_runs_of_a_seed_are_equal_and_leave_the_global_generator_alone(
    onenip: Build, samples: Sequence[Sample]
) -> None:
    found = []
    for seed, state in ((1, 5), (1, 6), (2, 5)):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            before = torch.random.get_rng_state()
            detector = onenip(seed)
            detector.train(samples)
            assert torch.equal(before, torch.random.get_rng_state())
        found.append(learned(detector))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_each_step_has_randomness_of_its_own(
    onenip: Build, samples: Sequence[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and jitter follow the step, or resuming would have nothing to restore them by."""
    usual, other = onenip(), onenip()
    usual.train(samples)
    monkeypatch.setattr("anomalyst.training._step_seed", lambda *_: 0)
    other.train(samples)
    assert not equal(learned(usual), learned(other))
    still = [onenip(dropout=0, jitter=0), onenip(dropout=0, jitter=0)]
    still[0].train(samples)
    monkeypatch.undo()
    still[1].train(samples)
    assert equal(learned(still[0]), learned(still[1]))


def interrupted(
    onenip: Build, samples: Sequence[Sample], folder: Path, **options: object
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a training learned in one go, and what one did that was stopped and resumed."""
    whole, parts = onenip(**options), onenip(**options)
    whole.train(samples)

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.train(samples, setup=TrainingSetup(folder, checkpoint_seconds=0), progress=stop)
    parts.train(samples, setup=TrainingSetup(folder, resume=True))
    assert len((folder / "log.csv").read_text().splitlines()) == 7
    return learned(whole), learned(parts)


@pytest.mark.parametrize(
    "options", [{"standardize": True}, {"pool": 2}, {"refiner": False}], ids=str
)
def test_resumed_it_ends_at_the_same_weights_and_means_bit_for_bit(
    onenip: Build, samples: Sequence[Sample], tmp_path: Path, options: dict[str, object]
) -> None:
    assert equal(*interrupted(onenip, samples, tmp_path / "training", **options))


@pytest.mark.parametrize(
    ("textures", "said"),
    [("empty", r"empty: .*give another folder"), ("procedurl", "did you mean 'procedural'")],
)
def test_without_textures_no_step_is_taken(
    onenip: Build,
    samples: Sequence[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    textures: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    stages: list[str] = []
    detector = onenip(textures=textures)
    with pytest.raises(InputError, match=said) as error:
        detector.fit(samples, progress=lambda stage, *_: stages.append(stage))
    assert "\n" not in str(error.value)
    assert "train" not in stages and not detector.ready and not detector.method.trained


def test_images_that_no_pseudo_anomaly_shows_on_are_refused(onenip: Build, tmp_path: Path) -> None:
    for k in range(3):
        save(tmp_path / "night" / "good" / f"{k}.png", np.full((64, 64 + 8 * k, 3), 0, np.uint8))
    with pytest.raises(InputError, match=r"no pseudo-anomaly shows on any of 3 .*recipe cutpaste"):
        onenip(recipe="cutpaste").fit(load_dataset(tmp_path).train, calibration=0)


@pytest.mark.parametrize(("width", "heads"), [(15, 2), (10, 4), (9, 3)])
def test_a_width_that_heads_cannot_share_is_refused(onenip: Build, width: int, heads: int) -> None:
    with pytest.raises(InputError, match=f"width={width} .*even multiple of heads={heads}"):
        _ = onenip(width=width, heads=heads).method


def test_an_unreadable_training_image_is_named(
    onenip: Build, samples: Sequence[Sample], tmp_path: Path
) -> None:
    (tmp_path / "7.png").write_bytes(b"no image")
    data = [*samples, Sample(tmp_path / "7.png", "plate", 0)]
    for cached in (True, False):
        with pytest.raises(InputError, match=r"training image: .*7\.png"):
            onenip().fit(data, calibration=0, training=TrainingSetup(cached=cached))


# ---- the command line ---------------------------------------------------------------------------


def test_on_the_command_line(
    run: Run,
    deep_weights: str,
    make_parts: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts, bundle, out = make_parts(("plate", "sheet"), good=6), tmp_path / "bundle", tmp_path / "o"
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    tiny = ("--backbone", DEEP, "--weights", deep_weights, "--image-size", 64, *settings)
    fit = ("fit", "onenip", parts, "-o", bundle, *tiny)
    for words, said in (
        (("--set", "decoder=dinamic"), "decoder='dinamic'"),
        (("--set", "width=15"), "even multiple of heads=2"),
        (("--set", "textures=nowhere"), "unknown source or folder of textures 'nowhere'"),
    ):
        code, _, err = run(*fit, *words)
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert code == 2 and len(lines) == 1 and said in lines[0] and not bundle.exists()
    code, _, err = run(*fit, "--set", "pool=2", "--category", "plate", "--calibration", 0)
    assert code == 0, err
    good = parts / "sheet" / "train" / "good"
    code, out_text, err = run("enroll", bundle, "sheet", "--normal", good / "000.png", "--json")
    assert code == 0, err
    assert {line["category"] for line in json.loads(out_text)["categories"]} == {"plate", "sheet"}
    test = parts / "sheet" / "test" / "good"
    code, _, err = run("predict", bundle, test, "-o", out)
    assert code == 0 and not warnings(caplog)
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [record["category"] for record in records] == ["sheet"] * 3
    code, _, err = run("predict", bundle, test, "-o", out, "--category", "plate")
    assert code == 0 and [text.count("looks like 'sheet'") for text in warnings(caplog)] == [1]
    code, _, err = run("predict", bundle, test, "-o", out, "--category", "gear")
    assert code == 2 and "unknown category 'gear'. Known: plate, sheet" in err
    code, _, err = run("evaluate", bundle, parts, "-o", tmp_path / "results")
    assert code == 0, err
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["categories"]["sheet"]["n_anomalous"] == 3
    assert metrics["options"]["pool"] == 2 and metrics["options"]["width"] == 16
