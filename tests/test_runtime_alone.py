"""The runtime on the command line, and where torch is not: blocked, and not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalyst.overlay import heat_overlay
from anomalyst.runtime import Runtime
from conftest import Run, save
from tiny_export import COLOURS, coloured, spotted, write

pytest.importorskip("onnx")
ROOT = Path(__file__).resolve().parents[1]
RED, BLUE = COLOURS["red"], COLOURS["blue"]
SCORES = {"red": [k / 2 for k in range(1, 20)]}
# Nothing but the packages of the base install may be imported, and no socket opened.
BLOCKER = """
import socket, sys

class Blocker:
    names = {"torch", "torchvision", "timm", "open_clip", "onnx", "lightning", "scipy", "sklearn",
             "cv2", "matplotlib", "pandas", "jinja2", "huggingface_hub", "ray", "openvino"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"blocked: {name}")

class NoSocket(socket.socket):
    def __init__(self, *words, **more):
        raise OSError("blocked: socket")

sys.meta_path.insert(0, Blocker())
socket.socket = NoSocket
"""


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write(tmp_path / "export", calibration=SCORES)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    pictures = {"a": coloured(RED), "b": spotted(RED, BLUE, 32, 48), "c": coloured(BLUE)}
    return [save(tmp_path / "in" / f"{name}.png", p) for name, p in pictures.items()]


def lines(folder: Path) -> list[dict[str, object]]:
    text = (folder / "predictions.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def one_line(err: str) -> str:
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "Traceback" not in err, err
    return found[0]


def test_predict_writes_the_contract(
    run: Run, export: Path, images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, err = run("predict", export, images[0].parent, "-o", out, "--maps", "--overlays")
    assert code == 0, err
    assert said.strip() == str(out / "predictions.jsonl")
    assert "1 ng, 1 not calibrated, 1 ok" in err
    found = lines(out)
    assert [row["image"] for row in found] == [str(path) for path in images]
    assert [row["verdict"] for row in found] == ["ok", "ng", None]
    runtime = Runtime.load(export)
    for row, prediction in zip(found, runtime.predict(images, keep_pixels=True), strict=True):
        for key in ("category", "score", "p_value", "verdict", "threshold", "calibrated", "error"):
            assert row[key] == getattr(prediction, key)
        regions = [
            {"bbox": list(r.bbox), "area": r.area, "score": r.score} for r in prediction.regions
        ]
        assert row["regions"] == regions
        np.testing.assert_array_equal(np.load(out / str(row["map"])), prediction.map)
        unit = runtime.heat_unit(prediction.category)
        drawn = heat_overlay(prediction.pixels, prediction.map, unit, prediction.regions)
        np.testing.assert_array_equal(np.asarray(Image.open(out / str(row["overlay"]))), drawn)


def test_levels_and_category_are_the_runs_own(
    run: Run, export: Path, images: list[Path], tmp_path: Path
) -> None:
    words = ("predict", export, *images, "-o", tmp_path / "out")
    code, out, err = run(*words, "--category", "red", "--alpha", "0.04", "--json")
    assert code == 2 and "alpha 0.04 needs at least 24" in one_line(err)
    code, out, err = run(*words, "--category", "red", "--alpha", "0.05", "--json")
    assert code == 0, err
    assert [json.loads(line)["threshold"] for line in out.splitlines()] == [9.5] * 3
    code, out, err = run(*words, "--alpha", "0.05")
    assert code == 2 and "category 'blue'" in one_line(err)  # is not calibrated
    code, out, err = run(*words, "--category", "rde")
    assert code == 2 and "did you mean 'red'" in one_line(err)


def test_refusals_are_one_line(
    run: Run, export: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*images, "-o", tmp_path / "out")
    code, _, err = run("predict", export, *words, "--device", "cuda")
    assert code == 2 and "exported bundles run on the processor" in one_line(err)
    code, _, err = run("evaluate", export, images[0].parent, "-o", tmp_path / "e")
    assert code == 2 and "give the bundle that it was made of" in one_line(err)
    code, _, err = run("predict", export, images[0], tmp_path / "none.png", *words)
    assert code == 2 and "none.png" in one_line(err) and len(lines(tmp_path / "out")) == 5
    (export / "exported.json").unlink()
    code, _, err = run("predict", export, *words)
    assert code == 2 and "exported.json" in one_line(err) and "export" in err
    monkeypatch.setattr("anomalyst.cli.find_spec", lambda name: None)  # no torch
    code, _, err = run("predict", tmp_path / "nothing", *words)
    assert code == 2 and "no such exported bundle" in one_line(err)


def test_nothing_of_torch_and_no_socket_is_needed(
    export: Path, images: list[Path], tmp_path: Path, run: Run
) -> None:
    """The same files, byte for byte, come out where the other packages cannot be imported."""
    words = ["predict", str(export), *map(str, images), "--maps", "--overlays"]
    code = f"""{BLOCKER}
import anomalyst.runtime, anomalyst.judging, anomalyst.retrieval
from anomalyst.cli import main
sys.argv = ["anomalyst", *{[*words, "-o", str(tmp_path / "alone")]!r}]
try:
    main()
finally:
    loaded = sorted(Blocker.names & set(sys.modules))
    print("loaded", loaded)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "loaded []" in found.stdout
    assert run(*words, "-o", tmp_path / "beside")[0] == 0
    alone, beside = (
        {p.relative_to(at): p.read_bytes() for p in sorted(at.rglob("*")) if p.is_file()}
        for at in (tmp_path / "alone", tmp_path / "beside")
    )
    assert len(alone) == 7 and alone == beside


@pytest.mark.parametrize("openvino", [False, True], ids=["onnxruntime", "openvino"])
def test_the_engines_report_nothing(images: list[Path], tmp_path: Path, openvino: bool) -> None:
    """Left alone, both write an identifier into the home, to report what runs to their makers."""
    if openvino:
        pytest.importorskip("openvino")
    export, home = write(tmp_path / "export", openvino=openvino), tmp_path / "home"
    home.mkdir()
    left_out = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "XDG_CACHE_HOME")
    clean = {k: v for k, v in os.environ.items() if k not in left_out} | {"HOME": str(home)}
    words = ["-m", "anomalyst.cli", "predict", str(export), str(images[0]), "-o", str(tmp_path)]
    subprocess.run([sys.executable, *words], env=clean, check=True, capture_output=True)
    assert list(home.rglob("*")) == []


@pytest.mark.slow
def test_a_base_install_judges_explains_itself_and_has_no_torch(
    export: Path, images: list[Path], tmp_path: Path
) -> None:
    """In an environment of its own, made from this checkout and a package index."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "pip"), "install", "--quiet", str(ROOT)]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("no package index within reach")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(home / "bin" / "anomalyst"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path)

    listed = subprocess.run([*pip[:1], "list"], capture_output=True, text=True).stdout.lower()
    assert "onnxruntime" in listed and not any(f"\n{n} " in listed for n in ("torch", "timm"))
    judged = call("predict", export, *images, "-o", tmp_path / "out", "--overlays")
    assert judged.returncode == 0, judged.stderr
    assert [row["verdict"] for row in lines(tmp_path / "out")] == ["ok", "ng", None]
    told = call("doctor", "--json")
    rows = {row["check"]: row for row in json.loads(told.stdout)}
    assert told.returncode == 0 and rows["runtime"]["works"] and not rows["extra [train]"]["works"]
    refused = call("predict", tmp_path / "no", *images, "-o", tmp_path / "out")
    assert refused.returncode == 2 and "anomalyst export" in one_line(refused.stderr)
    refused = call("fit", "anomaly-dino", tmp_path / "in", "-o", tmp_path / "b")
    assert refused.returncode == 2 and "anomalyst[train]" in one_line(refused.stderr)
    size = sum(p.stat().st_size for p in home.rglob("*") if p.is_file() and not p.is_symlink())
    assert size < 300e6
