"""Drift, repeatability and the shift report of a station that judges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")

from anomalyst.station import drift
from anomalyst.station import line as monitoring
from anomalyst.station.repeatability import Look, study
from anomalyst.station.shift_page import Facts, Row, render
from conftest import texture
from quality_parts import CALIBRATION, GOOD, Line, dented, nagl_bundle, png


@pytest.fixture(scope="module")
def gears(tiny_weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nagl_bundle(tiny_weights, tmp_path_factory.mktemp("gears"))[0]


@pytest.fixture
def line(gears: Path, tmp_path: Path, database_url: str) -> Iterator[Line]:
    with Line(tmp_path / "station", gears, url=database_url) as found:
        yield found


def dimmed(seed: int) -> bytes:
    """A good part under a lamp that is worn out."""
    return png((texture(seed).astype(np.float32) * 0.6).astype(np.uint8))


# ---- drift --------------------------------------------------------------------------------------


def test_only_new_good_parts_count_for_drift(line: Line) -> None:
    for picture in (GOOD[0], CALIBRATION[0], texture(300), texture(300)):
        line.inspect(png(picture))
    line.inspect(png(texture(301)), part_id="7")
    line.inspect(png(texture(302)), part_id="7")  # the same part once more
    line.decided(png(dented(40)), "defect")
    found = line.get("/recipes/gears/drift")
    assert found["score"]["count"] == found["features"]["count"] == 2
    assert found["score"]["baseline"] == 24 and found["features"]["baseline"] == 0
    assert found["alarm"] is None and found["evidence"] < 0.01
    assert "at most one false alarm in 10,000 parts" in found["words"]


def test_another_light_raises_an_alarm_in_plain_words_until_it_is_seen(line: Line) -> None:
    uids = [line.inspect(png(texture(300 + k)))["id"] for k in range(10)]
    uids += [line.inspect(dimmed(400 + k))["id"] for k in range(40)]
    found = line.get("/recipes/gears/drift", category="gear")
    change = found["score"]["change"]
    assert change["direction"] == "higher" and change["now"] > change["usual"]
    # So soon the bets may have begun to win a little early, by chance.
    assert uids.index(change["since"]["id"]) <= 11 < uids.index(change["at"]["id"]) < 40
    assert found["evidence"] == 1
    assert found["alarm"].startswith("Scores are higher than in the calibration, probably since ")
    assert "Look at camera, light, lens" in found["alarm"]
    assert line.post("/recipes/gears/drift/seen", 200, note="lamp changed")["alarm"] is None
    assert line.get("/recipes/gears/drift")["score"]["count"] == 0
    row = line.get("/audit", limit=1)["items"][0]
    assert row["action"] == "drift.seen" and "lamp changed" in row["detail"]


def test_watching_begins_anew_before_it_grows_slow(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "_BLOCK", 4)
    for k in range(13):  # the last three blocks: 9th to 13th are one and a bit, 5th to 8th one
        line.inspect(png(texture(300 + k)))
    assert line.get("/recipes/gears/drift")["score"]["count"] == 9


def test_an_unknown_category_is_named(line: Line) -> None:
    answer = line.client.get("/api/v1/recipes/gears/drift", params={"category": "geer"})
    assert answer.status_code == 422 and "did you mean 'gear'" in answer.json()["error"]


# ---- repeatability ------------------------------------------------------------------------------


def test_looks_at_parts_make_a_study(line: Line) -> None:
    looks: dict[str, list[Look]] = {"a": [], "b": []}
    for part, make in (("a", texture), ("b", dented)):
        for k in range(3):
            judged = line.inspect(png(make(700 + k)), part_id=part)
            looks[part].append(Look(judged["score"], judged["verdict"]))
    line.inspect(png(texture(700)), part_id="a")  # the same file: no look of its own
    line.inspect(png(texture(800)), part_id="once")
    found, expected = line.get("/recipes/gears/repeatability"), study(looks)
    assert [part["part_id"] for part in found["parts"]] == ["a", "b"]
    assert [part["n"] for part in found["parts"]] == [3, 3]
    assert found["grr_percent"] == pytest.approx(expected.grr_percent)
    assert found["repeatability_sd"] == pytest.approx(expected.repeatability_sd)
    assert found["flip_rate"] == 0 and "1 look at a picture" in found["words"]
    one = line.get("/recipes/gears/repeatability", part_id=["b", "unknown"])
    assert [part["part_id"] for part in one["parts"]] == ["b"] and one["grr_percent"] is None


# ---- the shift ----------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects text and tags; a tag in somebody's text would show up here."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_the_shift_report_says_what_was_judged_decided_and_changed(line: Line) -> None:
    for k in range(3):
        line.inspect(png(texture(300 + k)))
    line.decided(png(texture(310)), "good")
    bad = line.decided(png(dented(40)), "good", part_id="<script>alert(1)</script>")
    line.post("/recipes/gears/golden", 201, inspection=bad, expected="fail", note="the dent")
    line.post("/recipes/gears/thresholds", 201, ng=0.9, review=0.04, note="by Ann")
    line.inspect(png(dented(41)))
    answer = line.client.get("/api/v1/recipes/gears/shift")
    policy = answer.headers["content-security-policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = _Page(answer.text)
    said = re.sub(r"\s+", " ", page.text)
    assert "parts 6 ok" in said and "limits set by hand" in said
    assert "1 (nagl)" in said and "2 (nagl)" in said and "review above 0.04 (by hand)" in said
    assert "local 2 1 0" in said  # two decisions, one against a verdict
    assert "must fail: the dent" in said and "version 2 judges in place of 1: by Ann" in said
    assert "<script>alert(1)</script>" in page.text
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "link" not in tags
    sources = [found["src"] or "" for tag, found in page.tags if tag == "img"]
    assert len(sources) == 2 and all(s.startswith("data:image/jpeg;base64,") for s in sources)


def test_a_shift_is_a_span_of_time(line: Line) -> None:
    line.inspect(png(texture(300)))
    moment = datetime.now(timezone.utc) + timedelta(hours=1)
    path = "/api/v1/recipes/gears/shift"
    empty = line.client.get(path, params={"since": moment.isoformat()})
    assert empty.status_code == 422 and "before until" in empty.json()["error"]
    later = {"since": moment.isoformat(), "until": (moment + timedelta(hours=8)).isoformat()}
    said = _Page(line.client.get(path, params=later).text).text
    assert "parts 0 ok" in said and "nobody decided anything" in said
    assert line.client.get(path, params={"since": "9999-12-31T23:59:59-14:00"}).status_code == 422


def test_whatever_people_write_stays_text() -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    row = Row("2026-01-31T08:15:00.000000Z", evil, evil, 0.5, evil, evil, None)
    facts = Facts(
        evil,
        "2026",
        "2026",
        "2026",
        {evil: 1},
        [evil],
        evil,
        [(evil, evil, evil, 1)],
        [(evil, 1, 1, 0, 0)],
        [(evil, 1, 0, 0)],
        [(evil, evil, evil)],
        [row],
        3,
    )
    page = _Page(render(facts))
    assert "img" not in [tag for tag, _ in page.tags] and page.text.count(evil) >= 10
    assert "and 3 earlier ones" in page.text and "2026-01-31 08:15:00" in page.text


def test_the_rate_is_shared_by_all_that_is_watched(line: Line) -> None:
    assert line.get("/recipes/gears/drift")["parts_a_false_alarm"] == drift.PARTS_A_FALSE_ALARM


# ---- roles --------------------------------------------------------------------------------------


def test_viewers_and_operators_look_and_engineers_change(line: Line) -> None:
    from anomalyst.station.keys import add_key

    database = line.app.state.station.database
    keys = {role: add_key(database, role, role, "test") for role in ("operator", "engineer")}
    home = "/api/v1/recipes/gears"
    for role, status in (("operator", 403), ("engineer", 422)):
        headers = {"X-API-Key": keys[role]}
        for place in ("thresholds", "thresholds/preview", "teach", "teach/preview", "golden"):
            body = {"wrong": 1}
            answer = line.client.post(f"{home}/{place}", json=body, headers=headers)
            assert answer.status_code == status, place
        for place in ("history", "golden", "drift", "repeatability", "shift"):
            assert line.client.get(f"{home}/{place}", headers=headers).status_code == 200
    headers = {"X-API-Key": keys["operator"]}
    assert line.client.delete(f"{home}/golden/1", headers=headers).status_code == 403
    assert line.client.post(f"{home}/drift/seen", json={}, headers=headers).status_code == 403
    assert line.client.get(f"{home}/shift").status_code == 401
