"""Checkpoints of the methods' own authors to detectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from anomalyst.data.transforms import Preprocess
from anomalyst.detector import Detector
from anomalyst.engine import Engine, pick_device
from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.features.extractor import Backbone
from anomalyst.features.libraries import make_tower
from anomalyst.features.weights import read_checkpoint
from anomalyst.methods.base import make_options
from anomalyst.methods.inp_former import InpFormer

_SIZES = {384: "small", 768: "base", 1024: "large"}
_NAMES = {
    "prototype_token": "extractor.tokens",
    "aggregation.0.": "extractor.",
    "bottleneck.0.": "bottleneck.",
    "attn.learn_scale": "scale",
}


def convert_inp_former(path: str | Path, *, image_size: int = 392, resize: int = 448) -> Detector:
    """Return a detector with the weights of a checkpoint of luow23/INP-Former.

    It judges every image without a category; `Detector.calibrate` on good images, which may be of
    any category, makes verdicts of its scores.

    Parameters
    ----------
    path
        The ``.pth`` that the official code writes: a state dict with its encoder. Read as plain
        tensors, so nothing in it is executed.
    image_size, resize
        Crop and size before it in pixels, the official training's by default.

    Raises
    ------
    InputError
        Not such a checkpoint, not whole, or of an encoder other than DINOv2 small, base or large.
    """
    file = Path(path).expanduser()
    tensors = read_checkpoint(file)
    encoder = {
        k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")
    }
    spec = find_backbone(_backbone(file, encoder))
    preprocess = Preprocess(image_size, spec.stride, spec.mean, spec.std, True, resize)
    if "prototype_token" not in tensors:
        raise InputError(f"{file}: has no 'prototype_token': not a checkpoint of INP-Former")
    count = len(tensors["prototype_token"])
    detector = Detector(
        "inp-former",
        backbone=spec.id,
        image_size=image_size,
        square=True,
        resize=resize,
        options={"prototypes": count},
    )
    options = make_options(InpFormer, detector.options)
    layers = InpFormer.default_layers(spec)
    backbone = Backbone(spec, layers, make_tower(spec, layers), encoder, str(file))
    device = pick_device("auto")
    engine = Engine(backbone.to(device), preprocess, device, condenser=InpFormer.condenser(options))
    heads = {
        f"network.{rename(name)}": value.float().to(device)
        for name, value in tensors.items()
        if not name.startswith("encoder.")
    }
    try:
        detector.restore(engine, {"method": heads, "retrieval": {}})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not the heads of INP-Former ({reason})") from None
    detector.setting = "zero-shot"
    return detector


def rename(name: str) -> str:
    """Return our name of one of the official code's tensors.

    >>> rename("decoder.3.attn.learn_scale")
    'decoder.3.scale'
    """
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _backbone(file: Path, encoder: Mapping[str, Tensor]) -> str:
    token = encoder.get("cls_token")
    width = token.shape[-1] if token is not None else 0
    if width not in _SIZES or "patch_embed.proj.weight" not in encoder:
        raise InputError(
            f"{file}: has no encoder of DINOv2 small, base or large; give the .pth that the "
            "official training wrote"
        )
    return f"dinov2-{_SIZES[width]}{'-reg' if 'register_tokens' in encoder else ''}"
