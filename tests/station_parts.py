"""A small station for tests: an export made by hand whose results are known, and a client."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from anomalyst.station.app import create_app
from anomalyst.station.settings import Settings
from tiny_export import COLOURS, coloured, spotted, write

API = "/api/v1"
PNG = {"Content-Type": "image/png"}
RED = COLOURS["red"]
LEVELS = [k / 100 for k in range(1, 20)]  # 19 held-out scores: 0.01 ... 0.19


def bundle(folder: Path, name: str = "plates", **more: Any) -> Path:
    """An export that knows red parts, calibrated: ``ng`` at 10 %, ``review`` at 20 %."""
    made: dict[str, Any] = {"calibration": {"red": LEVELS}, **more}
    return write(folder / name, {"red": (RED,)}, **made)


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, kind)
    return packed.getvalue()


def good(seed: int = 0) -> bytes:
    """A red part; its score is small, but seeds differ."""
    return png(spotted(RED, (200 + seed % 3, 40 + seed // 3 % 5, 40)))


def bad(spot: tuple[int, int, int] = (40, 200, 40)) -> bytes:
    """A red part with a spot of another colour."""
    return png(spotted(RED, spot))


def plain() -> bytes:
    """A red part like the reference: its score is 0."""
    return png(coloured(RED))


def settings(folder: Path, url: str | None = None, **more: Any) -> Settings:
    """A station in ``folder``/station with one recipe, ``plates``."""
    made: dict[str, Any] = {"watch_seconds": 0.05, "rate": 1e6, "burst": 1_000_000, **more}
    if "bundles" not in made:
        made["bundles"] = (kept_bundle(folder),)
    return Settings(data=folder / "station", url=url, **made)


def kept_bundle(folder: Path) -> Path:
    """The test's bundle, made once: a second one would carry another date."""
    place = folder / "plates"
    return place if place.exists() else bundle(folder)


@contextmanager
def client_of(made: Settings, address: str = "127.0.0.1") -> Iterator[TestClient]:
    """A client of a running station; an error of ours is an answer of 500, as for real clients."""
    app = create_app(made)
    with TestClient(
        app,
        base_url="http://127.0.0.1:8000",
        client=(address, 50000),
        raise_server_exceptions=False,
    ) as client:
        yield client


def zipped(folder: Path) -> bytes:
    """A bundle's folder as the bytes of its ``.zip``."""
    return Path(shutil.make_archive(str(folder), "zip", folder)).read_bytes()


def send(client: TestClient, content: bytes, **query: Any) -> Any:
    return client.post(f"{API}/inspections", params=query, content=content, headers=PNG)
