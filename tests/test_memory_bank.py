"""Exact search against brute force."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from anomalyst.errors import InputError
from anomalyst.methods import memory_bank
from anomalyst.methods.memory_bank import (
    Banks,
    nearest_cosine,
    nearest_euclidean,
    resize_like,
    to_map,
    to_patches,
    top_mean,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_both_searches_equal_brute_force(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(memory_bank, "_BLOCK", block)
    queries, bank = random(40, 8), random(73, 8, seed=1)
    distance, index = nearest_euclidean(queries, bank)
    brute = torch.cdist(queries.double(), bank.double())
    assert index.tolist() == brute.argmin(dim=1).tolist()
    torch.testing.assert_close(distance.double(), brute.min(dim=1).values, rtol=1e-5, atol=1e-6)
    queries, bank = normalize(queries, dim=1), normalize(bank, dim=1)
    distance, index = nearest_cosine(queries, bank)
    cosine = queries.double() @ bank.double().T
    assert index.tolist() == cosine.argmax(dim=1).tolist()
    torch.testing.assert_close(distance.double(), 1 - cosine.max(dim=1).values, rtol=0, atol=1e-6)


def test_a_query_in_the_bank_is_at_distance_zero_even_far_from_the_origin() -> None:
    bank = random(50, 16) + 300
    distance, index = nearest_euclidean(bank, bank)
    assert distance.abs().max() == 0
    assert index.tolist() == list(range(50))


def test_ties_go_to_the_lowest_row_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bank, "_BLOCK", 2)
    bank = normalize(torch.ones(7, 3), dim=1)
    assert nearest_cosine(bank[:1], bank)[1].tolist() == [0]


def test_cosine_extremes() -> None:
    axis = torch.tensor([[1.0, 0.0]])
    others = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = [float(nearest_cosine(axis, other[None])[0]) for other in others]
    assert found == pytest.approx([0.0, 1.0, 2.0], abs=1e-7)


def test_patches_and_maps_are_inverse_on_a_non_square_grid() -> None:
    maps = random(2, 5, 3, 4)
    patches = to_patches(maps)
    assert patches.shape == (24, 5)
    assert torch.equal(patches[12 + 1 * 4 + 2], maps[1, :, 1, 2])
    assert torch.equal(to_map(patches[:, 0], maps), maps[:, 0])


def test_top_mean_by_hand() -> None:
    maps = torch.arange(400.0).reshape(2, 10, 20)
    assert top_mean(maps, 0.01).tolist() == [(199 + 198) / 2, (399 + 398) / 2]
    assert top_mean(maps[:, :3, :3], 0.01).tolist() == [42.0, 242.0]  # under 100 patches: maximum


def test_deeper_layers_come_to_the_first_grid() -> None:
    fine, coarse = random(1, 2, 4, 6), random(1, 3, 2, 3, seed=1)
    stacked = resize_like([fine, coarse])
    assert stacked.shape == (1, 5, 4, 6)
    assert torch.equal(stacked[:, :2], fine)


def test_a_misspelt_category_names_the_nearest() -> None:
    banks = Banks()
    banks.add("bottle", random(3, 2))
    with pytest.raises(InputError, match="did you mean 'bottle'"):
        banks["botle"]
