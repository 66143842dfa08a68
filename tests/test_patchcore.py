"""PatchCore's equations on feature maps small enough to check by hand or by brute force."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.base import make_options
from anomalyst.methods.patchcore import PatchCore


def patchcore(options: Mapping[str, object], seed: int = 0) -> PatchCore:
    return PatchCore(make_options(PatchCore, options), find_backbone("wide-resnet50"), (2, 3), seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_neighbourhood_mean_pads_with_zeros() -> None:
    maps = random(1, 2, 4, 5)
    local = patchcore({}).embed([maps])
    padded = np.pad(maps[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    for row in range(4):
        for column in range(5):
            expected = padded[:, row : row + 3, column : column + 3].mean(axis=(1, 2))
            np.testing.assert_allclose(local[0, :, row, column], expected, atol=1e-6)


def test_layers_are_stacked_on_the_first_grid_and_pooled_to_the_dimension() -> None:
    maps = [random(1, 4, 6, 6), random(1, 8, 3, 3, seed=1)]
    stacked = patchcore({"neighbourhood": 1}).embed(maps)
    assert stacked.shape == (1, 12, 6, 6)
    pooled = patchcore({"neighbourhood": 1, "dimension": 6}).embed(maps)
    torch.testing.assert_close(pooled, stacked.reshape(1, 6, 2, 6, 6).mean(dim=2))


def test_a_training_image_scores_zero_when_the_bank_keeps_all_patches() -> None:
    method = patchcore({"coreset": 1})
    maps = random(2, 3, 4, 4)
    method.enroll("a", [[maps]])
    found, scores = method.score([maps], "a")
    assert found.abs().max() == 0
    assert scores.tolist() == [0, 0]


def test_coreset_share_seed_and_subset() -> None:
    maps = random(5, 6, 8, 8)
    banks = []
    for seed in (0, 0, 1):
        method = patchcore({"coreset": 0.1, "neighbourhood": 1}, seed)
        method.enroll("a", [[maps]])
        banks.append(method.tensors()["a"])
    assert banks[0].shape == (32, 6)
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])
    patches = {tuple(row) for row in maps.permute(0, 2, 3, 1).reshape(-1, 6).tolist()}
    assert {tuple(row) for row in banks[0].tolist()} <= patches


def test_projection_is_used_only_to_select() -> None:
    method = patchcore({"coreset": 0.5, "projection": 2, "neighbourhood": 1})
    maps = random(1, 6, 6, 6)
    method.enroll("a", [[maps]])
    assert method.tensors()["a"].shape == (18, 6)


def test_reweighting_is_equation_7() -> None:
    """By brute force in float64, straight from the paper's formula."""
    method = patchcore({"coreset": 1, "reweight": 3, "neighbourhood": 1})
    method.enroll("a", [[random(1, 4, 5, 5)]])
    test = random(2, 4, 3, 3, seed=1)
    maps, scores = method.score([test], "a")
    bank = method.tensors()["a"].double().numpy()
    for image in range(2):
        patches = test[image].double().numpy().reshape(4, -1).T
        distances = np.linalg.norm(patches[:, None] - bank[None], axis=2)
        worst = distances.min(axis=1).argmax()
        star = distances[worst].argmin()
        neighbours = np.linalg.norm(bank - bank[star], axis=1).argsort()[:3]
        assert star in neighbours
        exponents = np.exp(distances[worst][neighbours])
        expected = (1 - np.exp(distances[worst, star]) / exponents.sum()) * distances[worst, star]
        assert float(scores[image]) == pytest.approx(expected, rel=1e-5)
        assert float(maps[image].max()) == pytest.approx(distances[worst, star], rel=1e-5)


@pytest.mark.parametrize("off", [0, 1])
def test_without_reweighting_the_image_score_is_the_largest_patch_score(off: int) -> None:
    method = patchcore({"reweight": off})
    method.enroll("a", [[random(3, 4, 5, 5)]])
    maps, scores = method.score([random(2, 4, 5, 5, seed=1)], "a")
    assert torch.equal(scores, maps.flatten(1).max(dim=1).values)


def test_an_even_neighbourhood_is_refused() -> None:
    with pytest.raises(InputError, match="odd"):
        patchcore({"neighbourhood": 2})
