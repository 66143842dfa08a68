"""The folder of a cell or of a training: emptied, or gone on in, and what says which it is."""

from __future__ import annotations

import json
import shutil
import traceback
from pathlib import Path
from typing import Any, ClassVar, Protocol

from anomalyst.errors import InputError
from anomalyst.files import make_folder, replace_file
from anomalyst.training_setup import CHECKPOINT, Precision, TrainingSetup

_ERROR = "error.txt"
_TRAINING = "training"


class Made(Protocol):
    """What is made once for a configuration; its folder says so in the file ``record``."""

    record: ClassVar[str]

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything that it depends on, ready for JSON."""

    @property
    def sha256(self) -> str:
        """Hash of the configuration."""

    @property
    def precision(self) -> Precision:
        """Of its gradient steps."""


def prepare(made: Made, home: Path) -> TrainingSetup:
    """Empty the folder, unless a training of the same configuration was stopped in it."""
    training = home / _TRAINING
    stopped = is_same(made, home) and not (home / _ERROR).exists()
    resume = stopped and (training / CHECKPOINT).exists()
    if not resume:
        if home.exists():
            shutil.rmtree(home)
        make_folder(home)
        content = {"sha256": made.sha256, "configuration": made.configuration}
        replace_file(home / made.record, json.dumps(content, indent=2).encode())
    return TrainingSetup(training, resume=resume, precision=made.precision)


def is_same(made: Made, home: Path) -> bool:
    """Tell whether the folder is one of the same configuration."""
    known = read_json(home / made.record)
    return isinstance(known, dict) and known.get("sha256") == made.sha256


def note_error(error: Exception, home: Path) -> str:
    """Write into the folder, if it is there, why the work failed, and return it in one line."""
    ours = not isinstance(error, InputError)
    text = f"{type(error).__name__}: {error}" if ours else str(error)
    if home.is_dir():
        kept = "".join(traceback.format_exception(error)) if ours else f"{text}\n"
        replace_file(home / _ERROR, kept.encode())
    return " ".join(text.split())


def read_json(path: Path) -> Any:
    """Return the content of a file, None where it is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
