"""Judging by an exported bundle with NumPy, Pillow and ONNX Runtime or OpenVINO. Never torch."""

from __future__ import annotations

from anomalyst.runtime.judge import Runtime

__all__ = ["Runtime"]
