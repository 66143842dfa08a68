"""How a training runs, apart from what it learns. No torch: the command line reads it for help."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anomalyst.errors import InputError

Precision = Literal["32-true", "bf16-mixed"]
FULL: Precision = "32-true"
CHECKPOINT = "checkpoint.safetensors"
FEATURES = "features"


@dataclass(frozen=True)
class TrainingSetup:
    """Where a training keeps its log and checkpoints, and on what it runs.

    Attributes
    ----------
    folder
        For ``log.csv``, checkpoints and, meanwhile, frozen features; None keeps nothing.
    resume
        Go on from the checkpoint in ``folder``; the weights come out as without the interruption.
    checkpoint_seconds
        Time between two checkpoints.
    tensorboard
        Write TensorBoard events into ``folder``.
    cached
        Compute each image's frozen features once and keep them on disk, in half precision, while
        training; False runs the backbone at every step.
    devices
        Processes that share each batch, one a GPU or, on the CPU, a process each.
    precision
        ``32-true``, or ``bf16-mixed``: quicker where the processor has bfloat16, less exact.

    Raises
    ------
    InputError
        Values that do not fit together.
    """

    folder: Path | None = None
    resume: bool = False
    checkpoint_seconds: float = 120.0
    tensorboard: bool = False
    cached: bool = True
    devices: int = 1
    precision: Precision = FULL

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise InputError(f"{self.devices} devices: give 1 or more")
        if self.folder is None and (self.resume or self.tensorboard):
            raise InputError("resume and tensorboard need a folder for the training's files")

    def finish(self) -> None:
        """Remove what only an unfinished training needs, once its bundle is saved."""
        if self.folder is not None:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
            shutil.rmtree(self.folder / FEATURES, ignore_errors=True)
