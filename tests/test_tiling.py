"""Images in overlapping tiles: where they lie, and how their maps become one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalyst import Detector, InputError, load_dataset
from anomalyst.data.frame import Frame
from anomalyst.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from anomalyst.inference import Part, network_inputs, read_batches, read_item
from anomalyst.retrieval import pooled
from anomalyst.runtime import Runtime
from anomalyst.scoring import upsampled
from anomalyst.tiling import Tile, Tiling, blended
from conftest import TINY, blot, save, texture
from tiny_export import COLOURS, PREPROCESS, coloured, row, write

PLAIN = Preprocess(64, 8, IMAGENET_MEAN, IMAGENET_STD)
TILED = replace(PLAIN, tiling=Tiling(32))


# ---- where tiles lie ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "overlap", "tops", "lefts"),
    [
        (4, 4, 0.25, [0], [0]),
        (8, 8, 0.0, [0, 4], [0, 4]),
        (8, 8, 0.25, [0, 2, 4], [0, 2, 4]),  # steps of 3 at most: two gaps over 4 patches
        (7, 10, 0.25, [0, 3], [0, 3, 6]),
        (8, 12, 0.5, [0, 2, 4], [0, 2, 4, 6, 8]),
        (3, 9, 0.25, [0], [0, 2, 5]),
        (5, 5, 0.9, [0, 1], [0, 1]),  # never less than a patch on
    ],
)
def test_tiles_are_few_even_and_whole(
    rows: int, columns: int, overlap: float, tops: list[int], lefts: list[int]
) -> None:
    found = Tiling(32, overlap).tiles(rows, columns, 8)
    assert [tile[:2] for tile in found] == [(top, left) for top in tops for left in lefts]
    assert {tile[2:] for tile in found} == {(min(4, rows), min(4, columns))}


def test_tiles_cover_all_and_overlap_enough() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        side, length = int(random.integers(1, 40)), int(random.integers(1, 300))
        overlap = float(random.choice([0, 0.1, 0.25, 0.5, 0.75]))
        starts = [tile.left for tile in Tiling(14 * side, overlap).tiles(1, length, 14)]
        assert starts[0] == 0 and starts[-1] == max(length - side, 0)
        assert starts == sorted(set(starts))
        if side == 1:
            continue
        for one, two in pairwise(starts):
            assert two - one <= max(side * (1 - overlap), 1)
        if len(starts) > 1:
            steps = np.diff(starts)
            assert steps.max() - steps.min() <= 1


# ---- blending -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 4])
def test_a_constant_map_stays_constant(scale: int) -> None:
    tiles = Tiling(32, 0.3).tiles(9, 13, 8)
    value = np.float32(0.1)
    maps = [(tile, np.full((4 * scale, 4 * scale), value, np.float32)) for tile in tiles]
    found = blended((9, 13), maps, -1.0)
    assert found.dtype == np.float32 and found.shape == (9 * scale, 13 * scale)
    assert (found == value).all()


def test_a_slope_seen_in_tiles_is_the_slope() -> None:
    whole = np.add.outer(np.arange(9.0), 3 * np.arange(13.0)).astype(np.float32)
    tiles = Tiling(32, 0.3).tiles(9, 13, 8)
    maps = [(t, whole[t.top : t.top + 4, t.left : t.left + 4]) for t in tiles]
    np.testing.assert_allclose(blended((9, 13), maps, 0.0), whole, rtol=1e-6)


def test_weights_fall_towards_the_border_of_a_tile() -> None:
    """Two tiles of four, two shared columns: weights 1.5 and 0.5, then the other way round."""
    maps = [(Tile(0, 0, 1, 4), np.zeros((1, 4))), (Tile(0, 2, 1, 4), np.ones((1, 4)))]
    np.testing.assert_allclose(blended((1, 6), maps, 0.0), [[0, 0, 0.25, 0.75, 1, 1]])


def test_where_no_tile_lies_is_the_lowest() -> None:
    found = blended((4, 6), [(Tile(0, 0, 4, 4), np.full((4, 4), 2.0))], 0.5)
    assert (found[:, :4] == 2).all() and (found[:, 4:] == 0.5).all()


def test_one_tile_gives_its_map_bit_for_bit() -> None:
    values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_array_equal(blended((4, 5), [(Tile(0, 0, 4, 5), values)], 0.0), values)


def test_maps_that_do_not_lie_on_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="does not lie on the patches"):
        blended((4, 4), [(Tile(0, 0, 4, 4), np.zeros((6, 6)))], 0.0)


def test_upsampling_keeps_size_and_slopes() -> None:
    values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_array_equal(upsampled(values, 4, 5), values)
    slope = np.arange(4, dtype=np.float32)[None]
    np.testing.assert_allclose(
        upsampled(slope, 2, 8),
        np.tile([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], (2, 1)),
        atol=1e-6,
    )


# ---- preprocessing ------------------------------------------------------------------------------


def test_parts_are_cut_from_the_whole_and_know_where_they_lie() -> None:
    picture = texture(0, 128, 192)
    item, whole = read_item(picture, "x", TILED), PLAIN(picture)
    assert item.tensor.shape == (3, 64, 96)
    seen = np.zeros((64, 96), int)
    for tiles, parts in network_inputs(item, TILED):
        for tile, part in zip(tiles, parts, strict=True):
            top, left = 8 * tile.top, 8 * tile.left
            np.testing.assert_array_equal(part.tensor, whole[:, top : top + 32, left : left + 32])
            assert part.box == (2 * top, 2 * left, 64, 64) and part.size == (128, 192)
            seen[top : top + 32, left : left + 32] += 1
    assert seen.min() >= 1
    hashes = {part.sha256 for _, parts in network_inputs(item, TILED) for part in parts}
    assert len(hashes) == 3 * 4 and item.sha256 not in hashes


def test_batches_of_tiles_are_bounded() -> None:
    large = Preprocess(1344, 14, IMAGENET_MEAN, IMAGENET_STD, tiling=Tiling(448))
    item = read_item(np.zeros((30, 45, 3), np.uint8), "x", large)
    sizes = [len(parts) for _, parts in network_inputs(item, large)]
    assert max(sizes) == 2 and sum(sizes) == len(large.tiles(1344, 2016))


def test_the_overview_is_the_whole_image_at_the_size_of_a_tile() -> None:
    picture = texture(0, 128, 192)
    preprocess = replace(PLAIN, tiling=Tiling(32, overview=True))
    item = read_item(picture, "x", preprocess)
    *_, (tiles, (part,)) = network_inputs(item, preprocess)
    assert tiles == [None] and part.box == (0, 0, 128, 192)
    np.testing.assert_array_equal(part.tensor, replace(PLAIN, image_size=32)(picture))
    one = replace(PLAIN, tiling=Tiling(64, overview=True))  # a tile that is the image already
    assert read_item(texture(0), "x", one).overview is None


def test_tiles_of_which_nothing_counts_are_left_out() -> None:
    mask = np.zeros((128, 192), bool)
    mask[:, 80:] = True
    hidden = replace(TILED, frame=Frame(ignore=mask))
    item = read_item(texture(0, 128, 192), "x", hidden)
    lefts = {tile.left for tiles, _ in network_inputs(item, hidden) for tile in tiles}
    assert lefts == {0, 3} and {t.left for t in hidden.tiles(64, 96)} == {0, 3, 5, 8}


def test_one_tile_of_a_file_is_read_like_an_image(tmp_path: Path) -> None:
    picture = texture(0, 128, 192)
    path = save(tmp_path / "0.png", picture)
    tile = Tile(2, 3, 4, 4)
    for preprocess, whole in ((TILED, PLAIN), (TILED.doubled, PLAIN.doubled)):
        item = read_item(Part(path, "plate", tile=tile), "x", preprocess)
        side = preprocess.multiple
        cut = whole(picture)[:, 2 * side : 6 * side, 3 * side : 7 * side]
        np.testing.assert_array_equal(item.tensor, cut)
        assert item.box == (32, 48, 64, 64) and item.category == "plate"


def test_large_images_are_read_one_by_one() -> None:
    assert [len(b) for b in read_batches([texture(k) for k in range(3)], TILED, 8)] == [1, 1, 1]
    assert [len(b) for b in read_batches([texture(k) for k in range(3)], PLAIN, 8)] == [3]


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(
        InputError, match="tile 30 is not a multiple of 8: the nearest are 24 and 32"
    ):
        replace(PLAIN, tiling=Tiling(30))
    for change in ({"square": True}, {"resize": 80}):
        with pytest.raises(InputError, match="tiles are for images as they are"):
            replace(TILED, **change)
    with pytest.raises(InputError, match="tile 0"):
        Tiling(0)
    for overlap in (-0.1, 1.0):
        with pytest.raises(InputError, match="overlap"):
            Tiling(32, overlap)


def test_tiling_in_json() -> None:
    tiled = replace(PLAIN, tiling=Tiling(32, 0.4, True))
    assert Preprocess.from_dict(json.loads(json.dumps(tiled.to_dict()))) == tiled
    assert "tiling" not in PLAIN.to_dict()


# ---- a detector ---------------------------------------------------------------------------------


@pytest.fixture
def make(tiny_weights: str) -> Callable[..., Detector]:
    def build(**more: Any) -> Detector:
        settings = {"backbone": TINY, "weights": tiny_weights, "image_size": 192, **more}
        return Detector("anomaly-dino", **settings)

    return build


def enrolled(detector: Detector, *images: np.ndarray) -> Detector:
    detector.enroll("plate", list(images))
    return detector


def test_an_image_of_one_tile_is_judged_as_it_is_untiled(make: Callable[..., Detector]) -> None:
    images = [texture(9), blot(texture(9), 30, 40, 24)]
    whole = enrolled(make(image_size=96), texture(0), texture(1))
    tiled = enrolled(make(image_size=96, tile=96, overview=True), texture(0), texture(1))
    for one, two in zip(whole.predict(images), tiled.predict(images), strict=True):
        assert one.score == two.score and one.category == two.category
        np.testing.assert_array_equal(one.map, two.map)
        assert one.score_map.sigma == two.score_map.sigma


def test_maps_and_scores_are_those_of_the_tiles(make: Callable[..., Detector]) -> None:
    """Each tile by itself through a plain detector, and what becomes of them by hand."""
    good, bad = texture(0, 192, 288), blot(texture(9, 192, 288), 100, 200, 24)
    tiled = enrolled(make(tile=96, overview=True), good)
    (found,) = tiled.predict([bad])
    plain = make(image_size=96)
    tiles = [Tile(t, c, 6, 6) for t in (0, 3, 6) for c in (0, 4, 8, 12)]
    cut = {t: np.s_[16 * t.top : 16 * t.top + 96, 16 * t.left : 16 * t.left + 96] for t in tiles}
    plain.enroll("plate", [*(good[cut[t]].copy() for t in tiles), good])
    maps, scores = [], []
    for tile in tiles:
        (judged,) = plain.predict([bad[cut[tile]].copy()])
        maps.append((tile, judged.score_map.values))
        scores.append(judged.score)
    (over,) = plain.predict([bad])
    expected = np.maximum(blended((12, 18), maps, 0.0), upsampled(over.score_map.values, 12, 18))
    np.testing.assert_allclose(found.score_map.values, expected, atol=1e-5)
    assert found.score == pytest.approx(max(*scores, over.score), abs=1e-5)
    row, column = np.unravel_index(found.map.argmax(), found.map.shape)
    assert 92 <= row < 132 and 192 <= column < 232


def test_categories_are_told_apart_and_errors_stay_one_image(make: Callable[..., Detector]) -> None:
    detector = make(tile=96)
    upright, turned = texture(0, 192, 288), np.rot90(texture(1, 288, 192)).copy()
    detector.enroll("upright", [upright])
    detector.enroll("turned", [turned])
    images = [np.rot90(texture(5, 288, 192)).copy(), b"none", texture(6, 192, 288)]
    found = list(detector.predict(images))
    assert [p.category for p in found] == ["turned", None, "upright"]
    assert found[1].error is not None
    for index, name in ((0, "turned"), (2, "upright")):  # as if the name had been given
        (given,) = detector.predict([images[index]], category=name)
        assert given.score == found[index].score


def test_fit_calibrates_and_finds_regions_in_tiles(
    make: Callable[..., Detector], make_parts: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_dataset(make_parts(good=30))
    detector = make(tile=96).fit(data.train, calibration=0.7)
    bad = [s for s in data.test if s.label == 1]
    found = list(detector.predict(bad))
    assert all(p.verdict == "review" and p.regions for p in found)
    detector.save(tmp_path / "bundle")
    again = Detector.load(tmp_path / "bundle")
    assert again.engine.preprocess == detector.engine.preprocess
    assert (again.tile, again.overlap, again.overview) == (96, 0.25, False)
    for one, two in zip(found, again.predict(bad), strict=True):
        assert one == two
        np.testing.assert_array_equal(one.map, two.map)


def test_cached_tiles_give_the_same(make: Callable[..., Detector], tmp_path: Path) -> None:
    from anomalyst.features.cache import FeatureCache

    cache, image = FeatureCache(tmp_path / "cache"), blot(texture(9, 192, 288), 100, 200, 24)
    found = []
    for _ in range(2):
        detector = enrolled(make(tile=96, feature_cache=cache), texture(0, 192, 288))
        found += list(detector.predict([image]))
    assert cache.hits == 2 * 12 + 0 * cache.misses
    assert found[0].score == found[1].score
    np.testing.assert_array_equal(found[0].map, found[1].map)


# ---- the runtime --------------------------------------------------------------------------------


def test_what_looks_otherwise_at_first_is_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tile after tile; the first is red, the whole is blue all the same."""
    pytest.importorskip("onnx")
    monkeypatch.setattr("anomalyst.inference._BATCH_PIXELS", 16 * 16)
    tiled = replace(PREPROCESS, tiling=Tiling(16, 0.0))
    runtime = Runtime.load(write(tmp_path / "export", preprocess=tiled.to_dict()))
    picture = coloured(COLOURS["blue"], 32, 64)
    picture[:16, :16] = COLOURS["red"]
    for image, name in ((picture, "blue"), (coloured(COLOURS["red"]), "red")):
        (found,), (given,) = runtime.predict([image]), runtime.predict([image], category=name)
        assert found.category == given.category == name and found.score == given.score
        np.testing.assert_array_equal(found.map, given.map)
    (found,) = runtime.predict([picture])
    away = ((row(COLOURS["red"]) - row(COLOURS["blue"])) ** 2).sum()
    expected = np.zeros((4, 8))
    expected[:2, :2] = away
    np.testing.assert_allclose(found.score_map.values, expected, atol=1e-4)
    assert found.score == pytest.approx(away, rel=1e-5)


def test_the_descriptor_of_an_image_is_the_mean_of_its_parts() -> None:
    parts = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    expected = np.array([1.6, 1.8]) / np.hypot(1.6, 1.8)
    np.testing.assert_allclose(pooled([parts[:2], parts[2:]]), expected[None], rtol=1e-6)
    np.testing.assert_array_equal(pooled([parts[2:]]), parts[2:])
    assert pooled([np.zeros((3, 0), np.float32)]).shape == (1, 0)
