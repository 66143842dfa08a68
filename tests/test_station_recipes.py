"""Recipes: given at the start, uploaded, switched, rolled back."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from fastapi.testclient import TestClient

from anomalyst.errors import InputError
from anomalyst.station.bundles import keep_bundle
from anomalyst.station.core import Station
from anomalyst.station.recipes import add_version, find_recipe, recipe_name
from anomalyst.station.settings import Settings
from station_parts import API, bad, bundle, client_of, plain, send, settings, zipped

ZIP = {"Content-Type": "application/zip"}


@pytest.fixture
def client(database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    with client_of(settings(tmp_path, database_url)) as made:
        yield made


def upload(client: TestClient, content: bytes, name: str, note: str = "") -> Any:
    query = {"name": name, "note": note}
    return client.post(f"{API}/recipes", params=query, content=content, headers=ZIP)


def test_a_bundle_given_at_the_start_is_a_recipe(client: TestClient) -> None:
    (recipe,) = client.get(f"{API}/recipes").json()
    assert (recipe["name"], recipe["versions"], recipe["method"]) == ("plates", 1, "by-hand")
    assert (recipe["kind"], recipe["can_teach"]) == ("export", False)
    assert "exported" in recipe["why_not"]
    assert recipe["categories"] == [
        {
            "name": "red",
            "calibrated": True,
            "n_normal": 1,
            "n_abnormal": 0,
            "n_calibration": 19,
            "needed_for": {"0.1": 0, "0.2": 0},
        }
    ]


def test_an_upload_is_a_new_recipe_and_its_next_one_a_version(
    client: TestClient, tmp_path: Path
) -> None:
    first = zipped(bundle(tmp_path, "one"))
    made = upload(client, first, "line 2", "first")
    assert made.status_code == 201, made.text
    assert (made.json()["name"], made.json()["active"]["number"]) == ("line 2", 1)
    again = upload(client, first, "line 2")
    assert (again.status_code, "version 1" in again.json()["error"]) == (409, True)
    second = upload(client, zipped(bundle(tmp_path, "two", alpha=0.2)), "line 2", "laxer")
    assert second.json()["active"]["number"] == 2
    versions = client.get(f"{API}/recipes/line 2/versions").json()
    assert [(v["number"], v["note"], v["parent"], v["active"]) for v in versions] == [
        (2, "laxer", 1, True),
        (1, "first", None, False),
    ]
    assert client.get(f"{API}/audit/verify").json()["ok"]


def test_a_version_judges_until_another_is_made_active(client: TestClient, tmp_path: Path) -> None:
    """The second version's reference has the spot's colour: what was wrong is right."""
    assert send(client, plain()).json()["verdict"] == "ok"
    blue = bundle(tmp_path, "blue")
    from tiny_export import write

    made = write(blue, {"red": ((40, 40, 200),)}, calibration={"red": [0.1] * 19})
    assert upload(client, zipped(made), "plates").status_code == 201
    after = send(client, plain()).json()
    assert (after["version"], after["verdict"]) == (2, "ng")
    back = client.post(f"{API}/recipes/plates/activate", json={"number": 1, "note": "wrong"})
    assert back.json()["active"]["number"] == 1
    again = send(client, plain()).json()
    assert (again["version"], again["verdict"]) == (1, "ok")
    log = client.get(f"{API}/audit").json()["items"]
    (row,) = [r for r in log if r["action"] == "recipe.activate" and "wrong" in r["detail"]]
    assert json.loads(row["detail"]) == {"former": 2, "note": "wrong", "number": 1}


def test_what_is_not_there_is_said(client: TestClient) -> None:
    missing = client.get(f"{API}/recipes/plate/versions")
    assert (missing.status_code, "plates" in missing.json()["error"]) == (404, True)
    assert client.post(f"{API}/recipes/plates/activate", json={"number": 9}).status_code == 404
    assert send(client, plain(), recipe="plate").status_code == 404


def test_two_recipes_must_be_named(client: TestClient, tmp_path: Path) -> None:
    upload(client, zipped(bundle(tmp_path, "one")), "other")
    answer = send(client, plain())
    assert (answer.status_code, "recipe=NAME" in answer.json()["error"]) == (400, True)
    assert send(client, plain(), recipe="other").json()["recipe"] == "other"


def altered(folder: Path, name: str, content: bytes) -> bytes:
    (folder / name).write_bytes(content)
    return zipped(folder)


def packed(**files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def test_an_upload_that_is_no_whole_bundle_is_refused(client: TestClient, tmp_path: Path) -> None:
    whole = zipped(bundle(tmp_path, "a"))
    for content in (
        b"no zip",
        packed(),
        packed(**{"exported.json": b"{}"}),
        packed(**{"bundle.json": b"{"}),
        whole[:-30],
        altered(bundle(tmp_path, "b"), "model.onnx", b"other"),
        altered(bundle(tmp_path, "c"), "exported.json", b"{}"),
    ):
        answer = upload(client, content, "new")
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert "\n" not in error
        assert str(tmp_path) not in error  # where the station keeps things is nobody's business
    assert [recipe["name"] for recipe in client.get(f"{API}/recipes").json()] == ["plates"]
    station = client.app.state.station  # type: ignore[attr-defined]
    assert list(station.uploads.iterdir()) == []
    assert len(list((tmp_path / "station" / "recipes").iterdir())) == 1


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".hidden"])
def test_a_bundle_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    from anomalyst.runtime.exported import MANIFEST
    from anomalyst.sealed import sealed

    made = bundle(tmp_path, "a")
    manifest = json.loads((made / MANIFEST).read_bytes())
    manifest.pop("seal")
    from hashlib import sha256

    manifest["sha256"][name] = sha256(b"evil").hexdigest()
    (made / MANIFEST).write_bytes(sealed(manifest))
    content = zipped(made)
    file = tmp_path / "upload.zip"
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(file, "w") as out:
        for entry in archive.namelist():
            if not entry.endswith("/"):
                out.writestr(entry, archive.read(entry))
        out.writestr(name, b"evil")
    with pytest.raises(InputError, match="outside"):
        keep_bundle(Settings(data=tmp_path / "station"), file)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_zip_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anomalyst.station.bundles._MOST_BYTES", 1 << 20)
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("exported.json", b"\0" * (2 << 20))
    assert file.stat().st_size < 10_000
    with pytest.raises(InputError, match="unpacks to"):
        keep_bundle(Settings(data=tmp_path / "station"), file)


def test_a_recipe_that_a_check_forbids_stays_as_it_is(client: TestClient, tmp_path: Path) -> None:
    from anomalyst.station.refusals import Refusal

    station: Station = client.app.state.station  # type: ignore[attr-defined]

    def never(*_: object) -> None:
        raise Refusal(409, "golden samples break", broken=[1])

    station.checks.append(never)
    answer = upload(client, zipped(bundle(tmp_path, "two", alpha=0.2)), "plates")
    assert (answer.status_code, answer.json()["broken"]) == (409, [1])
    answer = client.post(f"{API}/recipes/plates/activate", json={"number": 1})
    assert answer.status_code == 409
    assert len(client.get(f"{API}/recipes/plates/versions").json()) == 1


def test_thresholds_by_hand_judge_and_promise_nothing(client: TestClient) -> None:
    station: Station = client.app.state.station  # type: ignore[attr-defined]
    kept = keep_bundle(station.settings, Path(station.settings.bundles[0]))
    with station.database.change("test") as change:
        recipe = find_recipe(change.session, "plates")
        add_version(change, recipe, kept, thresholds={"red": {"ng": 1e6, "review": 1e-3}})
    spoilt = send(client, bad()).json()
    assert (spoilt["verdict"], spoilt["by_hand"], spoilt["calibrated"]) == ("review", True, True)
    assert (spoilt["threshold"], spoilt["threshold_review"]) == (1e6, 1e-3)
    assert spoilt["p_value"] == 0.05  # what the calibration says is told all the same
    assert send(client, plain()).json()["verdict"] == "ok"


def test_the_same_bundle_at_the_next_start_rolls_nothing_forward(tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        upload(client, zipped(bundle(tmp_path, "two", alpha=0.2)), "plates")
    with client_of(settings(tmp_path)) as client:
        (recipe,) = client.get(f"{API}/recipes").json()
        assert (recipe["versions"], recipe["active"]["number"]) == (2, 2)


def test_two_bundles_of_one_name_are_versions(tmp_path: Path) -> None:
    places = (bundle(tmp_path / "x"), bundle(tmp_path / "y", alpha=0.2))
    with client_of(settings(tmp_path, bundles=places)) as client:
        (recipe,) = client.get(f"{API}/recipes").json()
        assert recipe["versions"] == 2


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\0", " a", "x" * 101, "a ", "-x", "é\n"])
def test_names_that_no_address_can_hold_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        recipe_name(name)
    assert recipe_name("Fläche 2.1_b+") == "Fläche 2.1_b+"


def test_a_detector_with_torch_judges_as_the_library_does(
    tmp_path: Path, tiny_weights: str, make_parts: Any
) -> None:
    pytest.importorskip("torch")
    from anomalyst import Detector, load_dataset
    from conftest import TINY

    data = load_dataset(make_parts())
    detector = Detector("patchcore", backbone=TINY, weights=tiny_weights, image_size=64)
    detector.fit(data.train, calibration=0.5)
    detector.save(tmp_path / "torch")
    file = next(sample.path for sample in data.test if sample.label == 1)
    (expected,) = detector.predict([file])
    with client_of(settings(tmp_path, bundles=(tmp_path / "torch",))) as client:
        answer = send(client, file.read_bytes()).json()
        (recipe,) = client.get(f"{API}/recipes").json()
    assert answer["score"] == pytest.approx(expected.score, rel=1e-5)
    assert answer["p_value"] == expected.p_value
    assert -1 <= answer["similarity"] <= 1
    assert (recipe["kind"], recipe["can_teach"], recipe["why_not"]) == ("bundle", True, None)
    assert recipe["categories"][0]["n_calibration"] == 6


def test_a_bundle_given_at_the_start_must_not_break_a_golden_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`serve` keeps it as a version, and the one before goes on judging."""
    first = settings(tmp_path)
    with client_of(first) as client:
        uid = send(client, bad()).json()["id"]
        golden = {"inspection": uid, "expected": "fail", "note": ""}
        path = f"{API}/recipes/plates/golden"
        assert client.post(path, json=golden).json()["holds"]
    blind = bundle(tmp_path / "other", calibration={})
    caplog.set_level(logging.WARNING)
    with client_of(replace(first, bundles=(blind,))) as client:
        (recipe,) = client.get(f"{API}/recipes").json()
        assert recipe["active"]["number"] == 1
        assert len(client.get(f"{API}/recipes/plates/versions").json()) == 2
        assert client.get(f"{API}/audit/verify").json()["ok"]
    assert "the bundle given is not used: 1 golden sample would break" in caplog.text
    wider = bundle(tmp_path / "third", calibration={"red": [0.01] * 19})
    with client_of(replace(first, bundles=(wider,))) as client:
        assert client.get(f"{API}/recipes").json()[0]["active"]["number"] == 3
