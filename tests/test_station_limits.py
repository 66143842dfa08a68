"""What is too large, too many, or not what it says it is."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from fastapi.testclient import TestClient

from anomalyst.station.limits import shown_name
from station_parts import API, PNG, client_of, plain, send, settings

KIB = 1 << 10


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("limits")
    limits = {"max_image": 64 * KIB, "max_batch": 128 * KIB, "max_recipe": 256 * KIB}
    with client_of(settings(folder, **limits, max_batch_images=4)) as made:
        yield made


def chunks(size: int, seen: list[int]) -> Iterator[bytes]:
    """A body without a length; ``seen`` tells how much of it was taken."""
    for _ in range(size // KIB):
        seen.append(KIB)
        yield b"x" * KIB


@pytest.mark.parametrize("path", ["/inspections", "/inspections/batch", "/recipes?name=new"])
def test_a_body_that_says_it_is_too_large_is_refused_unread(client: TestClient, path: str) -> None:
    headers = {"Content-Type": "image/png", "Content-Length": str(1 << 40)}
    answer = client.post(API + path, content=b"x", headers=headers)
    assert answer.status_code == 413
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/inspections", "image/png"),
        ("/inspections", "multipart/form-data; boundary=b"),
        ("/inspections/batch", "multipart/form-data; boundary=b"),
        ("/recipes?name=new", "application/zip"),
        (f"/inspections/{'0' * 32}/decision", "application/json"),
    ],
)
def test_a_body_without_a_length_is_refused_as_it_comes(
    client: TestClient, path: str, kind: str
) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head if "form" in kind else b""
        yield from chunks(8 << 20, [])

    answer = client.post(API + path, content=body(), headers={"Content-Type": kind})
    assert answer.status_code == 413, answer.text
    station = client.app.state.station  # type: ignore[attr-defined]
    assert list(station.uploads.iterdir()) == []


def test_a_picture_at_the_limit_is_read_and_one_byte_more_is_not(client: TestClient) -> None:
    exact = plain() + b"\0" * (64 * KIB - len(plain()))
    assert send(client, exact).status_code == 201  # bytes after the picture's end do not matter
    assert send(client, exact + b"\0").status_code == 413
    form = {"image": ("a.png", exact + b"\0", "image/png")}
    assert client.post(f"{API}/inspections", files=form).status_code == 413


def test_a_batch_of_too_many_pictures_is_refused(client: TestClient) -> None:
    files = [("images", (f"{k}.png", plain(), "image/png")) for k in range(5)]
    answer = client.post(f"{API}/inspections/batch", files=files)
    assert answer.status_code == 400
    assert "4" in answer.json()["error"]


def header_only(width: int, height: int) -> bytes:
    """A PNG whose header tells of so many pixels, and which holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(10_001, 10_000), (100_000, 100_000), (1 << 30, 2), (2, 1 << 30)]
)
def test_a_bomb_is_refused_by_its_header(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr("anomalyst.data.images._load", decoded)
    answer = send(client, header_only(width, height))
    assert answer.status_code == 422
    assert "megapixels" in answer.json()["error"]


def test_100_megapixels_are_not_too_many_for_the_header(client: TestClient) -> None:
    answer = send(client, header_only(10_000, 10_000))
    assert answer.status_code == 422
    assert "damaged" in answer.json()["error"]  # there are no pixels behind that header


@pytest.mark.parametrize("kind", ["text/html", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_kind_is_refused(client: TestClient, kind: str) -> None:
    answer = client.post(f"{API}/inspections", content=plain(), headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert "image/png" in answer.json()["error"]


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=b",
        "multipart/form-data; boundary=b; charset=no",
    ],
    ids=["no boundary", "no parts", "no such charset"],
)
@pytest.mark.parametrize("path", ["/inspections", "/inspections/batch"])
def test_a_form_that_is_none_is_refused(client: TestClient, path: str, kind: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--\r\n'
    for body in (b"", b"nonsense", head):
        answer = client.post(API + path, content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "query",
    [
        {"part_id": "\0"},
        {"part_id": "x" * 201},
        {"recipe": "a\nb"},
        {"category": "\x1b[31m"},
        {"name": "a\u202eb"},
    ],
)
def test_words_that_no_database_or_screen_should_get_are_refused(
    client: TestClient, query: dict[str, str]
) -> None:
    answer = client.post(f"{API}/inspections", params=query, content=plain(), headers=PNG)
    assert answer.status_code == 422
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "C:\\x\\y.png", "/abs.png", "a\0b.png", "\ud800.png", "x" * 999, ""],
)
def test_a_files_name_is_only_ever_text(tmp_path: Path, name: str) -> None:
    shown = shown_name(name)
    assert shown.isprintable()
    assert len(shown) <= 255
    shown.encode()


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/page/../../cli.py",
        "/page/%2e%2e/%2e%2e/cli.py",
        f"{API}/inspections/..%2f..%2fetc/image",
        f"{API}/inspections/{'0' * 31}/image",
        f"{API}/recipes/..%2f../versions",
        "/pictures/",
        "/station.db",
    ],
)
def test_no_path_leads_to_a_file(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 404, 422)


def test_bodies_share_a_bound_of_memory(tmp_path: Path) -> None:
    with client_of(settings(tmp_path, max_buffered=10 * KIB)) as client:
        answer = client.post(f"{API}/inspections", content=chunks(20 * KIB, []), headers=PNG)
        assert answer.status_code == 503
        assert send(client, plain()).status_code == 201  # and it is free again
