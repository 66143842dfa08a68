"""Benchmarks: what is run, what is run again, what is written, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from anomalyst.benchmark import SHIPPED, kept, runner, shipped
from anomalyst.benchmark.cells import Cell, Outcome, plan
from anomalyst.benchmark.config import BenchmarkConfig
from anomalyst.benchmark.reading import load_benchmark
from anomalyst.benchmark.rows import rows_of
from anomalyst.benchmark.tables import main_table
from anomalyst.errors import InputError
from anomalyst.evaluation import METRICS
from conftest import CLIP, DEEP, TINY, Run, load_part, save, texture, write_yaml
from test_docs import parse

Write = Callable[..., Path]


@pytest.fixture
def run(run: Run) -> Run:
    """Run `anomalyst benchmark` with these words."""
    return partial(run, "benchmark")


@pytest.fixture
def write(tmp_path: Path, tiny_weights: str) -> Write:
    """Write a configuration of tiny anomaly-dino models, changed as given."""

    def call(**keys: Any) -> Path:
        values = {
            "title": "Tiny",
            "method": "anomaly-dino",
            "setting": "few-shot",
            "shots": [2],
            "backbone": TINY,
            "weights": tiny_weights,
            "image_size": 96,
            "options": {"rotations": 1},
            **keys,
        }
        return write_yaml(tmp_path / "tiny.yaml", values)

    return call


@pytest.fixture
def trained(write: Write, deep_weights: str) -> Write:
    """As `write`, of inp-former in two steps on all images."""

    def call(**keys: Any) -> Path:
        base = {"method": "inp-former", "setting": "multi", "shots": ..., "steps": 2}
        base |= {"backbone": DEEP, "weights": deep_weights, "options": {"batch_size": 4}}
        return write(**(base | keys))

    return call


def metrics_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Every cell's metrics.json, by the cell's name."""
    paths = sorted((folder / "cells").glob("*/metrics.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- which cells --------------------------------------------------------------------------------


def test_single_and_few_shot_make_a_model_of_each_category(write: Write, make_parts) -> None:
    parts = make_parts(("across", "down"), good=3)
    variants = [{"name": "default"}, {"name": "8 turns", "options": {"rotations": 8}}]
    path = write(data=str(parts), shots=[1, 2], seeds=[3, 4], variants=variants)
    cells = plan(load_part(path))
    assert len(cells) == 2 * 2 * 2 * 2 == len({cell.name for cell in cells})
    assert [cell.label for cell in cells[:3]] == [
        "anomaly-dino, 1 shot, seed 3, across",
        "anomaly-dino, 1 shot, seed 3, down",
        "anomaly-dino, 1 shot, seed 4, across",
    ]
    assert cells[-1].label == "anomaly-dino, 8 turns, 2 shots, seed 4, down"
    assert cells[0].name == "anomaly-dino+1-shot+seed-3+across"
    assert cells[-1].arguments["options"] == {"rotations": 8}
    assert {s.category for s in cells[0].train.train} == {"across"}
    assert {s.category for s in cells[0].test.test} == {"across"}
    config = load_part(write(data=str(parts), setting="single", shots=..., categories=["down"]))
    assert [cell.category for cell in plan(config)] == ["down"]


def test_joint_settings_make_one_model(write: Write, make_parts, tmp_path: Path) -> None:
    parts = make_parts(("across", "down"), good=3)
    other = tmp_path / "other"
    (other / "across").parent.mkdir()
    (parts / "across").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(other / "across")
    (cell,) = plan(load_part(write(data=str(parts), setting="multi", shots=...)))
    assert cell.category is None and cell.setting == "multi"
    both = [str(parts), str(other)]
    (cell,) = plan(load_part(write(data=both, setting="multi", shots=...)))
    assert cell.setting == "super-multi" and cell.test.categories == ("down", "across")
    cells = plan(load_part(write(data=both, setting="few-shot-multi", shots=[1, 2])))
    assert [cell.shots for cell in cells] == [1, 2]


def test_data_sets_with_a_category_in_common_keep_it_apart(
    write: Write, make_parts, tmp_path: Path
) -> None:
    parts = make_parts(("plate",), good=2)
    other = tmp_path / "other"
    other.mkdir()
    for file in parts.rglob("*.png"):
        save(other / file.relative_to(parts), texture(0))
    (cell,) = plan(load_part(write(data=[str(parts), str(other)], setting="multi", shots=...)))
    assert cell.train.categories == ("parts/plate", "other/plate")
    assert {s.category for s in cell.test.test} == {"parts/plate", "other/plate"}


def test_settings_are_laid_over_each_other(trained: Write) -> None:
    variants = [{"name": "a", "options": {"epochs": 3}}, {"name": "b", "options": {"layers": [0]}}]
    options = {"prototypes": 2, "square": True}
    path = trained(data="x", options=options, variants=variants, image_size=64)
    config = load_part(path)
    first, second = (config.arguments("inp-former", variant) for variant in config.variants)
    assert first["options"] == {"prototypes": 2, "epochs": 3, "steps": None}
    assert second["options"] == {"prototypes": 2, "steps": 2}
    assert second["layers"] == [0] and first["square"] and first["image_size"] == 64
    config = load_part(path, steps=7)
    for variant in config.variants:
        assert config.arguments("inp-former", variant)["options"] == {"prototypes": 2, "steps": 7}


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_load_and_name_their_command(
    name: str, tmp_path: Path, deep_weights: str
) -> None:
    text = (SHIPPED / f"{name}.yaml").read_text()
    command = text.splitlines()[0].removeprefix("# ")
    assert command.startswith(f"anomalyst benchmark {name} ")
    parse(command)
    words = command.split()
    given = {words[k]: Path(words[k + 1]) for k in range(3, len(words) - 1, 2)}
    copy = tmp_path / "copy.yaml"  # on a backbone that every machine has
    copy.write_text(f"{text}backbone: {DEEP}\nweights: {deep_weights}\n")
    if "--root" not in given:
        with pytest.raises(InputError, match=r"--(data|test)"):
            load_benchmark(copy)
    folders = {key: [given[f"--{key}"]] for key in ("data", "test") if f"--{key}" in given}
    found = load_benchmark(copy, root=given.get("--root"), **folders)
    assert all(part.data or part.test for part in found.parts)


def test_the_ablation_takes_one_part_after_the_other() -> None:
    rows = yaml.safe_load((SHIPPED / "inp-former-ablation.yaml").read_text())["variants"]
    off = [set(row.get("options", {})) for row in rows[:4]]
    assert off == [{"prototypes", "coherence", "gamma"}, {"coherence", "gamma"}, {"gamma"}, set()]
    assert {value for row in rows[:4] for value in row.get("options", {}).values()} == {0}
    for row in rows[4:]:
        assert row["name"] == f"M = {row['options']['prototypes']}"


# ---- running ------------------------------------------------------------------------------------


def test_results_equal_the_metrics_and_nothing_runs_twice(
    run: Run, write: Write, make_parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, out = make_parts(("across", "down"), good=4), tmp_path / "out"
    path = write(data=str(parts), shots=[1], seeds=[1, 2, 3], title="Few | shots")
    code, shown, err = run(path, "-o", out)
    assert code == 0, err
    assert re.search(r"^6/6 anomaly-dino, 1 shot, seed 3, down: \d+ s$", err, re.MULTILINE)
    found = metrics_of(out)
    assert len(found) == 6
    lines = {
        (line["seed"], line["category"], line["metric"]): line
        for line in lines_of(out)
        if not line["defect"]
    }
    assert len(lines) == 9 * len(METRICS) + 6 * 2  # and the costs of each cell
    for name, metrics in found.items():
        for category, row in metrics["categories"].items():
            for key in METRICS:
                line = lines[str(metrics["seed"]), category, key]
                assert line["cell"] == name and line["status"] == "done"
                assert (line["setting"], line["shots"]) == ("few-shot", "1")
                assert float(line["value"]) == row[key]
                assert float(line["n_normal"]) == row["n_normal"]
    means = []
    for seed in ("1", "2", "3"):
        pair = [float(lines[seed, name, "p_ap"]["value"]) for name in ("across", "down")]
        means.append(sum(pair) / 2)
        assert float(lines[seed, "mean", "p_ap"]["value"]) == pytest.approx(means[-1], abs=1e-12)
    mean = sum(means) / 3
    deviation = (sum((value - mean) ** 2 for value in means) / 2) ** 0.5
    assert deviation > 0
    text = (out / "results.md").read_text()
    assert text.startswith("# Few | shots\n") and "## across" in text
    assert f"{mean:.3f} ± {deviation:.3f}" in text and f"{mean:.3f} ± {deviation:.3f}" in shown
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").rglob("*")}
    monkeypatch.setattr(runner.Workshop, "_measure", None)  # whatever calls it fails
    code, again, err = run(path, "-o", out)
    assert code == 0 and again == shown and err.count(": done before\n") == 6
    assert before == {p: p.stat().st_mtime_ns for p in (out / "cells").rglob("*")}


def test_a_changed_cell_alone_is_run_again(
    run: Run, write: Write, make_parts, tmp_path: Path
) -> None:
    parts, out = make_parts(("across", "down"), good=3), tmp_path / "out"
    variants = [{"name": "one", "options": {"tail": 0.01}}, {"name": "two"}]
    keys = {"data": str(parts), "setting": "multi", "shots": ...}
    assert run(write(**keys, variants=variants), "-o", out)[0] == 0
    variants[0]["options"] = {"tail": 0.5}
    code, _, err = run(write(**keys, variants=variants), "-o", out)
    assert code == 0 and re.search(r"1/2 anomaly-dino, one, seed 0: \d+ s\n", err)
    assert "2/2 anomaly-dino, two, seed 0: done before\n" in err
    assert metrics_of(out)["anomaly-dino+one+seed-0"]["options"]["tail"] == 0.5
    save(parts / "down" / "test" / "good" / "new.png", texture(7))
    assert "done before" not in run(write(**keys, variants=variants), "-o", out)[2]


def test_a_failed_cell_leaves_the_rest(run: Run, write: Write, make_parts, tmp_path: Path) -> None:
    parts, out = make_parts(("across", "down"), good=3), tmp_path / "out"
    for extra in (5, 6):
        save(parts / "down" / "train" / "good" / f"{extra}.png", texture(extra))
    path = write(data=str(parts), shots=[2, 4])  # four of across there are not
    code, shown, err = run(path, "-o", out)
    assert code == 2 and err.count("error: ") == 1
    failed = "anomaly-dino, 4 shots, seed 0, across"
    assert f"3/4 {failed}: error: 4 shots of 'across' need as many normal images" in err
    assert len(metrics_of(out)) == 3
    home = out / "cells" / "anomaly-dino+4-shot+seed-0+across"
    assert "draw fewer" in (home / "error.txt").read_text()
    missing = [(x["category"], x["value"]) for x in lines_of(out) if x["status"] == "not run"]
    assert missing == [("across", "")]
    text = (out / "results.md").read_text()
    assert "| anomaly-dino | default | 4 | 0 of 1 | not run |" in text and "not run" in shown
    assert f"- {failed}: error: 4 shots" in text and "3 of 4 models" in text
    save(parts / "across" / "train" / "good" / "5.png", texture(5))
    assert run(path, "-o", out)[0] == 0 and not (home / "error.txt").exists()


def test_a_bad_test_image_and_a_fault_of_ours_fail_the_cell(
    run: Run, write: Write, make_parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, out = make_parts(("plate",), good=2), tmp_path / "out"
    (parts / "plate" / "test" / "good" / "bad.png").write_bytes(b"no picture")
    path = write(data=str(parts), shots=[1])
    code, _, err = run(path, "-o", out)
    assert code == 2 and "1 test image(s)" in err and "bad.png" in err

    def broken(*_: object) -> None:
        raise RuntimeError("a bug\nof ours")

    monkeypatch.setattr(runner.Workshop, "_measure", broken)
    code, _, err = run(path, "-o", out)
    assert code == 2 and "error: RuntimeError: a bug of ours" in err
    assert "Traceback" in next(out.glob("cells/*/error.txt")).read_text()


def test_a_trained_method_keeps_its_log_and_json_has_the_table(
    run: Run, trained: Write, make_parts, tmp_path: Path
) -> None:
    parts, out = make_parts(("across", "down"), good=4), tmp_path / "out"
    variants = [{"name": "default"}, {"name": "M = 4", "options": {"prototypes": 4}}]
    path = trained(variants=variants)
    features = tmp_path / "features"
    code, shown, err = run(
        path, "-o", out, "--data", parts, "--steps", 1, "--json", "--feature-cache", features
    )
    assert code == 0, err
    found = json.loads(shown)
    assert [row["variant"] for row in found["results"]] == ["default", "M = 4"]
    assert all(row["metrics"]["i_auroc"]["sd"] is None for row in found["results"])
    homes = sorted((out / "cells").iterdir())
    assert all(len((h / "training" / "log.csv").read_text().splitlines()) == 2 for h in homes)
    assert not list(out.rglob("*.safetensors")) and list(features.rglob("*.safetensors"))
    cell = json.loads((homes[0] / "cell.json").read_text())
    assert cell["configuration"]["data"]["folders"] == [str(parts)]
    assert {m["options"]["steps"] for m in metrics_of(out).values()} == {1}
    assert {m["setting"] for m in metrics_of(out).values()} == {"multi"}


def test_a_stopped_training_goes_on_from_its_checkpoint(
    trained: Write, make_parts, tmp_path: Path
) -> None:
    (cell,) = plan(load_part(trained(data=str(make_parts(("plate",), good=4)))))
    home = tmp_path / "cell"
    setup = kept.prepare(cell, home)
    assert not setup.resume and setup.folder is not None
    setup.folder.mkdir()
    (setup.folder / kept.CHECKPOINT).write_bytes(b"")
    assert kept.prepare(cell, home).resume
    (home / "error.txt").write_text("it failed, and would again")
    assert not kept.prepare(cell, home).resume
    assert sorted(path.name for path in home.iterdir()) == ["cell.json"]


def test_a_reduced_precision_is_another_training_and_stands_in_the_results(
    run: Run, trained: Write, make_parts, tmp_path: Path
) -> None:
    parts, out = make_parts(("plate",), good=4), tmp_path / "out"
    (full,) = plan(load_part(trained(data=str(parts))))
    path = trained(data=str(parts), precision="bf16-mixed")
    (reduced,) = plan(load_part(path))
    assert full.sha256 != reduced.sha256 and "precision" not in full.configuration
    assert kept.prepare(full, tmp_path / "full").precision == "32-true"
    assert kept.prepare(reduced, tmp_path / "reduced").precision == "bf16-mixed"
    code, _, err = run(path, "-o", out)
    assert code == 0, err
    assert "- precision of training: bf16-mixed" in (out / "results.md").read_text()


def test_zero_shot_is_measured_on_other_data(
    run: Run, trained: Write, make_parts, tmp_path: Path
) -> None:
    source, out = make_parts(("across",), good=4), tmp_path / "out"
    source = source.rename(tmp_path / "source")
    target = make_parts(("down", "plate"), good=1)
    options = {"score": "prototypes", "batch_size": 4}
    path = trained(setting="zero-shot", options=options, categories=["down"])
    code, _, err = run(path, "-o", out, "--data", source, "--test", target)
    assert code == 0, err
    (metrics,) = metrics_of(out).values()
    assert metrics["setting"] == "zero-shot" and list(metrics["categories"]) == ["down"]
    assert metrics["mean"]["n_normal"] == 3
    code, _, err = run(trained(setting="zero-shot"), "-o", out, "--data", source, "--test", target)
    assert code == 2 and "score: prototypes" in err


# ---- tables -------------------------------------------------------------------------------------


PART = BenchmarkConfig(title="t", methods=("m",), setting="single")


def outcome(config: Any, seed: int, category: str, p_ap: float | None) -> Outcome:
    """A cell's outcome with one figure that counts; None for a failed cell."""
    cell = Cell("m", "default", "single", None, seed, category, 256, {}, ((), ()), config, config)
    if p_ap is None:
        return Outcome(cell, None, "broken")
    row = {**dict.fromkeys(METRICS), "n_normal": 1, "n_anomalous": 1, "p_ap": p_ap}
    return Outcome(cell, {"categories": {category: row}})


def test_zero_shot_of_a_method_that_is_not_trained_needs_no_source(
    run: Run, write: Write, make_parts: Callable[..., Path], clip_weights: str, tmp_path: Path
) -> None:
    path = write(
        method="winclip",
        setting="zero-shot",
        shots=...,
        backbone=CLIP,
        weights=clip_weights,
        image_size=80,
        options={"zero_shot": True, "windows": "shared"},
    )
    code, _, err = run(path, "-o", tmp_path / "out", "--test", make_parts(good=2))
    assert code == 0, err
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    metrics = json.loads((cell / "metrics.json").read_text())
    assert metrics["setting"] == "zero-shot" and list(metrics["categories"]) == ["plate"]
    keys = {"shots": ..., "backbone": CLIP, "weights": clip_weights, "image_size": 80}
    path = write(method="winclip", setting="zero-shot", options={}, **keys)
    code, _, err = run(path, "-o", tmp_path / "none", "--test", tmp_path / "parts")
    assert code == 2 and "zero_shot: true" in err


def test_means_and_deviations_over_seeds() -> None:
    figures = {(0, "a"): 0.2, (0, "b"): 0.4, (1, "a"): 0.6, (1, "b"): 0.8, (2, "a"): 0.9}
    found = [outcome(None, seed, name, p_ap) for (seed, name), p_ap in figures.items()]
    (row,) = rows_of([*found, outcome(None, 2, "b", None)])
    assert row.summary()["seeds"] == [0, 1] and row.summary()["seeds_not_run"] == [2]
    spread = row.summary()["metrics"]["p_ap"]
    assert spread["mean"] == pytest.approx(0.5)
    assert spread["sd"] == pytest.approx(0.08**0.5)  # of 0.3 and 0.7: 2 * 0.2 ** 2 / (2 - 1)
    (line,) = main_table([row], PART).rows
    assert line[3] == "2 of 3" and line[4] == "\N{EN DASH}"
    first = row.summary("a")["metrics"]["p_ap"]
    assert first["sd"] == pytest.approx(statistics.stdev([0.2, 0.6, 0.9]))
    assert "0.567 ± 0.351" in main_table([row], PART, "a").rows[0]


def test_five_seeds_have_an_interval() -> None:
    values = [0.2, 0.4, 0.6, 0.8, 1.0]
    (row,) = rows_of([outcome(None, seed, "a", value) for seed, value in enumerate(values)])
    found = row.summary()["metrics"]["p_ap"]
    # Of 3125 resamples 56 have a mean of at most 0.32 and 126 one of at most 0.36: 2.5 % is 78.
    assert found["low"] == pytest.approx(0.36) and found["high"] == pytest.approx(0.84)
    assert "0.600 ± 0.316 [0.360, 0.840]" in main_table([row], PART).rows[0]


# ---- what is refused ----------------------------------------------------------------------------

SLIPS: list[tuple[dict[str, Any], list[str]]] = [
    ({"sedes": [1]}, ["tiny.yaml", "'sedes'", "'seeds'"]),
    ({"variants": [{"name": "a", "option": {}}]}, ["tiny.yaml", "'option'", "'options'"]),
    ({"method": "anomaly-dina"}, ["tiny.yaml", "'anomaly-dino'"]),
    ({"methods": ["patchcore"]}, ["method or methods"]),
    ({"setting": "few-shots"}, ["tiny.yaml", "did you mean 'few-shot'"]),
    ({"setting": "zero-shot", "shots": ..., "test": "y"}, ["anomaly-dino cannot do zero-shot"]),
    ({"setting": "single"}, ["tiny.yaml: shots", "takes none"]),
    ({"shots": ...}, ["tiny.yaml: shots", "needs a list"]),
    ({"shots": [0]}, ["tiny.yaml: shots.0", "not '0'"]),
    ({"shots": 4}, ["tiny.yaml: shots"]),
    ({"seeds": [1, 1]}, ["tiny.yaml: seeds", "twice"]),
    ({"seeds": []}, ["tiny.yaml: seeds"]),
    ({"title": ...}, ["tiny.yaml: title"]),
    ({"variants": [{"name": "A"}, {"name": "a"}]}, ["variants", "twice"]),
    ({"variants": [{"name": "a", "options": {"tial": 1}}]}, ["variant 'a'", "'tail'"]),
    ({"options": {"tail": 7}}, ["variant 'default'", "tail=7"]),
    ({"options": {"layers": "last"}}, ["variant 'default'", "layers"]),
    ({"preset": "papper"}, ["'paper'"]),
    ({"backbone": "dinov2-smal"}, ["'dinov2-small'"]),
    ({"steps": 5}, ["tiny.yaml", "takes no gradient steps"]),
    ({"steps": 5, "epochs": 5}, ["steps and epochs"]),
    ({"precision": "bf16-mixed"}, ["takes no gradient steps", "leave precision out"]),
    ({"precision": "half"}, ["tiny.yaml: precision"]),
    ({"setting": "super-multi", "shots": ...}, ["super-multi needs two"]),
    ({"eval_size": "big"}, ["tiny.yaml: eval_size"]),
    ({"data": ...}, ["tiny.yaml", "--data"]),
]


@pytest.mark.parametrize(("keys", "words"), SLIPS, ids=[str(keys) for keys, _ in SLIPS])
def test_slips_are_one_line_that_names_them(write: Write, keys: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        load_part(write(**({"data": "x"} | keys)))
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_zero_shot_needs_other_test_data(trained: Write) -> None:
    with pytest.raises(InputError, match="--test"):
        load_part(trained(setting="zero-shot", data="x"))
    with pytest.raises(InputError, match="never trained on"):
        load_part(trained(setting="zero-shot", data="x", test="./x"))


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    for content in ("title: [", "title: Tiny\n- 1", "only words", ""):
        path.write_text(content)
        with pytest.raises(InputError, match=r"odd\.yaml"):
            load_part(path)
    with pytest.raises(InputError, match="no such file"):
        load_part("elsewhere.yaml")
    with pytest.raises(InputError, match="did you mean 'inp-former-ablation'"):
        load_part("inp-former-ablatoin")


def test_the_command_says_what_is_missing(run: Run, tmp_path: Path, write: Write) -> None:
    code, _, err = run(write(data=...), "-o", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "--data" in err
    code, _, err = run(write(data=...), "-o", tmp_path / "out", "--data", tmp_path / "nowhere")
    assert code == 2 and "no such folder" in err and not (tmp_path / "out").exists()
