"""Watched folders: each file once, whatever happens in between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from fastapi.testclient import TestClient
from sqlalchemy import select

from anomalyst.errors import InputError
from anomalyst.station.core import STATION, Station
from anomalyst.station.database import DatabaseGone, DiskFull
from anomalyst.station.settings import Settings
from anomalyst.station.tables import Watched
from station_parts import API, bad, client_of, good, plain, settings
from test_station_database import gone


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    folder = tmp_path / "camera"
    folder.mkdir()
    return folder


@pytest.fixture
def made(tmp_path: Path, camera: Path, database_url: str) -> Settings:
    return settings(tmp_path, database_url, watch=(camera,), watch_seconds=3600.0)


@pytest.fixture
def station(made: Settings) -> Iterator[Station]:
    """A station that judges, and looks at its folders when a test says so."""
    opened = Station(made)
    opened.judges.start()
    yield opened
    opened.close()


def look(station: Station, times: int = 2) -> None:
    """Look often enough for a file to be seen standing still."""
    for _ in range(times):
        station.watcher.look()


def inspected(station: Station) -> list[str]:
    with station.database.read() as session:
        return list(session.scalars(select(Watched.name).order_by(Watched.id)))


def test_a_file_is_inspected_once_it_stands_still(station: Station, camera: Path) -> None:
    content = bad()
    (camera / "a.png").write_bytes(content[:50])
    look(station, 1)
    (camera / "a.png").write_bytes(content[:90])  # still being written
    look(station, 1)
    (camera / "a.png").write_bytes(content)
    look(station, 1)
    assert inspected(station) == []
    look(station, 1)
    assert inspected(station) == ["a.png"]
    look(station, 3)
    assert inspected(station) == ["a.png"]


def test_files_are_inspected_in_the_order_that_they_came(station: Station, camera: Path) -> None:
    for k, name in enumerate(("c", "a", "b")):
        (camera / f"{name}.png").write_bytes(good(k))
        os.utime(camera / f"{name}.png", ns=(k, k))
    look(station)
    assert inspected(station) == ["c.png", "a.png", "b.png"]


def test_what_is_no_picture_is_left_alone(station: Station, camera: Path, tmp_path: Path) -> None:
    (camera / "notes.txt").write_text("x")
    (camera / ".hidden.png").write_bytes(plain())
    (tmp_path / "secret.png").write_bytes(plain())
    (camera / "link.png").symlink_to(tmp_path / "secret.png")
    (camera / "folder.png").mkdir()
    os.mkfifo(camera / "pipe.png")
    (camera / "day").mkdir()
    (camera / "day" / "1.PNG").write_bytes(plain())
    look(station)
    assert inspected(station) == ["day/1.PNG"]


def test_a_new_content_is_a_new_part_and_a_new_time_is_none(station: Station, camera: Path) -> None:
    file = camera / "last.png"
    file.write_bytes(plain())
    look(station)
    os.utime(file, ns=(5, 5))
    look(station)
    assert inspected(station) == ["last.png"]
    file.write_bytes(bad())
    look(station)
    assert inspected(station) == ["last.png", "last.png"]
    file.write_bytes(plain())  # seen before under this name
    look(station)
    assert inspected(station) == ["last.png", "last.png"]


def test_a_broken_file_is_told_once_and_waits_for_an_operator(
    station: Station, camera: Path
) -> None:
    (camera / "a.png").write_bytes(bad()[:60])
    (camera / "b.png").write_bytes(b"")
    (camera / "c.png").write_bytes(plain())
    look(station, 4)
    from anomalyst.station.queries import Filters, page

    with station.database.read() as session:
        items, _ = page(session, Filters(), 10)
        waiting, _ = page(session, Filters(pending=True), 10)
    told = {item.image: item for item in items}
    assert len(items) == 3
    assert (told["c.png"].verdict, told["c.png"].error, told["c.png"].source) == (
        "ok",
        None,
        "watch",
    )
    assert "a.png" in (told["a.png"].error or "")
    assert "empty" in (told["b.png"].error or "")
    assert (told["a.png"].score, told["a.png"].links.image) == (None, None)
    assert {item.image for item in waiting} == {"a.png", "b.png"}


def test_a_file_too_large_is_told_without_being_held(tmp_path: Path, camera: Path) -> None:
    (camera / "a.png").write_bytes(plain() + b"\0" * 2000)
    station = Station(settings(tmp_path, watch=(camera,), max_image=1000))
    station.judges.start()
    look(station)
    from anomalyst.station.queries import Filters, page

    with station.database.read() as session:
        ((item,), _) = page(session, Filters(), 10)
    assert "limit" in (item.error or "")
    station.close()


def test_a_restart_goes_on_where_it_was(made: Settings, camera: Path) -> None:
    for k in range(3):
        (camera / f"{k}.png").write_bytes(good(k))
    first = Station(made)
    first.judges.start()
    look(first)
    first.close()
    (camera / "3.png").write_bytes(good(3))
    second = Station(made)
    second.judges.start()
    look(second, 4)
    assert sorted(inspected(second)) == ["0.png", "1.png", "2.png", "3.png"]
    (watched,) = second.watcher.folders()
    assert (watched.folder, watched.inspected, watched.error) == (str(camera), 4, None)
    second.close()


@pytest.mark.parametrize("at", ["store", "commit"])
def test_a_station_that_dies_on_the_way_inspects_the_file_once(
    made: Settings, camera: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    (camera / "a.png").write_bytes(bad())
    first = Station(made)
    first.judges.start()
    with monkeypatch.context() as patch:
        fail: Callable[..., Any] = _raise
        if at == "store":
            patch.setattr(first.store, "put", fail)
        else:
            patch.setattr("sqlalchemy.orm.Session.commit", fail)
        with pytest.raises(KeyboardInterrupt):
            look(first)
    first.close()
    second = Station(made)
    second.judges.start()
    look(second)
    assert inspected(second) == ["a.png"]
    second.close()


def _raise(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_database_that_is_gone_loses_no_file(station: Station, camera: Path) -> None:
    (camera / "a.png").write_bytes(bad())
    look(station, 1)
    with gone(station.database), pytest.raises(DatabaseGone):
        look(station, 1)
    look(station)
    assert inspected(station) == ["a.png"]


def test_a_full_disk_loses_no_file(
    station: Station, camera: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskFull("no room")

    (camera / "a.png").write_bytes(bad())
    with monkeypatch.context() as patch:
        patch.setattr(station.store, "put", full)
        with pytest.raises(DiskFull):
            look(station)
    look(station)
    assert inspected(station) == ["a.png"]


def test_more_files_than_may_wait_all_get_their_turn(tmp_path: Path, camera: Path) -> None:
    for k in range(15):
        (camera / f"{k:02d}.png").write_bytes(good(k))
    station = Station(settings(tmp_path, watch=(camera,), waiting=2))
    station.judges.start()
    look(station, 12)
    assert sorted(inspected(station)) == [f"{k:02d}.png" for k in range(15)]
    station.close()


def test_a_folder_that_vanishes_is_told(station: Station, camera: Path) -> None:
    camera.rename(camera.with_name("away"))
    look(station)
    (watched,) = station.watcher.folders()
    assert "No such file" in (watched.error or "")
    camera.with_name("away").rename(camera)
    (camera / "a.png").write_bytes(plain())
    look(station)
    (watched,) = station.watcher.folders()
    assert (watched.error, watched.inspected) == (None, 1)


def test_a_recipe_that_cannot_judge_marks_no_file(station: Station, camera: Path) -> None:
    station.watcher.add(camera, "plates", "blue", STATION)
    (camera / "a.png").write_bytes(plain())
    look(station)
    assert inspected(station) == []
    assert "unknown category 'blue'" in (station.watcher.folders()[0].error or "")
    station.watcher.add(camera, "plates", None, STATION)
    look(station)
    assert inspected(station) == ["a.png"]


def test_the_stations_own_folder_is_not_watched(station: Station, tmp_path: Path) -> None:
    for folder in (tmp_path / "station", tmp_path / "station" / "pictures", tmp_path):
        with pytest.raises(InputError, match="own files"):
            station.watcher.add(folder, None, None, "test")
    with pytest.raises(InputError, match="no such folder"):
        station.watcher.add(tmp_path / "none", None, None, "test")


def test_folders_are_watched_and_let_go_by_the_api(tmp_path: Path, camera: Path) -> None:
    def wait_for(client: TestClient, count: int) -> None:
        until = time.monotonic() + 20
        while client.get(f"{API}/watch").json()[0]["inspected"] < count:
            assert time.monotonic() < until
            time.sleep(0.02)

    with client_of(settings(tmp_path)) as client:
        (camera / "a.png").write_bytes(bad())
        answer = client.post(f"{API}/watch", json={"folder": str(camera), "category": "red"})
        assert answer.status_code == 201
        wait_for(client, 1)
        (item,) = client.get(f"{API}/inspections").json()["items"]
        assert (item["image"], item["verdict"], item["actor"]) == ("a.png", "ng", "watch")
    with client_of(settings(tmp_path)) as client:  # it is still watched after a restart
        (camera / "b.png").write_bytes(plain())
        wait_for(client, 2)
        gone = client.delete(f"{API}/watch", params={"folder": str(camera)})
        assert gone.json() == []
        assert client.delete(f"{API}/watch", params={"folder": "none"}).status_code == 404
        assert client.get(f"{API}/audit/verify").json()["ok"]
