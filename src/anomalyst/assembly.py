"""What a detector is put together from: preprocessing and frozen backbone, by its settings."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from anomalyst.data.transforms import Preprocess
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.base import make_options
from anomalyst.tiling import Tiling

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
