"""Benchmarks of generalists: one training, drawn references, and what is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from anomalyst import generalist
from anomalyst.benchmark import SHIPPED
from anomalyst.benchmark.cells import Outcome, plan
from anomalyst.benchmark.generalist import by_reference
from anomalyst.benchmark.reading import load_benchmark
from anomalyst.benchmark.references import draw_tasks
from anomalyst.benchmark.runner import run_benchmark
from anomalyst.data.layouts import Dataset, load_dataset
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import METRICS, CategoryEvaluation, Judged
from anomalyst.training_setup import CHECKPOINT, TrainingSetup
from anomalyst.types import Prediction, References, Sample, ScoreMap
from conftest import TINY, blot, load_part, save, texture, write_yaml

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny_weights: str) -> Write:
    """Write a configuration of a tiny NAGL in one step, changed as given."""

    def call(**keys: Any) -> Path:
        values = {
            "title": "Tiny",
            "method": "nagl",
            "setting": "generalist",
            "shots": [1],
            "backbone": TINY,
            "weights": tiny_weights,
            "image_size": 96,
            "steps": 1,
            "data": "x",
            "test": "y",
            "eval_size": 32,
            **keys,
        }
        return write_yaml(tmp_path / "tiny.yaml", values)

    return call


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Two products with two types of defects each, two images a type."""
    root = tmp_path / "target"
    for base, product in ((1000, "lid"), (2000, "nut")):
        for number in range(3):
            save(root / product / "train" / "good" / f"{number}.png", texture(base + number))
        for number in range(2):
            save(root / product / "test" / "good" / f"{number}.png", texture(base + 100 + number))
            for top, defect in ((8, "chip"), (56, "stain")):
                name = f"{base + number}.png"
                spoilt = blot(texture(base + 200 + top + number), top, 40, 24)
                save(root / product / "test" / defect / name, spoilt)
                mask = np.zeros((96, 96), np.uint8)
                mask[top : top + 24, 40:64] = 255
                save(root / product / "ground_truth" / defect / name, mask)
    return root


def metrics_of(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((folder / "cells").glob("*/metrics.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def run(path: Path, folder: Path) -> list[Outcome]:
    outcomes = run_benchmark(load_benchmark(path), folder)
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return outcomes


# ---- what is refused ----------------------------------------------------------------------------

SLIPS: list[tuple[dict[str, Any], list[str]]] = [
    ({"shots": ...}, ["tiny.yaml: shots", "generalist needs a list"]),
    ({"data": ...}, ["--data"]),
    ({"test": ...}, ["generalist needs", "--test"]),
    ({"test": "./x"}, ["never trained on"]),
    ({"abnormal": [1, 1]}, ["abnormal", "twice"]),
    ({"abnormal": [-1]}, ["abnormal.0"]),
    ({"abnormal": []}, ["tiny.yaml: abnormal"]),
    ({"references": "types"}, ["references", "'types'"]),
    ({"references": "type"}, ["references: type needs", "abnormal: [1]"]),
    ({"method": "inp-former"}, ["inp-former cannot do generalist"]),
    ({"setting": "few-shot", "test": ...}, ["it can do generalist only"]),
    ({"method": "patchcore", "steps": ...}, ["data: patchcore", "leave it out"]),
    (
        {"method": ..., "methods": ["nagl", "patchcore"], "abnormal": [1]},
        ["patchcore uses no abnormal", "put 0"],
    ),
    ({"bundle": "shipped"}, ["tiny.yaml: data", "leave data or the bundle out"]),
    ({"bundle": "shipped", "data": ...}, ["tiny.yaml: steps", "leave steps"]),
    ({"bundle": "shipped", "data": ..., "steps": ...}, ["tiny.yaml: backbone"]),
    (
        {"bundle": "shipped", "data": ..., "steps": ..., "variants": [{"name": "a"}]},
        ["tiny.yaml: variants"],
    ),
    (
        {"bundle": "b", "method": "patchcore", "data": ..., "steps": ...},
        ["bundle: holds one trained method"],
    ),
    ({"variants": [{"name": "a", "at_test": {"prats": "naive"}}]}, ["variant 'a'", "'parts'"]),
    (
        {
            "method": "patchcore",
            "data": ...,
            "steps": ...,
            "variants": [{"name": "a", "at_test": {"n": 1}}],
        },
        ["at_test: patchcore takes no gradient steps"],
    ),
]
OF_OTHERS = [("abnormal", [1]), ("references", "type"), ("bundle", "shipped")]
OF_OTHERS += [("variants", [{"name": "a", "at_test": {"parts": "naive"}}])]


@pytest.mark.parametrize(("keys", "words"), SLIPS, ids=[str(keys) for keys, _ in SLIPS])
def test_slips_are_one_line_that_names_them(write: Write, keys: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        load_part(write(**keys))
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(("key", "value"), OF_OTHERS)
def test_its_keys_belong_to_no_other_setting(write: Write, key: str, value: Any) -> None:
    keys = {"method": "anomaly-dino", "setting": "few-shot", "steps": ..., key: value}
    with pytest.raises(InputError, match="only generalist takes it"):
        load_part(write(**keys))


def test_a_bundle_that_is_not_there(write: Write) -> None:
    keys = {"data": ..., "steps": ..., "backbone": ..., "weights": ..., "image_size": ...}
    with pytest.raises(InputError, match="no such bundle"):
        load_part(write(**keys, bundle="nowhere"))
    assert load_part(write(**keys, bundle="shipped")).bundle == "shipped"


def test_the_ablation_takes_one_training() -> None:
    rows = yaml.safe_load((SHIPPED / "nagl-ablation.yaml").read_text())["variants"]
    assert [row.get("at_test") for row in rows] == [
        {"parts": "normal"},
        {"parts": "abnormal"},
        {"parts": "naive"},
        None,
    ]
    assert all("options" not in row for row in rows)


# ---- which references ---------------------------------------------------------------------------


def defects(**counts: int) -> Dataset:
    """A product of so many images of each defect type, ``bare`` ones without a mask."""
    test = [Sample(Path(f"test/good/{n}.png"), "lid", 0, "good") for n in range(3)]
    for name, count in counts.items():
        for n in range(count):
            mask = None if name == "bare" else Path(f"{name}/{n}_mask.png")
            test.append(Sample(Path(f"test/{name}/{n}.png"), "lid", 1, name, mask))
    train = tuple(Sample(Path(f"train/good/{n}.png"), "lid", 0, "good") for n in range(5))
    return Dataset(Path(), "mvtec", ("lid",), train, tuple(test))


def drawn(data: Dataset, shots: int, abnormal: int, seed: int) -> References:
    (task,) = draw_tasks(data, shots, abnormal, seed)
    assert task.queries == data.test
    (references,) = task.references
    return references


def test_draws_are_seeded_nested_and_go_through_the_types() -> None:
    data = defects(chip=3, dent=4, stain=5, bare=6, lone=1)
    firsts = set()
    for seed in range(20):
        one, two, most = (drawn(data, 1 + (a > 1), a, seed) for a in (1, 2, 9))
        assert set(one.abnormal) < set(two.abnormal) < set(most.abnormal)
        assert set(one.normal) < set(two.normal) and not set(two.normal) & set(data.test)
        types = [sample.defect for sample in most.abnormal]
        assert {*types[:3]} == {*types[3:6]} == {"chip", "dent", "stain"}
        assert types[6:] in (["dent", "stain"], ["stain", "dent"]) or len(types) == 9
        assert drawn(data, 2, 2, seed) == two
        firsts.add(one.abnormal)
    assert len(firsts) > 5
    assert {len({s.defect for s in drawn(data, 1, 9, seed).abnormal}) for seed in range(9)} == {3}


def test_one_image_of_a_type_is_left_to_be_judged() -> None:
    data = defects(chip=3, dent=2)
    assert [s.defect for s in drawn(data, 1, 3, 0).abnormal].count("chip") == 2
    with pytest.raises(InputError, match=r"abnormal: 4 of 'lid'.* 3 defective"):
        drawn(data, 1, 4, 0)
    for none in (defects(), defects(bare=4), defects(lone=1)):
        with pytest.raises(InputError, match="1 of 'lid' cannot be drawn"):
            drawn(none, 1, 1, 0)


def test_without_abnormal_references_all_categories_are_one_task() -> None:
    data = defects(lone=1)
    (task,) = draw_tasks(data, 2, 0, 0, by_type=True)
    assert task.queries == data.test and task.references[0].abnormal == ()
    assert len(task.references[0].normal) == 2


def test_each_type_is_judged_with_its_own_references() -> None:
    data = defects(chip=3, dent=4)
    kept = set()
    for seed in range(10):
        tasks = draw_tasks(data, 1, 2, seed, by_type=True)
        assert sorted(s.path for t in tasks for s in t.queries) == sorted(s.path for s in data.test)
        for task in tasks:
            (references,) = task.references
            (name,) = {sample.defect for sample in references.abnormal}
            assert {s.defect for s in task.queries} <= {name, "good"}
            assert (
                len(references.abnormal) == 2 and references.normal == tasks[0].references[0].normal
            )
        (normal,) = [task for task in tasks if any(s.label == 0 for s in task.queries)]
        kept.add(normal.references[0].abnormal[0].defect)
    assert kept == {"chip", "dent"}
    with pytest.raises(InputError, match="3 of 'lid' of type 'chip'"):
        draw_tasks(data, 1, 3, 0, by_type=True)


# ---- what is told apart -------------------------------------------------------------------------


def judged(name: str, **scores: list[float]) -> CategoryEvaluation:
    found = CategoryEvaluation(name)
    for defect, values in scores.items():
        for score in values:
            sample = Sample(Path("a.png"), name, int(defect != "good"), defect)
            score_map = ScoreMap(np.zeros((2, 2), np.float32), (8, 8), 1.0, (0.0, 0.0, 8.0, 8.0))
            found.add(sample, Prediction("a.png", name, score, score_map=score_map), 8)
    return found


def test_known_and_other_types_by_hand() -> None:
    lid = judged("lid", good=[0.1, 0.5], chip=[0.6, 0.4], dent=[0.2])
    nut = judged("nut", good=[0.1], chip=[0.9])
    chip = (Sample(Path("c.png"), None, 1, "chip"),)
    references = {name: References(name, (), chip) for name in ("lid", "nut")}
    found = by_reference({"lid": lid, "nut": nut}, references, 8)
    assert found["same"]["i_auroc"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["other"]["i_auroc"] == pytest.approx(1 / 2)  # nut has no other types
    assert (found["same"]["n_normal"], found["same"]["n_anomalous"]) == (1.5, 1.5)
    assert (found["other"]["n_normal"], found["other"]["n_anomalous"]) == (2, 1)
    assert found["same"]["p_auroc"] is None
    alone = by_reference({"nut": nut}, references, 8)
    assert set(alone["other"].values()) == {None}


# ---- running ------------------------------------------------------------------------------------


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the trainings that were run."""
    seeds: list[int] = []
    fit = Detector.fit

    def counted(self: Detector, *args: Any, **keys: Any) -> Detector:
        seeds.append(self.seed)
        return fit(self, *args, **keys)

    monkeypatch.setattr(Detector, "fit", counted)
    return seeds


def test_cells_share_one_training(
    write: Write, make_parts, target: Path, tmp_path: Path, trainings: list[int]
) -> None:
    variants = [{"name": "full"}, {"name": "i", "at_test": {"parts": "normal"}}]
    keys = {"data": str(make_parts(good=2)), "test": str(target), "variants": variants}
    path, out = write(**keys, abnormal=[0, 1], seeds=[3, 4]), tmp_path / "out"
    cells = plan(load_part(path))
    assert len({cell.name for cell in cells}) == 8 == len(cells)
    assert cells[2].label == "nagl, full, 1 shot, 1 abnormal, seed 3"
    assert len({cell.sha256 for cell in cells}) == 8
    run(path, out)
    assert trainings == [3]
    (home,) = (out / "trained").iterdir()
    assert sorted(p.name for p in home.iterdir()) == ["bundle", "training", "training.json"]
    assert sorted(p.name for p in (home / "training").iterdir()) == ["log.csv"]
    found = metrics_of(out)
    one = found["nagl+full+1-shot+1-abnormal+seed-4"]
    assert (one["setting"], one["shots"], one["abnormal"], one["seed"]) == ("generalist", 1, 1, 4)
    assert one["seconds"]["train"] > 0 and one["seconds"]["enroll"] > 0
    assert [row["n_anomalous"] for row in one["categories"].values()] == [3, 3]
    assert one["by_reference"]["same"]["n_anomalous"] == 1
    assert one["by_reference"]["other"]["n_anomalous"] == 2
    for names in one["references"].values():
        assert len(names["normal"]) == 1 and len(names["abnormal"]) == 1
    zero = found["nagl+full+1-shot+0-abnormal+seed-4"]
    assert zero["mean"]["n_anomalous"] == 4 and "by_reference" not in zero
    assert zero["references"]["lid"]["normal"] == one["references"]["lid"]["normal"]
    assert found["nagl+i+1-shot+1-abnormal+seed-4"]["options"]["parts"] == "normal"
    text = (out / "results.md").read_text()
    assert "| method | variant | shots | abnormal | seeds | i_auroc |" in text
    apart = text.partition("## By type of defect")[2].partition("\n## ")[0]
    for part in ("same", "other", "none"):
        assert f"| nagl | full | 1 | 1 | {part} | " in apart
    (out / "cells" / "nagl+i+1-shot+1-abnormal+seed-4" / "metrics.json").unlink()
    run(path, out)
    assert trainings == [3]
    again = metrics_of(out)["nagl+i+1-shot+1-abnormal+seed-4"]
    assert again["mean"] == found["nagl+i+1-shot+1-abnormal+seed-4"]["mean"]
    run(write(**keys | {"variants": variants[:1]}, seeds=[4]), out)
    assert trainings == [3, 4]


def test_a_training_that_fails_fails_its_cells_once(
    write: Write, make_parts, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(self: Detector, *args: Any, **keys: Any) -> Detector:
        tried.append(self.seed)
        raise InputError("the loss is not a number")

    monkeypatch.setattr(Detector, "fit", broken)
    path = write(data=str(make_parts(good=2)), test=str(target), seeds=[0, 1])
    for _ in range(2):  # a later run tries again
        outcomes = run_benchmark(load_benchmark(path), tmp_path / "out")
        assert [outcome.error for outcome in outcomes] == ["the loss is not a number"] * 2
    assert tried == [0, 0]


def test_by_type_and_from_a_bundle(
    write: Write,
    make_parts,
    target: Path,
    tmp_path: Path,
    trainings: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"data": str(make_parts(good=2)), "test": str(target), "categories": ["lid"]}
    rounds: list[tuple[set[str], set[str | None]]] = []
    add = Judged.add

    def watched(self: Judged, detector: Detector, samples: Any, progress: Any = None) -> None:
        known = {record.name for record in detector.abnormal["lid"]}
        rounds.append((known, {sample.defect for sample in samples}))
        add(self, detector, samples, progress)

    monkeypatch.setattr(Judged, "add", watched)
    run(write(**keys, abnormal=[1], references="type"), tmp_path / "out")
    (metrics,) = metrics_of(tmp_path / "out").values()
    assert [len(known) for known, _ in rounds] == [1, 1]
    assert sorted(sorted(types - {"good"}) for _, types in rounds) == [["chip"], ["stain"]]
    names = metrics["references"]["lid"]["abnormal"]
    assert sorted(name.partition("/")[0] for name in names) == ["chip", "stain"]
    assert metrics["mean"]["n_normal"] == 2 and metrics["mean"]["n_anomalous"] == 2
    assert "by_reference" not in metrics

    (bundle,) = (tmp_path / "out" / "trained").glob("*/bundle")
    detector = dict.fromkeys(("data", "steps", "backbone", "weights", "image_size"), ...)
    keys = {**keys, **detector, "bundle": str(bundle), "abnormal": [1], "references": "type"}
    run(write(**keys), tmp_path / "again")
    (again,) = metrics_of(tmp_path / "again").values()
    assert again["categories"] == metrics["categories"] and trainings == [0]
    text = (tmp_path / "again" / "results.md").read_text()
    assert f"- trained on: {bundle}\n" in text and "- references by: type\n" in text


def test_a_stopped_training_goes_on(
    write: Write, make_parts, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(data=str(make_parts(good=2)), test=str(target), steps=2), tmp_path / "out"
    setups, fit = [], Detector.fit

    def stopped(self: Detector, *args: Any, **keys: Any) -> Detector:
        setups.append(keys["training"])
        if len(setups) == 1:
            setups[0].folder.mkdir()
            (setups[0].folder / CHECKPOINT).write_bytes(b"")
            raise KeyboardInterrupt
        return fit(self, *args, **keys | {"training": TrainingSetup()})

    monkeypatch.setattr(Detector, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(load_benchmark(path), out)
    run(path, out)
    assert [setup.resume for setup in setups] == [False, True]
    assert not list(out.rglob(CHECKPOINT))


def test_methods_that_are_not_trained_need_no_source(
    write: Write, target: Path, tmp_path: Path
) -> None:
    keys = {"method": "anomaly-dino", "data": ..., "steps": ..., "test": str(target)}
    out = tmp_path / "out"
    (outcome,) = run(write(**keys, options={"rotations": 1}, abnormal=[0, 1]), out)
    assert outcome.cell.name == "anomaly-dino+1-shot+0-abnormal+seed-0"
    (metrics,) = metrics_of(out).values()
    assert metrics["setting"] == "generalist" and metrics["mean"]["n_anomalous"] == 4
    assert list(metrics["categories"]) == ["lid", "nut"] and not (out / "trained").exists()
    text = (out / "results.md").read_text()
    assert "By type of defect" not in text and "- trained on: none\n" in text
    assert set(METRICS) <= set(metrics["mean"])


def test_a_bundle_of_another_kind_is_refused(
    write: Write, target: Path, tmp_path: Path, tiny_weights: str
) -> None:
    normal = load_dataset(target).only(["lid"]).train
    other = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96)
    other.fit(normal, calibration=0).save(tmp_path / "other")
    keys = dict.fromkeys(("data", "steps", "backbone", "weights", "image_size"), ...)
    path = write(**keys, test=str(target), bundle=str(tmp_path / "other"))
    (outcome,) = run_benchmark(load_benchmark(path), tmp_path / "out")
    assert "is of anomaly-dino with products enrolled" in (outcome.error or "")


def test_the_shipped_generalist_has_a_card(
    write: Write, make_parts, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(write(data=str(make_parts(good=2)), test=str(target)), tmp_path / "out")
    (bundle,) = (tmp_path / "out" / "trained").glob("*/bundle")
    card = {"version": 1}
    monkeypatch.setattr(generalist, "model_card", lambda: card)
    monkeypatch.setattr(generalist, "load_generalist", lambda **keys: Detector.load(bundle, **keys))
    keys = dict.fromkeys(("data", "steps", "backbone", "weights", "image_size"), ...)
    path = write(**keys, test=str(target), bundle="shipped")
    (outcome,) = run(path, tmp_path / "shipped")
    (trained,) = metrics_of(tmp_path / "out").values()
    assert outcome.metrics and outcome.metrics["mean"] == trained["mean"]
    assert "- trained on: shipped\n" in (tmp_path / "shipped" / "results.md").read_text()
    card["version"] = 2
    (cell,) = plan(load_part(path))
    assert cell.arguments == {} and cell.sha256 != outcome.cell.sha256
