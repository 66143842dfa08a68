"""NAGL in its compat mode against values made with the authors' own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalyst.methods.nagl import Defect, Guide, NaglNetwork, NaglOptions
from anomalyst.methods.nagl_losses import logit_losses
from anomalyst.methods.proxy_attention import grid_places, position_code, reference_codes
from anomalyst.methods.residuals import nearest_normal
from conftest import SHARED
from slow_nagl import COMPAT

_LAYERS = {
    "mine_cross": "rm_ca.multihead_attn",
    "mine_self": "rm_sa.self_attn",
    "learn_cross": "afl_ca.multihead_attn",
    "learn_self": "afl_sa.self_attn",
}


def theirs() -> dict[str, str]:
    """The authors' name of each of our parameters."""
    found = {"proxies": "learnable_proxies.weight"}
    for mine, name in _LAYERS.items():
        found[f"{mine}.in_weight"] = f"{name}.in_proj_weight"
        found[f"{mine}.in_bias"] = f"{name}.in_proj_bias"
        for kind in ("weight", "bias"):
            found[f"{mine}.out.{kind}"] = f"{name}.out_proj.{kind}"
            found[f"{mine}.norm.{kind}"] = f"{name.split('.')[0]}.norm.{kind}"
    return found


def to_maps(patches: Tensor) -> Tensor:
    """Maps ``[..., C, 6, 6]`` of patches ``[..., 36, C]``."""
    return patches.transpose(-1, -2).unflatten(-1, (6, 6))


class Authors:
    """Their values, our network with their weights, and what it makes of their references."""

    def __init__(self, count: int) -> None:
        path = SHARED / "golden" / f"nagl_k{count}.npz"
        if not path.is_file():
            pytest.skip(f"the authors' values are not here ({path})")
        with np.load(path) as values:
            self.values = {name: torch.from_numpy(values[name]) for name in values.files}
        self.count = count
        self.network = NaglNetwork(32, NaglOptions(**{**COMPAT, "proxies": 7}), 14)
        state = {mine: self.values[f"param/{name}"] for mine, name in theirs().items()}
        self.network.load_state_dict(state)
        self.normal = self["feat_n"][0].reshape(-1, 32)
        self.query = to_maps(self["feat_q"][0])
        abnormal, masks = to_maps(self["feat_a"][0]), self["mask_abnormal"][0]
        nothing = torch.zeros(6, 6)  # their masks are pooled their way, whatever the coverage
        self.defects: list[Defect] = [
            self.network.defect(abnormal[n], nothing, masks[n]) for n in range(count)
        ]
        self.guide: Guide = self.network.guide(self.normal, self.defects)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


@pytest.fixture(scope="module", params=[1, 2])
def authors(request: pytest.FixtureRequest) -> Authors:
    return Authors(request.param)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-5, atol=2e-6)


def test_masks_and_position_codes_are_the_authors(authors: Authors) -> None:
    covers = [cover for _, cover, _ in authors.defects]
    assert torch.equal(torch.stack(covers).flatten(), authors["patch_mask"].flatten())
    close(position_code(grid_places(6, 6), 32), authors["pe_grid"])
    close(torch.cat(reference_codes("masked", covers, 32)), authors["pe_masked"])


def test_residuals_are_the_authors(authors: Authors) -> None:
    unit = torch.nn.functional.normalize(authors.normal, dim=1)
    for name, expected in (("feat_a", "residual_abnormal"), ("feat_q", "residual_query")):
        patches = authors[name].reshape(-1, 32)
        _, found = nearest_normal(patches, authors.normal, unit, "inner-product")
        close(found, authors[expected])


def test_proxies_are_the_authors(authors: Authors) -> None:
    close(authors.guide.proxies, authors["residual_proxies"])
    keys = authors["residual_query"][0] + authors["pe_grid"][:, 0]
    found, _ = authors.network.learn(authors["residual_proxies"], keys, authors["feat_q"][0])
    close(found, authors["anomaly_proxies"])


def test_scores_are_the_authors(authors: Authors) -> None:
    scores = authors.network.score(authors.guide, authors.query)
    close(1 - scores.normal, authors["similarity_normal"])
    close(scores.abnormal, authors["score_abnormal"])
    close(scores.fused, authors["score"])


def test_losses_and_all_gradients_are_the_authors(authors: Authors) -> None:
    network = authors.network
    network.zero_grad()
    scores = network.score(network.guide(authors.normal, authors.defects), authors.query)
    losses = logit_losses(*(maps[0] for maps in scores), authors["mask_query"][0])
    close(losses["image"], authors["train_loss_image"])
    close(losses["focal"] + losses["dice"], authors["train_loss_pixel"])
    close(losses["loss"], authors["train_loss_image"] + authors["train_loss_pixel"])
    losses["loss"].backward()
    names = theirs()
    assert {name for name, _ in network.named_parameters()} == set(names)
    for name, parameter in network.named_parameters():
        expected = authors[f"grad/{names[name]}"]
        assert parameter.grad is not None
        size = float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4 * size)
        if name.endswith("in_bias"):
            assert (parameter.grad.chunk(3)[1] == 0).all()
            assert expected.chunk(3)[1].abs().max() < 1e-6 * size
