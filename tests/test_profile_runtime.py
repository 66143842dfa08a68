"""`anomalyst profile --runtime` on exports made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalyst import cli_profile_runtime, profiling_clock
from anomalyst.data.frame import Frame
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.profiling_record import RuntimeProfile, Spread
from anomalyst.runtime import Runtime
from anomalyst.runtime import profiling as measured
from anomalyst.runtime.engines import Array
from anomalyst.runtime.exported import (
    FRAME,
    MANIFEST,
    SCHEMA_VERSION,
    Exported,
    read_export,
    tensor_file,
    write_export,
)
from anomalyst.runtime.profiling import profile_runtime
from anomalyst.sealed import unsealed
from anomalyst.tiling import Tiling
from conftest import Run
from test_runtime_alone import BLOCKER
from tiny_export import PREPROCESS, write

pytest.importorskip("onnx")
SCORES = {"red": [k / 2 for k in range(1, 20)]}
SMALL = (96, 64)
STAGES = ("decode", "preprocess", "graph", "judging")
WHOLE = ("from_file", "from_pixels")


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few rounds as there may be; one cold start."""
    monkeypatch.setattr(profiling_clock, "_ENOUGH", 0.0)
    monkeypatch.setattr(measured, "_STARTS", 1)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write(tmp_path / "export", calibration=SCORES)


class Slow:
    """An engine that takes its time, and counts."""

    def __init__(self, runtime: Runtime, pause: float) -> None:
        self._engine = runtime.engine
        self.name, self.inputs = self._engine.name, self._engine.inputs
        self.outputs, self.pause, self.runs = self._engine.outputs, pause, 0

    def run(self, feeds: Any) -> dict[str, Array]:
        time.sleep(self.pause)
        self.runs += 1
        return self._engine.run(feeds)


def stages(path: Path, batch: int, pause: float = 0.0, **more: Any) -> measured._Stages:
    runtime = Runtime.load(path)
    runtime.engine = Slow(runtime, pause)
    shown = measured._Shown.make(runtime, more.get("size", SMALL))
    return measured._Stages(read_export(path), runtime, shown, batch)


# ---- what is timed ------------------------------------------------------------------------------


def test_the_graph_runs_in_its_own_stage_and_in_the_whole_alone(export: Path) -> None:
    """A pause in the engine shows there, and nowhere else."""
    each = stages(export, 3, pause=0.05)
    took = {name: profiling_clock.seconds(work) for name, work in each.works().items()}
    assert set(took) == {*STAGES, *WHOLE}
    for name in ("graph", *WHOLE):
        assert took[name] >= 0.05, name  # at least one run; the batch is one
    engine = each._runtime.engine
    before = engine.runs  # type: ignore[attr-defined]
    for name in ("decode", "preprocess", "judging"):
        each.works()[name]()
    assert engine.runs == before  # type: ignore[attr-defined]


def test_judging_is_that_of_a_good_part(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the made-up picture itself most patches stand out, and its regions would be drawn."""
    each = stages(export, 2)
    (whole,) = each._runtime.predict(each._shown.pixels, category="red")
    assert whole.regions and whole.verdict == "ng"
    monkeypatch.setattr("anomalyst.judging.find_regions", lambda *_: pytest.fail("regions"))
    each.works()["judging"]()


def test_a_picture_in_tiles_passes_the_graph_tile_by_tile(tmp_path: Path) -> None:
    tiled = Preprocess(64, 8, PREPROCESS.mean, PREPROCESS.std, tiling=Tiling(32, 0.0, True))
    path = write(tmp_path / "tiled", calibration=SCORES, preprocess=tiled.to_dict())
    each = stages(path, 2)
    # 96 x 64 pixels: 3 x 2 tiles of 32, and the whole as small as a tile.
    assert each._shown.network_inputs == ((6, 32, 32), (1, 32, 48))
    assert [feeds["image"].shape[0] for feeds in each._feeds] == [6, 1, 6, 1]
    for work in each.works().values():
        work()


def test_what_is_measured_and_on_what(export: Path) -> None:
    said: list[tuple[int, int]] = []
    found = profile_runtime(
        export,
        threads=[2, 1],
        batch_sizes=[2, 1],
        picture=SMALL,
        progress=lambda stage, done, total, note="": said.append((done, total)),
    )
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(t.batch_size, t.threads) for t in found.times] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for times in found.times:
        for name in (*STAGES, *WHOLE):
            spread = getattr(times, name)
            assert 0 < spread.low <= spread.median <= spread.high and spread.count == 5
    assert (found.category, found.calibrated, found.engine) == ("red", True, "onnxruntime")
    assert (found.picture, found.network_inputs) == (SMALL, ((1, 32, 48),))
    assert min(vars(found.drawing)[name].low for name in ("map", "regions", "overlay")) > 0
    assert found.cold.started.median > found.cold.loaded.median > 0
    peaks = list(found.cold.memory_mb.values())
    assert list(found.cold.memory_mb) == [1, 2] and 0 < peaks[0] <= peaks[1]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.to_dict()["times"][0]["graph"]["count"] == 5


def test_an_export_that_knows_no_category(tmp_path: Path) -> None:
    path = write(
        tmp_path / "free", {}, references=False, needs_category=False, judges_unseen=True,
        retrieval=False,
    )  # fmt: skip
    found = profile_runtime(path, batch_sizes=[1], picture=SMALL)
    assert (found.category, found.calibrated) == (None, False)
    assert [times.threads for times in found.times] == [None]


# ---- the picture --------------------------------------------------------------------------------


def test_the_picture_fits_what_the_export_takes(tmp_path: Path) -> None:
    def usual(path: Path) -> tuple[int, int]:
        return measured._Shown.make(Runtime.load(path), None).size

    assert usual(write(tmp_path / "any")) == (1600, 1200)
    fixed = write(tmp_path / "fixed", size=(48, 32))
    assert usual(fixed) == (1200, 1800)  # width, height
    with pytest.raises(InputError, match=r"picture of 96x64 pixels cannot be judged.*--picture"):
        measured._Shown.make(Runtime.load(fixed), SMALL)


def test_a_part_that_is_aligned_is_found_on_it(tmp_path: Path) -> None:
    patch = np.random.default_rng(0).integers(0, 255, (24, 40), dtype=np.uint8)
    frame = Frame(crop=(100, 80, 400, 300), template=patch, place=(300, 200))
    preprocess = Preprocess(32, 8, PREPROCESS.mean, PREPROCESS.std, frame=frame)
    path = write(tmp_path / "framed", preprocess=preprocess.to_dict())
    shown = measured._Shown.make(framed(path, frame), (640, 480))
    assert shown.item.box == (80.0, 100.0, 300.0, 400.0)  # neither moved nor lost
    drawn_over = Frame(ignore=np.eye(300, 500, dtype=bool))
    blind = Preprocess(32, 8, PREPROCESS.mean, PREPROCESS.std, frame=drawn_over)
    assert measured._usual_size(blind, None) == (500, 300)


def framed(path: Path, frame: Frame) -> Runtime:
    """The export with the arrays of its frame beside it."""
    names = [p.name for p in path.iterdir() if p.name != "exported.json"]
    files = {name: (path / name).read_bytes() for name in names}
    text = (path / MANIFEST).read_bytes()
    manifest = unsealed(path, MANIFEST, text, Exported, SCHEMA_VERSION)
    write_export(path, manifest, {**files, FRAME: tensor_file(frame.arrays())})
    return Runtime.load(path)


# ---- without torch, refused, printed ------------------------------------------------------------


def test_it_needs_no_torch(export: Path, tmp_path: Path) -> None:
    words = ["profile", str(export), "--runtime", "--picture", "96x64", "--batch-size", "1"]
    code = f"""{BLOCKER.replace("socket.socket = NoSocket", "")}
from anomalyst.cli import main
sys.argv = ["anomalyst", *{[*words, "-o", str(tmp_path / "out")]!r}]
try:
    main()
finally:
    import anomalyst.runtime.cold
    print("loaded", sorted(Blocker.names & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "loaded []" and found.stderr == ""
    written = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert written["picture"] == [96, 64] and written["cold"]["memory_mb"]["1"] > 0


def test_only_judging_is_imported_before_the_first_image(export: Path) -> None:
    code = "import sys, anomalyst.runtime.cold; print('anomalyst.runtime.profiling' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--runtime", "--shots", "4"], "--shots is of a method"),
        (["--runtime", "--image-size", "224"], "--image-size is of a method"),
        (["--runtime", "--set", "a=1"], "--set is of a method"),
        (["--runtime", "--device", "cpu"], "--device is of a method"),
        (["--runtime", "--picture", "1600"], "--picture '1600': give WIDTHxHEIGHT"),
        (["--runtime", "--picture", "0x9"], "give WIDTHxHEIGHT"),
        (["--runtime", "--picture", "9x9000"], "more than 32 times as long"),
        (["--runtime", "--picture", "99999x99999"], "over 120 megapixels"),
        (["--threads", "2"], "--threads is of an exported bundle: name one, and add --runtime"),
        (["--engine", "openvino"], "--engine is of an exported bundle"),
        ([], "is an exported bundle: add --runtime"),
    ],
)
def test_refusals_are_one_line(run: Run, export: Path, words: list[str], expected: str) -> None:
    code, out, err = run("profile", export, *words)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "" and len(said) == 1 and expected in said[0]


def test_what_is_no_export_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("profile", tmp_path / "none", "--runtime")
    assert code == 2 and "no such exported bundle" in err
    with pytest.raises(InputError, match="batch size 0"):
        profile_runtime(write(tmp_path / "export"), batch_sizes=[0])


def test_the_command(run: Run, export: Path, tmp_path: Path) -> None:
    words = ["profile", export, "--runtime", "--picture", "96x64", "--threads", "1"]
    code, out, err = run(*words, "--batch-size", 1, "-o", tmp_path / "out")
    assert code == 0 and err == ""  # what the picture looks like is of no interest
    written = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert out.startswith(f"{export}: by-hand, onnx, onnxruntime\npictures of 96x64, ")
    assert "in the network 48x32" in out and "batch 1, 1 thread" in out
    graph = Spread(**written["times"][0]["graph"])
    assert cli_profile_runtime.as_time(graph) in out
    assert f"{written['cold']['memory_mb']['1']:.0f} MB" in out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "profile.json")
    code, out, err = run(*words, "--json", "--batch-size", 1)
    assert code == 0 and json.loads(out)["method"] == "by-hand"


def test_a_process_that_fails_is_named(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = measured._Shown.make(Runtime.load(export), SMALL)
    (export / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"a fresh process cannot judge by it \(.*model.onnx"):
        measured._start_cold(export, "auto", 1, [1], made)


def test_the_record_is_what_is_documented() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "profile.md").read_text()
    for key in RuntimeProfile.__dataclass_fields__:
        assert f"`{key}`" in page or f"`{key}[]`" in page, key
