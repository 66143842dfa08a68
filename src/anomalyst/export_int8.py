"""A graph's matrix products with weights in int8, by NNCF; everything else stays as it is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, cast

import numpy.typing as npt

from anomalyst.runtime.engines import import_onnxruntime

Feeds = Mapping[str, npt.NDArray[Any]]

_WEIGHED = ("MatMul", "Gemm", "Conv")


def quantized(model: Any, feeds: Iterable[Feeds]) -> Any:
    """Return an ``onnx.ModelProto`` whose layers compute in int8, ranges measured on ``feeds``.

    Products of two computed tensors (attention, the search among references) stay in float32:
    they cost little and their ranges are the image's own.
    """
    nncf = _import_nncf()
    given = list(feeds)
    with redirect_stdout(StringIO()):  # its progress bars
        return nncf.quantize(
            model,
            nncf.Dataset(given),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(given),
            ignored_scope=nncf.IgnoredScope(names=_without_weights(model), validate=False),
        )


def _import_nncf() -> Any:
    """Return the package ``nncf``, imported so that neither it nor what it imports reports home."""
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))  # as good as missing
    import_onnxruntime()
    # Its remarks on what is missing here, and, once it has set itself up, on each layer.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf


def _without_weights(model: Any) -> list[str]:
    """Return the names of layers that multiply no constant."""
    constants = {each.name for each in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _WEIGHED and not constants.intersection(node.input)
    ]
