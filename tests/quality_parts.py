"""Shared by the station's quality tests: a tiny NAGL that knows gears, and pictures of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomalyst.data.layouts import load_dataset
from anomalyst.detector import Detector
from anomalyst.types import Sample
from conftest import TINY, blot, save, texture

SHORT = {"steps": 6, "warmup": 2, "batch_size": 2, "normals": 2, "abnormals": 1}
GOOD = [texture(k) for k in range(2)]
CALIBRATION = [texture(100 + k) for k in range(24)]
BOX = (40, 32, 24, 24)
STAINS = (30, 55, 57, 59)
"""Seeds of `stained` parts: all but the first are let through, until the first is taught."""


def stained(seed: int, top: int = 32, left: int = 40) -> np.ndarray:
    """A gear with a faint stain, which a tiny network that never saw one hardly minds."""
    picture = texture(seed)
    part = picture[top : top + 24, left : left + 24].astype(np.int16)
    part[..., 0] += 6
    picture[top : top + 24, left : left + 24] = part.clip(0, 255).astype(np.uint8)
    return picture


def dented(seed: int) -> np.ndarray:
    """A gear with a defect that nobody overlooks."""
    return blot(texture(seed), 32, 40, 24)


def png(picture: np.ndarray) -> bytes:
    blob = io.BytesIO()
    Image.fromarray(picture).save(blob, "PNG")
    return blob.getvalue()


def source(folder: Path) -> Path:
    """Write what a tiny generalist is trained on: plates, some with a blot and its mask."""
    for k in range(8):
        save(folder / "train" / "good" / f"{k}.png", texture(500 + k))
    for k in range(3):
        top = 16 * k + 16
        save(folder / "test" / "blot" / f"{k}.png", blot(texture(600 + k), top, 48, 24))
        mask = np.zeros((96, 96), np.uint8)
        mask[top : top + 24, 48:72] = 255
        save(folder / "ground_truth" / "blot" / f"{k}_mask.png", mask)
    return folder


def nagl_bundle(weights: str, folder: Path) -> tuple[Path, list[Path]]:
    """Write a bundle that judges gears, calibrated; return it and its calibration's pictures."""
    data = load_dataset(source(folder / "plate"))
    detector = Detector("nagl", backbone=TINY, weights=weights, image_size=96, options=SHORT)
    detector.fit((*data.train, *data.test))
    detector.enroll("gear", pictures_in(folder / "good", GOOD))
    pictures = pictures_in(folder / "calibration", CALIBRATION)
    detector.calibrate([Sample(path, "gear") for path in pictures])
    return detector.save(folder / "gears"), pictures


def pictures_in(folder: Path, pictures: Sequence[np.ndarray]) -> list[Path]:
    return [save(folder / f"{k:03d}.png", picture) for k, picture in enumerate(pictures)]


class Line:
    """A station in this process, spoken to as a page or machine would."""

    def __init__(self, data: Path, *bundles: Path, url: str | None = None) -> None:
        from fastapi.testclient import TestClient

        from anomalyst.station.app import create_app
        from anomalyst.station.settings import Settings

        settings = Settings(data=data, bundles=bundles, url=url, rate=1e6, burst=1_000_000)
        self.app = create_app(settings)
        self.client = TestClient(self.app, "http://127.0.0.1", client=("127.0.0.1", 1))

    def __enter__(self) -> Line:
        self.client.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.__exit__(None, None, None)

    def get(self, path: str, **query: Any) -> Any:
        answer = self.client.get(f"/api/v1{path}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, status: int, **body: Any) -> Any:
        answer = self.client.post(f"/api/v1{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def inspect(self, content: bytes, **query: Any) -> Any:
        kind = {"Content-Type": "image/png"}
        answer = self.client.post(
            "/api/v1/inspections", content=content, params=query, headers=kind
        )
        assert answer.status_code == 201, answer.text
        return answer.json()

    def decided(self, content: bytes, decision: str, **query: Any) -> str:
        """Inspect a picture, say what it is, and return the inspection's id."""
        uid: str = self.inspect(content, **query)["id"]
        self.post(f"/inspections/{uid}/decision", 200, decision=decision, reason="seen")
        return uid
