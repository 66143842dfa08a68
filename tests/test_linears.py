"""Linear layers by oneDNN: the same numbers, only where they may be, and counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from anomalyst import Detector
from anomalyst.features import linears
from anomalyst.features.linears import QuickLinears
from anomalyst.profiling_meter import count_flops
from conftest import TINY, texture

pytestmark = pytest.mark.skipif(
    not linears._THERE,
    reason="this torch has no oneDNN",
)


def runs(work: Callable[[], object]) -> set[str]:
    """Return the names of the operators that run."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return {event.name for event in seen.events()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (2, 3, 4, 8)])
def test_the_same_numbers(shape: tuple[int, ...], bias: bool) -> None:
    layer = torch.nn.Linear(8, 6, bias=bias)
    rows = torch.randn(shape)
    with torch.inference_mode():
        exact = torch.einsum("...c,dc->...d", rows.double(), layer.weight.double())
        exact = exact + layer.bias.double() if bias else exact
        with QuickLinears():
            found = layer(rows)
    assert found.shape == (*shape[:-1], 6) and found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_views_that_are_not_contiguous() -> None:
    rows, weight = torch.randn(8, 5).T, torch.randn(8, 6).T
    with torch.inference_mode(), QuickLinears():
        found = functional.linear(rows, weight)
    torch.testing.assert_close(found, rows @ weight.T)


def test_it_is_onednn_that_computes() -> None:
    layer, rows = torch.nn.Linear(8, 6), torch.randn(5, 8)

    def quick() -> Tensor:
        with torch.inference_mode(), QuickLinears():
            return layer(rows)

    assert "mkldnn::_linear_pointwise" in runs(quick)


@pytest.mark.parametrize("case", ["gradients", "double", "empty", "keywords"])
def test_all_else_stays_as_it_is(case: str) -> None:
    layer = torch.nn.Linear(8, 6).to(torch.float64 if case == "double" else torch.float32)
    rows = torch.randn(0 if case == "empty" else 5, 8, dtype=layer.weight.dtype)

    def work() -> Tensor:
        with torch.set_grad_enabled(case == "gradients"), QuickLinears():
            if case == "keywords":
                return functional.linear(rows, weight=layer.weight, bias=layer.bias)
            return layer(rows)

    assert "mkldnn::_linear_pointwise" not in runs(work)
    assert work().requires_grad == (case == "gradients")


def test_a_graph_is_made_of_plain_layers() -> None:
    class Quick(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 6)

        def forward(self, rows: Tensor) -> Tensor:
            with QuickLinears():
                return self.layer(rows)

    with torch.no_grad():
        program = torch.export.export(Quick().eval(), (torch.randn(5, 8),), strict=False)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.linear.default"}


def test_its_flops_are_counted() -> None:
    layer, rows = torch.nn.Linear(8, 6), torch.randn(2, 5, 8)

    def quick() -> None:
        with torch.no_grad(), QuickLinears():
            layer(rows)

    assert count_flops(quick) == 2 * (2 * 5) * 8 * 6


@pytest.mark.parametrize("method", ["patchcore", "anomaly-dino"])
def test_all_of_a_prediction_is_computed_so(method: str, tiny_weights: str) -> None:
    """Outside inference mode, as users call it: gradients would keep oneDNN out of the search."""
    detector = Detector(method, backbone=TINY, weights=tiny_weights, image_size=96)
    detector.enroll("plate", [texture(0)])
    found = runs(lambda: list(detector.predict([texture(1)])))
    assert "mkldnn::_linear_pointwise" in found
    assert not found & {"aten::linear", "aten::addmm"}
