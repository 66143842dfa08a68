"""Search through an index, on banks whose nearest rows are known beforehand."""

from __future__ import annotations

from math import cos, pi, sqrt
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.methods import bank_search
from anomalyst.methods.bank_search import BankSearch, InvertedLists, Metric
from anomalyst.methods.memory_bank import Banks, nearest_cosine, nearest_euclidean
from conftest import TINY, Run, blot, save, texture

faiss = pytest.importorskip("faiss")
OPTIONS = {"search": "approximate"}


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index small banks too."""
    monkeypatch.setattr(bank_search, "LEAST", 30)


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InvertedLists, "of", lambda *_: pytest.fail("an index was built"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def search_of(bank: torch.Tensor, metric: Metric, seed: int = 0) -> BankSearch:
    banks = Banks()
    banks.add("a", bank)
    return BankSearch(banks, "approximate", metric, seed)


# ---- what it finds ------------------------------------------------------------------------------


def test_on_a_circle_the_nearest_is_a_quarter_step_away() -> None:
    count = 2000
    steps = torch.arange(count, dtype=torch.float64)

    def at(angle: torch.Tensor) -> torch.Tensor:
        return torch.stack([angle.cos(), angle.sin()], dim=1).float()

    search = search_of(at(2 * pi * steps / count), "cosine")
    distance, row = search.nearest(at(2 * pi * (steps + 0.25) / count), "a")
    assert row.tolist() == list(range(count))
    step = 1 - cos(2 * pi * 0.25 / count)
    torch.testing.assert_close(distance, torch.full((count,), step), rtol=0, atol=2e-7)


def test_on_a_lattice_the_nearest_is_the_corner_of_the_cell() -> None:
    lattice = torch.cartesian_prod(torch.arange(40.0), torch.arange(50.0))
    search = search_of(lattice, "euclidean")
    distance, row = search.nearest(lattice + torch.tensor([0.25, -0.25]), "a")
    assert row.tolist() == list(range(2000))
    torch.testing.assert_close(distance, torch.full((2000,), sqrt(0.125)), rtol=1e-6, atol=0)


def test_a_row_of_the_bank_is_at_distance_zero_even_far_from_the_origin() -> None:
    bank = random(400, 16) + 300
    distance, row = search_of(bank, "euclidean").nearest(bank, "a")
    assert distance.abs().max() == 0 and row.tolist() == list(range(400))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_distance_is_too_large_or_right(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    """One list of many misses much among random rows; all lists miss nothing."""
    bank, queries = normalize(random(900, 8)), normalize(random(300, 8, seed=1))
    exact = nearest_cosine if metric == "cosine" else nearest_euclidean
    true, nearest = exact(queries, bank)
    monkeypatch.setattr(bank_search, "_PROBES", 1)
    distance, row = search_of(bank, metric).nearest(queries, "a")
    wrong = row != nearest
    assert 30 < int(wrong.sum()) < 290
    assert (distance[wrong] > true[wrong] - 1e-6).all()
    assert (distance[wrong] > true[wrong] + 1e-3).any()
    torch.testing.assert_close(distance[~wrong], true[~wrong], rtol=0, atol=1e-6)
    monkeypatch.setattr(bank_search, "_PROBES", 10_000)
    distance, row = search_of(bank, metric).nearest(queries, "a")
    assert torch.equal(row, nearest)
    torch.testing.assert_close(distance, true, rtol=0, atol=1e-6)


# ---- when, and of what --------------------------------------------------------------------------


@pytest.mark.usefixtures("not_built")
def test_small_banks_graphs_and_exact_search_have_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = normalize(random(29, 8))
    small = search_of(bank, "cosine")
    assert torch.equal(small.nearest(bank, "a")[1], torch.arange(29))
    assert list(small.tensors()) == ["a"]
    banks = Banks()
    banks.add("a", normalize(random(30, 8)))
    exact = BankSearch(banks, "exact", "cosine", 0)
    assert list(exact.tensors()) == ["a"] and exact.nearest(bank, "a")[1].shape == (29,)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("anomalyst.methods.memory_bank._cuts", lambda rows: [0, rows])
    assert search_of(normalize(random(30, 8)), "cosine").nearest(bank, "a")[1].shape == (29,)


def test_new_references_are_found_too() -> None:
    banks = Banks()
    banks.add("a", random(100, 8))
    search = BankSearch(banks, "approximate", "euclidean", 0)
    fresh = random(5, 8, seed=1) + 50
    assert search.nearest(fresh, "a")[0].min() > 50
    banks.add("a", fresh)
    distance, row = search.nearest(fresh, "a")
    assert distance.abs().max() == 0 and row.tolist() == [100, 101, 102, 103, 104]


def test_the_seed_fixes_an_index() -> None:
    bank = random(1000, 8)
    first, again = (search_of(bank, "euclidean", 2**40 + 3).tensors() for _ in range(2))
    other = search_of(bank, "euclidean", 4).tensors()
    assert list(first) == ["a", "__centres__ a", "__lists__ a"]
    assert first["__centres__ a"].shape == (4 * 31, 8) and first["__lists__ a"].shape == (1000,)
    for name in first:
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["__centres__ a"], other["__centres__ a"])


def test_each_row_is_in_the_list_of_its_nearest_centre() -> None:
    lists = InvertedLists.of(random(500, 8), "euclidean", 0)
    nearest = torch.cdist(random(500, 8), lists.centres).argmin(dim=1)
    assert torch.equal(nearest, lists.list_of.long())


def test_it_takes_as_many_threads_as_torch() -> None:
    before = torch.get_num_threads()
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            search_of(random(60, 4), "euclidean").nearest(random(3, 4), "a")
            assert faiss.omp_get_max_threads() == count
    finally:
        torch.set_num_threads(before)


# ---- in a detector ------------------------------------------------------------------------------


@pytest.fixture(params=["anomaly-dino", "patchcore"])
def detector(request: pytest.FixtureRequest, tiny_weights: str) -> Detector:
    more = {"coreset": 1.0} if request.param == "patchcore" else {}
    made = Detector(
        request.param,
        backbone=TINY,
        weights=tiny_weights,
        image_size=96,
        options={**OPTIONS, **more},
        device="cpu",
    )
    made.enroll("plate", [texture(k) for k in range(4)])
    return made


def maps(detector: Detector) -> list[torch.Tensor]:
    images = [texture(9), blot(texture(10), 20, 40, 24)]
    found = list(detector.predict(images, category="plate"))
    return [torch.from_numpy(p.score_map.values) for p in found if p.score_map is not None]


def test_a_bundle_brings_its_index(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = maps(detector)
    saved = detector.save(tmp_path / "bundle")
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    monkeypatch.setattr(InvertedLists, "of", lambda *_: pytest.fail("built again"))
    again = Detector.load(saved, device="cpu")
    for first, second in zip(before, maps(again), strict=True):
        assert torch.equal(first, second)
    assert set(again.method.tensors()) == {"plate", "__centres__ plate", "__lists__ plate"}
    monkeypatch.setattr(InvertedLists, "nearest", lambda *_: pytest.fail("the index was searched"))
    exact = Detector.load(saved, device="cpu", options={"search": "exact"})
    for first, second in zip(before, maps(exact), strict=True):
        assert (second <= first + 1e-6).all()
    assert list(exact.method.tensors()) == ["plate"] and exact.method.obstacle is None


def test_an_export_asks_for_exact_search(detector: Detector, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnxscript")
    saved, image = detector.save(tmp_path / "bundle"), save(tmp_path / "image.png", texture(9))
    code, _, err = run("export", saved, "-o", tmp_path / "export", "--images", image)
    assert code == 2 and not (tmp_path / "export").exists()
    assert f"{detector.spec.name} cannot be exported: search=approximate" in err


def test_without_faiss_the_extra_is_named(
    tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_search, "find_spec", lambda name: None)
    detector = Detector("patchcore", backbone=TINY, weights=tiny_weights, options=OPTIONS)
    with pytest.raises(InputError, match=r"pip install 'anomalyst\[index\]', or search=exact"):
        detector.enroll("plate", [texture(0)])
    BankSearch(Banks(), "exact", "cosine", 0)


def test_a_misspelt_search_is_refused(tiny_weights: str) -> None:
    detector = Detector(
        "anomaly-dino", backbone=TINY, weights=tiny_weights, options={"search": "aproximate"}
    )
    with pytest.raises(InputError, match=r"option search='aproximate' of anomaly-dino.*'exact' or"):
        detector.enroll("plate", [texture(0)])
