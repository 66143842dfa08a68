"""A detector to a bundle and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anomalyst.bundle import (
    BackboneRecord,
    CategoryRecord,
    Manifest,
    now,
    package_versions,
    read_bundle,
    write_bundle,
)
from anomalyst.data.transforms import Preprocess
from anomalyst.detector import Detector
from anomalyst.engine import Engine, pick_device
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureCache
from anomalyst.features.extractor import Backbone
from anomalyst.methods.base import find_method, make_options
from anomalyst.scoring import Calibration, Decision
from anomalyst.tiling import OVERLAP


def save_detector(detector: Detector, path: Path) -> None:
    """Write the whole detector, backbone weights included, as a folder or a ``.zip``."""
    parts = {
        "backbone": detector.engine.backbone.state(),
        "method": detector.method.tensors(),
        "retrieval": detector.index.tensors(),
    }
    arrays = {
        part: {key: value.detach().cpu().numpy() for key, value in tensors.items()}
        for part, tensors in parts.items()
    }
    frame = detector.engine.preprocess.frame
    if frame is not None and frame.arrays():
        arrays["frame"] = frame.arrays()
    write_bundle(path, _describe(detector), arrays)


def _describe(detector: Detector) -> Manifest:
    backbone = detector.engine.backbone
    categories = {}
    for name, references in detector.references.items():
        calibration = detector.calibration.get(name, Calibration((), ()))
        categories[name] = CategoryRecord(
            references=references,
            abnormal=detector.abnormal.get(name, []),
            calibration_scores=list(calibration.scores),
            calibration_maxima=list(calibration.maxima),
            calibration_sha256=list(calibration.images),
        )
    return Manifest(
        method=detector.spec.name,
        options=detector.method.options.model_dump(),
        seed=detector.seed,
        backbone=BackboneRecord(
            id=backbone.spec.id, layers=backbone.layers, weights_sha256=backbone.weights_sha256
        ),
        preprocess=detector.engine.preprocess.to_dict(),
        alpha=detector.decision.alpha,
        alpha_review=detector.decision.alpha_review,
        categories=categories,
        trained_on=detector.trained_on,
        setting=detector.setting,
        shots=detector.shots,
        data_fingerprint=detector.fingerprint,
        seconds=detector.seconds,
        versions=package_versions(),
        created=now(),
    )


def load_detector(
    path: Path,
    device: str,
    decision: Decision | None,
    cache: FeatureCache | None,
    options: Mapping[str, Any],
) -> Detector:
    """Read a bundle; nothing else is read, the network least of all."""
    manifest, arrays = read_bundle(path)
    preprocess = Preprocess.from_dict(manifest.preprocess, arrays.pop("frame", None))
    target = pick_device(device)
    parts = {
        part: {key: torch.from_numpy(value).to(target) for key, value in named.items()}
        for part, named in arrays.items()
    }
    record = manifest.backbone
    method = find_method(manifest.method).load()
    chosen = make_options(method, {**manifest.options, **options})
    backbone = Backbone.from_state(
        record.id, record.layers, parts["backbone"], partial(method.make_tower, chosen)
    ).to(target)
    if backbone.weights_sha256 != record.weights_sha256:
        raise InputError(
            f"{path}: the backbone's weights are not those that the bundle was made on"
        )
    tiling = preprocess.tiling
    detector = Detector(
        manifest.method,
        backbone=record.id,
        image_size=preprocess.image_size,
        square=preprocess.square,
        resize=preprocess.resize,
        frame=preprocess.frame,
        tile=None if tiling is None else tiling.side,
        overlap=OVERLAP if tiling is None else tiling.overlap,
        overview=tiling is not None and tiling.overview,
        layers=record.layers,
        options={**manifest.options, **options},
        decision=decision or Decision(manifest.alpha, manifest.alpha_review),
        seed=manifest.seed,
        device=device,
        offline=True,
        feature_cache=cache,
    )
    condenser = method.condenser(chosen)
    detector.restore(Engine(backbone, preprocess, target, cache, condenser), parts)
    _recall(detector, manifest)
    return detector


def _recall(detector: Detector, manifest: Manifest) -> None:
    """Give a detector what a manifest knows of its past."""
    detector.trained_on = manifest.trained_on
    detector.setting, detector.shots = manifest.setting, manifest.shots
    detector.seconds = manifest.seconds
    for name, known in manifest.categories.items():
        detector.references[name] = known.references
        if known.abnormal:
            detector.abnormal[name] = known.abnormal
        if known.calibration_scores:
            detector.calibration[name] = Calibration.of(
                known.calibration_scores, known.calibration_maxima, known.calibration_sha256
            )
