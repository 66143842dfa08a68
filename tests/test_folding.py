"""Batch norms in convolutions: the same maps, the same tensors to save, and never where it errs."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from anomalyst.features.extractor import Backbone
from anomalyst.features.folding import folded
from anomalyst.features.towers import StageTower


def livened(model: nn.Module) -> nn.Module:
    """The model with batch norms that do something, in evaluation mode."""
    draw = torch.Generator().manual_seed(0)
    for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.2, 0.2),
            (norm.running_mean, -0.2, 0.2),
            (norm.running_var, 0.5, 2.0),
        ):
            assert tensor is not None
            nn.init.uniform_(tensor, low, high, generator=draw)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(each, nn.BatchNorm2d) for each in model.modules())


@torch.no_grad()
def test_a_folded_convolution_is_the_two_written_out() -> None:
    model = livened(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    twin = folded(model)
    assert twin is not None and norms(twin) == 0 and norms(model) == 1
    conv, norm = model
    x = np.random.default_rng(0).normal(size=3)
    inner = conv.weight[:, :, 0, 0].double().numpy() @ x + conv.bias.double().numpy()
    mean, variance = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    expected = (inner - mean) / np.sqrt(variance + norm.eps) * norm.weight.double().numpy()
    expected += norm.bias.double().numpy()
    found = twin(torch.tensor(x, dtype=torch.float32).reshape(1, 3, 1, 1))
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_to_fold() -> None:
    assert folded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU()).eval()) is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnetv2_18", "vgg11_bn"])
def test_maps_and_tensors_of_a_network_stay(name: str) -> None:
    model = livened(timm.create_model(name, num_classes=0))
    layers = (2, 1)
    backbone = Backbone.from_state(f"timm:{name}", layers, model.state_dict())
    assert norms(backbone.tower.model) < norms(model)
    images = torch.randn(5, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = model.forward_intermediates(images, indices=[1, 2], intermediates_only=True)
    for mine, theirs in zip(backbone(images), reversed(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    for key, tensor in backbone.state().items():
        assert torch.equal(tensor, model.state_dict()[key])
    again = Backbone.from_state(f"timm:{name}", layers, backbone.state())
    assert again.weights_sha256 == backbone.weights_sha256
    assert torch.equal(again(images)[0], backbone(images)[0])


class Crossed(nn.Module):
    """Declares a batch norm after its convolution and computes it before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward_intermediates(self, images: Tensor, **_: object) -> list[Tensor]:
        found: Tensor = self.conv(self.norm(images))
        return [found]


@torch.no_grad()
def test_a_network_that_folding_would_change_stays_as_it_is() -> None:
    model = livened(Crossed())
    images = torch.randn(2, 3, 8, 8)
    (expected,) = model.forward_intermediates(images)  # type: ignore[operator]
    tower = StageTower(model, [0])
    tower.adopt(dict(model.state_dict()))
    assert norms(tower.model) == 1
    torch.testing.assert_close(tower(images)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "halonet26t",  # takes no small image, so that nothing tells whether folding errs
        "lambda_resnet26t",  # has 3-d convolutions, and norms declared behind others' convolutions
    ],
)
def test_networks_of_unusual_build_give_the_same_maps(name: str) -> None:
    model = livened(timm.create_model(name, num_classes=0))
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    backbone = Backbone.from_state(f"timm:{name}", (3,), model.state_dict())
    (expected,) = model.forward_intermediates(images, indices=[3], intermediates_only=True)
    rounding = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(backbone(images)[0], expected, rtol=0, atol=rounding)
    assert norms(backbone.tower.model) > 0
