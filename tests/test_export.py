"""Exported equals eager, for every registered method: the same tensor through torch and a graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
import torch
from torch.nn import functional

from anomalyst import export_graph
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.export_graph import as_onnx, as_openvino, references_of, trace
from anomalyst.features.object_tokens import cubic_weights
from anomalyst.methods import REGISTRY, memory_bank
from anomalyst.retrieval import describe
from anomalyst.runtime.engines import ENGINES
from conftest import CLIP, DEEP, blot, texture
from test_iipad_tower import write_qformer

# Small networks, so that tracing them takes seconds.
QUICK: dict[str, dict[str, Any]] = {
    "anomaly-dino": {"layers": [1]},
    "patchcore": {"layers": [0, 1]},
    "nagl": {"layers": [1]},
    "inp-former": {"options": {"decoder_blocks": 2, "stored": 40}},
    "onenip": {
        "layers": [0, 1],
        "options": {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "width": 64,
            "heads": 4,
            "hidden": 128,
            "prompts": 2,
        },
    },
}
WIDE, HIGH = (96, 128), (160, 96)


@pytest.fixture
def taught(deep_weights: str, clip_weights: str) -> Any:
    """A detector with fresh weights and two products, of which more is known of the first."""

    def build(method: str, **more: Any) -> Detector:
        spec = REGISTRY[method]
        clip = spec.backbone.startswith("clip")
        backbone, weights = (CLIP, clip_weights) if clip else (DEEP, deep_weights)
        usual = QUICK.get(method, {})
        more["options"] = usual.get("options", {}) | more.get("options", {})
        more = {"backbone": backbone, "weights": weights, "image_size": 96, **usual, **more}
        detector = Detector(method, **more)
        detector.method.trained = True
        detector.enroll("plate", [texture(k) for k in range(3)])
        detector.enroll("rod", [texture(40, 96, 128)[:, ::-1].copy()])
        if spec.abnormal_references:
            mask = blot(np.zeros((96, 96, 3), np.uint8), 20, 30, 30)[..., 0]
            detector.enroll("plate", (), [(blot(texture(k), 20, 30, 30), mask) for k in (7, 8)])
        return detector

    return build


def eager(detector: Detector, images: torch.Tensor, category: str) -> dict[str, np.ndarray]:
    """What torch makes of images."""
    condenser = detector.engine.condenser
    with torch.inference_mode():
        maps = detector.engine.backbone(images)
        features = detector.method.encode(condenser.apply(maps) if condenser else maps)
        found = (*detector.method.score(features, category), describe(features))
    return {k: x.numpy() for k, x in zip(("map", "score", "descriptor"), found, strict=True)}


def compared(
    detector: Detector, size: tuple[int, int] | None = None
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Yield what torch and each engine make of images, three of one size and one of another."""
    known = references_of(detector, detector.categories, size)
    model = trace(detector, known, size)
    files = {"onnxruntime": (as_onnx(model),), "openvino": as_openvino(model)}
    for name, content in files.items():
        engine = ENGINES[name](content, 1)
        for category in detector.categories:
            references = {
                k: x.numpy() for k, x in known[category].items() if k in engine.inputs - {"image"}
            }
            for count, (height, width) in ((3, WIDE), (1, size or HIGH)):
                seeded = torch.Generator().manual_seed(count)
                images = torch.randn(count, 3, height, width, generator=seeded)
                found = engine.run({"image": images.numpy(), **references})
                yield eager(detector, images, category), found


def require_equal(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    span = np.ptp(expected["map"])
    assert span > 0
    for name, tolerance in (("map", 1e-5 * span), ("score", 1e-5 * span), ("descriptor", 1e-5)):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_a_graph_gives_what_torch_gives(
    method: str, taught: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any batch, two products with banks of different sizes, both engines."""
    if method == "anomaly-dino":
        monkeypatch.setattr(memory_bank, "_WIDE", 16)  # a bank of several blocks
    runs = list(compared(taught(method), WIDE))
    assert len(runs) == 2 * 2 * 2
    for expected, found in runs:
        require_equal(expected, found)


@pytest.mark.parametrize(
    "method",
    [
        # Symbols of sizes take the others half a minute to work out.
        pytest.param(name, marks=[] if name in ("patchcore", "nagl") else [pytest.mark.slow])
        for name in sorted(REGISTRY)
    ],
)
def test_a_graph_of_any_size(method: str, taught: Any) -> None:
    for expected, found in compared(taught(method)):
        require_equal(expected, found)


VARIANTS = [
    ("anomaly-dino", {"layers": [3, 6]}),
    ("patchcore", {"options": {"reweight": 3, "dimension": 20}}),
    ("inp-former", {"options": {"prototypes": 0}}),
    ("inp-former", {"options": {"score": "prototypes"}}),
    (
        "inp-former",
        {
            "options": {
                "decoder_blocks": 8,
                "groups": 8,
                "bare": True,
                "heads": 1,
                "similarity": "dot",
                "skip": "input",
            }
        },
    ),
    ("onenip", {"options": {"decoder": "static"}}),
    ("onenip", {"options": {"decoder": "query", "masked": "encoder"}}),
    ("onenip", {"options": {"decoder": "legacy", "prompts": 1}}),
    ("onenip", {"options": {"refiner": False}}),
    ("nagl", {"options": {"guidance": "sum", "pooling": "joint", "positions": "grid"}}),
    ("nagl", {"options": {"positions": "masked", "matching": "inner-product"}}),
    ("nagl", {"options": {"parts": "naive"}}),
    ("nagl", {"options": {"parts": "normal"}}),
    ("winclip", {"options": {"windows": "shared"}}),
    ("winclip", {"options": {"fusion": "community"}}),
    ("anople", {"options": {"interaction": "text", "bank": "shared", "image_score": "map"}}),
    ("anople", {"options": {"interaction": "visual", "prefix": "add", "bank": "none"}}),
    ("iipad", {"options": {"object_tokens": "kmeans"}}),
    ("iipad", {"options": {"object_tokens": "random", "memory": "shared", "ln_post": False}}),
    ("iipad", {"options": {"generator": "code", "image_score": "code", "memory": "none"}}),
]


@pytest.mark.slow
@pytest.mark.parametrize("method,more", VARIANTS, ids=lambda part: str(part).replace(" ", ""))
def test_variants_of_methods_too(method: str, more: dict[str, Any], taught: Any) -> None:
    for expected, found in compared(taught(method, **more)):
        require_equal(expected, found)


@pytest.mark.slow
def test_the_qformer_too(taught: Any, tmp_path: Path) -> None:
    folder = write_qformer(tmp_path / "qformer")
    options = {"object_tokens": "qformer", "qformer": str(folder)}
    for expected, found in compared(taught("iipad", options=options)):
        require_equal(expected, found)


@pytest.mark.parametrize("size", [(96, 128), (20, 24), (32, 33)])
def test_resizing_by_two_products_is_torchs(size: tuple[int, int]) -> None:
    image = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(image, (32, 32), mode="bicubic", antialias=True)
    rows, columns = (cubic_weights(length, 32) for length in size)
    torch.testing.assert_close(rows @ image @ columns.T, expected, rtol=0, atol=1e-5)


def test_a_graph_too_large_for_onnx_still_goes_to_openvino(
    taught: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two gigabytes, here of a kilobyte."""
    monkeypatch.setattr(export_graph, "_LARGEST", 1000)
    detector = taught("patchcore")
    known = references_of(detector, detector.categories, (96, 96))
    model = trace(detector, known, (96, 96))
    with pytest.raises(InputError, match=r"GB, an \.onnx file holds 2 GB at most"):
        as_onnx(model)
    engine = ENGINES["openvino"](as_openvino(model), 1)
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    found = engine.run({"image": images.numpy(), "bank": known["rod"]["bank"].numpy()})
    require_equal(eager(detector, images, "rod"), found)
