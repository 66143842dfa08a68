"""From data sets to a bundle: every check before the long work, the bundle at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from anomalyst.bundle import check_destination
from anomalyst.data.layouts import load_together
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.promises import require_held_out
from anomalyst.training_setup import TrainingSetup
from anomalyst.types import Progress

_log = logging.getLogger(__name__)


def fit_bundle(
    detector: Detector,
    roots: Sequence[Path],
    output: Path,
    training: TrainingSetup,
    calibration: float = 0.2,
    *,
    shots: int | None = None,
    layout: str | None = None,
    categories: Sequence[str] | None = None,
    levels: Sequence[float | None] = (),
    progress: Progress | None = None,
) -> None:
    """Fit the detector on one or several data sets together and save it.

    Parameters
    ----------
    roots
        Folders of data sets.
    levels
        False-reject rates that the calibration must be able to promise.
    training, shots, calibration, progress
        As `Detector.fit`.

    Raises
    ------
    InputError
        As `load_together`, `Detector.fit` and `Detector.save`; or a level cannot be promised.
    """
    check_destination(output)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        _log.warning("%s: the bundle there is replaced once this one is done", output)
    data = load_together(roots, layout=layout, categories=categories)
    samples = data.train
    if detector.trains_apart:
        _require_no_calibration(levels)
        samples += data.test
    else:
        require_held_out(samples, calibration, levels)
    detector.fit(
        samples, shots=shots, calibration=calibration, training=training, progress=progress
    )
    if len(roots) > 1 and detector.setting == "multi":
        detector.setting = "super-multi"
    detector.save(output)
    training.finish()


def _require_no_calibration(levels: Sequence[float | None]) -> None:
    if any(level is not None for level in levels):
        raise InputError(
            "--alpha and --alpha-review promise nothing of products that are enrolled later: "
            "leave them out, and give them to `anomalyst calibrate`"
        )
