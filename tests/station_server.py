"""A station in a process of its own, as `anomalyst serve` runs it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running `anomalyst serve`; `kill` is a power cut as far as a process can have one."""

    def __init__(self, data: Path, *words: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "anomalyst", "serve", *map(str, words)]
        command += ["--data", str(data), "--port", str(self.port)]
        self.log = data.parent / "server.log"
        with self.log.open("ab") as log:
            # Where the tests run in the background Ctrl-C is ignored, and would be here too.
            ready = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            self.process = subprocess.Popen(command, stderr=log, stdout=log, preexec_fn=ready)
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the station did not start: {self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@contextmanager
def serving(data: Path, *words: object) -> Iterator[Server]:
    server = Server(data, *words)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
