"""The object that users hold: stages, categories, calibration, errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from anomalyst import Detector, InputError, Sample, evaluate, load_dataset
from anomalyst.features.cache import FeatureCache
from anomalyst.promises import belonging, describe, require_levels
from anomalyst.scoring import Decision
from conftest import TINY, blot, save, texture


@pytest.fixture
def detector(tiny_weights: str) -> Detector:
    return Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96)


def test_fit_holds_out_calibrates_and_decides(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts(good=30))
    detector.fit(data.train, calibration=0.7)
    assert len(detector.references["plate"]) == 9
    assert detector.calibration["plate"].count == 21
    found = {Path(p.image).parts[-2:]: p for p in detector.predict(data.test)}
    bad = [p for key, p in found.items() if key[0] == "blot"]
    assert all(p.verdict == "review" and p.p_value == pytest.approx(1 / 22) for p in bad)
    assert all(p.threshold is None and p.calibrated for p in bad)  # 1 % needs 99
    for p in bad:
        x, _, width, _ = p.regions[0].bbox
        assert x < 72 and x + width > 48 and p.regions[0].score <= p.map.max()
    detector.decision = Decision(0.05, 0.2)
    bad = [p for p in detector.predict(data.test) if "blot" in p.image]
    assert all(p.verdict == "ng" and p.score > p.threshold for p in bad)


def test_shots_are_drawn_by_seed_and_none_calibrates(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts())
    detector.fit(data.train, shots=2, calibration=0.5)
    first = [r.sha256 for r in detector.references["plate"]]
    detector.fit(data.train, shots=2, calibration=0.5)
    assert first == [r.sha256 for r in detector.references["plate"]]
    assert detector.setting == "few-shot" and detector.shots == 2
    detector.seed = 1
    detector.fit(data.train, shots=2, calibration=0.5)
    assert first != [r.sha256 for r in detector.references["plate"]]


def test_nothing_held_out_nothing_promised(detector: Detector) -> None:
    detector.enroll("plate", [texture(0)])
    (found,) = detector.predict(blot(texture(1), 20, 20, 30))
    assert found.score > 0
    assert (found.calibrated, found.p_value, found.verdict, found.threshold) == (
        False,
        None,
        None,
        None,
    )
    assert found.regions == ()


def test_categories_by_name_by_sample_and_by_retrieval(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts(("across", "down")))
    detector.fit(data.train, calibration=0)
    assert detector.categories == ("across", "down")
    paths = [sample.path for sample in data.test]
    truth = [sample.category for sample in data.test]
    assert [p.category for p in detector.predict(data.test)] == truth
    assert [p.category for p in detector.predict(paths)] == truth
    assert {p.category for p in detector.predict(paths, category="down")} == {"down"}
    with pytest.raises(InputError, match="did you mean 'across'"):
        detector.predict(paths, category="acros")


def test_every_kind_of_source_gives_the_same_score(detector: Detector, tmp_path: Path) -> None:
    detector.enroll("plate", [texture(0)])
    path = save(tmp_path / "a.png", texture(1))
    sources = [path, str(path), path.read_bytes(), texture(1), Sample(path, "plate")]
    scores = {found.score for found in detector.predict(sources)}
    assert len(scores) == 1
    of_file = hashlib.sha256(path.read_bytes()).hexdigest()
    hashes = [found.sha256 for found in detector.predict(sources)]
    assert hashes[:3] == [of_file] * 3 and hashes[4] == of_file and len(hashes[3]) == 64
    names = [found.image for found in detector.predict(sources)]
    assert names == [str(path), str(path), "image-2", "image-3", str(path)]


def test_prediction_is_lazy_and_one_bad_image_spoils_nothing(
    detector: Detector, tmp_path: Path
) -> None:
    detector.enroll("plate", [texture(0)])
    taken = []

    def sources():
        for k in range(1000):
            taken.append(k)
            yield texture(k) if k != 1 else tmp_path / "missing.png"

    stream = detector.predict(sources(), batch_size=2)
    first, second, third = next(stream), next(stream), next(stream)
    assert first.error is None and third.error is None
    assert "missing.png" in second.error and second.score is None
    stream.close()
    assert len(taken) < 20


def test_enrolling_more_lowers_scores_and_drops_the_calibration(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts())
    detector.fit(data.train, calibration=0.5)
    odd = blot(texture(77), 30, 30, 30)
    before = next(detector.predict(odd)).score
    detector.enroll("plate", [odd])
    after = next(detector.predict(odd))
    assert after.score < 0.1 * before
    assert not after.calibrated


def test_calibration_leaves_references_out(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts())
    detector.fit(data.train, shots=4, calibration=0)
    assert detector.calibrate(data.train) == {"plate": 8}
    only = [s for s in data.train if s.path.name in {r.name for r in detector.references["plate"]}]
    with pytest.raises(InputError, match="all 4 images given are references"):
        detector.calibrate(only)
    with pytest.raises(InputError, match="normal images only"):
        detector.calibrate(data.test)


def test_a_calibrated_bundle_decides_the_same(
    detector: Detector, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_dataset(make_parts(good=40))
    detector.decision = Decision(0.05, 0.1)
    detector.fit(data.train, calibration=0.5)
    before = list(detector.predict(data.test))
    again = Detector.load(detector.save(tmp_path / "b"))
    assert again.image_size == 96 and not again.square
    assert again.decision == Decision(0.05, 0.1)
    assert [p.verdict for p in again.predict(data.test)] == [p.verdict for p in before]
    assert list(again.predict(data.test)) == before
    assert again.fingerprint == detector.fingerprint


def test_refusals_come_before_any_work(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fit or enroll first"):
        detector.predict(texture(0))
    with pytest.raises(InputError, match="fit or enroll before"):
        detector.save(tmp_path / "b")
    with pytest.raises(InputError, match="at least one normal"):
        detector.enroll("plate", [])
    with pytest.raises(InputError, match="did you mean 'anomaly-dino'"):
        Detector("anomalydino")
    with pytest.raises(InputError, match="no training images"):
        detector.fit([])
    with pytest.raises(InputError, match="normal images only"):
        detector.fit([Sample(tmp_path / "a.png", "plate", 1)])
    bad = save(tmp_path / "ok.png", texture(0)), tmp_path / "no.png"
    with pytest.raises(InputError, match=r"no\.png"):
        detector.enroll("plate", bad)
    assert detector.categories == ()


def test_an_unsupported_level_is_refused_with_the_number_needed(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    detector.fit(load_dataset(make_parts()).train, calibration=0.5)
    require_levels(detector, (0.2, None), ["plate"])
    with pytest.raises(InputError, match="at least 99 held-out normal images, it has 6"):
        require_levels(detector, (None, 0.01), ["plate"])
    (line,) = describe(detector)
    assert "--alpha 0.1429" in line  # 1 / 7, rounded up
    require_levels(detector, (0.1429,), ["plate"])
    with pytest.raises(InputError, match="nothing could be sent to review"):
        Decision(0.1, 0.01)


def test_maps_lie_on_the_original_pixels(detector: Detector) -> None:
    wide = [np.repeat(texture(k, 100, 150), 2, axis=1) for k in range(3)]
    detector.enroll("plate", wide[:2])
    (found,) = detector.predict(blot(wide[2], 40, 220, 50))
    assert found.map.shape == (100, 300)
    row, column = np.unravel_index(found.map.argmax(), found.map.shape)
    assert 30 <= row < 100 and 205 <= column < 285


def test_peak_memory_is_this_processes_own() -> None:
    import subprocess
    import sys

    ballast = np.ones(60_000_000)  # 480 MB that a child process must not be charged with
    code = "from anomalyst.evaluation import peak_rss_mb; print(peak_rss_mb())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10 < float(found.stdout) < ballast.nbytes / 1e6


def test_a_failed_fit_leaves_the_detector_as_it_was(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts(("across", "down")))
    detector.fit(data.train, calibration=0.5)
    before = [p.score for p in detector.predict(data.test)]
    next(s.path for s in data.train if s.category == "down").write_bytes(b"")
    with pytest.raises(InputError, match="000"):
        detector.fit(data.train, calibration=0)
    assert detector.categories == ("across", "down") and len(detector.calibration) == 2
    assert [p.score for p in detector.predict(data.test)] == before


def test_a_loaded_detector_is_fitted_again_on_the_same_footing(
    tiny_weights: str, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_dataset(make_parts())
    first = Detector("patchcore", backbone=TINY, weights=tiny_weights, image_size=64, square=True)
    first.fit(data.train, calibration=0)
    again = Detector.load(first.save(tmp_path / "b"))
    again.fit(data.train, calibration=0)
    assert again.engine.preprocess == first.engine.preprocess
    scores = [[p.score for p in each.predict(data.test)] for each in (first, again)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_calibration_counts_each_image_once(detector: Detector, tmp_path: Path) -> None:
    detector.enroll("plate", [texture(0)])
    copies = [Sample(save(tmp_path / f"{k}.png", texture(1)), "plate", 0) for k in range(30)]
    assert detector.calibrate(copies) == {"plate": 1}


def test_images_that_calibrated_are_not_tested_on(
    detector: Detector, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts())
    detector.fit(data.train, calibration=0)
    good = [s for s in data.test if s.label == 0]
    detector.calibrate(good[:2])
    row = evaluate(detector, data).metrics["categories"]["plate"]
    assert (row["n_normal"], row["n_anomalous"]) == (len(good) - 2, 3)


def test_the_cache_keeps_apart_what_differs(tiny_weights: str, tmp_path: Path) -> None:
    """A file that changes between reading and caching, and another size on the same cache."""
    cache = FeatureCache(tmp_path / "cache")
    path = save(tmp_path / "latest.png", texture(1))
    settings = {"backbone": TINY, "weights": tiny_weights, "feature_cache": cache}
    detector = Detector("anomaly-dino", image_size=96, **settings)
    detector.enroll("plate", [texture(0)])
    good = next(detector.predict(path)).score
    save(path, blot(texture(1), 20, 20, 40))
    assert next(detector.predict(path)).score > 2 * good
    save(path, texture(1))
    assert next(detector.predict(path)).score == good
    smaller = Detector("anomaly-dino", image_size=64, **settings)
    smaller.enroll("plate", [texture(0)])
    assert next(smaller.predict(path)).score_map.values.shape == (4, 4)


def test_a_plain_folder_stands_for_the_only_product(
    detector: Detector, make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_dataset(make_parts(("across", "down")))
    detector.fit(data.train, calibration=0)
    folder = load_dataset(data.train[0].path.parent)
    assert folder.layout == "folder"
    with pytest.raises(InputError, match="--category"):
        belonging(detector, folder, folder.train)
    chosen = belonging(detector, folder, folder.train, ["down"])
    assert {sample.category for sample in chosen} == {"down"}
    with pytest.raises(InputError, match="did you mean 'down'"):
        belonging(detector, folder, folder.train, ["dow"])


def test_an_image_too_elongated_is_named(detector: Detector, tmp_path: Path) -> None:
    detector.enroll("plate", [texture(0)])
    path = save(tmp_path / "strip.png", texture(1, 20, 900))
    (found,) = detector.predict(path)
    assert found.error.startswith(str(path)) and "32" in found.error
