"""Frame and tiles in an exported bundle: the runtime sees what torch sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")

from anomalyst import Detector, Frame, InputError, Sample
from anomalyst.export import export_bundle
from anomalyst.runtime import Runtime
from anomalyst.sealed import file_reader
from conftest import TINY, blot, save, texture
from test_frame import corner, moved, smooth

GOLDEN = smooth(1, 200, 260)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """The golden sample moved about, each with noise of its own; every third with a blot."""
    random, found = np.random.default_rng(0), []
    for k in range(12):
        picture = moved(GOLDEN, *(int(by) for by in random.integers(-8, 9, 2)))
        picture = (picture + random.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)
        if k % 3 == 2:
            picture = blot(picture, 100, 140 - 6 * k, 20)
        found.append(save(tmp_path / "images" / f"{k:02d}.png", picture))
    return found


@pytest.fixture
def taught(tiny_weights: str, images: list[Path]) -> Callable[..., Detector]:
    def build(**more: Any) -> Detector:
        detector = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, **more)
        detector.enroll("plate", images[:2])
        good = [path for k, path in enumerate(images) if k % 3 != 2]
        detector.calibrate([Sample(path, "plate", 0, "good") for path in good[2:]])
        return detector

    return build


FRAME = Frame.read(
    crop=(40, 30, 180, 140),
    ignore=corner(200, 260, 90, 110),
    golden=GOLDEN,
    align_on=(150, 60, 60, 50),
    search=12,
)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 96, "frame": FRAME},
        {"image_size": 128, "tile": 64, "overview": True},
        {"image_size": 128, "tile": 64, "frame": FRAME},
    ],
    ids=["frame", "tiles", "both"],
)
def test_the_runtime_judges_alike(
    settings: dict[str, Any], taught: Callable[..., Detector], images: list[Path], tmp_path: Path
) -> None:
    detector = taught(**settings)
    zipped = "tile" in settings
    path = export_bundle(detector, tmp_path / ("exported.zip" if zipped else "exported"), images)
    read = file_reader(path, "exported.json")
    assert json.loads(read("exported.json"))["size"] is None
    if "frame" in settings:
        assert read("frame.safetensors")
    runtime = Runtime.load(path)
    lost = [texture(5, 200, 260), texture(5, 50, 90)] if "frame" in settings else []
    sources = [*images, *lost]
    for one, two in zip(detector.predict(sources), runtime.predict(sources), strict=True):
        assert (one.error, one.category, one.verdict) == (two.error, two.category, two.verdict)
        if one.error is None:
            assert two.score == pytest.approx(one.score, rel=1e-4, abs=1e-6)
            assert two.score_map.box == one.score_map.box
            np.testing.assert_allclose(two.map, one.map, atol=1e-4)
            assert [r.bbox for r in one.regions] == [r.bbox for r in two.regions]
    assert all(found.error for found in runtime.predict(lost))


def test_a_graph_of_one_size_takes_its_tiles(
    taught: Callable[..., Detector], images: list[Path], tmp_path: Path
) -> None:
    detector = taught(image_size=128, tile=64)
    path = export_bundle(detector, tmp_path / "exported", images, size=(64, 64))
    assert json.loads((path / "exported.json").read_text())["size"] == [64, 64]
    tall = np.rot90(GOLDEN).copy()
    (one, two), (three, four) = (
        list(judge.predict([images[5], tall])) for judge in (detector, Runtime.load(path))
    )
    assert three.score == pytest.approx(one.score, rel=1e-4)
    assert four.score == pytest.approx(two.score, rel=1e-4)
    with pytest.raises(InputError, match="have 64 pixels along the short side"):
        export_bundle(detector, tmp_path / "other", images, size=(128, 128))


def test_a_frame_that_was_changed_is_noticed(
    taught: Callable[..., Detector], images: list[Path], tmp_path: Path
) -> None:
    path = export_bundle(taught(image_size=96, frame=FRAME), tmp_path / "exported", images)
    file = path / "frame.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"frame\.safetensors was altered"):
        Runtime.load(path)
