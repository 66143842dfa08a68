"""A full disk, a database that is gone, a process that is killed: nothing acknowledged is lost."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from anomalyst.station.database import Database, DiskFull
from anomalyst.station.store import Store
from anomalyst.station.verification import verify
from station_parts import API, bad, bundle, client_of, good, plain, send, settings
from station_server import serving
from test_station_database import gone


def test_a_database_that_is_gone_is_503_and_back_without_a_restart(
    database_url: str, tmp_path: Path
) -> None:
    with client_of(settings(tmp_path, database_url)) as client:
        assert send(client, plain()).status_code == 201
        database = client.app.state.station.database  # type: ignore[attr-defined]
        with gone(database):
            for answer in (
                send(client, bad()),
                client.get(f"{API}/inspections"),
                client.get(f"{API}/inspections.csv"),
                client.get("/healthz"),
            ):
                assert answer.status_code == 503
                assert "database" in answer.json()["error"]
                assert "\n" not in answer.json()["error"]
                assert answer.headers["retry-after"] == "5"
        assert client.get("/healthz").status_code == 200
        assert send(client, bad()).status_code == 201
        assert len(client.get(f"{API}/inspections").json()["items"]) == 2
        assert client.get(f"{API}/audit/verify").json()["ok"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_507_and_leaves_nothing_half_written(
    small_disk: Path, tmp_path: Path
) -> None:
    made = settings(tmp_path)
    with client_of(replace(made, data=small_disk / "station")) as client:
        assert send(client, plain()).status_code == 201
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        before = sorted(p for p in (small_disk / "station" / "pictures").rglob("*") if p.is_file())
        answer = send(client, bad() + b"\0" * 10_000)
        assert answer.status_code == 507
        assert "\n" not in answer.json()["error"]
        after = sorted(p for p in (small_disk / "station" / "pictures").rglob("*") if p.is_file())
        assert after == before
        assert len(client.get(f"{API}/inspections").json()["items"]) == 1  # reading still works
        filler.unlink()
        assert send(client, bad() + b"\0" * 10_000).status_code == 201
        found = client.get(f"{API}/audit/verify").json()
        assert (found["ok"], found["inspections"]) == (True, 2)


def test_the_store_keeps_whole_files_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "pictures")
    digest = store.put(b"first")
    assert store.get(digest) == b"first"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        store.put(b"second")
    assert [p.name for p in (tmp_path / "pictures").rglob("*") if p.is_file()] == [digest]


def test_a_picture_is_on_the_disk_before_its_row_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        steps.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        real_sync(handle)

    def rename(source: object, target: object) -> None:
        steps.append("rename")
        real_replace(source, target)  # type: ignore[arg-type]

    from sqlalchemy.orm import Session

    real_commit = Session.commit

    def commit(self: Session) -> None:
        steps.append("commit")
        real_commit(self)

    with client_of(settings(tmp_path)) as client:
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "replace", rename)
        monkeypatch.setattr(Session, "commit", commit)
        assert send(client, bad()).status_code == 201
    written = ["sync file", "rename", "sync folder"]
    expected = ["sync folder", *written, "sync folder", *written, "commit"]
    assert [s for s in steps if s] == expected


def test_an_altered_picture_is_not_shown_as_the_one_that_was_judged(tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        answer = send(client, bad()).json()
        store = client.app.state.station.store  # type: ignore[attr-defined]
        store.path(answer["image_sha256"]).write_bytes(plain())
        shown = client.get(answer["links"]["image"])
        assert (shown.status_code, "altered" in shown.json()["error"]) == (404, True)


def test_what_a_killed_station_left_half_written_is_cleared(tmp_path: Path) -> None:
    store = Store(tmp_path / "pictures")
    digest = store.put(b"x")
    left = store.path(digest).parent / ".1-2.partial"
    left.write_bytes(b"half")
    Store(tmp_path / "pictures")
    assert not left.exists()
    assert store.get(digest) == b"x"


def test_a_killed_station_has_all_that_it_acknowledged(tmp_path: Path) -> None:
    """Three rounds of what benchmarks/station_kill.py does fifty times."""
    import threading

    import httpx

    made, data = bundle(tmp_path), tmp_path / "station"
    acknowledged: list[str] = []

    def write(url: str, who: int) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            try:
                for k in range(1000):
                    content = good(17 * who + k)
                    answer = send(client, content, part_id=f"{who}-{k}")  # type: ignore[arg-type]
                    if answer.status_code == 201:
                        acknowledged.append(answer.json()["id"])
            except httpx.HTTPError:
                return

    for _ in range(3):
        count = len(acknowledged)
        with serving(data, made) as server:
            threads = [threading.Thread(target=write, args=(server.url, who)) for who in range(3)]
            for thread in threads:
                thread.start()
            while len(acknowledged) < count + 20:
                assert any(thread.is_alive() for thread in threads)
                time.sleep(0.01)
            server.kill()
            for thread in threads:
                thread.join()
    database = Database(f"sqlite:///{data / 'station.db'}", data / "audit.head")
    found = verify(database)
    assert found.faults == []
    from sqlalchemy import select

    from anomalyst.station.tables import Inspection

    with database.read() as session:
        kept = session.scalars(select(Inspection)).all()
    assert set(acknowledged) <= {row.uid for row in kept}
    store = Store(data / "pictures")
    for row in kept:
        assert store.get(row.image_sha256 or "")
        assert store.get(row.map_sha256 or "")
    database.close()
