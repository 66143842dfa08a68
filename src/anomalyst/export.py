"""A bundle to an exported one: one graph for ONNX Runtime or OpenVINO, held against torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

import numpy.typing as npt

from anomalyst.bundle import BackboneRecord, bundle_hash, now, package_versions
from anomalyst.data.images import list_images
from anomalyst.detector import Detector
from anomalyst.errors import InputError, unknown
from anomalyst.inference import network_inputs, read_item
from anomalyst.runtime.engines import HOME, NEW, installed
from anomalyst.runtime.exported import (
    FRAME,
    MODEL_FILES,
    PARITY,
    REFERENCES,
    RETRIEVAL,
    Export,
    Exported,
    ExportedCategory,
    Format,
    check_destination,
    tensor_file,
    write_export,
)
from anomalyst.scoring import Calibration

if TYPE_CHECKING:
    from anomalyst.export_graph import References
    from anomalyst.export_parity import Gate, Parity

Array = npt.NDArray[Any]
Size = tuple[int, int]
Tell = Callable[[str], None]
_log = logging.getLogger(__name__)

_COMPARED = 24  # images that go through the gate, of those given; with int8 all do
_MEASURED = 128  # images that the ranges of int8 are measured on
_NEEDED = ("onnx", "onnxscript")
_TOOLS = (*_NEEDED, "onnxruntime", "openvino", "nncf")


def export_bundle(
    source: str | Path | Detector,
    folder: str | Path,
    images: Sequence[str | Path],
    *,
    format: Format = "onnx",
    int8: bool = False,
    size: Size | None = None,
    categories: Sequence[str] | None = None,
    tell: Tell | None = None,
) -> Path:
    """Write what the runtime judges images with, once it gives what torch gives on real images.

    Parameters
    ----------
    source
        A bundle, or a detector, which stays as it is.
    folder
        Where to; a name that ends in ``.zip`` makes one file.
    images
        Images, or folders of them (searched to the bottom), to compare with. 24 of them are, with
        int8 all: they should hold the calibration images then, and defects.
    format
        ``onnx`` or ``openvino``.
    int8
        Compute the layers in int8: faster where the processor gains by it, and less exact.
    size
        Height and width of the network's input, for a graph that takes no other; by default one
        that takes any, or, where the method rules that out, the size that most of the images have.
    categories
        Only these; all by default. Of a method that judges by name alone, any names.
    tell
        Called with a line at each stage.

    Raises
    ------
    InputError
        The method cannot be exported, images are bad, or the export is not near enough to torch;
        nothing is written then.
    """
    target = Path(folder)
    if format not in get_args(Format):
        raise unknown("format", format, get_args(Format))
    check_destination(target)
    _require_packages(format, int8)
    paths = _listed(images)
    with _opened(source) as (detector, origin):
        _require_exportable(detector)
        names = _named(detector, categories)
        maker = _Maker(detector, names, format, int8, origin, tell or _log.info)
        export, parity = maker.make(paths, _allowed(detector, size))
    files = dict(zip(MODEL_FILES[format], export.model, strict=True))
    files[PARITY] = json.dumps(parity.to_dict(), indent=2).encode()
    parts = {REFERENCES: export.references, RETRIEVAL: export.retrieval, FRAME: export.frame}
    files |= {name: tensor_file(arrays) for name, arrays in parts.items() if arrays}
    write_export(target, export.manifest, files)
    return target


@contextmanager
def _opened(source: str | Path | Detector) -> Iterator[tuple[Detector, str]]:
    """Yield the detector on the processor, and the SHA-256 of the bundle's manifest."""
    if not isinstance(source, Detector):
        yield Detector.load(source, device="cpu"), bundle_hash(Path(source))
        return
    with TemporaryDirectory() as folder:
        source.save(folder)
        with _opened(folder) as opened:
            yield opened


def _listed(images: Sequence[str | Path]) -> list[Path]:
    if not images:
        raise InputError(
            "give real images to compare the export with (--images): a bundle keeps none"
        )
    return [path for given in images for path in list_images(given, recursive=True)]


def _require_packages(format: Format, int8: bool) -> None:
    wanted = [*_NEEDED, HOME[format], *(["nncf"] if int8 else [])]
    missing = [package for package in wanted if find_spec(package) is None]
    if missing:
        raise InputError(
            f"exporting needs {', '.join(missing)}: pip install 'anomalyst[export]'"
            + (" 'anomalyst[openvino]'" if "openvino" in missing else "")
        )


def _require_exportable(detector: Detector) -> None:
    if not detector.ready:
        raise InputError("this bundle knows no product yet: enroll one, then export")
    if (obstacle := detector.method.obstacle) is not None:
        raise InputError(f"{detector.spec.name} cannot be exported: {obstacle}")


def _named(detector: Detector, categories: Sequence[str] | None) -> list[str]:
    """Return the categories to export."""
    by_name = detector.spec.needs_class_name and detector.method.judges_unseen
    for name in categories or ():
        if not detector.knows(name):
            raise unknown("category", name, detector.categories)
        detector.method.require_name(name)
    if by_name and not (categories or detector.categories):
        raise InputError(
            f"{detector.spec.name} judges by name here, and an export knows no others than were "
            "said when it was made: say which (--category NAME, repeatable)"
        )
    return list(dict.fromkeys(categories or detector.categories))


def _allowed(detector: Detector, size: Size | None) -> Size | None:
    """Return the size that the graph is to have, checked; None is any."""
    preprocess = detector.engine.preprocess
    short, step = preprocess.least_side, preprocess.multiple
    always = bool(preprocess.square or preprocess.resize)
    if size is None:
        return (short, short) if always else None
    if min(size) != short or any(side % step for side in size) or (always and max(size) != short):
        other = "the other too" if always else f"a multiple of {step} along the other"
        raise InputError(
            f"size {size[0]}x{size[1]}: images of this bundle have {short} pixels along the short "
            f"side of the network's input, and {other}"
        )
    return size


# ---- one export ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """Makes exports of one detector, each held against it."""

    detector: Detector
    names: Sequence[str]
    format: Format
    int8: bool
    origin: str
    tell: Tell

    def make(self, paths: Sequence[Path], size: Size | None) -> tuple[Export, Parity]:
        """Return the export and how near it is; of one size where any will not do."""
        from anomalyst.export_graph import NoGraphError
        from anomalyst.export_parity import DriftError, Gate

        most = len(paths) if self.int8 else min(len(paths), _COMPARED)
        chosen = [paths[k * len(paths) // most] for k in range(most)]
        self.tell(f"judging {most} images with torch")
        gate = Gate(self.detector, chosen, self.names)
        if self.int8:
            gate.require_calibration()
        try:
            return self._attempt(gate, size)
        except (NoGraphError, DriftError) as reason:
            if size is not None or (self.int8 and isinstance(reason, DriftError)):
                raise self._failed(reason) from reason
            self.tell(f"no graph for images of any size ({reason})")
        try:
            return self._attempt(gate, gate.size)
        except (NoGraphError, DriftError) as reason:
            raise self._failed(reason) from reason

    def _failed(self, reason: Exception) -> InputError:
        how = f"{self.format}, int8" if self.int8 else self.format
        return InputError(f"no export of {self.detector.spec.name} ({how}): {reason}")

    def _attempt(self, gate: Gate, size: Size | None) -> tuple[Export, Parity]:
        from anomalyst.export_graph import references_of, trace

        known = references_of(self.detector, self.names, size)
        self.tell("making the graph, " + ("any size" if size is None else f"{size[0]}x{size[1]}"))
        model = trace(self.detector, known, size)
        if self.int8:
            return self._quantized(model, gate, known, size)
        return self._held(model, gate, known, size)

    def _quantized(
        self, model: Any, gate: Gate, known: Mapping[str, References], size: Size | None
    ) -> tuple[Export, Parity]:
        """Return the export with as many layers in int8 as the gate lets pass."""
        from anomalyst.export_int8 import ATTEMPTS, count_layers, quantized
        from anomalyst.export_parity import DriftError

        feeds = list(islice(self._feeds(gate, known, size), _MEASURED))
        layers = count_layers(model)
        refused: DriftError | None = None
        for words, find in ATTEMPTS.items():
            self.tell(f"measuring the ranges of int8, {words}")
            spared = find(model)
            try:
                export, parity = self._held(quantized(model, feeds, spared), gate, known, size)
            except DriftError as reason:
                self.tell(f"refused ({reason})")
                refused = reason
            else:
                return export, replace(parity, int8_layers=(layers - len(spared), layers))
        assert refused is not None
        raise refused

    def _held(
        self, model: Any, gate: Gate, known: Mapping[str, References], size: Size | None
    ) -> tuple[Export, Parity]:
        """Return the graph's export, held against torch."""
        from anomalyst.export_graph import OUTPUTS, as_onnx, as_openvino
        from anomalyst.runtime import Runtime
        from anomalyst.runtime.engines import make_engine

        self.tell(f"comparing {self.format} with torch")
        files = (as_onnx(model),) if self.format == "onnx" else as_openvino(model)
        inputs = [each.name for each in model.graph.input if each.name != "image"]
        tensors, places = _stored(inputs, known)
        retrieval = {
            name: each.cpu().numpy()
            for name, each in self.detector.index.tensors().items()
            if name in self.names
        }
        frame = self.detector.engine.preprocess.frame
        framed = {} if frame is None else frame.arrays()
        grows = [each.name.removeprefix(NEW) for each in model.graph.output][len(OUTPUTS) :]
        manifest = self._manifest(size, places, grows)
        export = Export(manifest, files, tensors, retrieval, framed)
        runtime = Runtime(export, make_engine(export, "auto", None), self.detector.decision)
        parity = gate.check(runtime, size, self.int8)
        for name, found in runtime.calibration.items():  # of int8 its own
            manifest.categories[name].take_calibration(found)
        return export, parity

    def _feeds(
        self, gate: Gate, known: Mapping[str, References], size: Size | None
    ) -> Iterator[dict[str, Array]]:
        """Yield what the graph is fed with for the gate's images."""
        for source, category in gate.images(size):
            preprocess = self.detector.engine.preprocess
            item = read_item(source, "image", preprocess)
            references = {k: x.numpy() for k, x in known.get(category or "", {}).items()}
            for _, parts in network_inputs(item, preprocess):
                tensors = [part.tensor for part in parts if part.tensor is not None]
                yield from ({"image": tensor[None], **references} for tensor in tensors)

    def _manifest(
        self, size: Size | None, places: Mapping[str, Mapping[str, str]], grows: Sequence[str]
    ) -> Exported:
        detector, backbone = self.detector, self.detector.engine.backbone
        tools = {name: version for name in _TOOLS if (version := installed(name))}
        return Exported(
            format=self.format,
            int8=self.int8,
            method=detector.spec.name,
            options=detector.method.options.model_dump(),
            backbone=BackboneRecord(
                id=backbone.spec.id, layers=backbone.layers, weights_sha256=backbone.weights_sha256
            ),
            preprocess=detector.engine.preprocess.to_dict(),
            size=size,
            grows=list(grows),
            needs_category=detector.spec.needs_category,
            needs_class_name=detector.spec.needs_class_name,
            judges_unseen=detector.method.judges_unseen,
            sigma=detector.method.sigma,
            heat_unit=detector.method.heat_unit(self.names[0] if self.names else None),
            alpha=detector.decision.alpha,
            alpha_review=detector.decision.alpha_review,
            categories={name: self._record(name, places.get(name, {})) for name in self.names},
            source=self.origin,
            versions=package_versions() | tools,
            created=now(),
        )

    def _record(self, name: str, references: Mapping[str, str]) -> ExportedCategory:
        detector = self.detector
        record = ExportedCategory(
            references=dict(references),
            heat_unit=detector.method.heat_unit(name),
            reference_sha256=[each.sha256 for each in detector.references.get(name, [])],
            n_normal=len(detector.references.get(name, [])),
            n_abnormal=len(detector.abnormal.get(name, [])),
        )
        record.take_calibration(detector.calibration.get(name, Calibration((), ())))
        return record


def _stored(
    inputs: Sequence[str], known: Mapping[str, References]
) -> tuple[dict[str, Array], dict[str, dict[str, str]]]:
    """Return the references by the name of their tensor, and those names by category and input.

    What several categories share is kept once.
    """
    tensors: dict[str, Array] = {}
    names: dict[tuple[str, int], str] = {}
    places: dict[str, dict[str, str]] = {}
    for number, (category, references) in enumerate(known.items()):
        for key in inputs:
            same = (key, references[key].data_ptr())
            name = names.setdefault(same, f"{key}/{number}")
            tensors[name] = references[key].cpu().contiguous().numpy()
            places.setdefault(category, {})[key] = name
    return tensors, places
