"""anomalyst: find visual defects from references."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import anomalyst` needs no torch.
_HOME = {
    "Dataset": "anomalyst.data.layouts",
    "Detector": "anomalyst.detector",
    "Frame": "anomalyst.data.frame",
    "InputError": "anomalyst.errors",
    "Prediction": "anomalyst.types",
    "References": "anomalyst.types",
    "Region": "anomalyst.types",
    "Sample": "anomalyst.types",
    "backbones": "anomalyst.features.backbones",
    "evaluate": "anomalyst.evaluation",
    "load_dataset": "anomalyst.data.layouts",
    "methods": "anomalyst.methods.base",
    "preset": "anomalyst.methods.base",
}
__all__ = [
    "Dataset",
    "Detector",
    "Frame",
    "InputError",
    "Prediction",
    "References",
    "Region",
    "Sample",
    "backbones",
    "evaluate",
    "load_dataset",
    "methods",
    "preset",
]

if TYPE_CHECKING:
    from anomalyst.data.frame import Frame
    from anomalyst.data.layouts import Dataset, load_dataset
    from anomalyst.detector import Detector
    from anomalyst.errors import InputError
    from anomalyst.evaluation import evaluate
    from anomalyst.features.backbones import backbones
    from anomalyst.methods.base import methods, preset
    from anomalyst.types import Prediction, References, Region, Sample


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'anomalyst' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
