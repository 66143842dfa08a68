"""What a detector is put together from: an engine by its settings, calibrations by images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.base import make_options
from anomalyst.scoring import Calibration
from anomalyst.tiling import Tiling
from anomalyst.types import Progress, Sample

if TYPE_CHECKING:
    from anomalyst.detector import Detector
    from anomalyst.engine import Engine


def make_engine(detector: Detector) -> Engine:
    """Return preprocessing and frozen backbone as a detector's settings say."""
    method, spec = detector.spec.load(), find_backbone(detector.backbone_id)
    options = make_options(method, detector.options)  # a slip must not wait for the weights
    tiling = None
    if detector.tile is not None:
        tiling = Tiling(detector.tile, detector.overlap, detector.overview)
    preprocess = Preprocess(
        image_size=spec.image_size if detector.image_size is None else detector.image_size,
        multiple=spec.stride,
        mean=spec.mean,
        std=spec.std,
        square=detector.square,
        resize=detector.resize,
        frame=detector.frame,
        tiling=tiling,
    )
    layers = tuple(detector.layers) if detector.layers else method.default_layers(spec)
    from anomalyst.engine import Engine, pick_device
    from anomalyst.features.extractor import Backbone

    device = pick_device(detector.device)
    backbone = Backbone.load(
        spec.id,
        layers,
        weights=detector.weights,
        offline=detector.offline,
        device=device,
        make=partial(method.make_tower, options),
    )
    return Engine(backbone, preprocess, device, detector.feature_cache, method.condenser(options))


def calibration_of(
    detector: Detector, data: Sequence[Sample], progress: Progress | None
) -> dict[str, Calibration]:
    """Return by category what held-out normal images say; see `Detector.calibrate`."""
    anomalous = next((s for s in data if s.label == 1), None)
    if anomalous is not None:
        raise InputError(f"{anomalous.path}: calibration takes normal images only")
    learned = [*detector.references.values(), detector.trained_on]
    seen = {record.sha256 for records in learned for record in records}
    bad = {record.sha256: name for name, rows in detector.abnormal.items() for record in rows}
    kept: dict[str, list[tuple[float, float, str]]] = {}
    for done, p in enumerate(detector.predict(data), start=1):
        if p.error or p.category is None or p.score is None or p.map is None:
            raise InputError(f"calibration image: {p.error}")
        if p.sha256 in bad:
            raise InputError(f"{p.image}: an abnormal reference of {bad[p.sha256]!r}; leave it out")
        if p.sha256 not in seen:
            seen.add(p.sha256)
            kept.setdefault(p.category, []).append((p.score, float(p.map.max()), p.sha256))
        if progress:
            progress("calibrate", done, len(data))
    if not kept:
        raise InputError(
            f"all {len(data)} images given are references of this detector: "
            "calibrate with normal images that it has not seen"
        )
    return {name: Calibration.of(*zip(*rows, strict=True)) for name, rows in kept.items()}
