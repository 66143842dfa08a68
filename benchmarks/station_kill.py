"""kill -9 while pictures are written, again and again: is anything lost that was acknowledged?

python benchmarks/station_kill.py BUNDLE PICTURES [--times 50] [--clients 4]
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from sqlalchemy import select

from anomalyst.data.images import list_images
from anomalyst.station.database import Database
from anomalyst.station.store import Store
from anomalyst.station.tables import Inspection
from anomalyst.station.verification import verify
from station_load import API, HEADERS
from station_parts import bundle, good
from station_server import serving


class Writer(threading.Thread):
    """Sends pictures that nobody sent before, and decides on them, until the station is gone."""

    def __init__(self, url: str, turn: int, number: int, pictures: list[bytes]) -> None:
        super().__init__()
        self.url, self.name_, self.pictures = url, f"{turn}-{number}", pictures
        self.inspected: list[str] = []
        self.decided: list[str] = []

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=60) as client:
                for k, content in enumerate(self.pictures * 1000):
                    part = f"{self.name_}-{k}"
                    fresh = content + part.encode()  # what follows a picture's end is not read
                    where = f"{API}/inspections"
                    told = {"part_id": part}
                    answer = client.post(where, params=told, content=fresh, headers=HEADERS)
                    if answer.status_code != 201:
                        continue
                    uid = answer.json()["id"]
                    self.inspected.append(uid)
                    told = {"decision": "good", "reason": part}
                    if client.post(f"{where}/{uid}/decision", json=told).status_code == 200:
                        self.decided.append(uid)
        except httpx.HTTPError:
            return


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("bundle", type=Path, nargs="?")
    words.add_argument("pictures", type=Path, nargs="?")
    words.add_argument("--times", type=int, default=50)
    words.add_argument("--clients", type=int, default=4)
    given = words.parse_args()
    chance = random.Random(0)
    inspected: list[str] = []
    decided: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "station"
        made = given.bundle or bundle(Path(folder))
        pictures = [good(k) for k in range(15)]
        if given.pictures:
            files = list_images(given.pictures, recursive=True)[:20]
            pictures = [path.read_bytes() for path in files]
        for turn in range(given.times):
            with serving(data, made) as server:
                writers = [Writer(server.url, turn, n, pictures) for n in range(given.clients)]
                for writer in writers:
                    writer.start()
                wanted = chance.randint(1, 40)
                while sum(len(writer.inspected) for writer in writers) < wanted:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.05))
                server.kill()
                for writer in writers:
                    writer.join()
            inspected += [uid for writer in writers for uid in writer.inspected]
            decided += [uid for writer in writers for uid in writer.decided]
        tell(data, given.times, inspected, decided)


def tell(data: Path, times: int, inspected: list[str], decided: list[str]) -> None:
    with sqlite3.connect(data / "station.db") as plain:
        whole = plain.execute("PRAGMA integrity_check").fetchone()[0]
    database = Database(f"sqlite:///{data / 'station.db'}", data / "audit.head")
    found = verify(database)
    with database.read() as session:
        rows = {row.uid: row for row in session.scalars(select(Inspection))}
    store = Store(data / "pictures")
    missing = sum(
        not (row.image_sha256 and store.get(row.image_sha256) and row.map_sha256)
        or not store.get(row.map_sha256 or "")
        for row in rows.values()
    )
    parts = [row.part_id for row in rows.values()]
    result = {
        "killed": times,
        "acknowledged": len(inspected),
        "decisions_acknowledged": len(decided),
        "kept": len(rows),
        "lost": len(set(inspected) - set(rows)),
        "decisions_lost": sum(rows[uid].decision != "good" for uid in decided if uid in rows),
        "doubled": len(parts) - len(set(parts)),
        "pictures_missing": missing,
        "integrity_check": whole,
        "log_faults": found.faults,
    }
    print(json.dumps(result, indent=2))
    database.close()


if __name__ == "__main__":
    main()
