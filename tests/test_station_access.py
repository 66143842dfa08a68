"""Who may do what, and what a foreign page or a careless caller cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from fastapi.testclient import TestClient

from anomalyst.errors import InputError
from anomalyst.station.core import Station
from anomalyst.station.database import Database
from anomalyst.station.keys import add_key, any_key, find_key, revoke_key
from anomalyst.station.limits import Buckets
from anomalyst.station.settings import is_loopback
from station_parts import API, PNG, client_of, plain, settings


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    yield made
    made.close()


def test_a_key_is_found_by_its_secret_alone(database: Database) -> None:
    token = add_key(database, "anna", "operator", "test")
    other = add_key(database, "ben", "viewer", "test")
    prefix, number, secret = token.split("_")
    assert (prefix, len(secret)) == ("ast", 64)
    wrong = [f"ast_{number}_{'0' * 64}", f"ast_999_{secret}", "ast", "", f"ast_x_{secret}"]
    wrong += [f"ast_{other.split('_')[1]}_{secret}", f"ast_{'9' * 40}_{secret}", "ast_²_a"]
    with database.read() as session:
        found = find_key(session, token)
        assert found is not None
        assert (found.name, found.role) == ("anna", "operator")
        assert secret not in found.sha256
        assert [find_key(session, each) for each in wrong] == [None] * len(wrong)


def test_a_revoked_key_is_none(database: Database) -> None:
    token = add_key(database, "anna", "operator", "test")
    revoke_key(database, "anna", "test")
    with database.read() as session:
        assert find_key(session, token) is None
        assert any_key(session)
        assert not any_key(session, active=True)
    with pytest.raises(InputError, match="revoked already"):
        revoke_key(database, "anna", "test")


@pytest.mark.parametrize(
    ("name", "role", "words"),
    [("anna", "boss", "unknown role"), ("", "viewer", "name"), ("a\nb", "viewer", "name")],
)
def test_keys_that_cannot_be_are_refused(
    database: Database, name: str, role: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        add_key(database, name, role, "test")


def test_a_name_is_given_once(database: Database) -> None:
    add_key(database, "anna", "viewer", "test")
    with pytest.raises(InputError, match="already"):
        add_key(database, "anna", "viewer", "test")


@pytest.fixture(scope="module")
def keyed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[TestClient, dict[str, dict[str, str]]]]:
    """A station with one key a role; their headers, by role."""
    with client_of(settings(tmp_path_factory.mktemp("keyed"))) as client:
        database = client.app.state.station.database  # type: ignore[attr-defined]
        tokens = {
            role: add_key(database, f"the {role}", role, "test")
            for role in ("viewer", "operator", "engineer")
        }
        yield client, {role: {"X-API-Key": token} for role, token in tokens.items()}


# Method, path, body, and the least role; viewer reads, operator inspects, engineer changes.
ROUTES = [
    ("GET", "/me", None, "viewer"),
    ("GET", "/recipes", None, "viewer"),
    ("GET", "/recipes/plates/versions", None, "viewer"),
    ("GET", "/inspections", None, "viewer"),
    ("GET", "/inspections.csv", None, "viewer"),
    ("GET", "/inspections.jsonl", None, "viewer"),
    ("GET", "/audit", None, "viewer"),
    ("GET", "/audit/verify", None, "viewer"),
    ("GET", "/watch", None, "viewer"),
    ("POST", "/inspections", b"x", "operator"),
    ("POST", "/inspections/batch", b"x", "operator"),
    ("POST", f"/inspections/{'0' * 32}/decision", {"decision": "good"}, "operator"),
    ("POST", "/recipes?name=new", b"x", "engineer"),
    ("POST", "/recipes/plates/activate", {"number": 1}, "engineer"),
    ("POST", "/watch", {"folder": "/no/such"}, "engineer"),
    ("DELETE", "/watch?folder=none", None, "engineer"),
]


@pytest.mark.parametrize(("method", "path", "body", "least"), ROUTES)
def test_a_role_may_do_so_much_and_no_more(
    keyed: tuple[TestClient, dict[str, dict[str, str]]],
    method: str,
    path: str,
    body: object,
    least: str,
) -> None:
    client, headers = keyed
    given = {"content": body} if isinstance(body, bytes) else {"json": body} if body else {}

    def status(**more: str) -> int:
        return client.request(method, API + path, headers=more, **given).status_code

    assert status() == 401
    assert status(**{"X-API-Key": "ast_1_nonsense"}) == 401
    roles = ["viewer", "operator", "engineer"]
    for role in roles:
        allowed = roles.index(role) >= roles.index(least)
        assert (status(**headers[role]) == 403) != allowed


def test_a_key_may_come_as_a_bearer(keyed: tuple[TestClient, dict[str, dict[str, str]]]) -> None:
    client, headers = keyed
    token = headers["operator"]["X-API-Key"]
    me = client.get(f"{API}/me", headers={"Authorization": f"Bearer {token}"}).json()
    assert me == {"name": "the operator", "role": "operator", "open": False}
    wrong = client.get(f"{API}/me", headers={"Authorization": f"Basic {token}"})
    assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")


def test_health_needs_no_key_and_metrics_do(
    keyed: tuple[TestClient, dict[str, dict[str, str]]],
) -> None:
    client, headers = keyed
    assert client.get("/healthz").status_code == 200
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers=headers["viewer"]).status_code == 200


def test_the_log_names_who_decided(keyed: tuple[TestClient, dict[str, dict[str, str]]]) -> None:
    client, headers = keyed
    sent = client.post(
        f"{API}/inspections", content=plain(), headers=PNG | headers["operator"]
    ).json()
    assert sent["actor"] == "the operator"
    told = client.post(
        f"{API}/inspections/{sent['id']}/decision",
        json={"decision": "good"},
        headers=headers["engineer"],
    ).json()
    assert told["decided_by"] == "the engineer"


def test_without_any_key_this_machine_is_the_engineer(tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        assert client.get(f"{API}/me").json() == {"name": "local", "role": "engineer", "open": True}
    with client_of(settings(tmp_path), address="192.0.2.7") as client:
        assert client.get(f"{API}/me").status_code == 401


def test_once_a_key_was_made_the_station_stays_closed(tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        database = client.app.state.station.database  # type: ignore[attr-defined]
        add_key(database, "anna", "viewer", "test")
        revoke_key(database, "anna", "test")
        assert client.get(f"{API}/me").status_code == 401


def test_other_machines_need_a_key_first(tmp_path: Path) -> None:
    made = settings(tmp_path, host="0.0.0.0")
    with pytest.raises(InputError, match="anomalyst key add"):
        Station(made)
    database = Database(made.database_url)
    token = add_key(database, "anna", "viewer", "test")
    database.close()
    with client_of(made, address="192.0.2.7") as client:
        assert client.get(f"{API}/me").status_code == 401
        answer = client.get(f"{API}/me", headers={"X-API-Key": token, "Host": "station.plant"})
        assert answer.json()["name"] == "anna"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "["]
)
def test_a_foreign_name_for_this_machine_is_refused(tmp_path: Path, host: str) -> None:
    with client_of(settings(tmp_path)) as client:
        answer = client.get(f"{API}/me", headers={"Host": host})
        assert answer.status_code == 400
        for own in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
            assert client.get(f"{API}/me", headers={"Host": own}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_page_from_elsewhere_changes_nothing(tmp_path: Path, headers: dict[str, str]) -> None:
    with client_of(settings(tmp_path)) as client:
        answer = client.post(f"{API}/inspections", content=plain(), headers=PNG | headers)
        assert answer.status_code == 403
        assert client.get(f"{API}/inspections").json()["items"] == []
        own = PNG | {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
        assert client.post(f"{API}/inspections", content=plain(), headers=own).status_code == 201


def test_answers_tell_browsers_what_not_to_do(tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        for path in (f"{API}/me", f"{API}/none", "/healthz"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "access-control-allow-origin" not in headers


def test_who_asks_too_often_waits(tmp_path: Path) -> None:
    with client_of(settings(tmp_path, rate=0.001, burst=3)) as client:
        codes = [client.get(f"{API}/me").status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        assert client.get(f"{API}/me").headers["retry-after"] == "1"


def test_who_guesses_keys_waits(tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        wrong = {"X-API-Key": f"ast_1_{'0' * 64}"}
        codes = [client.get(f"{API}/me", headers=wrong).status_code for _ in range(25)]
        assert codes[:20] == [401] * 20
        assert codes[24] == 429


def test_a_bucket_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [0.0]
    monkeypatch.setattr("anomalyst.station.limits.time.monotonic", lambda: moment[0])
    buckets = Buckets(rate=2, burst=3)
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b")
    moment[0] = 1.0
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "192.168.0.1", "localhost.evil", "")),
    ],
)
def test_what_is_this_machine(host: str, own: bool) -> None:
    assert is_loopback(host) == own
