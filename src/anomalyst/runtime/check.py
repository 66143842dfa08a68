"""Whether exported bundles can be judged here, for `anomalyst doctor`."""

from __future__ import annotations

import base64
import platform
from pathlib import Path

import numpy as np

from anomalyst.runtime.engines import ENGINES, installed

# A graph of 192 bytes, ONNX opset 18: red + 2 green + 3 blue of each pixel of ``image``.
_GRAPH = base64.b64decode(
    "CAgSADqzAQoTCgVpbWFnZQoBdxIBYyIEQ29udgonCgFjCgFhEgNtYXAiCVJlZHVjZU1heCoPCghrZWVwZGlt"
    "cxgAoAECEgFnKhsIAQgDCAEIARABQgF3SgwAAIA/AAAAQAAAQEAqEQgBEAdCAWFKCAEAAAAAAAAAWiIKBWlt"
    "YWdlEhkKFwgBEhMKAxIBYgoCCAMKAxIBaAoDEgF3YhwKA21hcBIVChMIARIPCgMSAWIKAxIBaAoDEgF3QgQK"
    "ABAS"
)


def check_engines() -> tuple[bool, str]:
    """Run a tiny graph on each engine installed; return whether all did, and what to know."""
    here = {name: installed(name) for name in ENGINES}
    wrong = [fault for name in ENGINES if here[name] and (fault := _fault(name))]
    if wrong or not any(here.values()):
        return False, "; ".join(wrong) or "missing onnxruntime: pip install onnxruntime"
    found = ", ".join(f"{name} {version}" for name, version in here.items() if version)
    return True, found + ("" if has_avx2() else "; works without AVX2, slower than with it")


def _fault(name: str) -> str | None:
    """Return what is wrong with an engine, None where it computes what it should."""
    image = np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
    try:
        found = ENGINES[name]((_GRAPH,), 1).run({"image": image})["map"]
    except Exception as error:  # a broken install may raise anything; the table must go on
        return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    expected = image[:, 0] + 2 * image[:, 1] + 3 * image[:, 2]
    if np.allclose(found, expected, rtol=1e-5):
        return None
    return f"{name} computes wrongly here: pip install --force-reinstall {name}"


def has_avx2(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether the processor has AVX2, as far as Linux tells; other kinds count as having."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not cpuinfo.is_file():
        return True
    lines = cpuinfo.read_text(errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "flags: avx2")
    return "avx2" in flags.split()
