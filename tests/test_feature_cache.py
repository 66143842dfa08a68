"""The feature cache: what went in comes out, whatever happens to the folder meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureCache
from anomalyst.files import replace_file


def maps(seed: int, scale: float = 1.0) -> list[np.ndarray]:
    """Two taps of different size, float32 ``[C, h, w]``."""
    random = np.random.default_rng(seed)
    shapes = ((6, 4, 5), (3, 2, 3))
    return [(scale * random.normal(size=shape)).astype(np.float32) for shape in shapes]


def key(seed: int) -> str:
    return FeatureCache.key(f"image {seed}", "resize 280", "weights", (5, 8))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_hit_is_what_put_returned_bit_for_bit(tmp_path: Path) -> None:
    cache, given = FeatureCache(tmp_path), maps(0)
    assert cache.get(key(0)) is None
    stored = cache.put(key(0), given)
    found = cache.get(key(0))
    assert found is not None and (cache.hits, cache.misses) == (1, 1)
    for before, put, got in zip(given, stored, found, strict=True):
        assert put.dtype == got.dtype == np.float16
        assert np.array_equal(put, got) and put.shape == before.shape
        np.testing.assert_allclose(got, before, rtol=2**-11, atol=2**-24)
    assert FeatureCache(tmp_path).get(key(0)) is not None


def test_reading_maps_the_file(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put(key(0), maps(0))
    found = cache.get(key(0))
    assert found is not None
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in found)


def test_other_tools_can_read_an_entry(tmp_path: Path) -> None:
    stored = FeatureCache(tmp_path).put(key(0), maps(0))
    (path,) = files(tmp_path)
    read = load_file(path)
    assert np.array_equal(read["0"], stored[0]) and np.array_equal(read["1"], stored[1])


def test_strided_views_are_stored_as_they_look(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    tokens = maps(0)[0].reshape(6, 20).T[1:]
    view = tokens.T
    cache.put(key(0), [view])
    found = cache.get(key(0))
    assert found is not None and np.array_equal(found[0], view.astype(np.float16))


@pytest.mark.parametrize("value", [65520.0, -1e30, np.inf, np.nan])
def test_what_half_precision_cannot_hold_stays_single(tmp_path: Path, value: float) -> None:
    cache, given = FeatureCache(tmp_path), maps(0)
    given[1][0, 0, 0] = value
    stored = cache.put(key(0), given)
    found = cache.get(key(0))
    assert found is not None
    assert [array.dtype for array in found] == [np.float16, np.float32]
    for array in (stored[1], found[1]):
        assert np.array_equal(array, given[1], equal_nan=True)


def test_the_largest_half_is_still_half(tmp_path: Path) -> None:
    (stored,) = FeatureCache(tmp_path).put(key(0), [np.full((1, 1, 1), 65504.0, np.float32)])
    assert stored.dtype == np.float16 and stored.item() == 65504.0


def test_every_part_of_the_key_counts() -> None:
    parts = ("image", "transform", "weights", (2, 3), "plain")
    others = [("x", *parts[1:]), ("image", "x", *parts[2:]), (*parts[:2], "x", *parts[3:])]
    others += [(*parts[:3], (3, 2), "plain"), (*parts[:4], "rotated")]
    others += [("imagetransform", "", *parts[2:])]
    keys = {FeatureCache.key(*other) for other in [parts, *others]}
    assert len(keys) == 1 + len(others)
    assert FeatureCache.key(*parts) == FeatureCache.key(*parts[:3], [2, 3], "plain")


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 4, 20, 150, -1])
def test_a_truncated_entry_is_a_miss_and_goes(tmp_path: Path, cut: int) -> None:
    cache = FeatureCache(tmp_path)
    cache.put(key(0), maps(0))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    assert cache.get(key(0)) is None
    assert files(tmp_path) == [] and cache.misses == 1
    cache.put(key(0), maps(0))
    assert cache.get(key(0)) is not None


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    stored = cache.put(key(0), maps(0))
    (path,) = files(tmp_path)
    good = path.read_bytes()
    for position in range(len(good)):
        spoilt = bytearray(good)
        spoilt[position] ^= 0x10
        path.write_bytes(spoilt)
        found = cache.get(key(0))
        if found is None:
            assert not path.exists()
        else:
            assert all(np.array_equal(a, b) for a, b in zip(found, stored, strict=True))


# ---- the bound ----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    probe = FeatureCache(tmp_path / "probe")
    probe.put(key(0), maps(0))
    size = files(tmp_path / "probe")[0].stat().st_size
    cache = FeatureCache(tmp_path / "cache", max_bytes=4 * size)
    for seed in range(4):
        cache.put(key(seed), maps(seed))
        path = next(p for p in files(tmp_path / "cache") if p.stem == key(seed))
        os.utime(path, (1000 + seed, 1000 + seed))
    assert cache.get(key(0)) is not None  # now the most recently used
    cache.put(key(4), maps(4))
    kept = {p.stem for p in files(tmp_path / "cache")}
    assert kept == {key(0), key(3), key(4)}
    assert sum(p.stat().st_size for p in files(tmp_path / "cache")) <= 4 * size


def test_the_bound_holds_over_many_and_between_objects(tmp_path: Path) -> None:
    bound = 20_000
    for run in range(3):
        cache = FeatureCache(tmp_path, max_bytes=bound)
        for seed in range(60):
            cache.put(key(100 * run + seed), maps(seed))
            total = sum(path.stat().st_size for path in files(tmp_path))
            assert total <= bound * (1 + 1 / 16)
    assert total > bound / 2


def test_an_entry_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=10)
    (stored, _) = cache.put(key(0), maps(0))
    assert stored.dtype == np.float16 and files(tmp_path) == []


def test_abandoned_partial_files_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ab"
    folder.mkdir()
    abandon(folder / "x", monkeypatch)
    (old,) = files(tmp_path)
    new = folder / ".12-34.partial"
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    FeatureCache(tmp_path).put(key(0), maps(0))
    assert not old.exists() and new.exists()


def abandon(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin to write a file as `replace_file` does, and be killed."""
    with monkeypatch.context() as patch:
        patch.setattr("anomalyst.files.os.replace", lambda *_: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        replace_file(path, b"part")


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    others = [
        tmp_path / "work" / "thesis.txt",
        tmp_path / "work" / "model.safetensors",
        tmp_path / "ab" / "model.safetensors",
        tmp_path / "ab" / ".notes.partial",
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10_000))
        os.utime(path, (1000, 1000))
    cache = FeatureCache(tmp_path, max_bytes=2_000)
    for seed in range(20):
        cache.put(key(seed), maps(seed))
    assert all(path.exists() for path in others)
    assert len(files(tmp_path)) > len(others)


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "plug").touch()
    with pytest.raises(InputError, match="plug: cannot keep features there"):
        FeatureCache(tmp_path / "plug")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    cache = FeatureCache(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(InputError, match="cannot keep features there") as caught:
            cache.put(key(0), maps(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == []


def test_mapped_files_may_be_immovable_as_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, a file that somebody has mapped can be neither replaced nor removed."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "in use")

    cache = FeatureCache(tmp_path, max_bytes=2_000)
    first = cache.put(key(0), maps(0))
    (path,) = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("anomalyst.features.cache.replace_file", refuse)
        again = cache.put(key(0), maps(0))
        assert np.array_equal(first[0], again[0])
        with pytest.raises(InputError, match="in use"):
            cache.put(key(1), maps(1))
    unlink = Path.unlink

    def unlink_others(self: Path, missing_ok: bool = False) -> None:
        if self == path:
            refuse()
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_others)
    for seed in range(1, 20):
        cache.put(key(seed), maps(seed))
    assert path.exists() and sum(p.stat().st_size for p in files(tmp_path)) <= 2_000 * 17 / 16
    path.write_bytes(b"")
    assert cache.get(key(0)) is None


# ---- several processes --------------------------------------------------------------------------


def hammer(folder: str, start: int) -> int:
    """Write and read the same few entries as others do; return how many reads were wrong."""
    cache = FeatureCache(folder, max_bytes=3_000)
    wrong = 0
    for step in range(150):
        seed = (start + step) % 7
        expected = cache.put(key(seed), maps(seed))
        found = cache.get(key((seed + 3) % 7))
        truth = [a.astype(np.float16) for a in maps((seed + 3) % 7)]
        if found is not None:
            wrong += not all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))
        wrong += len(expected) != 2
    return wrong


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(hammer, [(str(tmp_path), start) for start in (0, 2, 5)]) == [0, 0, 0]
    assert not [path for path in files(tmp_path) if path.suffix != ".safetensors"]
