"""The demo: defects on real solar cells, from a few good ones. The images come in a package.

Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in
Electroluminescence Imagery", 2018: 2,624 cells of 300 x 300 pixels, mono- and polycrystalline, each
with a probability of being defective: 0, 1/3, 2/3 or 1. Cells at 1/3 and 2/3, on which the experts
were unsure, are left out.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from anomalyst.console import progress, say
from anomalyst.data.layouts import Dataset
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.evaluation import evaluate, test_samples, write_metrics
from anomalyst.evaluation_report import write_evaluation_report
from anomalyst.types import Sample

_IMAGE_SIZE = 224
_CALIBRATION_IMAGES = 200


def solar_cells(shots: int) -> Dataset:
    """Return the cells: ``shots`` and the calibration images as train, the rest as test.

    Raises
    ------
    InputError
        The package that carries the images is not installed.
    """
    try:
        files = metadata.files("elpv-dataset") or []
    except metadata.PackageNotFoundError:
        raise InputError(
            "the demo's images come in a package: pip install 'anomalyst[demo]'"
        ) from None
    labels = next(Path(str(file.locate())) for file in files if file.name == "labels.csv")
    good: dict[str, list[Sample]] = {"mono": [], "poly": []}
    test: list[Sample] = []
    for line in labels.read_text().splitlines():
        name, probability, kind = line.split()
        path = labels.parent / name
        if float(probability) == 0:
            good[kind].append(Sample(path, kind, 0, "good"))
        elif float(probability) == 1:
            test.append(Sample(path, kind, 1, "defective"))
    train: list[Sample] = []
    for cells in good.values():
        # Neighbouring files show the same module: take cells from all over the list.
        wanted = shots + _CALIBRATION_IMAGES
        chosen = {k * len(cells) // wanted for k in range(wanted)}
        train += [cell for k, cell in enumerate(cells) if k in chosen]
        test += [cell for k, cell in enumerate(cells) if k not in chosen]
    return Dataset(labels.parent, "elpv", ("mono", "poly"), tuple(train), tuple(test))


def run_demo(output: Path, shots: int) -> tuple[dict[str, Any], Path]:
    """Fit, calibrate, predict and report; return the metrics and the report's path."""
    if shots < 1:
        raise InputError(f"--shots {shots}: at least one good cell of each kind is needed")
    cells = solar_cells(shots)
    detector = Detector("anomaly-dino", image_size=_IMAGE_SIZE)
    held_out = _CALIBRATION_IMAGES / (_CALIBRATION_IMAGES + shots)
    say(
        f"one detector, two products: {shots} good mono and {shots} good poly solar cells to "
        f"compare with, {_CALIBRATION_IMAGES} more of each to calibrate on"
    )
    detector.fit(cells.train, calibration=held_out)
    bundle = detector.save(output / "bundle")
    with progress("judging the other cells", len(test_samples(detector, cells))) as advance:
        result = evaluate(detector, cells, progress=advance)
    write_metrics(result, output)
    report = write_evaluation_report(result, detector, output, source=bundle, data=cells)
    return result.metrics, report
