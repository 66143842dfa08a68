"""What teaching does to a detector, and to its calibration."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import numpy as np
import pytest

from anomalyst.errors import InputError
from anomalyst.station import lesson
from anomalyst.station.remembered import Remembered
from conftest import save, texture
from quality_parts import BOX, CALIBRATION, nagl_bundle, pictures_in, png, stained


@pytest.fixture
def bundle(tiny_weights: str, tmp_path: Path) -> tuple[Path, list[Path]]:
    return nagl_bundle(tiny_weights, tmp_path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_taught_defect_stands_out_and_calibration_begins_anew(
    bundle: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    taught, (first, again) = bundle, pictures_in(tmp_path / "bad", [stained(30), stained(31)])
    detector = lesson.load(taught[0])
    before = lesson.look(detector, [*taught[1], again], "gear")
    ended = lesson.learn(
        detector,
        lesson.Lesson("gear", abnormal=((first, lesson.box_mask(BOX, 96, 96)),)),
    )
    assert ended["gear"].count == len(CALIBRATION) and "gear" not in detector.calibration
    *good, bad = lesson.look(detector, [*taught[1], again], "gear")
    usual = max(seen.score for seen in before[:-1])
    assert bad.score / max(seen.score for seen in good) > before[-1].score / usual

    lesson.calibrate(detector, "gear", dict(zip(map(digest, taught[1]), good, strict=True)))
    known = detector.calibration["gear"]
    assert known.scores == tuple(sorted(seen.score for seen in good))
    assert known.images == ended["gear"].images
    again_loaded = lesson.load(detector.save(tmp_path / "new"))
    assert again_loaded.calibration["gear"] == known


def test_references_calibrate_nothing(bundle: tuple[Path, list[Path]], tmp_path: Path) -> None:
    detector = lesson.load(bundle[0])
    (more,) = pictures_in(tmp_path / "more", [texture(60)])
    lesson.learn(detector, lesson.Lesson("gear", normal=(more,)))
    assert digest(more) in lesson.references(detector, "gear")
    lesson.calibrate(detector, "gear", {digest(more): lesson.Seen(0.0, 0.0)})
    assert "gear" not in detector.calibration
    with pytest.raises(InputError, match="given already"):
        lesson.learn(detector, lesson.Lesson("gear", normal=(more,)))


@pytest.mark.parametrize(
    ("kind", "method", "options", "normal", "abnormal"),
    [
        ("bundle", "nagl", {}, True, True),
        ("bundle", "anomaly-dino", {}, True, False),
        ("bundle", "inp-former", {}, False, False),
        ("bundle", "inp-former", {"stored": 10}, True, False),
        ("export", "nagl", {}, False, False),
    ],
)
def test_what_can_be_taught_and_why_not(
    kind: str, method: str, options: dict[str, int], normal: bool, abnormal: bool
) -> None:
    found = lesson.teachable(kind, method, options)
    assert (found.normal, found.abnormal) == (normal, abnormal)
    assert (found.why_not is None) == normal and (found.why_no_defects is None) == abnormal


def test_a_box_is_cut_at_the_border_and_may_not_be_empty() -> None:
    mask = lesson.box_mask((-2, 1, 5, 100), 4, 6)
    assert mask[1:, :3].all() and mask.sum() == 9
    for box in ((0, 0, 0, 3), (6, 0, 2, 2), (-9, 0, 3, 3), (0, 0, -1, 2)):
        with pytest.raises(InputError, match="marks nothing"):
            lesson.box_mask(box, 4, 6)


def test_a_drawn_mask_is_read_or_refused(tmp_path: Path) -> None:
    drawn = np.zeros((4, 6), np.uint8)
    drawn[1, 2:4] = 9
    text = base64.b64encode(png(drawn)).decode()
    assert np.array_equal(lesson.png_mask(text, 4, 6), drawn > 0)
    assert np.array_equal(lesson.png_mask(f"data:image/png;base64,{text}", 4, 6), drawn > 0)
    transparent = np.zeros((4, 6, 4), np.uint8)
    transparent[..., :3] = 255
    transparent[0, 0, 3] = 255
    text = base64.b64encode(png(transparent)).decode()
    assert lesson.png_mask(text, 4, 6).sum() == 1
    for wrong, said in (("?!", "no base64"), ("aGVsbG8=", "mask"), (text, "draw it at")):
        with pytest.raises(InputError, match=said):
            lesson.png_mask(wrong, 5, 6)


def test_a_picture_that_cannot_be_judged_is_named(bundle: tuple[Path, list[Path]]) -> None:
    broken = save(bundle[0].parent / "x.png", texture(1))
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InputError, match=r"x\.png"):
        lesson.look(lesson.load(bundle[0]), [broken], "gear")


def test_features_are_remembered_exactly_and_within_bounds() -> None:
    maps = [np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 2, 2)]
    kept = Remembered(most_bytes=2 * maps[0].nbytes)
    for key in "ab":
        kept.put(key, maps)
    np.testing.assert_array_equal(kept.get("a")[0], maps[0])  # not rounded to half precision
    kept.put("c", maps)
    assert kept.get("b") is None and kept.get("a") is not None and kept.get("c") is not None


def test_a_lesson_tried_again_sees_no_picture_again(
    bundle: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, pictures = bundle
    monkeypatch.setattr("anomalyst.station.remembered.FEATURES", Remembered())
    once = lesson.look(lesson.load(place), pictures, "gear")
    again = lesson.load(place)
    monkeypatch.setattr(type(again.engine), "_extract", lambda *_: pytest.fail("seen again"))
    assert lesson.look(again, pictures, "gear") == once
