"""Clients that send pictures to a running station as fast as they are answered.

Prints p50 and p95 of the latency, as multiples of one prediction that the library makes of the same
bundle before the clients start, and whether any record was lost or doubled.

    python benchmarks/station_load.py BUNDLE PICTURES [--clients 8] [--seconds 60] [--db URL]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from anomalyst.data.images import list_images
from station_server import serving

API = "/api/v1"
HEADERS = {"Content-Type": "application/octet-stream"}


class Client(threading.Thread):
    """Sends pictures until a moment; each has a part number of its own."""

    def __init__(self, url: str, number: int, pictures: list[bytes], until: float) -> None:
        super().__init__()
        self.url, self.number, self.pictures, self.until = url, number, pictures, until
        self.latencies: list[float] = []
        self.acknowledged: dict[str, str] = {}
        self.refused: dict[int, int] = {}

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            for k in itertools.count():
                if time.monotonic() >= self.until:
                    return
                part = f"{self.number}-{k}"
                content = self.pictures[(k * 7 + self.number) % len(self.pictures)]
                began = time.perf_counter()
                answer = send(client, content, part)
                if answer.status_code == 201:
                    self.latencies.append(time.perf_counter() - began)
                    self.acknowledged[part] = answer.json()["id"]
                else:
                    self.refused[answer.status_code] = self.refused.get(answer.status_code, 0) + 1


def send(client: httpx.Client, content: bytes, part: str) -> httpx.Response:
    return client.post(
        f"{API}/inspections", params={"part_id": part}, content=content, headers=HEADERS
    )


def records(url: str) -> list[dict[str, Any]]:
    with httpx.stream("GET", f"{url}{API}/inspections.jsonl", timeout=300) as answer:
        return [json.loads(line) for line in answer.iter_lines()]


def at_rest(url: str, pictures: list[bytes], count: int = 40) -> float:
    """Return the median seconds of a request while nobody else asks."""
    with httpx.Client(base_url=url, timeout=120) as client:
        spent = []
        for k in range(count + 5):
            began = time.perf_counter()
            assert send(client, pictures[k % len(pictures)], "alone").status_code == 201
            spent.append(time.perf_counter() - began)
    return statistics.median(spent[5:])


def prediction_alone(bundle: Path, pictures: list[bytes], count: int = 40) -> float:
    """Return the median seconds of one prediction by the library, one picture at a time."""
    from anomalyst.detector import Detector
    from anomalyst.runtime import Runtime
    from anomalyst.runtime.exported import is_export

    model: Any = Runtime.load(bundle) if is_export(bundle) else Detector.load(bundle)
    spent = []
    for k in range(count + 5):
        began = time.perf_counter()
        list(model.predict(pictures[k % len(pictures)]))
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[5:])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("bundle", type=Path)
    words.add_argument("pictures", type=Path)
    words.add_argument("--clients", type=int, default=8)
    words.add_argument("--seconds", type=float, default=60)
    words.add_argument("--db")
    given = words.parse_args()
    pictures = [path.read_bytes() for path in list_images(given.pictures, recursive=True)]
    alone = prediction_alone(given.bundle, pictures)
    more = ["--db", given.db] if given.db else []
    with tempfile.TemporaryDirectory() as folder:
        with serving(Path(folder) / "station", given.bundle, *more) as server:
            request = at_rest(server.url, pictures)
            until = time.monotonic() + given.seconds
            clients = [Client(server.url, n, pictures, until) for n in range(given.clients)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            kept = records(server.url)
            verified = httpx.get(f"{server.url}{API}/audit/verify", timeout=600).json()
        tell(given, alone, request, clients, kept, verified)


def tell(
    given: argparse.Namespace,
    alone: float,
    request: float,
    clients: list[Client],
    kept: list[dict[str, Any]],
    verified: dict[str, Any],
) -> None:
    latencies = sorted(each for client in clients for each in client.latencies)
    acknowledged = {p: uid for client in clients for p, uid in client.acknowledged.items()}
    stored = [row for row in kept if row["part_id"] != "alone"]
    by_part: dict[str, list[str]] = {}
    for row in stored:
        by_part.setdefault(row["part_id"], []).append(row["id"])
    result = {
        "clients": given.clients,
        "seconds": given.seconds,
        "one_prediction_ms": round(alone * 1e3, 1),
        "one_request_alone": round(request / alone, 2),
        "answered": len(latencies),
        "a_second": round(len(latencies) / given.seconds, 1),
        "p50": round(statistics.median(latencies) / alone, 2),
        "p95": round(latencies[int(0.95 * len(latencies))] / alone, 2),
        "refused": {k: v for client in clients for k, v in client.refused.items()},
        "lost": sum(uid not in by_part.get(part, []) for part, uid in acknowledged.items()),
        "doubled": sum(len(each) > 1 for each in by_part.values()),
        "log_whole": verified["ok"],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
