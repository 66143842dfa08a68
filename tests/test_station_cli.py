"""`anomalyst serve`, `key` and `audit`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

import httpx

from anomalyst.station.database import Database
from conftest import Run
from station_parts import API, PNG, bad, bundle, client_of, plain, send, settings
from station_server import serving


def test_serve_answers_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with serving(tmp_path / "station", bundle(tmp_path)) as server:
        answer = httpx.post(f"{server.url}{API}/inspections", content=bad(), headers=PNG)
        assert (answer.status_code, answer.json()["verdict"]) == (201, "ng")
        assert "server" not in answer.headers
        # Without a length, and endless: refused while it comes.
        taken: list[int] = []

        def endless() -> Iterator[bytes]:
            for k in range(1000):
                taken.append(k)
                yield b"x" * (1 << 20)

        with suppress(httpx.TransportError):  # the connection may end before the answer is read
            refused = httpx.post(f"{server.url}{API}/inspections", content=endless(), headers=PNG)
            assert refused.status_code == 413
        assert len(taken) < 200
        assert server.stop() == 130  # as every command that Ctrl-C ends
    with serving(tmp_path / "station") as server:  # the recipe is known now
        items = httpx.get(f"{server.url}{API}/inspections").json()["items"]
        assert [item["id"] for item in items] == [answer.json()["id"]]


def test_keys_are_made_listed_and_revoked(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "station"
    data.mkdir()
    code, token, _ = run("key", "add", "anna", "--role", "operator", "--data", data)
    assert (code, token[:4], token.count("\n")) == (0, "ast_", 1)
    code, out, _ = run("key", "list", "--data", data, "--json")
    (row,) = json.loads(out)
    assert (row["name"], row["role"], row["revoked_at"]) == ("anna", "operator", None)
    assert token.strip().split("_")[2] not in out
    with client_of(settings(tmp_path)) as client:
        given = {"X-API-Key": token.strip()}
        assert client.get(f"{API}/me", headers=given).json()["name"] == "anna"
        assert run("key", "revoke", "anna", "--data", data)[0] == 0  # while the station runs
        assert client.get(f"{API}/me", headers=given).status_code == 401
    # A name that was given up may get a new key; the old one stays dead.
    code, fresh, _ = run("key", "add", "anna", "--role", "viewer", "--data", data)
    assert code == 0 and fresh != token
    with client_of(settings(tmp_path)) as client:
        for each, status in ((token, 401), (fresh, 200)):
            given = {"X-API-Key": each.strip()}
            assert client.get(f"{API}/me", headers=given).status_code == status
    assert run("audit", "verify", "--data", data)[0] == 0
    code, _, error = run("key", "add", "anna", "--role", "viewer", "--data", data)
    assert (code, "there is a key 'anna' already" in error) == (2, True)
    code, _, error = run("key", "revoke", "ann", "--data", data)
    assert (code, "did you mean 'anna'" in error) == (2, True)
    code, _, error = run("key", "add", "x", "--role", "boss", "--data", data)
    assert (code, "viewer" in error) == (2, True)


def test_the_log_is_verified_from_the_command_line(run: Run, tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        send(client, plain())
    data = tmp_path / "station"
    code, out, _ = run("audit", "verify", "--data", data)
    assert (code, out.split(":")[0]) == (0, "4 rows, 1 inspections")
    database = Database(f"sqlite:///{data / 'station.db'}")
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE inspections SET verdict = 'ng'")
    database.close()
    code, out, error = run("audit", "verify", "--data", data)
    assert (code, "verdict was changed" in error, "1 faults" in out) == (2, True, True)
    code, out, _ = run("audit", "verify", "--data", data, "--json")
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_starts_that_cannot_be_are_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    made, data = bundle(tmp_path), tmp_path / "station"
    for words, said in (
        (("--host", "0.0.0.0"), "anomalyst key add"),
        (("--db", "mysql://x/y"), "not a database"),
        (("--db", "postgresql+psycopg://me:hidden@127.0.0.1:1/x"), "cannot open"),
        (("--watch", tmp_path / "none"), "no such folder"),
        ((tmp_path / "none",), "no such bundle"),
    ):
        code, _, error = run("serve", made, "--data", data, *words)
        assert (code, said in error, error.count("\n")) == (2, True, 1), error
        assert "hidden" not in error
    code, _, error = run("key", "list", "--data", tmp_path / "nowhere")
    assert (code, "--data" in error) == (2, True)


def test_a_second_station_on_the_same_folder_is_refused(run: Run, tmp_path: Path) -> None:
    with client_of(settings(tmp_path)):
        code, _, error = run("serve", "--data", tmp_path / "station")
        assert (code, "another station" in error) == (2, True)


def test_a_port_in_use_is_said(run: Run, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = run("serve", "--data", tmp_path / "station", "--port", port)
    assert (code, f"port {port}" in error) == (2, True)
