"""Which layers of a graph compute in int8."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
if find_spec("nncf") is None:
    pytest.skip("nncf is not installed", allow_module_level=True)

from anomalyst.export_int8 import (  # noqa: E402
    behind_activations,
    count_layers,
    first_layers,
    quantized,
)

WIDE = 16


def perceptron() -> Any:
    """A patch layer, a perceptron of two layers, and a product with an input."""
    helper, random = onnx.helper, np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        values = random.normal(size=shape, scale=0.2).astype(np.float32)
        return onnx.numpy_helper.from_array(values, name)

    def tensor(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))

    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["seen"], "patches", kernel_shape=[1, 1]),
        helper.make_node("Transpose", ["seen"], ["last"], "turn", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["last", "w1"], ["wide"], "first"),
        helper.make_node("Relu", ["wide"], ["active"], "relu"),
        helper.make_node("MatMul", ["active", "w2"], ["narrow"], "second"),
        helper.make_node("MatMul", ["narrow", "bank"], ["score"], "search"),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [tensor("image", 1, 3, 8, 8), tensor("bank", WIDE, 5)],
        [tensor("score", 1, 8, 8, 5)],
        [weight("w0", WIDE, 3, 1, 1), weight("w1", WIDE, WIDE), weight("w2", WIDE, WIDE)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    return model


def in_int8(model: Any) -> set[str]:
    """Return the names of layers both of whose inputs were rounded."""
    rounded = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return {n.name for n in model.graph.node if rounded.issuperset(n.input[:2])}


def test_layers_are_found_by_what_they_read() -> None:
    model = perceptron()
    assert count_layers(model) == 3
    assert first_layers(model) == ["patches"]
    assert behind_activations(model) == ["second"]


def test_layers_of_two_inputs_are_both_first() -> None:
    model = perceptron()
    del model.graph.node[-1]
    other = onnx.helper.make_node("MatMul", ["bank", "w3"], ["known"], "known")
    model.graph.node.append(other)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(5, dtype="f4"), "w3"))
    assert first_layers(model) == ["patches", "known"]


def test_logging_stays_as_it_was() -> None:
    """NNCF makes all later loggers its own, and mutes handlers that its logger was given."""
    program = (
        "import logging; from anomalyst.export_int8 import _import_nncf; _import_nncf(); "
        "handler = logging.StreamHandler(); logging.getLogger('nncf').addHandler(handler); "
        "_import_nncf(); assert handler.level == logging.NOTSET; "
        "assert type(logging.getLogger('new')) is logging.Logger"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("spared", [["patches"], ["patches", "second"]])
def test_what_is_spared_stays_in_float32(spared: list[str]) -> None:
    random = np.random.default_rng(1)
    feeds = [
        {
            "image": random.normal(size=(1, 3, 8, 8)).astype("f4"),
            "bank": random.normal(size=(WIDE, 5)).astype("f4"),
        }
        for _ in range(4)
    ]
    model = perceptron()
    found = quantized(model, feeds, spared)
    assert model == perceptron()  # it may be taken for another attempt
    assert in_int8(found) == {"patches", "first", "second"} - set(spared)
    assert "search" in {node.name for node in found.graph.node}  # of two computed tensors
    from anomalyst.runtime.engines import ENGINES

    both = [
        ENGINES["onnxruntime"]((model.SerializeToString(),), 1).run(feeds[0])["score"]
        for model in (perceptron(), found)
    ]
    gap = np.abs(both[0] - both[1]).max() / np.abs(both[0]).max()
    assert 1e-5 < gap < 0.05  # of int8's 1/256 through a few sums
