"""Pictures to the station and what comes back, with results that are known in advance."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from fastapi.testclient import TestClient
from PIL import Image

from anomalyst.predictions import to_record
from anomalyst.runtime import Runtime
from anomalyst.types import Prediction
from station_parts import API, RED, bad, bundle, client_of, good, plain, png, send, settings
from tiny_export import coloured, spotted


@pytest.fixture
def client(database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    with client_of(settings(tmp_path, database_url)) as made:
        yield made


@pytest.fixture
def local(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(settings(tmp_path)) as made:
        yield made


def test_a_good_part_is_ok_and_a_spot_is_ng(client: TestClient) -> None:
    fine = send(client, plain(), part_id="7", name="fine.png").json()
    assert (fine["p_value"], fine["verdict"]) == (1.0, "ok")
    assert fine["score"] == pytest.approx(0, abs=1e-9)
    assert (fine["image"], fine["part_id"], fine["category"]) == ("fine.png", "7", "red")
    assert (fine["recipe"], fine["version"], fine["calibrated"]) == ("plates", 1, True)
    # Of 19 scores the 18th lies at 10 %, the 16th at 20 %.
    assert (fine["threshold"], fine["threshold_review"], fine["by_hand"]) == (0.18, 0.16, False)
    spoilt = send(client, bad()).json()
    # A patch's score is the squared distance of its colour to the reference's, after normalising.
    apart = (np.array((40, 200, 40)) - RED) / 255 / 0.25
    assert spoilt["score"] == pytest.approx(float(apart @ apart), rel=1e-5)
    assert (spoilt["p_value"], spoilt["verdict"]) == (0.05, "ng")
    ((left, top, width, height),) = (region["bbox"] for region in spoilt["regions"])
    assert left <= 8 < 16 <= left + width  # the spot, and what upsampling spreads of it
    assert top <= 16 < 24 <= top + height
    assert width * height < 32 * 32 / 2


def test_the_answer_begins_with_the_keys_of_predictions(client: TestClient) -> None:
    answer = send(client, plain()).json()
    assert list(answer)[1:12] == list(to_record(Prediction("x")))


def test_what_is_answered_is_what_is_kept(client: TestClient, tmp_path: Path) -> None:
    content = bad()
    answer = send(client, content, part_id="7")
    assert answer.status_code == 201
    kept = client.get(answer.json()["links"]["self"])
    assert kept.json() == answer.json()
    digest = hashlib.sha256(content).hexdigest()
    assert answer.json()["image_sha256"] == digest
    file = tmp_path / "station" / "pictures" / digest[:2] / digest
    assert file.read_bytes() == content


def test_the_same_picture_twice_is_two_inspections_and_one_file(client: TestClient) -> None:
    first, second = send(client, bad()).json(), send(client, bad()).json()
    assert first["id"] != second["id"]
    assert first["image_sha256"] == second["image_sha256"]


def test_a_form_carries_the_files_name(client: TestClient) -> None:
    files = {"image": ("../../etc/passwd\n.png", plain(), "image/png")}
    answer = client.post(f"{API}/inspections", files=files)
    assert answer.status_code == 201
    assert "\n" not in answer.json()["image"]


def test_pictures_are_drawn(local: TestClient) -> None:
    links = send(local, bad()).json()["links"]
    shown = local.get(links["image"])
    assert (shown.content, shown.headers["content-type"]) == (bad(), "image/png")
    grey = np.asarray(Image.open(io.BytesIO(local.get(links["map"]).content)))
    assert grey.shape == (32, 32)
    assert grey[20, 12] == 255  # the spot: far over two heat units
    assert grey[2, 2] == 0
    drawn = np.asarray(Image.open(io.BytesIO(local.get(links["overlay"]).content)))
    assert drawn.shape == (32, 32, 3)
    assert tuple(drawn[2, 2]) == RED  # nothing is hidden where nothing is wrong
    assert (drawn[16:24, 8:16] != (40, 200, 40)).any()
    small = Image.open(io.BytesIO(local.get(links["image"], params={"side": 16}).content))
    assert small.size == (16, 16)


def test_the_nearest_good_part_is_shown(local: TestClient) -> None:
    uid = send(local, bad()).json()["id"]
    missing = local.get(f"{API}/inspections/{uid}/nearest")
    assert (missing.status_code, list(missing.json())) == (404, ["error"])
    close = png(spotted(RED, (198, 44, 40)))
    other, near = send(local, plain()).json(), send(local, close).json()
    assert near["verdict"] == "ok"
    # Judged OK is not known to be good.
    assert local.get(f"{API}/inspections/{uid}/nearest").status_code == 404
    for part in (other, near):
        told = {"decision": "good", "reason": ""}
        local.post(f"{API}/inspections/{part['id']}/decision", json=told)
    found = local.get(f"{API}/inspections/{uid}/nearest")
    assert found.headers["x-inspection"] == near["id"]  # its mean colour is the nearer one
    assert found.content == close
    told = {"decision": "defect", "reason": "too dark"}
    assert local.post(f"{API}/inspections/{near['id']}/decision", json=told).status_code == 200
    found = local.get(f"{API}/inspections/{uid}/nearest")
    assert found.content == plain()


def test_tiff_is_shown_as_png(local: TestClient) -> None:
    links = send(local, png(coloured(RED), "TIFF")).json()["links"]
    shown = local.get(links["image"])
    assert shown.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.content))), coloured(RED))


def test_several_pictures_are_answered_in_order(client: TestClient) -> None:
    content = {"a.png": plain(), "b.png": b"\x89PNG\r\n\x1a\nnothing", "c.png": bad()}
    files = [("images", (name, data, "image/png")) for name, data in content.items()]
    answer = client.post(f"{API}/inspections/batch", files=files, params={"part_id": "9"})
    assert answer.status_code == 200
    first, broken, third = answer.json()
    assert (first["image"], first["verdict"], first["part_id"]) == ("a.png", "ok", "9")
    assert set(broken) == {"image", "error"}
    assert broken["image"] == "b.png"
    assert "b.png" in broken["error"]
    assert (third["image"], third["verdict"]) == ("c.png", "ng")
    assert len(client.get(f"{API}/inspections").json()["items"]) == 2


@pytest.mark.parametrize(
    "content",
    [b"no picture", bad()[:60], b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"BM", b"II*\0" + b"\xff" * 30],
    ids=["text", "cut", "zeros", "two bytes", "tiff"],
)
def test_a_broken_picture_is_refused_and_leaves_no_record(
    client: TestClient, content: bytes
) -> None:
    answer = send(client, content)
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]
    assert "\n" not in answer.json()["error"]
    assert client.get(f"{API}/inspections").json() == {"items": [], "next": None}


def test_a_category_that_nobody_knows_is_refused(client: TestClient) -> None:
    answer = send(client, plain(), category="rde")
    assert answer.status_code == 422
    assert "did you mean 'red'" in answer.json()["error"]
    assert send(client, plain(), category="red").status_code == 201


def test_inspections_are_listed_page_by_page(client: TestClient) -> None:
    sent = [send(client, good(k), part_id=str(k % 2)).json()["id"] for k in range(7)]
    found, before = [], None
    while True:
        query = {"limit": 3, **({} if before is None else {"before": before})}
        page = client.get(f"{API}/inspections", params=query).json()
        found += [item["id"] for item in page["items"]]
        before = page["next"]
        if before is None:
            break
    assert found == sent[::-1]
    odd = client.get(f"{API}/inspections", params={"part_id": "1"}).json()["items"]
    assert [item["id"] for item in odd] == sent[1::2][::-1]


def test_filters_choose(client: TestClient) -> None:
    fine, spoilt = send(client, plain()).json(), send(client, bad()).json()

    def ids(**query: object) -> list[str]:
        items = client.get(f"{API}/inspections", params=query).json()["items"]
        return [item["id"] for item in items]

    assert ids(verdict="ng") == [spoilt["id"]]
    assert ids(verdict="ok") == [fine["id"]]
    assert ids(pending=True) == [spoilt["id"]]
    assert ids(recipe="plates") == [spoilt["id"], fine["id"]]
    assert ids(recipe="other") == []
    assert ids(since=spoilt["created_at"]) == [spoilt["id"]]
    assert ids(until=spoilt["created_at"]) == [fine["id"]]
    told = {"decision": "good", "reason": "glare"}
    decided = client.post(f"{API}/inspections/{spoilt['id']}/decision", json=told).json()
    assert (decided["decision"], decided["decision_reason"]) == ("good", "glare")
    assert (decided["decided_by"], decided["decided_at"] > spoilt["created_at"]) == ("local", True)
    assert ids(pending=True) == []
    assert ids(decision="good") == [spoilt["id"]]


def test_a_decision_may_change_and_the_log_keeps_both(client: TestClient) -> None:
    uid = send(client, bad()).json()["id"]
    for word in ("good", "defect"):
        client.post(f"{API}/inspections/{uid}/decision", json={"decision": word})
    assert client.get(f"{API}/inspections/{uid}").json()["decision"] == "defect"
    log = client.get(f"{API}/audit").json()["items"]
    told = [json.loads(row["detail"])["decision"] for row in log if row["action"] == "decide"]
    assert told == ["defect", "good"]
    assert client.get(f"{API}/audit/verify").json()["ok"] is True


def test_exports_hold_everything_that_was_asked_for(client: TestClient) -> None:
    sent = [send(client, good(k), name="=1+1").json() for k in range(3)]
    table = client.get(f"{API}/inspections.csv", params={"verdict": "ok"})
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [row["id"] for row in rows] == [answer["id"] for answer in sent[::-1]]
    assert [float(row["score"]) for row in rows] == [answer["score"] for answer in sent[::-1]]
    assert {row["image"] for row in rows} == {"'=1+1"}  # no spreadsheet computes it
    lines = client.get(f"{API}/inspections.jsonl").text.splitlines()
    assert [json.loads(line) for line in lines] == sent[::-1]


def test_an_uncalibrated_recipe_says_so(tmp_path: Path) -> None:
    made = bundle(tmp_path, "raw", calibration={})
    with client_of(settings(tmp_path, bundles=(made,))) as client:
        answer = send(client, bad()).json()
        assert answer["calibrated"] is False
        assert (answer["p_value"], answer["verdict"], answer["threshold"]) == (None, None, None)
        assert answer["score"] > 1
        (recipe,) = client.get(f"{API}/recipes").json()
        (category,) = recipe["categories"]
        # One false reject in 10 needs 9 held-out images, one in 5 needs 4.
        assert category["needed_for"] == {"0.1": 9, "0.2": 4}


def test_pictures_that_wait_are_judged_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    sizes: list[int] = []
    real = Runtime._run

    def noting(self: Runtime, images: np.ndarray, category: str | None) -> dict[str, np.ndarray]:
        sizes.append(len(images))
        return real(self, images, category)

    with client_of(settings(tmp_path)) as client:
        monkeypatch.setattr(Runtime, "_run", noting)
        station = client.app.state.station  # type: ignore[attr-defined]
        with ThreadPoolExecutor(12) as pool:
            import threading

            gate = threading.Event()
            holding = pool.submit(station.judges.run, gate.wait)
            answers = [pool.submit(send, client, good(k)) for k in range(10)]
            while station.judges.waiting < 10:
                assert not any(answer.done() for answer in answers)
            gate.set()
            assert holding.result()
            assert {answer.result().status_code for answer in answers} == {201}
    assert max(sizes) == 8
    assert sum(sizes) == 10


def test_a_full_queue_is_said_at_once(tmp_path: Path) -> None:
    import threading
    from concurrent.futures import ThreadPoolExecutor

    with client_of(settings(tmp_path, waiting=2)) as client, ThreadPoolExecutor(4) as pool:
        station = client.app.state.station  # type: ignore[attr-defined]
        gate = threading.Event()
        holding = pool.submit(station.judges.run, gate.wait)
        answers = [pool.submit(send, client, good(k)) for k in range(2)]
        while station.judges.waiting < 2:
            pass
        late = send(client, plain())
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        gate.set()
        assert holding.result()
        assert {answer.result().status_code for answer in answers} == {201}
        assert send(client, plain()).status_code == 201


def test_metrics_count_what_was_judged(local: TestClient) -> None:
    send(local, plain())
    send(local, bad())
    send(local, bad())
    text = local.get("/metrics").text
    assert 'anomalyst_inspections_total{recipe="plates",source="api",verdict="ng"} 2.0' in text
    assert 'anomalyst_inspections_total{recipe="plates",source="api",verdict="ok"} 1.0' in text
    assert 'anomalyst_requests_total{status="201"} 3.0' in text
    assert "anomalyst_waiting 0.0" in text
    assert local.get("/healthz").json() == {"status": "ok"}


def test_a_map_comes_back_as_it_was_packed() -> None:
    from anomalyst.data.masks import Ignored
    from anomalyst.station.pictures import pack_map, unpack_map
    from anomalyst.types import ScoreMap

    random = np.random.default_rng(0)
    mask = random.random((5, 9)) > 0.5
    made = ScoreMap(
        random.random((4, 6)).astype(np.float32),
        (40, 60),
        1.5,
        (0.0, 2.0, 40.0, 56.0),
        Ignored(mask, (40, 60), (3, -2)),
    )
    found, unit = unpack_map(pack_map(made, 0.25))
    assert unit == 0.25
    assert np.array_equal(found.at(40, 60), made.at(40, 60))
