"""Shared by the tests of the page: a station that really listens, and a browser that is here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from anomalyst.station.app import create_app
from anomalyst.station.settings import Settings

VIEWS = ("inspect", "review", "parts", "thresholds", "teach", "golden", "line", "shift")
VIEWS += ("recipes", "audit")
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The browser's program: ``ANOMALYST_TEST_CHROMIUM``, or one on the path."""
    found = os.environ.get("ANOMALYST_TEST_CHROMIUM") or next(
        filter(None, map(shutil.which, _NAMES)), None
    )
    if found is None:
        pytest.skip("no chromium here (apt-get install chromium, or ANOMALYST_TEST_CHROMIUM)")
    return found


def axe() -> str:
    """The source of axe-core: ``ANOMALYST_TEST_AXE``, or npm's next to the repository's root."""
    root = Path(__file__).resolve().parents[1]
    usual = root / "node_modules" / "axe-core" / "axe.min.js"
    path = Path(os.environ.get("ANOMALYST_TEST_AXE", usual))
    if not path.is_file():
        pytest.skip("no axe-core here (npm install axe-core, or ANOMALYST_TEST_AXE)")
    return path.read_text()


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser."""
    api = pytest.importorskip("playwright.sync_api")
    program = chromium()
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield made
        made.close()


class Served:
    """A station that listens on a port of this machine."""

    def __init__(self, data: Path, *bundles: Path, port: int = 0, **more: Any) -> None:
        settings = Settings(data=data, bundles=bundles, **{"watch_seconds": 0.05, **more})
        config = uvicorn.Config(create_app(settings), port=port, log_level="error")
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(config)
        run = {"sockets": [self._socket]}
        self._thread = threading.Thread(target=self._server.run, kwargs=run, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        until = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < until and self._thread.is_alive(), "the station did not start"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, key: str | None = None, **query: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1{path}", params=query, headers=_headers(key))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.url}/api/v1{path}", json=body, timeout=60)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def inspect(self, content: bytes, **query: Any) -> Any:
        headers = {"Content-Type": "image/png"}
        place = f"{self.url}/api/v1/inspections"
        answer = httpx.post(place, content=content, params=query, headers=headers, timeout=60)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def decided(self, content: bytes, decision: str, **query: Any) -> str:
        uid: str = self.inspect(content, **query)["id"]
        self.post(f"/inspections/{uid}/decision", decision=decision)
        return uid


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"X-API-Key": key}


class Person:
    """Somebody in front of the page; what the browser complains of is a failure."""

    def __init__(self, made: Any, url: str, **context: Any) -> None:
        self.context = made.new_context(**{"viewport": {"width": 1366, "height": 800}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.url = url
        self.faults: list[str] = []
        self.foreign: list[str] = []
        self.context.on("weberror", lambda error: self.faults.append(str(error.error)))
        self.context.on("console", self._listen)
        self.context.on("request", self._follow)

    def _listen(self, message: Any) -> None:
        # A refused request is part of some tests; the browser itself notes each.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def _follow(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.foreign.append(request.url)

    def __enter__(self) -> Person:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert not self.faults and not self.foreign, (self.faults, self.foreign)

    def go(self, view: str) -> None:
        """Open a view, and wait until it is drawn."""
        before = self.page.url.split("#")[0].rstrip("/")
        if before != self.url:
            self.page.goto(f"{self.url}/#/{view}")
        else:
            self.page.evaluate("place => { location.hash = place }", f"#/{view}")
        name = view.split("/")[0]
        self.page.wait_for_selector(f"[data-view='#/{name}'][data-ready]")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=False).first.click()

    def sees(self, words: str) -> None:
        """Wait until words stand on the page."""
        self.page.get_by_text(words, exact=False).first.wait_for()

    def upload(self, *files: tuple[str, bytes]) -> None:
        given = [{"name": n, "mimeType": "image/png", "buffer": content} for n, content in files]
        self.page.set_input_files("#choose", given)

    def word(self) -> str:
        """The big word of the band."""
        return str(self.page.locator(".band .word").inner_text())

    def violations(self, source: str) -> list[str]:
        """Serious and critical faults that axe-core finds."""
        self.page.evaluate(source)
        found = self.page.evaluate("axe.run().then(result => result.violations)")
        grave = [each for each in found if each["impact"] in ("serious", "critical")]
        return [json.dumps([v["id"], [n["target"] for n in v["nodes"]]]) for v in grave]
