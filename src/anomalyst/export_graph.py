"""A detector as one graph: a preprocessed image in, raw map, image score and descriptor out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from anomalyst.errors import InputError
from anomalyst.retrieval import describe
from anomalyst.runtime.engines import NEW, import_openvino

if TYPE_CHECKING:
    from anomalyst.detector import Detector
    from anomalyst.methods.base import Method

OUTPUTS = ("map", "score", "descriptor")
Size = tuple[int, int]
References = Mapping[str, Tensor]

_BATCH = 5  # of the example: like no other size, so that the two are not taken for one
_READ_BY = 9  # version of the file format; what ONNX Runtime 1.17 and later read
_LARGEST = 2**31 - 2**20  # bytes that a protocol buffer may have, and some to spare


class Whole(nn.Module):
    """Backbone, method and descriptor behind one another, for one category at a time."""

    def __init__(self, detector: Detector, category: str | None) -> None:
        super().__init__()
        self.tower = detector.engine.backbone.tower
        self.condenser = detector.engine.condenser
        self.category = category
        self.grows = detector.method.grows
        self.method = _copy_of(detector)
        self.network = getattr(self.method, "network", None)  # so that its weights are found
        self.eval()

    def forward(self, image: Tensor, references: References) -> tuple[Tensor, ...]:
        """Return map ``[B, h, w]``, score ``[B]``, descriptor ``[B, C]`` and new rows, if any."""
        self.method.take(self.category, references)
        maps = self.tower(image)
        if self.condenser is not None:
            maps = self.condenser.apply(maps)
        features = self.method.encode(maps)
        rows = self.method.gained(features) if self.grows else {}
        score = self.method.score(features, self.category)
        return *score, describe(features), *(rows[name] for name in self.grows)


def _copy_of(detector: Detector) -> Method:
    """Return the method once more: `Method.take` makes it forget all that the detector knows."""
    known = detector.method
    fresh = type(known)(known.options, known.backbone, known.layers, known.seed)
    fresh.bind(detector.engine.backbone.tower)
    fresh.load_tensors(known.tensors())
    return fresh


class NoGraphError(Exception):
    """What stands in the way of a graph, in one line."""


@torch.no_grad()
def references_of(
    detector: Detector, names: Sequence[str], size: Size | None
) -> dict[str, dict[str, Tensor]]:
    """Return by category what the graph is fed with beside images of one ``size``, or of any.

    Raises
    ------
    InputError
        More is known of some categories than of others, so that one graph cannot serve both.
    """
    found = {
        name: {key: each.detach() for key, each in detector.method.references(name, size).items()}
        for name in names
    }
    for name, tensors in found.items():
        if tensors.keys() != found[names[0]].keys():
            raise InputError(
                f"{names[0]!r} and {name!r} cannot share a graph: only one of them has references; "
                "enroll some of the other, or export one of them alone (--category)"
            )
    return found


def trace(detector: Detector, known: Mapping[str, References], size: Size | None) -> Any:
    """Return the graph as an ``onnx.ModelProto``, weights inside, references as inputs.

    Parameters
    ----------
    known
        The references of each category, see `references_of`; the graph takes any of them.
    size
        Height and width of the only images that it takes; None for any.

    Raises
    ------
    NoGraphError
        Something in the way from image to score cannot be put into such a graph.
    """
    category = next(iter(known), None)
    example = {
        key: max((each[key] for each in known.values()), key=lambda x: (x.shape[0], x.numel()))
        for key in (known[category] if category is not None else {})
    }
    image, open_sides = _image(detector, size)
    whole = Whole(detector, category)
    lengths = {key: _open(key, known, key in whole.grows) for key in example}
    shapes = ({0: Dim("batch")} | open_sides, lengths)
    with torch.no_grad(), _quiet():
        whole(image[:1], example)  # what is computed once has been by now
        program = _try(
            lambda: torch.export.export(
                whole, (image, example), dynamic_shapes=shapes, strict=False
            )
        )
        outputs = [*OUTPUTS, *(NEW + key for key in whole.grows)]
        names: dict[str, Any] = {"input_names": ["image", *example], "output_names": outputs}
        made = _try(lambda: torch.onnx.export(program, dynamo=True, verbose=False, **names))
    model = made.model_proto
    _tidy(model)
    _require_open(model, {"image": shapes[0], **shapes[1]})
    return model


def _image(detector: Detector, size: Size | None) -> tuple[Tensor, dict[int, Any]]:
    """Return images to trace with, and which of their sides stay open."""
    if size is not None:
        return torch.zeros(_BATCH, 3, *size), {}
    preprocess = detector.engine.preprocess
    step = preprocess.multiple
    least = preprocess.least_side // step  # no input has fewer patches along a side
    if least < 2:
        raise NoGraphError("images may be a single patch high or wide")
    sides = {2 + k: step * Dim(name, min=least) for k, name in enumerate(("rows", "columns"))}
    return torch.zeros(_BATCH, 3, (least + 1) * step, (least + 3) * step), sides


def _open(key: str, known: Mapping[str, References], grows: bool) -> dict[int, Any]:
    """Return the dimensions of a reference in which categories differ, or may once it grows."""
    lengths = zip(*(each[key].shape for each in known.values()), strict=True)
    rows = {0: Dim(f"{key}_0", min=1)} if grows else {}
    return rows | {
        axis: Dim(f"{key}_{axis}", min=min(values))
        for axis, values in enumerate(lengths)
        if len(set(values)) > 1 and axis not in rows
    }


def _try(make: Callable[[], Any]) -> Any:
    # The exporter raises errors of many classes; all say what it could not do.
    try:
        return make()
    except Exception as error:
        causes = [str(error.__cause__ or error), type(error).__name__]
        line = next(" ".join(cause.split()) for cause in causes if cause.strip())
        raise NoGraphError(line[:300]) from error


def _tidy(model: Any) -> None:
    """Leave out what names files of this machine, and inputs that nothing reads."""
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    inputs = [each for each in graph.input if each.name in read]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = min(model.ir_version, _READ_BY)


def _require_open(model: Any, wanted: Mapping[str, Iterable[int]]) -> None:
    """Raise where a dimension that should be open was quietly fixed."""
    given = {each.name: each.type.tensor_type.shape.dim for each in model.graph.input}
    if "image" not in given:
        raise NoGraphError("the method does not look at the image")
    for name in wanted.keys() & given.keys():
        if any(given[name][axis].dim_value for axis in wanted[name]):
            what = "size of the images" if name == "image" else f"number of references ({name})"
            raise NoGraphError(f"what the method computes is laid out for one {what}")


def as_onnx(model: Any) -> bytes:
    """Return a graph as the content of one ``.onnx`` file.

    Raises
    ------
    InputError
        It is larger than such a file can be.
    """
    if (weight := _weight(model)) > _LARGEST:
        raise InputError(
            f"the graph has {weight / 1e9:.1f} GB, an .onnx file holds 2 GB at most: "
            "use --format openvino"
        )
    content: bytes = model.SerializeToString()
    return content


def as_openvino(model: Any) -> tuple[bytes, bytes]:
    """Return a graph as OpenVINO's two files, ``.xml`` and ``.bin``, of any size."""
    import onnx

    openvino = import_openvino()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save_model(model, str(path), save_as_external_data=_weight(model) > _LARGEST)
        converted = openvino.convert_model(path)
        openvino.save_model(converted, path.with_suffix(".xml"), compress_to_fp16=False)
        return path.with_suffix(".xml").read_bytes(), path.with_suffix(".bin").read_bytes()


def _weight(model: Any) -> int:
    return sum(len(each.raw_data) for each in model.graph.initializer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own remarks, which nobody but its makers can act on, off the screen."""
    loud = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [each.level for each in loud]
    try:
        for each in loud:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loud, levels, strict=True):
            each.setLevel(level)
