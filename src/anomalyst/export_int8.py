"""A graph's matrix products with weights in int8, by NNCF; everything else stays as it is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, cast

import numpy.typing as npt
import onnx

from anomalyst.runtime.engines import import_onnxruntime

Feeds = Mapping[str, npt.NDArray[Any]]

_WEIGHED = ("MatMul", "Gemm", "Conv")
_ACTIVATIONS = ("Gelu", "Relu", "Elu", "Mul")  # a graph writes CLIP's as x * sigmoid(x)
_SMOOTHING = 0.75  # NNCF's .95 leaves all of a channel's spread to the weights


def quantized(
    model: onnx.ModelProto, feeds: Iterable[Feeds], spared: Sequence[str]
) -> onnx.ModelProto:
    """Return the graph with its layers in int8, ranges measured on ``feeds``, but those ``spared``.

    Products of two computed tensors (attention, the search among references) stay in float32:
    they cost little and their ranges are the image's own.
    """
    nncf = _import_nncf()
    given = list(feeds)
    smoothing = nncf.AdvancedSmoothQuantParameters(matmul=_SMOOTHING)
    with redirect_stdout(StringIO()):  # its progress bars
        found: onnx.ModelProto = nncf.quantize(
            model,
            nncf.Dataset(given),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(given),
            ignored_scope=nncf.IgnoredScope(
                names=[*_without_weights(model), *spared], validate=False
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
        )
    return found


def first_layers(model: onnx.ModelProto) -> list[str]:
    """Return the layers that read an input, as a backbone's patches: little work, much error."""
    constants = _constants(model)
    behind: set[str] = set()
    found = []
    for node in model.graph.node:
        reads_layer = bool(behind.intersection(node.input))
        if is_layer := _is_layer(node, constants):
            found += [] if reads_layer else [node.name]
        if is_layer or reads_layer:
            behind.update(node.output)
    return found


def behind_activations(model: onnx.ModelProto) -> list[str]:
    """Return the layers that read an activation function: few large values widen their ranges."""
    constants = _constants(model)
    active = {name for n in model.graph.node if n.op_type in _ACTIVATIONS for name in n.output}
    return [
        node.name
        for node in model.graph.node
        if _is_layer(node, constants) and active.intersection(node.input)
    ]


ATTEMPTS: dict[str, Callable[[onnx.ModelProto], list[str]]] = {
    "all layers but the first": first_layers,
    "all but those behind an activation, too": lambda m: first_layers(m) + behind_activations(m),
}
"""Which layers stay in float32, by name; quickest first, until the gate lets one pass."""


def count_layers(model: onnx.ModelProto) -> int:
    """Return how many layers multiply by weights."""
    constants = _constants(model)
    return sum(_is_layer(node, constants) for node in model.graph.node)


def _import_nncf() -> Any:
    """Return the package ``nncf``, imported so that neither it nor what it imports reports home."""
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))  # as good as missing
    import_onnxruntime()
    # Its remarks on what is missing here, and, once it has set itself up, on each layer.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    usual = logging.getLoggerClass()
    import nncf

    logging.setLoggerClass(usual)  # it makes all loggers that come after it its own, which are mute
    # By its name: `nncf.set_log_level` mutes every handler of it, and others may share theirs.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def _constants(model: onnx.ModelProto) -> set[str]:
    return {each.name for each in model.graph.initializer}


def _is_layer(node: onnx.NodeProto, constants: Set[str]) -> bool:
    return node.op_type in _WEIGHED and not constants.isdisjoint(node.input)


def _without_weights(model: onnx.ModelProto) -> list[str]:
    """Return the names of products that multiply no constant."""
    constants = _constants(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _WEIGHED and not _is_layer(node, constants)
    ]
