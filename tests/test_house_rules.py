"""What keeps the code readable and light: sizes, depth, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "anomalyst"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# What the torch-free runtime shares: importing it must not load torch.
LIGHT = ["anomalyst", "anomalyst.cli", "anomalyst.types", "anomalyst.scoring", "anomalyst.metrics"]
LIGHT += ["anomalyst.bundle", "anomalyst.overlay", "anomalyst.report", "anomalyst.data.layouts"]
LIGHT += ["anomalyst.data.transforms", "anomalyst.methods.base", "anomalyst.features.backbones"]
LIGHT += ["anomalyst.features.weights", "anomalyst.detector", "anomalyst.inference"]
LIGHT += ["anomalyst.judging", "anomalyst.retrieval", "anomalyst.predictions", "anomalyst.runtime"]
LIGHT += ["anomalyst.data.frame", "anomalyst.tiled", "anomalyst.calibrating"]
LIGHT += ["anomalyst.runtime.profiling"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_functions_and_folders_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert len(path.relative_to(PACKAGE).parts) <= 2
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            assert (node.end_lineno or 0) - node.lineno + 1 - docstring <= 50, node.name


def test_the_median_file_is_short() -> None:
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES)
    assert lengths[len(lengths) // 2] < 200


def test_methods_import_no_other_method() -> None:
    from anomalyst.methods import REGISTRY

    homes = {spec.home.partition(":")[0] for spec in REGISTRY.values()}
    for home in homes:
        tree = ast.parse((ROOT / "src" / (home.replace(".", "/") + ".py")).read_text())
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & (homes - {home})


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_no_torch(module: str) -> None:
    heavy = "('torch', 'timm', 'open_clip', 'onnx', 'onnxruntime', 'matplotlib', 'scipy')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
