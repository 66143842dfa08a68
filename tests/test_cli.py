"""The command line as a user types it: files, keys, exit codes, one line for each fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalyst import cli
from conftest import TINY, Run, blot, save, texture


@pytest.fixture
def parts(make_parts: Callable[..., Path]) -> Path:
    return make_parts(("across", "down"), good=24)


@pytest.fixture
def fit(run: Run, parts: Path, tmp_path: Path, tiny_weights: str) -> Callable[..., Path]:
    def call(*more: object) -> Path:
        bundle = tmp_path / "bundle"
        tiny = ("--backbone", TINY, "--weights", tiny_weights, "--image-size", 96)
        code, _, err = run("fit", "anomaly-dino", parts, "-o", bundle, *tiny, *more)
        assert code == 0, err
        return bundle

    return call


def one_line(err: str) -> str:
    """The error, which must be one line and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_fit_evaluate_writes_the_contract(run: Run, fit, parts: Path, tmp_path: Path) -> None:
    bundle = fit("--shots", 4)
    code, out, err = run("evaluate", bundle, parts, "-o", tmp_path / "e", "--json")
    assert code == 0, err
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert json.loads(out) == metrics
    keys = {"n_normal", "n_anomalous", "i_auroc", "i_ap", "i_f1max"}
    keys |= {"p_auroc", "p_ap", "p_f1max", "aupro"}
    assert set(metrics["categories"]) == {"across", "down"}
    for row in metrics["categories"].values():
        assert keys <= set(row) and (row["n_normal"], row["n_anomalous"]) == (3, 3)
        assert all(0 <= row[key] <= 1 for key in keys - {"n_normal", "n_anomalous"})
        assert row["i_auroc"] == 1.0
    assert (metrics["setting"], metrics["shots"], metrics["seed"]) == ("few-shot", 4, 0)
    wanted = {"method", "backbone", "weights_sha256", "image_size", "mean", "images_per_second"}
    assert wanted <= set(metrics) and set(metrics["seconds"]) == {"train", "enroll", "predict"}
    assert metrics["environment"]["torch"] and metrics["peak_rss_mb"] > 50
    html = (tmp_path / "e" / "report.html").read_text()
    assert "http://" not in html and "https://" not in html
    for size in ("original", "64"):
        assert run("evaluate", bundle, parts, "-o", tmp_path / size, "--eval-size", size)[0] == 0
    code, _, err = run("evaluate", bundle, parts, "-o", tmp_path / "x", "--eval-size", "big")
    assert code == 2 and "big" in one_line(err)


def test_predict_writes_the_contract_in_input_order(
    run: Run, fit, parts: Path, tmp_path: Path
) -> None:
    bundle = fit("--calibration", 0.8, "--alpha", 0.05)
    images = sorted((parts / "across" / "test").rglob("*.png"), reverse=True)
    code, out, err = run("predict", bundle, *images, "-o", tmp_path / "p", "--maps", "--overlays")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "p" / "predictions.jsonl")
    lines = [json.loads(line) for line in Path(out.strip()).read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in images]
    order = ["image", "category", "score", "p_value", "verdict", "threshold", "calibrated"]
    order += ["regions", "map", "overlay", "error"]
    for line in lines:
        assert list(line) == order
        assert line["category"] == "across" and line["calibrated"]
        assert (line["verdict"] == "ng") == (line["score"] > line["threshold"])
        assert np.load(tmp_path / "p" / line["map"]).shape == (96, 96)
        assert Image.open(tmp_path / "p" / line["overlay"]).size == (96, 96)
        if "blot" in line["image"]:
            assert line["verdict"] == "ng" and set(line["regions"][0]) == {"bbox", "area", "score"}
    assert not list((tmp_path / "p").glob("*.partial"))


def test_a_copied_bundle_predicts_the_same_numbers(
    run: Run, fit, parts: Path, tmp_path: Path
) -> None:
    bundle = fit("--shots", 2)
    folder = parts / "down" / "test" / "blot"
    run("predict", bundle, folder, "-o", tmp_path / "a")
    moved = bundle.rename(tmp_path / "elsewhere")
    run("predict", moved, folder, "-o", tmp_path / "b")
    texts = [(tmp_path / name / "predictions.jsonl").read_text() for name in "ab"]
    assert texts[0] == texts[1] and texts[0].count("\n") == 3


def nasty(folder: Path) -> list[str]:
    """Write every kind of bad file, and good ones of odd kinds; return the bad names."""
    good = texture(0)
    picture = Image.fromarray(good)
    save(folder / "a_good.png", good)
    picture.save(folder / "cut.jpg", quality=95)
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no picture")
    header = bytearray((folder / "a_good.png").read_bytes())
    import zlib

    header[16:24] = (20000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bytes(header))
    os.symlink(folder / "nowhere.png", folder / "link.png")
    Image.fromarray(good[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "rotated.jpg", exif=exif)
    picture.convert("RGBA").quantize(16).save(folder / "palette.png", transparency=3)
    picture.resize((1, 1)).save(folder / "one.png")
    return ["bomb.png", "cut.jpg", "empty.png", "link.png", "text.png"]


def test_the_nasty_set(run: Run, fit, tmp_path: Path) -> None:
    bundle = fit("--shots", 2)
    bad = nasty(tmp_path / "nasty")
    code, _, err = run(
        "predict", bundle, tmp_path / "nasty", tmp_path / "no.png", "-o", tmp_path / "out"
    )
    assert code == 2
    text = (tmp_path / "out" / "predictions.jsonl").read_text()
    lines = {Path(row["image"]).name: row for row in map(json.loads, text.splitlines())}
    assert sorted(name for name, row in lines.items() if row["error"]) == sorted([*bad, "no.png"])
    assert len(lines) == 12
    for name in [*bad, "no.png"]:
        assert name in lines[name]["error"] and "\n" not in lines[name]["error"]
        assert f"error: {lines[name]['error']}" in err.splitlines()
    assert all(row["score"] is not None for row in lines.values() if not row["error"])


def test_an_unreadable_file_is_one_line_too(
    run: Run, fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = fit("--shots", 2)
    path = save(tmp_path / "secret.png", texture(0))
    if os.geteuid() == 0:  # nothing is forbidden to root: let opening fail as it would
        real = open

        def refuse(name: object, *rest: object, **more: object) -> object:
            if str(name).endswith("secret.png"):
                raise PermissionError(13, "Permission denied", str(name))
            return real(name, *rest, **more)  # type: ignore[call-overload]

        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr(Path, "open", lambda self, *rest, **more: refuse(self, *rest, **more))
    else:
        path.chmod(0)
    code, _, err = run("predict", bundle, path, "-o", tmp_path / "out")
    assert code == 2 and "secret.png" in one_line(err) and "ermission" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "anomalydino", "DATA", "-o", "B"], "did you mean 'anomaly-dino'"),
        (["fit", "patchcore", "NOWHERE", "-o", "B"], "NOWHERE"),
        (["fit", "patchcore", "EMPTY", "-o", "B"], "EMPTY"),
        (["fit", "patchcore", "DATA", "-o", "B", "--category", "acros"], "did you mean 'across'"),
        (["fit", "patchcore", "DATA", "-o", "B", "--shotz", "3"], "--shots"),
        (["fit", "patchcore", "DATA", "-o", "B", "--layout", "mvtek"], "did you mean 'mvtec'"),
        (["fit", "patchcore", "DATA", "-o", "B", "--set", "corset=1"], "did you mean 'coreset'"),
        (["fit", "patchcore", "DATA", "-o", "B", "--set", "coreset=7"], "coreset"),
        (["fit", "patchcore", "DATA", "-o", "B", "--set", "coreset"], "KEY=VALUE"),
        (["fit", "patchcore", "DATA", "-o", "B", "--preset", "papper"], "did you mean 'paper'"),
        (["fit", "patchcore", "DATA", "-o", "B", "--backbone", "dino-small"], "did you mean"),
        (["fit", "patchcore", "DATA", "-o", "B", "--shots", "400"], "400"),
        (["fit", "patchcore", "DATA", "-o", "B", "--backbone", "dinov2-base"], "--weights file:"),
        (["predict", "NOWHERE", "a.png", "-o", "P"], "NOWHERE"),
        (["weights", "fetch", "dinov2-bass"], "did you mean"),
        (["predikt"], "Did you mean 'predict'"),
    ],
)
def test_every_slip_is_one_line_and_exit_code_2(
    run: Run, parts: Path, tmp_path: Path, words: list[str], expected: str, tiny_weights: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    places = {"DATA": parts, "NOWHERE": tmp_path / "NOWHERE", "EMPTY": tmp_path / "EMPTY"}
    places |= {"B": tmp_path / "B", "P": tmp_path / "P"}
    tiny = ["--backbone", TINY, "--weights", tiny_weights, "--image-size", "96"]
    more = tiny if words[0] == "fit" and "--backbone" not in words else []
    code, _, err = run(*[places.get(word, word) for word in words], *more)
    assert code == 2
    assert expected in one_line(err)
    assert not (tmp_path / "B").exists() and not (tmp_path / "P").exists()


def test_a_spoilt_training_image_stops_fit_by_name(
    run: Run, parts: Path, tmp_path: Path, tiny_weights: str
) -> None:
    (parts / "down" / "train" / "good" / "000.png").write_bytes(b"")
    code, _, err = run(
        "fit", "patchcore", parts, "-o", tmp_path / "B",
        "--backbone", TINY, "--weights", tiny_weights, "--image-size", 96,
    )  # fmt: skip
    assert code == 2 and "000.png" in one_line(err) and not (tmp_path / "B").exists()


def test_a_mask_of_another_size_is_named_and_the_rest_measured(
    run: Run, fit, parts: Path, tmp_path: Path
) -> None:
    bundle = fit("--shots", 2)
    mask = parts / "across" / "ground_truth" / "blot" / "001_mask.png"
    save(mask, np.zeros((10, 20), np.uint8))
    code, _, err = run("evaluate", bundle, parts, "-o", tmp_path / "e")
    assert code == 2 and "001_mask.png" in one_line(err)
    row = json.loads((tmp_path / "e" / "metrics.json").read_text())["categories"]["across"]
    assert row["n_anomalous"] == 2 and row["i_auroc"] == 1.0


def test_enroll_and_calibrate_change_the_bundle(run: Run, fit, parts: Path, tmp_path: Path) -> None:
    bundle = fit("--shots", 2, "--calibration", 0)
    folder = tmp_path / "gear"
    for k in range(4):
        save(folder / f"{k}.png", blot(texture(900 + k), 8, 8, 64))
    code, _, err = run("enroll", bundle, "gear", "--normal", folder / "0.png", "--normal", folder)
    assert code == 0 and "gear: 4 references, not calibrated" in err
    code, _, err = run("enroll", bundle, "gear", "--normal", folder)
    assert code == 2 and "has all 4 images given already" in one_line(err)
    code, _, err = run("enroll", bundle, "__metadata__", "--normal", folder)
    assert code == 2 and "printable" in one_line(err)
    code, _, err = run("calibrate", bundle, parts)
    assert code == 0 and "across: 2 references, calibrated on 22" in err
    code, _, err = run("calibrate", bundle, parts, "--alpha", "0.01")
    assert code == 2 and "at least 99" in one_line(err)
    code, _, err = run("calibrate", bundle, folder, "--category", "gears")
    assert code == 2 and "did you mean 'gear'" in one_line(err)
    code, _, err = run("enroll", bundle, "gear", "--normal", folder, "--abnormal", folder / "0.png")
    assert code == 2 and "abnormal references" in one_line(err)


def test_lists_for_people_and_machines(run: Run) -> None:
    for words in (["methods"], ["backbones"], ["weights", "list"]):
        code, out, _ = run(*words)
        assert code == 0 and out.strip()
        code, out, _ = run(*words, "--json")
        assert code == 0 and len(json.loads(out)) >= 2
    assert {row["name"] for row in json.loads(run("methods", "--json")[1])} >= {"patchcore"}


def test_our_faults_exit_1_and_debug_shows_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down() -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("anomalyst.methods.base.methods", break_down)
    code, _, err = run("methods")
    assert code == 1 and err.strip().count("\n") == 0 and "deep inside" in err
    monkeypatch.setattr(sys, "argv", ["anomalyst", "methods", "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.slow
def test_predict_prints_json_lines_also_beside_a_bar(fit, parts: Path, tmp_path: Path) -> None:
    """stderr is a terminal, stdout a pipe: results must still reach the pipe."""
    pty = pytest.importorskip("pty")
    bundle = fit("--shots", 2)
    images = [str(p) for p in sorted((parts / "down" / "test").rglob("*.png"))]
    command = [sys.executable, "-m", "anomalyst.cli", "predict", str(bundle), *images]
    command += ["-o", str(tmp_path / "p"), "--json", "--maps"]
    leader, follower = pty.openpty()
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, text=True, check=True)
    os.close(follower)
    os.close(leader)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["image"] for line in lines] == images
    assert all((tmp_path / "p" / line["map"]).exists() for line in lines)


def test_odd_names_and_folders_stop_nothing(run: Run, fit, tmp_path: Path) -> None:
    bundle = fit("--shots", 2)
    (tmp_path / "nothing").mkdir()
    deep = tmp_path / "a" / "b" / "c"
    names = ["x" * 240 + ".png", "naïve ü 字.png", os.fsdecode(b"no-text-\xff.png")]
    for name in names:
        save(deep / name, texture(3))
    words = ["predict", bundle, tmp_path / "nothing", tmp_path / "a", "-o", tmp_path / "p"]
    code, _, err = run(*words, "--maps")
    assert code == 2 and "nothing" in one_line(err)
    text = (tmp_path / "p" / "predictions.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 4 and [bool(line["error"]) for line in lines] == [
        True,
        False,
        False,
        False,
    ]
    assert all((tmp_path / "p" / line["map"]).exists() for line in lines[1:])


def test_refusals_cost_no_work(run: Run, fit, parts: Path, tmp_path: Path) -> None:
    bundle = fit("--shots", 2)
    (tmp_path / "file.txt").write_text("x")
    code, _, err = run("evaluate", bundle, parts, "-o", tmp_path / "file.txt")
    assert code == 2 and "file.txt" in one_line(err)
    code, _, err = run("predict", bundle, parts, "-o", tmp_path / "file.txt")
    assert code == 2 and "file.txt" in one_line(err)
    for words, expected in (
        (["-o", tmp_path / "file.txt"], "file.txt"),
        (["-o", tmp_path / "x", "--alpha", 0.01], "at least 99"),
        (["-o", tmp_path / "x", "--image-size", 0], "image-size"),
        (["-o", tmp_path / "x", "--device", "meta"], "meta"),
        (["-o", tmp_path / "x", "--alpha", 2], "alpha"),
        (["-o", tmp_path / "x", "--seed", "9" * 30], "seed"),
    ):
        code, _, err = run("fit", "patchcore", parts, *words, "--backbone", TINY)
        assert code == 2 and expected in one_line(err)
    good_only = tmp_path / "good_only"
    for k in range(3):
        save(good_only / f"{k}.png", texture(k))
    code, _, err = run("evaluate", bundle, good_only, "-o", tmp_path / "e")
    assert code == 2 and "no test images" in one_line(err)


def test_states_for_machines(run: Run, parts: Path, tmp_path: Path, tiny_weights: str) -> None:
    code, out, _ = run(
        "fit", "patchcore", parts, "-o", tmp_path / "B", "--backbone", TINY,
        "--weights", tiny_weights, "--image-size", 96, "--calibration", 0.5, "--json",
    )  # fmt: skip
    state = json.loads(out)
    assert code == 0 and state["bundle"] == str(tmp_path / "B")
    row = state["categories"][0]
    assert (row["category"], row["references"], row["calibrated_on"]) == ("across", 12, 12)
    assert row["smallest_alpha"] == 0.077


def test_doctor_tells_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomalyst import doctor

    rows = {row["check"]: row for row in doctor.examine()}
    assert rows["extra [train]"]["works"] and rows["devices"]["works"]
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    code, out, _ = run("doctor", "--json")
    rows = {row["check"]: row for row in json.loads(out)}
    assert code == 0 and "pip install 'anomalyst[train]'" in rows["extra [train]"]["detail"]
    assert rows["runtime"]["works"] and "self-test" not in rows  # exported bundles run without


def test_ctrl_c_is_one_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anomalyst.methods.base.methods", interrupt)
    code, _, err = run("methods")
    assert code == 130 and "Traceback" not in err and "error" not in err
