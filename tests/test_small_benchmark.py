"""The shipped configuration `small` in a tiny form: its own command, on a few real images."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from conftest import SHARED, Run

MVTEC = SHARED / "data" / "mvtec"
TRAIN, TEST = 8, 2  # images of each kind


@pytest.mark.slow
@pytest.mark.skipif(not MVTEC.is_dir(), reason="needs ../shared/data, which is not here")
def test_every_table_of_the_small_benchmark_is_filled(run: Run, tmp_path: Path) -> None:
    for category in ("bottle", "transistor"):
        for folder in sorted((MVTEC / category).glob("*/*")):
            count = TRAIN if folder.parent.name == "train" else TEST
            home = tmp_path / "mvtec" / folder.relative_to(MVTEC)
            home.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, home)
    out = tmp_path / "out"
    code, shown, err = run("benchmark", "small", "--root", tmp_path, "-o", out, "--steps", 2)
    assert code == 0, err
    assert "not run" not in shown and "not run" not in (out / "results.md").read_text()
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["status"] for line in lines} == {"done"}
    parts = {line["part"]: line["setting"] for line in lines}
    assert list(parts.values()) == ["single", "few-shot", "multi", "few-shot-multi", "generalist"]
    found = {
        (line["method"], line["category"]): float(line["value"])
        for line in lines
        if (line["setting"], line["metric"], line["defect"]) == ("single", "i_auroc", "")
    }
    assert found["anomaly-dino", "bottle"] > 0.9  # two good images and six broken ones
    page = (out / "results.html").read_text()
    assert all(part in page for part in parts) and page.count("<svg") >= 5
