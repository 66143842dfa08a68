"""What runs an exported graph on the processor: ONNX Runtime or OpenVINO, both in float32."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Literal, Protocol, cast, get_args

import numpy.typing as npt

from anomalyst.errors import InputError, unknown
from anomalyst.runtime.exported import Export, Format

Array = npt.NDArray[Any]
EngineName = Literal["auto", "onnxruntime", "openvino"]
NEW = "new_"
"""How the outputs begin that hold what an image would add to the references of that name."""
HOME: dict[Format, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The package that a format was made for, and that its export was checked with."""


class Engine(Protocol):
    """A graph, ready to run."""

    name: str
    inputs: frozenset[str]
    outputs: frozenset[str]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output by name; may be called from several threads."""


def make_engine(export: Export, name: str, threads: int | None) -> Engine:
    """Return what runs an export; ``auto`` is the package that its format was made for.

    Raises
    ------
    InputError
        There is no such engine, it is not installed, or its version cannot read the graph.
    """
    if name not in get_args(EngineName):
        raise unknown("engine", name, get_args(EngineName))
    if threads is not None and threads < 1:
        raise InputError(f"threads {threads}: give 1 or more, or none for the engine's own choice")
    chosen = HOME[export.manifest.format] if name == "auto" else name
    if chosen == "onnxruntime" and export.manifest.format != "onnx":
        raise InputError(
            "onnxruntime reads no OpenVINO graph: export again with --format onnx, or use openvino"
        )
    if installed(chosen) is None:
        raise InputError(
            f"this export runs on {chosen}, which is not installed: "
            f"pip install {chosen if chosen == 'onnxruntime' else repr('anomalyst[openvino]')}"
        )
    try:
        return ENGINES[chosen](export.model, threads)
    except (MemoryError, InputError):
        raise
    # Each package has error classes of its own; the files are whole, so their version is to blame.
    except Exception as error:
        made = export.manifest.versions.get(HOME[export.manifest.format], "an unknown version")
        raise InputError(
            f"{chosen} {installed(chosen)} cannot read this graph, exported with {made} "
            f"({_line(error)}); pip install -U {chosen}, or export the bundle again"
        ) from error


def silence() -> None:
    """Keep the engines, and NNCF, from reporting to their makers; to be called before any import.

    The wheels of ONNX Runtime from 1.29 on send what they run, a hash of the graph among it, to
    Microsoft, and keep an identifier in the user's cache: only this variable stops both, and
    whoever sets it to 0 wants it so. Importing OpenVINO or NNCF tells Intel, and writes an
    identifier into the user's home, by way of a package that they can do without: it is as good as
    missing, unless somebody imported it before.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))


def import_onnxruntime() -> Any:
    """Return the package ``onnxruntime``, silenced."""
    silence()
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # had somebody imported it before
    return onnxruntime


def import_openvino() -> Any:
    """Return the package ``openvino``, silenced."""
    silence()
    import openvino

    return openvino


def installed(package: str) -> str | None:
    """Return the installed version of a package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_older(version: str, other: str) -> bool:
    """Tell whether a version comes before another one, by its first two numbers."""
    first, second = ([int(n) for n in re.findall(r"\d+", v)[:2]] for v in (version, other))
    return first < second


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _OnnxEngine:
    name = "onnxruntime"

    def __init__(self, model: tuple[bytes, ...], threads: int | None) -> None:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads or 0  # 0: one for each physical core
        options.log_severity_level = 3  # errors; its warnings are for whoever makes graphs
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(model[0], options, providers=providers)
        self.inputs = frozenset(each.name for each in self._session.get_inputs())
        self._names = [each.name for each in self._session.get_outputs()]
        self.outputs = frozenset(self._names)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = self._session.run(self._names, dict(feeds))
        return dict(zip(self._names, found, strict=True))


class _OpenVinoEngine:
    name = "openvino"

    def __init__(self, model: tuple[bytes, ...], threads: int | None) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        read = core.read_model(*model)
        # By itself it would compute in bfloat16 where the processor can, which moves scores.
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._compiled = core.compile_model(read, "CPU", settings)
        self.inputs = frozenset(_name(port) for port in self._compiled.inputs)
        self._ports = {_name(port): port for port in self._compiled.outputs}
        self.outputs = frozenset(self._ports)
        self._lock = threading.Lock()  # a compiled model has one request, for one caller

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with self._lock:
            found = self._compiled(dict(feeds))
            return {name: found[port] for name, port in self._ports.items()}


ENGINES: dict[str, Callable[[tuple[bytes, ...], int | None], Engine]] = {
    "onnxruntime": _OnnxEngine,
    "openvino": _OpenVinoEngine,
}


def _name(port: Any) -> str:
    """Return the name that the exporter gave a tensor; converters may add others of their own."""
    names: set[str] = port.get_names()
    known = names & {"image", "map", "score", "descriptor"}
    return min(known or {name for name in names if name.startswith(NEW)} or names)
