"""Teaching over the API: seen first, saved, rolled back; golden samples stand in the way."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")

from anomalyst.scoring import normals_needed
from anomalyst.station import drafts, history
from conftest import texture
from quality_parts import BOX, CALIBRATION, STAINS, Line, dented, nagl_bundle, png, stained


@pytest.fixture(scope="module")
def gears(tiny_weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nagl_bundle(tiny_weights, tmp_path_factory.mktemp("gears"))[0]


@pytest.fixture
def line(gears: Path, tmp_path: Path, database_url: str) -> Iterator[Line]:
    with Line(tmp_path / "station", gears, url=database_url) as found:
        yield found


def box(uid: str) -> dict[str, object]:
    return {"id": uid, "box": list(BOX)}


def calibrated(line: Line) -> None:
    """Give the station the very pictures that calibrated the bundle."""
    for picture in CALIBRATION:
        line.inspect(png(picture))


def test_a_defect_is_taught_seen_saved_and_rolled_back(line: Line) -> None:
    calibrated(line)
    goods = [line.decided(png(texture(200 + k)), "good") for k in range(4)]
    taught, *missed = [line.decided(png(stained(seed)), "defect") for seed in STAINS]
    assert [line.get(f"/inspections/{uid}")["verdict"] for uid in missed] == ["ok"] * 3
    seen = line.post("/recipes/gears/teach/preview", 200, abnormal=[box(taught)])
    assert seen["before"]["n_defect"] == seen["before"]["misses"] == 3  # not the taught one
    assert seen["after"]["misses"] == 0
    changed = {each["id"]: each for each in seen["changed"] if each["label"] == "defect"}
    assert changed.keys() == {*missed}
    assert {(each["before"], each["after"]) for each in changed.values()} == {("ok", "review")}
    assert seen["before"]["n_good"] == len(goods) and not seen["blocked"]
    assert seen["calibration"] | {"words": ""} == {
        "before": 24,
        "after": 24,
        "kept": 24,
        "history": 0,
        "words": "",
        "needed_for": {"0.01": normals_needed(0.01) - 24, "0.05": 0},
    }
    assert line.get("/recipes")[0]["active"]["number"] == 1  # nothing is saved yet
    assert seen["after"]["ordered"] >= seen["before"]["ordered"]

    saved = line.post("/recipes/gears/teach", 201, token=seen["token"], note="the stain")
    assert saved["number"] == 2 and saved["active"] and saved["parent"] == 1
    (category,) = line.get("/recipes")[0]["categories"]
    assert (category["n_abnormal"], category["n_calibration"]) == (1, 24)
    again = line.inspect(png(stained(STAINS[1])))
    assert again["version"] == 2 and again["verdict"] == "review"
    assert again["score"] == pytest.approx(changed[missed[0]]["score_after"], abs=1e-5)
    past = line.get("/recipes/gears/history")
    assert past["confusion"] == seen["after"] and past["left_out"] == 1
    line.post("/recipes/gears/teach", 404, token=seen["token"])  # a preview is saved once

    line.post("/recipes/gears/activate", 200, number=1, note="back")
    assert line.inspect(png(stained(STAINS[1])))["verdict"] == "ok"
    logged = [row for row in line.get("/audit")["items"] if row["action"] == "recipe.teach"]
    detail = json.loads(logged[0]["detail"])
    mask = detail["taught"][0]["mask"]
    assert detail["number"] == 2 and line.app.state.station.store.has(mask)
    assert line.get("/audit/verify")["ok"]


def test_saving_judges_no_picture_again(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated(line)
    line.decided(png(texture(200)), "good")
    bad = line.decided(png(dented(40)), "defect")
    line.post("/recipes/gears/golden", 201, inspection=bad, expected="fail")
    seen = line.post("/recipes/gears/teach/preview", 200, abnormal=[box(bad)])
    judges = line.app.state.station.judges
    monkeypatch.setattr(judges, "judge_images", lambda *a: pytest.fail("judged again"))
    line.post("/recipes/gears/teach", 201, token=seen["token"])


def test_a_calibration_that_the_station_does_not_have_is_lost_and_said_so(line: Line) -> None:
    bad = line.decided(png(dented(40)), "defect")
    seen = line.post("/recipes/gears/teach/preview", 200, abnormal=[box(bad)])
    assert seen["calibration"]["after"] == 0
    assert "no verdicts" in seen["calibration"]["words"]
    assert "24 of the 24 pictures that calibrated it are not here" in seen["calibration"]["words"]
    line.post("/recipes/gears/teach", 201, token=seen["token"])
    judged = line.inspect(png(texture(9)))
    assert judged["verdict"] is None and not judged["calibrated"] and judged["p_value"] is None


def test_pictures_that_calibrated_are_given_back_and_no_others(line: Line) -> None:
    def give(content: bytes) -> tuple[int, dict[str, object]]:
        kind = {"Content-Type": "image/png"}
        answer = line.client.post(
            "/api/v1/recipes/gears/calibration", content=content, headers=kind
        )
        return answer.status_code, answer.json()

    expected = {"category": "gear", "pictures": 24}
    assert line.get("/recipes/gears/calibration") == {**expected, "here": 0}
    for k, picture in enumerate(CALIBRATION):
        assert give(png(picture)) == (200, {**expected, "here": k + 1})
    status, said = give(png(texture(999)))
    assert status == 422 and "not one of the pictures" in str(said["error"])
    assert line.get("/inspections")["items"] == []  # nothing was judged
    bad = line.decided(png(dented(40)), "defect")
    seen = line.post("/recipes/gears/teach/preview", 200, abnormal=[box(bad)])
    assert seen["calibration"]["after"] == seen["calibration"]["kept"] == 24


def test_good_history_calibrates_only_when_asked_and_never_itself(line: Line) -> None:
    goods = [line.decided(png(texture(200 + k)), "good") for k in range(21)]
    bad = line.decided(png(dented(40)), "defect")
    line.post("/recipes/gears/golden", 201, inspection=goods[0], expected="pass")
    lesson = {"abnormal": [box(bad)], "normal": [goods[1]], "calibration": "history"}
    kept = line.post("/recipes/gears/teach/preview", 200, **{**lesson, "calibration": "kept"})
    assert kept["calibration"]["history"] == 0 and kept["after"]["unjudged"] == 20
    assert kept["blocked"]  # without a calibration nothing passes
    refused = line.post("/recipes/gears/teach", 409, token=kept["token"])
    assert [each["expected"] for each in refused["broken"]] == ["pass"]

    seen = line.post("/recipes/gears/teach/preview", 200, **lesson)
    # Neither the golden sample nor the taught part are among those that calibrate.
    assert seen["calibration"]["history"] == seen["calibration"]["after"] == 19
    assert seen["after"]["n_good"] == 20
    # Each is judged by the 18 others, which cannot support 5 %: one more than any level is NG.
    assert seen["after"]["false_rejects"] == seen["after"]["reviews"] == 0


def test_history_of_flagged_parts_is_named_as_one_sided(line: Line) -> None:
    for k in range(6):
        line.decided(png(dented(60 + k)), "good")  # flagged, all of them
    bad = line.decided(png(dented(40)), "defect")
    lesson = {"abnormal": [box(bad)], "calibration": "history"}
    seen = line.post("/recipes/gears/teach/preview", 200, **lesson)
    assert "6 of them were decided because they had been flagged" in seen["calibration"]["words"]


def test_a_changed_recipe_makes_a_preview_void(line: Line) -> None:
    calibrated(line)
    bad = line.decided(png(dented(40)), "defect")
    seen = line.post("/recipes/gears/teach/preview", 200, abnormal=[box(bad)])
    line.post("/recipes/gears/thresholds", 201, ng=0.9, review=0.8)
    said = line.post("/recipes/gears/teach", 409, token=seen["token"])
    assert "changed since this preview" in said["error"]
    for token in ("../../recipes", "x" * 22, "."):
        line.post("/recipes/gears/teach", 404, token=token)


def test_limits_by_hand_end_with_the_references_they_were_set_for(line: Line) -> None:
    calibrated(line)
    line.post("/recipes/gears/thresholds", 201, ng=0.9, review=0.8, note="stricter")
    bad = line.decided(png(dented(40)), "defect")
    seen = line.post("/recipes/gears/teach/preview", 200, abnormal=[box(bad)])
    assert "limits set by hand end" in seen["calibration"]["words"]
    saved = line.post("/recipes/gears/teach", 201, token=seen["token"])
    assert saved["thresholds"] is None and not line.inspect(png(texture(9)))["by_hand"]


def test_what_cannot_be_taught_is_refused_in_words(line: Line) -> None:
    good = line.decided(png(texture(200)), "good")
    bad = line.decided(png(dented(40)), "defect")
    mask = np.zeros((96, 96), np.uint8)
    text = base64.b64encode(png(mask)).decode()
    both = {"id": bad, "box": list(BOX), "mask": text}
    for status, lesson, said in (
        (422, {}, "nothing to teach"),
        (404, {"normal": ["f" * 32]}, "no inspection"),
        (422, {"normal": [bad]}, "was decided defect"),
        (422, {"abnormal": [box(good)]}, "was decided good"),
        (422, {"abnormal": [{"id": bad}]}, "by a box or a mask"),
        (422, {"abnormal": [both]}, "by a box or a mask"),
        (422, {"abnormal": [{"id": bad, "mask": text}]}, "marks no pixel"),
        (422, {"abnormal": [{"id": bad, "box": [0, 0, 96, 96]}]}, "marks the whole image"),
        (422, {"abnormal": [{"id": bad, "box": [200, 0, 5, 5]}]}, "marks nothing"),
        (422, {"normal": [good], "category": "geer"}, "did you mean 'gear'"),
        (422, {"normal": [good], "wrong": 1}, "wrong"),
    ):
        answer = line.post("/recipes/gears/teach/preview", status, **lesson)
        assert said in answer["error"], answer
        assert "pictures" not in answer["error"]  # no path of the station's own files
    line.post("/recipes/none/teach/preview", 404, normal=[good])


def test_a_golden_sample_blocks_what_breaks_it(line: Line) -> None:
    calibrated(line)
    good = line.decided(png(texture(200)), "good")
    bad = line.decided(png(dented(40)), "defect")
    stain = line.decided(png(stained(STAINS[1])), "defect")
    first = line.post("/recipes/gears/golden", 201, inspection=good, expected="pass")
    line.post("/recipes/gears/golden", 201, inspection=bad, expected="fail", note="the dent")
    assert first["holds"] and first["verdict"] == "ok" and first["inspection"] == good
    line.post("/recipes/gears/golden", 409, inspection=good, expected="fail")
    line.post("/recipes/gears/golden", 404, inspection="f" * 32, expected="fail")
    # One that fails already blocks nothing: it is there to be taught.
    failing = line.post("/recipes/gears/golden", 201, inspection=stain, expected="fail")
    assert not failing["holds"]

    blind = {"ng": 1e9, "review": 1e9}
    seen = line.post("/recipes/gears/thresholds/preview", 200, **blind)
    assert seen["blocked"] and seen["misses"] == 2 and seen["before"]["misses"] == 1
    refused = line.post("/recipes/gears/thresholds", 409, **blind)
    assert [each["note"] for each in refused["broken"]] == ["the dent"]
    assert line.get("/recipes")[0]["active"]["number"] == 1

    wild = line.post("/recipes/gears/thresholds", 409, ng=-1.0, review=-2.0)
    assert [each["expected"] for each in wild["broken"]] == ["pass"]
    line.post("/recipes/gears/thresholds", 422, ng=1.0, review=2.0)

    dent = next(each for each in line.get("/recipes/gears/golden") if each["note"])
    gone = line.client.delete(f"/api/v1/recipes/gears/golden/{dent['id']}")
    assert gone.status_code == 204 and len(line.get("/recipes/gears/golden")) == 2
    assert line.client.delete(f"/api/v1/recipes/gears/golden/{dent['id']}").status_code == 404
    assert line.post("/recipes/gears/thresholds", 201, **blind)["number"] == 2
    # Version 2 lets it through, so it holds no more; made must-pass, the way back is blocked.
    line.post("/recipes/gears/golden", 201, inspection=bad, expected="pass")
    back = line.post("/recipes/gears/activate", 409, number=1)
    assert [each["expected"] for each in back["broken"]] == ["pass"]
    actions = [row["action"] for row in line.get("/audit")["items"]]
    assert actions.count("golden.add") == 4 and actions.count("golden.delete") == 1


def test_levels_by_hand_are_tried_saved_and_taken_back(line: Line) -> None:
    calibrated(line)
    uids = [line.decided(png(texture(200 + k)), "good") for k in range(3)]
    bad = line.decided(png(dented(40)), "defect")
    past = line.get("/recipes/gears/history", category="gear")
    scores = {each["id"]: each["score"] for each in past["scores"]}
    assert list(scores) == [bad, *reversed(uids)] and len(past["calibration"]) == 24
    assert past["calibration"] == sorted(past["calibration"])
    assert past["thresholds"]["ng"] is None and past["thresholds"]["review"] > 0
    low = sorted(scores[uid] for uid in uids)
    middle = (low[0] + low[1]) / 2
    seen = line.post("/recipes/gears/thresholds/preview", 200, ng=middle, review=middle)
    assert (seen["false_rejects"], seen["misses"], seen["n_good"]) == (2, 0, 3)
    assert seen["false_rejects_at_most"] == pytest.approx(0.9830, abs=1e-3)  # 1 - 0.05^(..): 2 of 3
    line.post("/recipes/gears/thresholds", 201, ng=middle, note="by hand")
    judged = line.inspect(png(texture(201)))
    assert judged["by_hand"] and judged["threshold"] == middle
    assert line.post("/recipes/gears/thresholds", 201)["thresholds"] is None
    assert not line.inspect(png(texture(201)))["by_hand"]


def test_old_history_is_judged_again_by_the_active_bundle(line: Line) -> None:
    """Scores of parts that an older version saw are those of the new one."""
    calibrated(line)
    uid = line.decided(png(texture(200)), "good")
    old = line.get(f"/inspections/{uid}")["score"]
    more = line.decided(png(texture(300)), "good")
    line.post("/recipes/gears/teach", 201, normal=[more])
    history._scores._known.clear()
    (row,) = line.get("/recipes/gears/history")["scores"]
    assert row["id"] == uid and row["score"] <= old  # one more reference: never further away
    assert row["score"] == pytest.approx(line.inspect(png(texture(200)))["score"], abs=1e-6)


def test_few_previews_are_kept(line: Line) -> None:
    bad = line.decided(png(dented(40)), "defect")
    tokens = [
        line.post("/recipes/gears/teach/preview", 200, abnormal=[box(bad)])["token"]
        for _ in range(drafts._KEPT + 1)
    ]
    line.post("/recipes/gears/teach", 404, token=tokens[0])
    line.post("/recipes/gears/teach", 201, token=tokens[-1])


@pytest.mark.slow
def test_an_export_says_why_it_cannot_be_taught(
    gears: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    pytest.importorskip("onnxscript")
    out = tmp_path / "exported"
    code, _, err = run("export", gears, "-o", out, "--images", gears.parent / "calibration")
    assert code == 0, err
    with Line(tmp_path / "station", out) as line:
        uid = line.decided(png(dented(40)), "defect")
        said = line.post("/recipes/exported/teach/preview", 409, abnormal=[box(uid)])
        assert "an exported bundle only judges" in said["error"]
        assert line.post("/recipes/exported/golden", 201, inspection=uid, expected="fail")["holds"]
        assert line.get("/recipes/exported/history")["confusion"]["n_defect"] == 1
