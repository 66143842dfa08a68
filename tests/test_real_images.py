"""The main job on real images with the packaged weights: slow tier."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from anomalyst import Detector, evaluate, load_dataset
from anomalyst.demo import solar_cells
from anomalyst.errors import InputError
from anomalyst.generalist import load_generalist

pytestmark = pytest.mark.slow


def test_one_bottle_finds_broken_ones(mvtec: Path, packaged: str) -> None:
    data = load_dataset(mvtec, categories=["bottle"])
    detector = Detector("anomaly-dino", backbone=packaged, image_size=280)
    detector.fit(data.train, shots=1, calibration=0)
    row = evaluate(detector, data).metrics["categories"]["bottle"]
    assert row["i_auroc"] >= 0.99
    assert row["p_auroc"] >= 0.975
    assert row["p_ap"] >= 0.78


def test_products_are_told_apart_without_their_names(mvtec: Path, packaged: str) -> None:
    data = load_dataset(mvtec)
    detector = Detector("anomaly-dino", backbone=packaged, image_size=140)
    detector.fit(data.train, shots=2, calibration=0)
    samples = data.test[::8]
    found = detector.predict([replace(sample, category=None) for sample in samples])
    assert [p.category for p in found] == [sample.category for sample in samples]


def test_solar_cells_of_the_demo(packaged: str) -> None:
    pytest.importorskip("elpv_dataset")
    cells, held_out = solar_cells(8)
    assert (len(cells.train), len(held_out)) == (16, 400)
    assert len(cells.test) == 588 + 920 - 16 - 400 + 313 + 402
    parts = [{s.path for s in part} for part in (cells.train, held_out, cells.test)]
    assert not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    mono = [int(s.path.stem.removeprefix("cell")) for s in cells.train if s.category == "mono"]
    assert max(mono) - min(mono) > 1500  # from all over the list
    few = replace(cells, test=cells.test[::12])
    detector = Detector("anomaly-dino", backbone=packaged, image_size=224)
    detector.fit(cells.train, calibration=0)
    row = evaluate(detector, few).metrics["categories"]
    assert row["mono"]["i_auroc"] > 0.75 and row["poly"]["i_auroc"] > 0.7
    assert row["mono"]["p_auroc"] is None and row["mono"]["aupro"] is None


def test_a_bundle_moved_to_another_machine_needs_nothing_else(
    mvtec: Path, packaged: str, tmp_path: Path
) -> None:
    """Another process, an empty home, no hub, no network, another folder: the same numbers."""
    data = load_dataset(mvtec, categories=["transistor"])
    detector = Detector("patchcore", backbone=packaged, image_size=140)
    detector.fit(data.train, shots=3, calibration=0)
    detector.save(tmp_path / "here")
    images = [sample.path for sample in data.test[:4]]
    expected = [p.score for p in detector.predict(images)]
    (tmp_path / "here").rename(tmp_path / "there")
    script = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        "from anomalyst.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "predict", str(tmp_path / "there"), *map(str, images)]
    home = {"PATH": "", "HOME": str(tmp_path), "ANOMALYST_HOME": str(tmp_path / "home")}
    subprocess.run([*command, "-o", str(tmp_path / "out")], check=True, env=home)
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == pytest.approx(expected, rel=1e-5)


def test_a_taught_defect_helps_the_shipped_generalist(mvtec: Path, packaged: str) -> None:
    data = load_dataset(mvtec, categories=["transistor"])
    data = replace(data, test=data.test[::3])
    normal = data.train[::120]
    bad = [s for s in data.test if s.label == 1][::6]
    plain, taught = load_generalist(), load_generalist()
    plain.enroll("transistor", normal)
    taught.enroll("transistor", normal, [(s, s.mask) for s in bad])
    left = replace(data, test=tuple(s for s in data.test if s not in bad))
    before, after = (
        evaluate(detector, left).metrics["categories"]["transistor"] for detector in (plain, taught)
    )
    assert after["n_anomalous"] == before["n_anomalous"]
    assert after["p_auroc"] > before["p_auroc"] and after["aupro"] > before["aupro"]


def test_another_product_is_no_reference(mvtec: Path, packaged: str) -> None:
    data = load_dataset(mvtec)
    detector = load_generalist()
    detector.enroll("bottle", [s for s in data.train if s.category == "bottle"][:2])
    for sample in data.test[::10]:
        if sample.label == 1 and sample.category != "bottle":
            with pytest.raises(InputError, match="another product than 'bottle'"):
                detector.enroll("bottle", (), [(sample, sample.mask)])
        elif sample.label == 1:
            detector.enroll("bottle", (), [(sample, sample.mask)])
    assert len(detector.abnormal["bottle"]) > 4
