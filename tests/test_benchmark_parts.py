"""Benchmarks of several parts: what each is made of, the papers' figures, what is left out."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from anomalyst.benchmark import runner
from anomalyst.benchmark.cells import plan
from anomalyst.benchmark.config import Benchmark, BenchmarkConfig, Published
from anomalyst.benchmark.reading import load_benchmark, present
from anomalyst.benchmark.records import COLUMNS
from anomalyst.benchmark.runner import run_benchmark
from anomalyst.benchmark.tables import main_table, sections_of
from anomalyst.errors import InputError
from anomalyst.evaluation import METRICS
from anomalyst.metrics import PixelMetrics, binary_metrics
from conftest import TINY, Run, load_part, save, texture, write_yaml

Write = Callable[..., Path]


@pytest.fixture
def run(run: Run) -> Run:
    """Run `anomalyst benchmark` with these words."""
    return partial(run, "benchmark")


@pytest.fixture
def write(tmp_path: Path, tiny_weights: str) -> Write:
    """Write a configuration of two parts, changed as given."""

    def call(**keys: Any) -> Path:
        values: dict[str, Any] = {
            "title": "Two parts",
            "method": "anomaly-dino",
            "setting": "few-shot-multi",
            "shots": [1],
            "backbone": TINY,
            "weights": tiny_weights,
            "image_size": 96,
            "published": {"source": "A. Author, 2024, Table 1"},
            "parts": [
                {"name": "First set", "data": "first"},
                {"name": "Second", "data": "second", "shots": [2], "image_size": 64},
            ],
            **keys,
        }
        return write_yaml(tmp_path / "two.yaml", values)

    return call


@pytest.fixture
def root(make_parts: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with two data sets, ``first`` and ``second``."""
    folder = tmp_path / "data"
    folder.mkdir()
    make_parts(("across", "down"), good=3).rename(folder / "first")
    make_parts(("plate",), good=3).rename(folder / "second")
    return folder


# ---- reading ------------------------------------------------------------------------------------


def test_a_part_stands_over_what_is_shared_and_below_the_root(write: Write, tmp_path: Path) -> None:
    rows = [{"method": "PaDiM", "i_auroc": 0.9}]
    parts = [
        {"name": "a", "data": "first", "published": {"rows": rows}},
        {"name": "b", "data": "/elsewhere", "methods": ["patchcore"], "shots": [4]},
    ]
    first, second = load_benchmark(write(parts=parts), root=tmp_path).parts
    assert first.data == (tmp_path / "first",) and second.data == (Path("/elsewhere"),)
    assert (first.methods, second.methods) == (("anomaly-dino",), ("patchcore",))
    assert (first.shots, second.shots) == ((1,), (4,)) and first.title == "Two parts"
    assert first.published is not None and second.published is not None
    assert first.published.source == second.published.source == "A. Author, 2024, Table 1"
    assert first.published.rows[0].i_auroc == 0.9 and not second.published.rows


def test_steps_go_to_the_parts_that_train(write: Write) -> None:
    by_method = {"onenip": {"epochs": 4, "options": {"batch_size": 4}}}
    parts = [
        {"name": "a", "data": "x"},
        {"name": "b", "data": "x", "setting": "multi", "shots": [], "methods": ["inp-former"]},
        {
            "name": "c",
            "data": "x",
            "setting": "multi",
            "shots": [],
            "methods": ["onenip"],
            "by_method": by_method,
            "variants": [{"name": "v", "options": {"epochs": 3}}],
        },
    ]
    path = write(parts=parts, backbone="timm:test_vit2")
    first, second, third = load_benchmark(path, steps=7).parts
    assert first.steps is None
    assert second.arguments("inp-former", second.variants[0])["options"] == {"steps": 7}
    found = third.arguments("onenip", third.variants[0])["options"]
    assert found == {"batch_size": 4, "steps": 7}
    with pytest.raises(InputError, match="no method of it takes gradient steps"):
        load_benchmark(write(), steps=7)


def test_one_method_s_settings_are_its_own(write: Write) -> None:
    by_method = {"patchcore": {"image_size": 128, "options": {"coreset": 0.5}}}
    (part,) = load_benchmark(
        write(
            parts=[{"name": "a", "data": "x"}],
            methods=["patchcore", "anomaly-dino"],
            method=...,
            by_method=by_method,
        )
    ).parts
    variant = part.variants[0]
    assert part.arguments("patchcore", variant)["options"] == {"coreset": 0.5}
    assert part.arguments("patchcore", variant)["image_size"] == 128
    other = part.arguments("anomaly-dino", variant)
    assert other["options"] == {} and other["image_size"] == 96


SLIPS: list[tuple[dict[str, Any], list[str]]] = [
    ({"parts": []}, ["two.yaml: parts", "each with a name"]),
    ({"parts": [{"data": "x"}]}, ["parts: each needs a name"]),
    ({"parts": [{"name": "a", "data": "x"}, {"name": "A", "data": "y"}]}, ["'A'"]),
    ({"parts": [{"name": "a", "dta": "x"}]}, ["part 'a' in two.yaml", "did you mean 'data'"]),
    ({"parts": [{"name": "a", "data": "x", "title": "no"}]}, ["'title'"]),
    ({"parts": [{"name": "a", "data": "x", "setting": "zero-shot", "shots": []}]}, ["part 'a'"]),
    ({"by_method": {"patchcroe": {}}}, ["by_method", "'patchcroe'", "'patchcore'"]),
    ({"by_method": {"anomaly-dino": {"optoins": {}}}}, ["by_method.anomaly-dino.optoins"]),
    ({"published": {"rows": []}}, ["published.source"]),
    ({"published": {"source": "p", "rows": [{"method": "m", "i_auroc": 96.5}]}}, ["i_auroc"]),
]


@pytest.mark.parametrize(("keys", "words"), SLIPS, ids=[str(keys) for keys, _ in SLIPS])
def test_slips_are_one_line_that_names_them(write: Write, keys: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        load_benchmark(write(**keys))
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_what_cannot_do_a_setting_is_refused_with_what_can(write: Write) -> None:
    parts = [{"name": "a", "data": "x", "setting": "leave-one-out", "shots": [1]}]
    with pytest.raises(InputError, match="anomaly-dino cannot do leave-one-out") as refused:
        load_benchmark(write(parts=parts))
    able = str(refused.value).partition("those that can: ")[2].split(", ")
    assert "anople" in able and "patchcore" not in able and "nagl" not in able


def test_folders_of_many_parts_come_by_the_root_alone(run: Run, write: Write, root: Path) -> None:
    code, _, err = run(write(), "-o", root / "out", "--data", root / "first")
    assert code == 2 and "2 parts" in err and "--root" in err


# ---- leave-one-out ------------------------------------------------------------------------------


def test_leave_one_out_learns_from_all_other_categories(
    write: Write, root: Path, deep_weights: str
) -> None:
    keys = {"method": "inp-former", "setting": "leave-one-out", "weights": deep_weights}
    keys |= {"parts": ..., "published": ..., "backbone": "timm:test_vit2", "shots": [2]}
    cells = plan(load_part(write(**keys, data=str(root / "first"))))
    assert [cell.category for cell in cells] == ["across", "down"]
    for cell, learned in zip(cells, ("down", "across"), strict=True):
        assert {sample.category for sample in cell.train.train} == {learned}
        assert {sample.category for sample in cell.test.test} == {cell.category}
    assert [
        c.category
        for c in plan(load_part(write(**keys, data=str(root / "first"), categories=["down"])))
    ] == ["down"]
    with pytest.raises(InputError, match="two categories or more"):
        plan(load_part(write(**keys, data=str(root / "second"))))


# ---- running ------------------------------------------------------------------------------------


def test_each_part_is_run_on_its_own_data(run: Run, write: Write, root: Path) -> None:
    out = root / "out"
    code, shown, err = run(write(), "-o", out, "--root", root)
    assert code == 0, err
    homes = sorted(path.name for path in (out / "cells").iterdir())
    assert homes[0].startswith("First-set-") and homes[1] == "Second+anomaly-dino+2-shot+seed-0"
    assert "1/2 First set: anomaly-dino, 1 shot, seed 0: " in err
    assert shown.index("First set") < shown.index("Second")
    text = (out / "results.md").read_text()
    assert "\n## First set\n" in text and "\n## Second\n" in text
    assert "not run" not in text
    table = pyarrow.parquet.read_table(out / "results.parquet").to_pylist()
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS and len(lines) == len(table)
    for line, record in zip(lines, table, strict=True):
        assert line["value"] == ("" if record["value"] is None else repr(record["value"]))
        assert (line["part"], line["metric"]) == (record["part"], record["metric"] or "")
    page, latex = (out / "results.html").read_text(), (out / "results.tex").read_text()
    assert "First set" in page and "Two parts" in page and "\\toprule" in latex


def test_missing_data_is_named_or_left_out(run: Run, write: Write, root: Path) -> None:
    shutil.rmtree(root / "second")
    code, _, err = run(write(), "-o", root / "out", "--root", root)
    assert code == 2 and str(root / "second") in err and "--skip-missing" in err
    assert not (root / "out").exists()
    rows = [{"method": "anomaly-dino", "shots": 2, "i_auroc": 0.913}]
    parts = [
        {"name": "First set", "data": "first"},
        {"name": "Second", "data": "second", "shots": [2], "published": {"rows": rows}},
    ]
    code, _, err = run(write(parts=parts), "-o", root / "out", "--root", root, "--skip-missing")
    assert code == 0 and "Second: left out" in err
    text = (root / "out" / "results.md").read_text().partition("## Second")[2]
    assert "| anomaly-dino | default | 2 | 0 of 1 | not run | 0.913 | not run |" in text
    shutil.rmtree(root / "first")
    with pytest.raises(InputError, match="no such folder"):
        present(load_benchmark(write(), root=root), print)


# ---- the papers' figures ------------------------------------------------------------------------


def test_printed_figures_have_columns_of_their_own(run: Run, write: Write, root: Path) -> None:
    rows = [
        {"method": "anomaly-dino", "shots": 2, "i_auroc": 0.913, "sd": {"i_auroc": 0.004}},
        {"method": "patchcore", "shots": 2, "i_auroc": 0.8935},
        {"method": "PaDiM", "shots": 2, "aupro": 0.5},
    ]
    parts = [{"name": "Second", "data": "second", "shots": [2], "published": {"rows": rows}}]
    out = root / "out"
    assert run(write(parts=parts), "-o", out, "--root", root)[0] == 0
    benchmark = load_benchmark(write(parts=parts), root=root)
    outcomes = run_benchmark(benchmark, out)
    table = sections_of(benchmark, outcomes)[0].table
    assert table is not None
    place = {head: number for number, head in enumerate(table.heads)}
    assert place["i_auroc, paper"] == place["i_auroc"] + 1
    assert "aupro, paper" in place and "i_ap, paper" not in place
    ours, ran_not, foreign = table.rows
    metrics = outcomes[0].metrics
    assert metrics is not None
    assert ours[place["i_auroc"]] == f"{metrics['mean']['i_auroc']:.3f}"
    assert ours[place["i_auroc, paper"]] == "0.913 ± 0.004"
    assert ran_not[place["i_auroc"]] == "not run" and ran_not[place["i_auroc, paper"]] == "0.8935"
    assert foreign[place["aupro"]] == "\N{EN DASH}" and foreign[place["aupro, paper"]] == "0.500"
    assert foreign[place["i_auroc, paper"]] == "\N{EN DASH}"
    text = (out / "results.md").read_text()
    assert "A. Author, 2024, Table 1" in text
    assert '"i_auroc, paper"' not in (out / "results.csv").read_text()


def test_a_part_that_was_left_out_has_lines_of_what_would_be_run() -> None:
    part = BenchmarkConfig(
        title="t",
        name="p",
        methods=("nagl", "patchcore"),
        setting="generalist",
        shots=(1, 2),
        abnormal=(0, 1),
        published=Published(source="s"),
    )
    (section,) = sections_of(Benchmark("t", (), (part,)), [])
    assert (
        section.table is not None and len(section.table.rows) == 2 * 2 + 2
    )  # patchcore: no abnormal
    assert {row[-1] for row in section.table.rows} == {"not run"}
    assert main_table([], part).heads[3] == "seeds"


# ---- by type of defect --------------------------------------------------------------------------


def test_each_type_of_defect_has_its_figures(run: Run, write: Write, root: Path) -> None:
    folder = root / "second" / "plate" / "test" / "dent"
    for number in (1, 2):
        save(folder / f"{number}.png", texture(20 + number))
    parts = [{"name": "Second", "data": "second", "shots": [2]}]
    out = root / "out"
    benchmark = load_benchmark(write(parts=parts), root=root)
    (outcome,) = run_benchmark(benchmark, out)
    assert outcome.metrics is not None
    found = outcome.metrics["defects"]["plate"]
    whole = outcome.metrics["categories"]["plate"]
    assert set(found) == {"dent", *(d.name for d in folder.parent.iterdir() if d.name != "good")}
    assert {row["n_normal"] for row in found.values()} == {whole["n_normal"]}
    assert sum(row["n_anomalous"] for row in found.values()) == whole["n_anomalous"]
    assert found["dent"]["n_anomalous"] == 2
    text = (out / "results.md").read_text()
    assert "### plate, by defect" in text and "| dent | 2 |" in text


def test_groups_of_pixels_are_measured_as_if_they_were_alone() -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    maps = generator.normal(size=(6, 8, 8)).astype(np.float32)
    masks = generator.random((6, 8, 8)) > 0.8
    groups = [None, None, "a", "a", "b", "b"]
    together, alone = PixelMetrics(), PixelMetrics()
    for values, mask, group in zip(maps, masks, groups, strict=True):
        together.update(values, mask if group else None, group)
        if group in (None, "a"):
            alone.update(values, mask if group else None)
    found = together.result_of("a")
    assert found is not None and found.metrics() == alone.result().metrics()
    pixels = [(maps[k], masks[k] if groups[k] else masks[k] & False) for k in range(6)]
    scores = np.concatenate([values.ravel() for values, _ in pixels])
    labels = np.concatenate([mask.ravel() for _, mask in pixels]).astype(int)
    assert together.result().auroc == pytest.approx(binary_metrics(scores, labels)["auroc"])
    assert together.result_of("c") is None
    folded = PixelMetrics(max_exact_pixels=100)
    for values, mask, group in zip(maps, masks, groups, strict=True):
        folded.update(values, mask if group else None, group)
    assert folded.result_of("a") is None and not folded.result().exact
    assert folded.result().auroc == pytest.approx(together.result().auroc, abs=1e-3)


# ---- what goes wrong ----------------------------------------------------------------------------


def test_two_runs_into_one_folder(write: Write, root: Path) -> None:
    benchmark = load_benchmark(write(), root=root)
    refused = []

    def engine(cells: Any, workshop: Any) -> Any:
        with pytest.raises(InputError, match="another benchmark is running there") as found:
            run_benchmark(benchmark, root / "out")
        refused.append(found)
        return []

    run_benchmark(benchmark, root / "out", engine=engine)
    assert refused
    assert all(outcome.metrics for outcome in run_benchmark(benchmark, root / "out"))


def test_a_full_disk_ends_the_run_and_loses_nothing(
    run: Run, write: Write, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = root / "out"
    real = runner.replace_file

    def full(path: Path, content: bytes) -> None:
        if "Second" in str(path):
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(runner, "replace_file", full)
    code, _, err = run(write(), "-o", out, "--root", root)
    assert code == 2 and "the disk is full" in err and "Traceback" not in err
    kept = [json.loads(path.read_text()) for path in out.glob("cells/*/metrics.json")]
    assert [set(metrics["mean"]) >= set(METRICS) for metrics in kept] == [True]
    assert not list(out.glob("cells/*/error.txt"))
    assert "1 of 1 models" in (out / "results.md").read_text()
    monkeypatch.undo()
    code, _, err = run(write(), "-o", out, "--root", root)
    assert code == 0 and "done before" in err
