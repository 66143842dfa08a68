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
from anomalyst.evaluation import evaluate, write_metrics
from anomalyst.evaluation_report import write_evaluation_report
from anomalyst.types import Sample

_IMAGE_SIZE = 224
_CALIBRATION_IMAGES = 200
_MOST_SHOTS = 100


def solar_cells(shots: int) -> tuple[Dataset, list[Sample]]:
    """Return the cells, ``shots`` of each kind to compare with as train and the rest as test,
    and apart from both the good cells to calibrate on.

    Raises
    ------
    InputError
        The package that carries the images is not installed, or so many shots leave no test.
    """
    if not 1 <= shots <= _MOST_SHOTS:
        raise InputError(f"--shots {shots}: give 1 to {_MOST_SHOTS} good cells of each kind")
    labels = _find_labels()
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
    calibration: list[Sample] = []
    for cells in good.values():
        references, others = _spread(cells, shots)
        held_out, rest = _spread(others, _CALIBRATION_IMAGES)
        train += references
        calibration += held_out
        test += rest
    data = Dataset(labels.parent, "elpv", ("mono", "poly"), tuple(train), tuple(test))
    return data, calibration


def _find_labels() -> Path:
    try:
        files = metadata.files("elpv-dataset") or []
    except metadata.PackageNotFoundError:
        raise InputError(
            "the demo's images come in a package: pip install 'anomalyst[demo]'"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.name == "labels.csv")


def _spread(cells: list[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Return ``count`` cells from all over the list, and the others.

    Neighbouring files show the same solar module.
    """
    chosen = {k * len(cells) // count for k in range(count)}
    taken = [cell for k, cell in enumerate(cells) if k in chosen]
    return taken, [cell for k, cell in enumerate(cells) if k not in chosen]


def run_demo(output: Path, shots: int) -> tuple[dict[str, Any], Path]:
    """Fit, calibrate, predict and report; return the metrics and the report's path."""
    cells, held_out = solar_cells(shots)
    detector = Detector("anomaly-dino", image_size=_IMAGE_SIZE)
    say(
        f"one detector, two products: {shots} good mono and {shots} good poly solar cells to "
        f"compare with, {_CALIBRATION_IMAGES} more of each to calibrate on"
    )
    with progress() as advance:
        detector.fit(cells.train, shots=shots, calibration=0, progress=advance)
        detector.calibrate(held_out, advance)
        bundle = detector.save(output / "bundle")
        result = evaluate(detector, cells, progress=advance)
    write_metrics(result, output)
    report = write_evaluation_report(result, detector, output, source=bundle, data=cells)
    return result.metrics, report
