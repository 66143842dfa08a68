"""The parity gate: what it lets pass, what it stops, and what it says then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.export_parity import DriftError, Gate, Parity
from anomalyst.scoring import Decision
from anomalyst.types import Prediction, Sample
from conftest import TINY, blot, save, texture

Change = Callable[[int, Prediction], Prediction]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six good plates, the first four of which calibrate, and two spoilt ones."""
    folder = tmp_path_factory.mktemp("images")
    good = [save(folder / f"good{k}.png", texture(10 + k)) for k in range(6)]
    spoilt = [save(folder / f"spoilt{k}.png", blot(texture(20 + k), 30, 30, 24)) for k in range(2)]
    return [*good, *spoilt]


def enrolled(weights: str, **more: Any) -> Detector:
    made = Detector("anomaly-dino", backbone=TINY, weights=weights, image_size=96, **more)
    made.enroll("plate", [texture(k) for k in range(3)])
    made.enroll("rod", [texture(3, 96, 128)[:, ::-1].copy()])
    return made


@pytest.fixture(scope="module")
def detector(tiny_weights: str, images: list[Path]) -> Detector:
    made = enrolled(tiny_weights)
    made.calibrate([Sample(path, "plate", 0, "good") for path in images[:4]])
    return made


@pytest.fixture(scope="module")
def gate(detector: Detector, images: list[Path]) -> Gate:
    return Gate(detector, images, ["plate", "rod"])


class Changed:
    """What an export would say that differs from torch in one way."""

    def __init__(self, detector: Detector, change: Change) -> None:
        self._detector = detector
        self._change = change
        self.calibration = dict(detector.calibration)

    def predict(self, sources: list[Any], *, category: str | None = None) -> Iterator[Prediction]:
        found = self._detector.predict(sources, category=category)
        return (self._change(k, each) for k, each in enumerate(found))


def check(gate: Gate, detector: Detector, change: Change, int8: bool = False) -> Parity:
    return gate.check(Changed(detector, change), None, int8)  # type: ignore[arg-type]


def moved(found: Prediction, score: float = 0.0, value: float = 0.0) -> Prediction:
    """The prediction with another score, and another value at one patch of its map."""
    assert found.score is not None and found.score_map is not None
    values = found.score_map.values.copy()
    values[0, 0] += value
    score_map = replace(found.score_map, values=values)
    return replace(found, score=found.score + score, score_map=score_map)


def span(detector: Detector, images: list[Path]) -> float:
    """The largest range of a plate's map: a spoilt one's."""
    maps = [p.score_map.values for p in detector.predict(images, category="plate") if p.score_map]
    return max(float(np.ptp(each)) for each in maps)


def test_what_equals_torch_passes(gate: Gate, detector: Detector) -> None:
    parity = check(gate, detector, lambda _, found: found)
    assert (parity.images, parity.calibration_images) == (10, 4)  # eight, and parts of two
    assert parity.sizes == [(96, 96), (96, 144), (128, 96)]
    assert parity.max_map_error == parity.max_score_error == parity.verdicts_flipped == 0
    assert parity.tolerance == 1e-4 and parity.spearman is None
    assert set(parity.seconds) == {"torch", "runtime"}


@pytest.mark.parametrize("what", ["score", "value"])
def test_errors_are_shares_of_the_largest_range_of_a_map(
    gate: Gate, detector: Detector, images: list[Path], what: str
) -> None:
    """Half a tolerance passes and is reported, twice one is not, and names the image."""
    unit = 1e-4 * span(detector, images)

    def by(tolerances: float) -> Change:
        return lambda k, p: moved(p, **{what: tolerances * unit}) if k == 5 else p

    parity = check(gate, detector, by(0.5))
    error = parity.max_score_error if what == "score" else parity.max_map_error
    assert error == pytest.approx(0.5e-4, rel=1e-2)
    thing = "image score" if what == "score" else "map"
    with pytest.raises(DriftError, match=rf"good5\.png: its {thing} differs by 0\.0002"):
        check(gate, detector, by(2))


def test_where_all_maps_are_flat_the_heat_unit_is_the_measure(
    tiny_weights: str, tmp_path: Path
) -> None:
    """An image that is a reference itself has a map of nothing but rounding."""
    plain = save(tmp_path / "plain.png", np.full((96, 96, 3), 120, np.uint8))
    flat = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96, square=True)
    flat.enroll("plate", [plain])
    gate = Gate(flat, [plain], ["plate"])
    unit = 1e-4 * 0.1 * flat.method.heat_unit("plate")
    assert check(gate, flat, lambda _, p: moved(p, score=0.5 * unit)).max_score_error > 0.49e-4
    with pytest.raises(DriftError, match="image score differs"):
        check(gate, flat, lambda _, p: moved(p, score=2 * unit))


def test_a_product_that_no_image_shows_is_compared_all_the_same(
    tiny_weights: str, images: list[Path]
) -> None:
    detector = enrolled(tiny_weights)
    detector.enroll("tile", [np.full((96, 96, 3), 30, np.uint8)])
    gate = Gate(detector, images[:1], ["plate", "rod", "tile"])
    seen: list[str | None] = []

    def noted(_: int, found: Prediction) -> Prediction:
        seen.append(found.category)
        return found

    assert check(gate, detector, noted).images == 4
    assert seen == ["plate", "rod", "rod", "tile"]


def drop_map(_: int, found: Prediction) -> Prediction:
    assert found.score_map is not None
    return replace(found, score_map=replace(found.score_map, values=np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda _, p: replace(p, category="rod"), "taken for 'rod', not 'plate'"),
        (lambda _, p: replace(p, error="broken", score_map=None), "broken"),
        (drop_map, r"its map is \(2, 2\) large, not \(6, 6\)"),
        (lambda _, p: moved(p, value=np.nan), "no numbers"),
        (lambda _, p: moved(p, score=np.inf), "no numbers"),
    ],
)
def test_what_is_of_another_kind_is_stopped(
    gate: Gate, detector: Detector, change: Change, said: str
) -> None:
    with pytest.raises(DriftError, match=rf"good0\.png: .*{said}"):
        check(gate, detector, change)


def test_a_graph_that_breaks_is_stopped(gate: Gate, detector: Detector) -> None:
    def broken(_: int, __: Prediction) -> Prediction:
        raise RuntimeError("shapes\ndiffer")

    with pytest.raises(DriftError, match=r"breaks on these images .shapes differ"):
        check(gate, detector, broken)


def test_a_flipped_verdict_is_told(gate: Gate, detector: Detector, images: list[Path]) -> None:
    """A calibration image is compared with the other three: its own score decides nothing."""
    given = detector.decision
    order = np.argsort([p.score for p in detector.predict(images[:4], category="plate")])
    lowest, highest = (f"good{order[k]}.png" for k in (0, 3))
    scores = detector.calibration["plate"].scores
    detector.decision = Decision(alpha=0.26, alpha_review=0.26)  # above all of three others

    def raised(name: str, by: float) -> Change:
        return lambda _, p: moved(p, score=by if Path(p.image).name == name else 0.0)

    try:
        # Torch finds the highest above the others, and so does an export that gives it more.
        assert check(gate, detector, raised(highest, 1e-6)).verdicts_flipped == 0
        for int8 in (True, False):
            with pytest.raises(DriftError, match=rf"{lowest} is 'ng' .* instead of 'ok'|differs"):
                check(gate, detector, raised(lowest, 2 * (scores[3] - scores[0])), int8)
    finally:
        detector.decision = given


def test_int8_may_move_scores_but_not_their_order(detector: Detector, images: list[Path]) -> None:
    gate = Gate(detector, images, ["plate"])
    more = Changed(detector, lambda _, p: moved(p, score=(p.score or 0) * 1e-3))
    doubled = gate.check(more, None, True)  # type: ignore[arg-type]
    # It is calibrated by its own scores of the same images.
    after, before = more.calibration["plate"], detector.calibration["plate"]
    assert after.scores == pytest.approx([score * 1.001 for score in before.scores], rel=1e-9)
    assert after.images == before.images and after.maxima == before.maxima
    assert doubled.spearman == pytest.approx(1) and doubled.tolerance is None
    assert doubled.max_score_error > 1e-4
    random = np.random.default_rng(0).permutation(64)
    with pytest.raises(DriftError, match="order of the 8 images of 'plate': rank correlation"):
        check(gate, detector, lambda k, p: moved(p, score=float(random[k])), int8=True)


def test_references_have_no_order(tiny_weights: str, images: list[Path], tmp_path: Path) -> None:
    """They score rounding errors alone, which int8 changes."""
    known = [save(tmp_path / f"{k}.png", texture(40 + k)) for k in range(8)]
    detector = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96)
    detector.enroll("plate", known)
    by_name = {path.name: 1e-5 * (1 + (5 * k) % 8) for k, path in enumerate(known)}
    gate = Gate(detector, [*known, *images], ["plate"])

    def change(_: int, p: Prediction) -> Prediction:
        return moved(p, score=by_name.get(Path(p.image).name, 0.0))

    assert check(gate, detector, change, int8=True).spearman == pytest.approx(1)


def test_int8_needs_images_that_tell_something(detector: Detector, images: list[Path]) -> None:
    for given, said in [
        (images[:4], "give 5 images of 'plate' or more"),
        (images[1:], r"give all 4 calibration images of 'plate' with --images \(1 are missing\)"),
    ]:
        few = Gate(detector, given, ["plate"])
        with pytest.raises(InputError, match=said):
            check(few, detector, lambda _, p: p, int8=True)


def test_one_size_leaves_out_images_of_others(gate: Gate, detector: Detector) -> None:
    same = Changed(detector, lambda _, p: p)
    assert gate.size == (96, 96)
    parity = gate.check(same, (96, 96), False)  # type: ignore[arg-type]
    assert parity.images >= 8 and parity.sizes == [(96, 96)]
    # A part of an image has the first of them, and no image.
    for size in ((96, 144), (96, 960)):
        with pytest.raises(InputError, match=f"none of the images is {size[0]}x{size[1]}"):
            gate.check(same, size, False)  # type: ignore[arg-type]


def test_bad_images_and_strangers_are_named(
    detector: Detector, images: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"an image to compare: .*bad\.png"):
        Gate(detector, [images[0], bad, images[1]], ["plate"])
    with pytest.raises(InputError, match="a category that is exported"):
        Gate(detector, images, [])
