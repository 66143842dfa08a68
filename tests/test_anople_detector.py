"""AnoPLe as a user meets it: learn a few images of named products, judge, add others, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anomalyst.data.layouts import load_dataset
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import evaluate
from anomalyst.features.clip import ClipTower
from anomalyst.features.extractor import Backbone
from anomalyst.methods.anople import AnoPle, abnormal_share, harmonic_mean
from anomalyst.training_setup import TrainingSetup
from anomalyst.types import Sample
from conftest import CLIP, DEEP, Run, blot, save, texture

pytest.importorskip("open_clip")

SHORT = {"steps": 5, "batch_size": 2, "warmup": 2, "text_prompts": 2, "visual_prompts": 2}
GOOD, BAD = texture(9), blot(texture(9), 32, 40, 24)
Build = Callable[..., Detector]
Learned = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache here has to outlive a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def anople(clip_weights: str) -> Build:
    def build(seed: int = 1, backbone: str = CLIP, weights: str = clip_weights, **options: object):
        chosen = {**SHORT, **options}
        return Detector(
            "anople", backbone=backbone, weights=weights, image_size=64, options=chosen, seed=seed
        )

    return build


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Sample]:
    """Two good images of `metal_plate` and of `pcb1`."""
    root = tmp_path_factory.mktemp("samples")
    for k in range(2):
        save(root / "metal_plate" / "good" / f"{k}.png", texture(k))
        save(root / "pcb1" / "good" / f"{k}.png", np.rot90(texture(1000 + k)))
    return load_dataset(root).train


@pytest.fixture(scope="module")
def bundle(
    anople: Build, samples: Sequence[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return anople().fit(samples, calibration=0).save(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def by_name(
    anople: Build, samples: Sequence[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Trained on both products, to judge others."""
    detector = anople(zero_shot=True).fit(samples)
    return detector.save(tmp_path_factory.mktemp("bundle") / "b")


def learned(detector: Detector) -> Learned:
    return {name: value.clone() for name, value in detector.method.tensors().items()}


def equal(first: Learned, second: Learned) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )


def scores(detector: Detector, *images: np.ndarray, **more: object) -> list[float]:
    return [found.score for found in detector.predict(list(images), **more)]


def expected_by_name(detector: Detector, image: np.ndarray, words: str) -> tuple[float, np.ndarray]:
    """Score and map by prompts alone, straight from the network."""
    tensor = torch.from_numpy(detector.engine.preprocess(image))[None]
    network = detector.method.network
    with torch.no_grad():
        z, patches = network.look(tensor, torch.zeros(1, dtype=torch.long))
        texts = network.texts([words])
        _, maps = network.decode(patches, texts)
        told = abnormal_share(z @ texts[0].T, 0.07)
        return harmonic_mean(told, maps.flatten(1).amax(1)).item(), maps[0].numpy()


# ---- train, judge, add --------------------------------------------------------------------------


def test_few_shots_of_several_products(
    anople: Build, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_dataset(make_parts(("plate", "sheet"), good=4))
    detector = anople().fit(data.train, shots=2, calibration=0.25)
    assert detector.setting == "few-shot-multi" and detector.categories == ("plate", "sheet")
    assert {name: len(kept) for name, kept in detector.references.items()} == {
        "plate": 2,
        "sheet": 2,
    }
    assert {name: c.count for name, c in detector.calibration.items()} == {"plate": 1, "sheet": 1}
    assert detector.trained_on == [] and detector.seconds["train"] > 0
    result = evaluate(detector, data).metrics
    assert result["setting"] == "few-shot-multi" and result["mean"]["i_auroc"] == 1.0
    assert result["mean"]["p_auroc"] > 0.8
    images = [GOOD, BAD, np.ascontiguousarray(np.rot90(BAD)), texture(5, 96, 160)]
    found = list(detector.predict(images))  # nobody says which product each is
    assert [p.category for p in found][:3] == ["plate", "plate", "sheet"]
    assert found[3].map.shape == (96, 160)
    again = Detector.load(detector.save(tmp_path / "bundle.zip"))
    assert equal(learned(again), learned(detector))
    for one, two in zip(found, again.predict(images), strict=True):
        assert (one.category, one.score, one.p_value) == (two.category, two.score, two.p_value)
        np.testing.assert_array_equal(one.map, two.map)


def test_a_new_product_takes_images_and_its_name_and_no_training(
    bundle: Path, samples: Sequence[Sample], tmp_path: Path
) -> None:
    detector = Detector.load(bundle)
    before = learned(detector)
    assert {f"bank{k}.{name}" for k in (0, 1) for name in ("metal_plate", "pcb1")} < set(before)
    with pytest.raises(InputError, match="unknown category 'dark_gear'"):
        detector.predict(GOOD, category="dark_gear")
    dark = [texture(k) // 4 for k in range(3)]
    detector.enroll("dark_gear", dark[:2])
    after = learned(detector)
    assert equal(before, {name: after[name] for name in before})
    assert set(after) - set(before) == {"bank0.dark_gear", "bank1.dark_gear"}
    assert after["bank0.dark_gear"].shape == (2 * 16, 64)
    seen, spoilt = detector.predict([dark[2], blot(dark[2], 32, 40, 24)])
    assert seen.category == spoilt.category == "dark_gear" and spoilt.score > 1.3 * seen.score
    assert scores(detector, GOOD, category="metal_plate") == scores(
        Detector.load(bundle), GOOD, category="metal_plate"
    )
    again = Detector.load(detector.save(tmp_path / "bundle"))
    assert scores(again, dark[2], category="dark_gear") == [seen.score]


def test_a_stored_image_scores_nothing(bundle: Path, samples: Sequence[Sample]) -> None:
    detector = Detector.load(bundle)
    stored, other = detector.predict([samples[0], texture(50)], category="metal_plate")
    assert abs(stored.score) < 1e-4 and np.abs(stored.map).max() < 1e-4  # once kept in half floats
    assert other.score > 10 * abs(stored.score)


def test_scores_do_not_depend_on_what_else_is_judged(bundle: Path) -> None:
    detector = Detector.load(bundle)
    images = [GOOD, BAD, texture(10, 96, 144), texture(11), texture(12, 144, 96)]
    expected = scores(detector, *images, category="metal_plate", batch_size=1)
    backward = scores(detector, *images[::-1], category="metal_plate", batch_size=4)[::-1]
    assert backward == pytest.approx(expected, rel=1e-4)
    texts = dict(detector.method._texts)
    assert scores(detector, *images, category="metal_plate", batch_size=1) == expected
    assert all(detector.method._texts[name] is kept for name, kept in texts.items())


def test_the_prefixes_of_quadrants_can_be_thrown_away(bundle: Path) -> None:
    detector = Detector.load(bundle)
    expected = scores(detector, GOOD, BAD, category="pcb1")
    with torch.no_grad():
        detector.method.network.prefix[1:] = torch.nan
    assert scores(detector, GOOD, BAD, category="pcb1") == expected


@pytest.mark.parametrize("bank", ["category", "shared", "none"])
def test_a_bank_is_a_products_own_or_all_products_or_none(
    bundle: Path, samples: Sequence[Sample], bank: str
) -> None:
    detector = Detector.load(bundle, options={"bank": bank})
    plate, board = samples[0], samples[2]
    assert (plate.category, board.category) == ("metal_plate", "pcb1")
    own = [scores(detector, p, category=p.category)[0] for p in (plate, board)]
    others = scores(detector, plate.path, category="pcb1")[0]
    by_name = expected_by_name(detector, texture(0), "metal plate")[0]
    if bank == "none":
        assert own[0] == pytest.approx(by_name, rel=1e-4) and own[0] > 0.1
    else:
        assert max(abs(score) for score in own) < 1e-4
        assert (others < 1e-4) == (bank == "shared")


# ---- by name alone ------------------------------------------------------------------------------


def test_an_unseen_product_is_judged_by_its_name(
    by_name: Path, samples: Sequence[Sample], tmp_path: Path
) -> None:
    detector = Detector.load(by_name)
    assert detector.setting == "zero-shot" and detector.categories == () and detector.ready
    assert len(detector.trained_on) == 4 and not any("bank" in name for name in learned(detector))
    found = {}
    for category, words in {"metal_nut": "metal nut", "pcb1": "printed circuit board"}.items():
        (judged,) = detector.predict(BAD, category=category)
        score, patches = expected_by_name(detector, BAD, words)
        assert judged.score == pytest.approx(score, rel=1e-4)
        np.testing.assert_allclose(judged.score_map.values, patches, rtol=0, atol=1e-5)
        assert judged.category == category and not judged.calibrated
        found[category] = judged.score
    assert found["metal_nut"] != found["pcb1"]
    assert scores(detector, BAD, category="pcb3") == [found["pcb1"]]  # read alike
    (sample,) = detector.predict([Sample(samples[0].path, "metal_nut")])
    assert (
        sample.error is None
        and sample.score == scores(detector, samples[0].path, category="metal_nut")[0]
    )
    with pytest.raises(InputError, match="anople needs a class name: say which product it is"):
        list(detector.predict(BAD))


def test_enrolled_references_are_compared_with_all_the_same(by_name: Path) -> None:
    detector = Detector.load(by_name)
    alone = scores(detector, texture(3), category="metal_nut")[0]
    detector.enroll("metal_nut", [texture(3)])
    assert abs(scores(detector, texture(3), category="metal_nut")[0]) < 1e-4 < alone
    assert scores(detector, texture(3), category="bolt")[0] > 0.01  # still any name will do


def test_a_name_in_another_script_is_warned_of_once(
    by_name: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector = Detector.load(by_name)
    found = scores(detector, GOOD, BAD, texture(3), category="Schlüssel", batch_size=1)
    assert len(found) == 3 and found[0] > 0
    assert [record.getMessage() for record in caplog.records] == [
        "class name 'Schlüssel': CLIP reads English; "
        "call it by words, such as 'metal plate', or fit with --set names='Schlüssel:WORDS'"
    ]


def test_zero_shot_trains_what_few_shot_trains(bundle: Path, by_name: Path) -> None:
    few = {k: v for k, v in learned(Detector.load(bundle)).items() if "bank" not in k}
    assert equal(few, learned(Detector.load(by_name)))


# ---- what is refused ----------------------------------------------------------------------------


def stages(detector: Detector, data: Sequence[Sample]) -> tuple[str, list[str]]:
    """The one line that fitting ends with, and the stages it had come to."""
    seen: list[str] = []
    with pytest.raises(InputError) as error:
        detector.fit(data, calibration=0, progress=lambda stage, *_: seen.append(stage))
    assert "\n" not in str(error.value) and not detector.categories
    return str(error.value), seen


def test_a_category_without_letters_is_refused_before_any_step(
    anople: Build, tmp_path: Path
) -> None:
    for k in range(2):
        save(tmp_path / "01" / "good" / f"{k}.png", texture(k))
    data = load_dataset(tmp_path).train
    said, seen = stages(anople(), data)
    assert said == (
        "category '01' is no class name that anople could read: "
        "call it by words, such as 'metal plate', or fit with --set names='01:WORDS'"
    )
    assert seen == []
    detector = anople(names="01:metal plate").fit(data, calibration=0)
    assert scores(detector, BAD, category="01")[0] > 0 and list(detector.method._texts) == [
        "metal plate"
    ]


def test_a_name_too_long_is_refused_before_any_step(
    anople: Build, samples: Sequence[Sample]
) -> None:
    said, seen = stages(anople(names={"pcb1": "nut " * 80}), samples)
    assert "has 80 tokens, beside anople's prompts CLIP reads 69 at most" in said and seen == []


def test_a_backbone_that_is_no_clip_is_refused(
    anople: Build, samples: Sequence[Sample], deep_weights: str
) -> None:
    said, seen = stages(anople(backbone=DEEP, weights=deep_weights), samples)
    assert said.startswith(f"backbone {DEEP}: not a CLIP with plain image and text transformers")
    assert "clip-vit-b-16-plus-240" in said and seen == []


def test_weights_of_another_network_are_refused(
    anople: Build, samples: Sequence[Sample], deep_weights: str, clip_weights: str, tmp_path: Path
) -> None:
    given = load_file(clip_weights.removeprefix("file:"))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("visual", "wide")}
    save_file({k: v for k, v in given.items() if k.startswith("visual.")}, files["visual"])
    wide = {**given, "visual.proj": torch.zeros(64, 512)}
    save_file(wide, files["wide"])
    for path, reason in (
        (deep_weights.removeprefix("file:"), "the text tower is missing; a whole CLIP is needed"),
        (files["visual"], "the text tower is missing; a whole CLIP is needed here"),
        (files["wide"], r"'visual.proj' is [64, 512] and should be [64, 48]"),
    ):
        said, seen = stages(anople(weights=f"file:{path}"), samples)
        assert said.startswith(f"{path}: not weights of {CLIP} ({reason}") and seen == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"interaction": "t2v"}, "option interaction='t2v' of anople"),
        ({"names": "metal plate"}, "write it as CATEGORY:WORDS,CATEGORY:WORDS"),
        ({"depth": 1.5}, "option depth=1.5 of anople"),
        ({"textures": "procedurl"}, "did you mean 'procedural'"),
        ({"recipe": "moon"}, "option recipe='moon' of anople"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(
    anople: Build, samples: Sequence[Sample], option: dict[str, object], said: str
) -> None:
    found, seen = stages(anople(**option), samples)
    assert said in found and seen == []


# ---- training -----------------------------------------------------------------------------------

KINDS = {"text", "visual", "to_text", "to_visual", "prefix", "decoder"}


@pytest.mark.parametrize(
    ("options", "still"),
    [
        ({}, set()),
        ({"interaction": "t2i", "views": "whole"}, {"to_text"}),
        ({"interaction": "i2t", "prefix": "add"}, {"to_visual"}),
        ({"interaction": "none", "prefix": "none"}, {"to_text", "to_visual", "prefix"}),
        ({"interaction": "text", "pseudo": "pixels"}, {"visual", "to_text", "to_visual"}),
        ({"interaction": "visual", "pseudo": "latent"}, {"text", "to_text", "to_visual"}),
        ({"contrast": "all", "align": "both", "image_score": "map"}, set()),
        ({"align": "none", "recipe": "perlin", "textures": "others", "bank": "shared"}, set()),
        ({"detach": True, "depth": 1.0, "temperature": 0.2, "bank": "none"}, set()),
    ],
    ids=str,
)
def test_every_variant_trains_judges_and_is_saved(
    anople: Build,
    samples: Sequence[Sample],
    tmp_path: Path,
    options: dict[str, object],
    still: set[str],
) -> None:
    detector = anople(**{**options, "steps": 3})
    first = learned(detector)
    detector.fit(samples, calibration=0, training=TrainingSetup(tmp_path / "training"))
    last = learned(detector)
    assert all(value.isfinite().all() for value in last.values())
    moved = {name.split(".")[1] for name, v in first.items() if not torch.equal(v, last[name])}
    assert moved == KINDS - still
    with (tmp_path / "training" / "log.csv").open() as file:
        header, *lines = [line.strip().split(",") for line in file]
    assert {"loss", "pixel", "image", "align"} < set(header) and len(lines) == 3
    aligned = [float(line[header.index("align")]) for line in lines]
    assert all(a == 0 for a in aligned) == (options.get("align") == "none")
    kept = detector.method.network.prefix[:, 0] - first["network.prefix"][:, 0]
    if options.get("views") == "whole":
        assert kept[0].abs().max() > 10 * kept[1:].abs().max()  # those only decay
    good, bad = scores(detector, GOOD, BAD, category="metal_plate")
    assert 0 < good != bad > 0
    again = Detector.load(detector.save(tmp_path / "bundle"))
    assert scores(again, GOOD, BAD, category="metal_plate") == [good, bad]


def test_the_map_learns_to_show_defects_it_never_saw(
    anople: Build, make_parts: Callable[..., Path]
) -> None:
    """The decoder's map alone, no memory, on random weights: what the prompts have learned."""
    data, losses = load_dataset(make_parts(good=4)), []
    options = {"bank": "none", "learning_rate": 5e-3, "pseudo": "pixels", "recipe": "cutpaste"}
    options |= {"views": "whole", "batch_size": 4}
    untrained = anople(**options, steps=1).fit(data.train, calibration=0)
    detector = anople(**options, steps=40).fit(
        data.train, calibration=0, progress=lambda *a: losses.append(a[3]) if len(a) > 3 else None
    )
    numbers = [float(note.split()[1].rstrip(",")) for note in losses]
    assert len(numbers) == 40 and np.mean(numbers[-5:]) < 0.8 * np.mean(numbers[:5])
    before, after = (evaluate(d, data).metrics["mean"]["p_auroc"] for d in (untrained, detector))
    assert after > 0.8 and after > before


def test_images_of_several_shapes_train_together(anople: Build, tmp_path: Path) -> None:
    for k, size in enumerate([(64, 64), (64, 96), (80, 64)]):
        save(tmp_path / "plate" / "good" / f"{k}.png", texture(k, *size))
    detector = anople(batch_size=3, steps=2).fit(load_dataset(tmp_path).train, calibration=0)
    assert [len(v) for k, v in learned(detector).items() if "bank0" in k] == [16 + 24 + 20]
    (found,) = detector.predict(texture(9, 64, 128))
    assert found.map.shape == (64, 128) and found.category == "plate"


def test_runs_of_a_seed_are_equal_and_leave_the_global_generator_alone(
    anople: Build, samples: Sequence[Sample]
) -> None:
    found = []
    for seed, state in ((1, 5), (1, 6), (2, 5)):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            before = torch.random.get_rng_state()
            detector = anople(seed, steps=3)
            detector.train(samples)
            assert torch.equal(before, torch.random.get_rng_state())
        found.append(learned(detector))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_resumed_it_ends_at_the_same_weights_bit_for_bit(
    anople: Build, samples: Sequence[Sample], bundle: Path, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    parts = anople()
    with pytest.raises(KeyboardInterrupt):
        parts.train(samples, setup=TrainingSetup(tmp_path, checkpoint_seconds=0), progress=stop)
    parts.train(samples, setup=TrainingSetup(tmp_path, resume=True))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 6
    whole = {k: v for k, v in learned(Detector.load(bundle)).items() if "bank" not in k}
    assert equal(whole, learned(parts))


def test_training_leaves_clip_as_it_is(
    anople: Build, samples: Sequence[Sample], clip_weights: str
) -> None:
    detector = anople(steps=2, learning_rate=0.1).fit(samples, calibration=0)
    given = load_file(clip_weights.removeprefix("file:"))
    state = detector.engine.backbone.state()
    assert equal(state, {name: given[name] for name in state}) and "token_embedding.weight" in state
    assert not any(p.requires_grad for p in detector.engine.backbone.parameters())
    saved = {name.split(".")[1] for name in learned(detector) if name.startswith("network.")}
    assert saved == KINDS


def test_the_paper_preset_and_the_backbone_of_its_own() -> None:
    assert Detector("anople").backbone_id == "clip-vit-b-16-plus-240"
    assert AnoPle.presets["paper"] == {"image_size": 240, "square": True}


def test_a_packed_clip_serves_without_a_file(
    clip_weights: str, samples: Sequence[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomalyst.features.weights import add, pack

    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "home"))
    add(clip_weights.removeprefix("file:"), CLIP)
    packed = pack(CLIP, tmp_path / "packed.safetensors")
    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "other"))
    add(packed)
    detector = Detector("anople", backbone=CLIP, image_size=64, options=SHORT, offline=True)
    given = Backbone.load(CLIP, (0, 1), weights=clip_weights, make=ClipTower)
    assert detector.engine.backbone.weights_sha256 == given.weights_sha256


# ---- the command line ---------------------------------------------------------------------------


def test_on_the_command_line(
    run: Run, clip_weights: str, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    parts, bundle, out = make_parts(("01", "sheet"), good=3), tmp_path / "bundle", tmp_path / "o"
    chosen = {**SHORT, "views": "whole"}
    settings = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
    tiny = ("--backbone", CLIP, "--weights", clip_weights, "--image-size", 64, *settings)
    fit = ("fit", "anople", parts, "-o", bundle, "--calibration", 0, *tiny)
    code, _, err = run(*fit)
    assert code == 2 and "category '01' is no class name that anople could read" in err
    names = ("--set", "names=01:metal plate,sheet:steel sheet")
    code, _, err = run(*fit, *names, "--shots", 2)
    assert code == 0, err
    test = parts / "01" / "test"
    code, _, err = run("predict", bundle, test / "blot", test / "good", "-o", out)
    assert code == 0, err
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [record["category"] for record in records] == ["01"] * 6
    found = [record["score"] for record in records]
    assert min(found[:3]) > max(found[3:])
    code, _, err = run(
        "fit", "anople", parts, "-o", tmp_path / "by-name", *tiny, *names, "--set", "zero_shot=true"
    )
    assert code == 0, err
    code, _, err = run("predict", tmp_path / "by-name", test / "good", "-o", out)
    assert code == 2 and "say which product it is (--category NAME)" in err
    code, _, err = run(
        "predict", tmp_path / "by-name", test / "good", "-o", out, "--category", "gear"
    )
    assert code == 0, err
