"""Exported bundles made by hand: small graphs whose results a few lines of numpy compute too.

A patch is the mean colour of 8 x 8 tensor pixels. With references a patch's score is the squared
distance to the nearest reference colour, without any its squared length. The image's score is the
largest patch's, its descriptor the direction of the mean colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from anomalyst.data.transforms import Preprocess
from anomalyst.runtime.exported import (
    PARITY,
    REFERENCES,
    RETRIEVAL,
    BackboneRecord,
    Exported,
    ExportedCategory,
    tensor_file,
    write_export,
)

PATCH = 8
PREPROCESS = Preprocess(32, PATCH, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def coloured(colour: tuple[int, int, int], height: int = 32, width: int = 32) -> np.ndarray:
    """A picture of one colour, uint8 ``[height, width, 3]``."""
    return np.full((height, width, 3), colour, dtype=np.uint8)


def spotted(
    colour: tuple[int, int, int], spot: tuple[int, int, int], height: int = 32, width: int = 32
) -> np.ndarray:
    """The same with its second patch of the third row in another colour."""
    picture = coloured(colour, height, width)
    picture[2 * PATCH : 3 * PATCH, PATCH : 2 * PATCH] = spot
    return picture


def row(colour: tuple[int, int, int]) -> np.ndarray:
    """The patch that a colour makes, float32 ``[1, 3]``."""
    return PREPROCESS.normalized(coloured(colour, 1, 1))[:, 0, 0][None]


def graph(
    references: bool = True,
    opset: int = 18,
    size: tuple[int, int] | None = None,
    grows: bool = False,
) -> bytes:
    """The graph as ONNX; with a ``size`` it takes only that (height, width).

    One that ``grows`` gives the patches too, which an image adds to the good ones.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        node("AveragePool", "image", "pooled", kernel_shape=[PATCH] * 2, strides=[PATCH] * 2),
        node("Transpose", "pooled", "patches", perm=[0, 2, 3, 1]),
        node("Unsqueeze", "patches last_but_one", "rows"),
        node("Sub", "rows good", "away") if references else node("Identity", "rows", "away"),
        node("Mul", "away away", "squares"),
        node("ReduceSum", "squares last", "distances", keepdims=0),
        node("ReduceMin", "distances last", "map", keepdims=0),
        node("ReduceMax", "map grid", "score", keepdims=0),
        node("ReduceMean", "patches grid", "mean", keepdims=0),
        node("ReduceL2", "mean last", "length", keepdims=1),
        node("Div", "mean length", "descriptor"),
    ]
    if grows:
        nodes.append(node("Reshape", "patches rows_shape", "new_good"))
    axes = {"last_but_one": [3], "last": [-1], "grid": [1, 2]}
    if grows:
        axes["rows_shape"] = [0, -1, 3]
    constants = [numpy_helper.from_array(np.array(at), name) for name, at in axes.items()]
    inputs = [value("image", "batch", 3, *(size or ("height", "width")))]
    inputs += [value("good", "rows", 3)] if references else []
    outputs = [value("map", "batch", "h", "w"), value("score", "batch")]
    outputs += [value("descriptor", "batch", 3)]
    outputs += [value("new_good", "batch", "n", 3)] if grows else []
    made = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return bytes(model.SerializeToString())


def category(*colours: tuple[int, int, int], **more: Any) -> ExportedCategory:
    return ExportedCategory(heat_unit=0.7, n_normal=len(colours), **more)


def write(
    path: Path,
    colours: dict[str, tuple[tuple[int, int, int], ...]] | None = None,
    *,
    references: bool = True,
    openvino: bool = False,
    model: bytes | None = None,
    calibration: dict[str, list[float]] | None = None,
    retrieval: bool = True,
    grows: bool = False,
    **manifest: Any,
) -> Path:
    """Write an export that knows categories by the colours of their good images."""
    named = {k: (v,) for k, v in COLOURS.items()} if colours is None else colours
    tensors, categories = {}, {}
    for number, (name, good) in enumerate(named.items()):
        known = category(*good)
        if references:
            known.references = {"good": f"good/{number}"}
            tensors[f"good/{number}"] = np.concatenate([row(colour) for colour in good])
        known.calibration_scores = (calibration or {}).get(name, [])
        known.calibration_maxima = known.calibration_scores
        categories[name] = known
    size = manifest.get("size")
    blob = graph(references, size=size, grows=grows) if model is None else model
    files = openvino_files(blob) if openvino else {"model.onnx": blob}
    files[REFERENCES], files[PARITY] = tensor_file(tensors), b"{}"
    if retrieval:
        found = {n: np.concatenate([row(c) for c in good]) for n, good in named.items()}
        units = {n: each / np.linalg.norm(each, axis=1)[:, None] for n, each in found.items()}
        files[RETRIEVAL] = tensor_file(units)
    settings: dict[str, Any] = {
        "format": "openvino" if openvino else "onnx",
        "method": "by-hand",
        "backbone": BackboneRecord(id="none", layers=(0,), weights_sha256=""),
        "preprocess": PREPROCESS.to_dict(),
        "needs_category": True,
        "sigma": 0.0,
        "heat_unit": 0.3,
        "alpha": 0.1,
        "alpha_review": 0.2,
        "categories": categories,
        "grows": ["good"] if grows else [],
    }
    write_export(path, Exported(**{**settings, **manifest}), files)
    return path


def openvino_files(model: bytes) -> dict[str, bytes]:
    """The same graph in OpenVINO's own files."""
    import tempfile

    from anomalyst.runtime.engines import import_openvino

    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.xml"
        openvino.save_model(openvino.Core().read_model(model), place, compress_to_fp16=False)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}
