"""Take the pictures of the station's page: a shift with solar cells, in a real browser.

    python docs/images/make_station_pictures.py cells docs/images    (some minutes)

`cells` is the folder that make_example.py writes (made if it is missing). It needs the extras
[station] and [demo], playwright, and a chromium (``ANOMALYST_TEST_CHROMIUM``, or on the path). The
recipe is the shipped generalist with 40 good cells as references, calibrated on 100; nothing is
picked by eye: parts come in the order of their files' numbers, and the defect that is taught is
that of the cell that most narrowly got past, where its map is highest. For the repeatability three
cells are "photographed" twice again: moved by a pixel, and a little brighter.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from make_example import write_cells
from PIL import Image, ImageChops
from playwright.sync_api import sync_playwright

from anomalyst import load_dataset
from anomalyst.generalist import load_generalist
from anomalyst.station.app import create_app
from anomalyst.station.settings import Settings
from anomalyst.types import Sample

REFERENCES, CALIBRATION, GOOD, DEFECTIVE, WAITING = 40, 100, 40, 16, 6
PORT = 8790
URL = f"http://127.0.0.1:{PORT}"
WIDE = {"width": 1280, "height": 800}


def main() -> None:
    cells, pictures = Path(sys.argv[1]), Path(sys.argv[2])
    if not cells.exists():
        write_cells(cells)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        held_out, left = make_recipe(cells, work / "cells")
        serve(Settings(data=work / "station", bundles=(work / "cells",), port=PORT))
        for sample in held_out:
            send("/recipes/cells/calibration", sample.path.read_bytes())
        feed(left)
        with sync_playwright() as playwright:
            program = os.environ.get("ANOMALYST_TEST_CHROMIUM") or shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            Walk(browser, pictures).whole()
            browser.close()


def make_recipe(cells: Path, bundle: Path) -> tuple[list[Sample], list[Sample]]:
    """Save a generalist that knows solar cells; return what calibrated it, and unseen ones."""
    data = load_dataset(cells)
    good = [*data.train, *(sample for sample in data.test if sample.label == 0)]
    detector = load_generalist()
    detector.enroll("cell", good[:REFERENCES])
    held_out = good[REFERENCES : REFERENCES + CALIBRATION]
    detector.calibrate([Sample(sample.path, "cell") for sample in held_out])
    detector.save(bundle)
    rest = good[REFERENCES + CALIBRATION :][:GOOD]
    return held_out, [*rest, *(sample for sample in data.test if sample.label == 1)]


def serve(settings: Settings) -> None:
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=PORT, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.1)


def feed(samples: list[Sample]) -> None:
    """Inspect cells and say what they are; the last ones wait for the page."""
    good = [sample for sample in samples if sample.label == 0]
    bad = [sample for sample in samples if sample.label == 1][: DEFECTIVE + WAITING]
    turns = [*good[: len(good) - 2], *bad[:DEFECTIVE], *good[-2:], *bad[DEFECTIVE:]]
    for number, sample in enumerate(good[:3]):
        for look in (1, 2):
            inspect(again(sample.path, look), f"cell {number + 1:03d}", f"look {look + 1}")
    for number, sample in enumerate(turns):
        part = inspect(sample.path.read_bytes(), f"cell {number + 1:03d}", sample.path.name)
        if number < len(turns) - WAITING:
            word = "defect" if sample.label else "good"
            post(f"/inspections/{part['id']}/decision", {"decision": word, "reason": ""})


def again(path: Path, look: int) -> bytes:
    """Another picture of the same cell: moved by ``look`` pixels, and so many percent brighter."""
    picture = Image.open(path).convert("L")
    moved = ImageChops.offset(picture, look, 0).point(lambda value: value * (1 + look / 100))
    blob = io.BytesIO()
    moved.save(blob, "PNG")
    return blob.getvalue()


def inspect(content: bytes, part_id: str, name: str) -> dict[str, Any]:
    return send("/inspections", content, part_id=part_id, name=name)


def send(path: str, content: bytes, **query: str) -> dict[str, Any]:
    headers = {"Content-Type": "image/png"}
    answer = httpx.post(
        f"{URL}/api/v1{path}", params=query, content=content, headers=headers, timeout=120
    )
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def post(path: str, body: dict[str, Any]) -> None:
    httpx.post(f"{URL}/api/v1{path}", json=body, timeout=120).raise_for_status()


def parts(**query: Any) -> list[dict[str, Any]]:
    answer = httpx.get(f"{URL}/api/v1/inspections", params={"limit": 200, **query}, timeout=120)
    found: list[dict[str, Any]] = answer.raise_for_status().json()["items"]
    return found


class Walk:
    """A shift's walk through the page."""

    def __init__(self, browser: Any, pictures: Path) -> None:
        self.browser = browser
        self.pictures = pictures
        self.page = browser.new_page(viewport=WIDE, color_scheme="light")
        self.page.set_default_timeout(120_000)

    def whole(self) -> None:
        self.go("inspect")
        self.take("station-inspect")
        self.go("review")
        self.take("station-review")
        self.thresholds()
        self.teach()
        self.go("line")
        self.take("station-line")
        self.narrow()

    def go(self, view: str) -> None:
        self.page.goto(f"{URL}/#/{view}")
        self.page.wait_for_selector(f"[data-view='#/{view.split('/')[0]}'][data-ready]")
        self.page.wait_for_timeout(1500)

    def thresholds(self) -> None:
        self.go("thresholds")
        slider = self.page.get_by_role("slider", name="REVIEW above")
        slider.focus()
        for _ in range(6):
            slider.press("ArrowLeft")
        self.page.wait_for_timeout(2500)
        self.page.mouse.wheel(0, 260)
        self.page.wait_for_timeout(1500)
        self.take("station-thresholds")

    def teach(self) -> None:
        """Teach the defect of the cell that most narrowly got past."""
        passed = [part for part in parts(decision="defect") if part["verdict"] == "ok"]
        chosen = max(passed or parts(decision="defect"), key=lambda part: part["score"])
        self.go(f"part/{chosen['id']}")
        self.page.get_by_role("button", name="Teach the defect").click()
        self.page.get_by_role("button", name="Teach this place").wait_for()
        self.page.wait_for_timeout(800)
        self.take("station-mark")
        self.page.get_by_role("button", name="Teach this place").click()
        self.go("teach")
        self.page.get_by_role("button", name="See what would change").click()
        self.page.get_by_text("Labelled history, judged with it").wait_for()
        self.page.locator("section[aria-label='What would change']").scroll_into_view_if_needed()
        self.page.wait_for_timeout(1500)
        self.take("station-teach")

    def narrow(self) -> None:
        self.page = self.browser.new_page(
            viewport={"width": 390, "height": 800}, color_scheme="dark"
        )
        self.go("review")
        self.take("station-narrow")

    def take(self, name: str) -> None:
        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        path = self.pictures / f"{name}.png"
        palette = shot.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
        shot.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
