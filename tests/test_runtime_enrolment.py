"""An export learns at the line, without torch: references, calibration, and back to disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from anomalyst import InputError, Sample
from anomalyst.runtime import Runtime
from anomalyst.scoring import Decision
from anomalyst.types import Prediction
from conftest import Run, save
from tiny_export import COLOURS, coloured, row, spotted, write

pytest.importorskip("onnx")
GREEN, SPOT = (40, 200, 40), (210, 60, 40)
CALIBRATION = {"red": [0.1, 0.2, 0.3], "blue": [0.1, 0.2]}


@pytest.fixture(params=["onnx", "openvino"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    openvino = request.param == "openvino"
    return write(tmp_path / "export", openvino=openvino, grows=True, calibration=CALIBRATION)


def scores(runtime: Runtime, *pictures: np.ndarray, category: str) -> list[float]:
    return [p.score for p in runtime.predict(list(pictures), category=category)]


def verdict(p: Prediction) -> tuple[object, ...]:
    return p.category, p.score, p.p_value, p.verdict, p.threshold, p.regions


def distance(colour: tuple[int, int, int], *good: tuple[int, int, int]) -> float:
    """The score of a picture of one colour."""
    return min(float(((row(colour) - row(each)) ** 2).sum()) for each in good)


def test_a_reference_more(folder: Path) -> None:
    """What it shows is normal from now on, and the category's calibration is gone."""
    runtime = Runtime.load(folder)
    before = scores(runtime, coloured(SPOT), category="red")
    assert before == pytest.approx([distance(SPOT, COLOURS["red"])], rel=1e-5)
    runtime.enroll("red", [spotted(COLOURS["red"], SPOT)])
    assert scores(runtime, coloured(SPOT), category="red") == pytest.approx([0], abs=1e-9)
    assert list(runtime.calibration) == ["blue"]
    assert runtime.counts("red") == {"references": 2, "abnormal": 0, "masks_found": 0}


def test_a_new_category_is_judged_and_told_from_the_others(folder: Path) -> None:
    runtime = Runtime.load(folder)
    runtime.enroll("leaf", [coloured(GREEN), coloured(GREEN, 64, 32)])
    assert runtime.categories == ("red", "blue", "leaf")
    (found,) = runtime.predict([coloured((45, 195, 40))])
    assert found.category == "leaf" and not found.calibrated
    assert found.score == pytest.approx(distance((45, 195, 40), GREEN), rel=1e-4)
    (red,) = runtime.predict([coloured(COLOURS["red"])])
    assert red.category == "red" and red.calibrated


def test_saved_and_loaded_it_knows_the_same(folder: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(folder)
    runtime.enroll("leaf", [coloured(GREEN)])
    pictures = [spotted(GREEN, SPOT), spotted(COLOURS["blue"], SPOT)]
    held_out = [
        Sample(save(tmp_path / f"{k}.png", spotted(GREEN, (k, 180, 40))), "leaf") for k in range(4)
    ]
    assert runtime.calibrate(held_out) == {"leaf": 4}
    runtime.decision = Decision(0.2, 0.4)
    expected = [verdict(p) for p in runtime.predict(pictures)]
    for place in (tmp_path / "new.zip", folder):
        assert runtime.save(place) == place
        again = Runtime.load(place)
        assert [verdict(p) for p in again.predict(pictures)] == expected
        assert again.references == runtime.references and again.decision == runtime.decision
        assert again.calibration == runtime.calibration
    again.enroll("leaf", [coloured(SPOT)])
    again.save(folder)
    assert Runtime.load(folder).counts("leaf")["references"] == 2


def test_the_same_image_counts_once(folder: Path) -> None:
    runtime = Runtime.load(folder)
    runtime.enroll("leaf", [coloured(GREEN), coloured(GREEN)])
    assert runtime.counts("leaf")["references"] == 1
    with pytest.raises(InputError, match="category 'leaf' has all 1 images given already"):
        runtime.enroll("leaf", [coloured(GREEN)])


def test_a_stranger_is_taken_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    Runtime.load(folder).enroll("red", [coloured(COLOURS["blue"])])
    assert "looks like 'blue' (similarity 1.00), not 'red'" in caplog.text


def test_a_reference_is_not_calibrated_with(folder: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(folder)
    good = save(tmp_path / "good.png", coloured(GREEN))
    runtime.enroll("leaf", [good])
    with pytest.raises(InputError, match="all 1 images given are references"):
        runtime.calibrate([Sample(good, "leaf")])


def test_what_cannot_be_learned_changes_nothing(folder: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(folder)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for name, images, why in [
        ("leaf", [coloured(GREEN), broken], "reference of 'leaf': .*broken.png"),
        ("leaf", [], "give at least one normal reference image"),
        ("__x", [coloured(GREEN)], "give a printable name"),
    ]:
        with pytest.raises(InputError, match=why):
            runtime.enroll(name, images)
    assert runtime.categories == ("red", "blue") and set(runtime.calibration) == {"red", "blue"}


def test_an_export_that_cannot_enroll_says_what_can(tmp_path: Path) -> None:
    runtime = Runtime.load(write(tmp_path / "export"))
    with pytest.raises(InputError, match="enroll with the bundle, and export it again"):
        runtime.enroll("red", [coloured(GREEN)])


def test_an_export_changed_meanwhile_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    first, second = Runtime.load(folder), Runtime.load(folder)
    first.enroll("leaf", [coloured(GREEN)])
    first.save(folder)
    second.enroll("leaf", [coloured(SPOT)])
    with pytest.raises(InputError, match="was changed after it was loaded"):
        second.save(folder)


def test_on_the_command_line(folder: Path, tmp_path: Path, run: Run) -> None:
    good = [str(save(tmp_path / f"good/{k}.png", spotted(GREEN, (k, 180, 40)))) for k in range(4)]
    code, out, err = run("enroll", str(folder), "leaf", "--normal", good[0], "--json")
    assert code == 0, err
    rows = {row["category"]: row for row in json.loads(out)["categories"]}
    assert rows["leaf"]["references"] == 1 and rows["red"]["calibrated_on"] == 3
    code, _, err = run(
        "calibrate", str(folder), str(tmp_path / "good"), "--category", "leaf", "--alpha", "0.25"
    )
    assert code == 0 and "leaf: 1 reference, calibrated on 3: at most 25.00%" in err
    code, _, err = run("enroll", str(folder), "leaf", "--normal", good[1], "--abnormal", good[2])
    assert code == 2 and "an export learns good images only" in err
