"""Words of the command line to settings of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from anomalyst.data.frame import SEARCH, Frame, parse_rectangle
from anomalyst.errors import InputError
from anomalyst.methods.base import find_method
from anomalyst.methods.base import preset as named_settings
from anomalyst.scoring import Decision
from anomalyst.tiling import OVERLAP
from anomalyst.training_setup import Precision, TrainingSetup

# Settings of the detector that `--set` reaches beside the method's own options.
DETECTOR_KEYS = ("layers", "resize", "square")


def detector_settings(
    method: str,
    preset: str | None,
    pairs: Sequence[str],
    backbone: str = "auto",
    image_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Return keyword arguments for `Detector`: a preset, overridden by what is given explicitly.

    Raises
    ------
    InputError
        Unknown preset, or a ``KEY=VALUE`` pair that is none.
    """
    chosen: dict[str, Any] = {"options": {}}
    if steps is not None and epochs is not None:
        raise InputError("--steps and --epochs say the same in two ways: give one of them")
    if (steps or epochs) and find_method(method).trains_on is None:
        raise InputError(f"{method} takes no gradient steps: leave --steps and --epochs out")
    if preset is not None:
        chosen |= named_settings(method, preset)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r}: write it as KEY=VALUE")
        if key in DETECTOR_KEYS:
            chosen[key] = _detector_value(key, value)
        else:
            chosen["options"][key] = value
    if epochs is not None:
        chosen["options"] |= {"epochs": epochs, "steps": None}
    if steps is not None:
        chosen["options"]["steps"] = steps
    if backbone != "auto" or "backbone" not in chosen:
        chosen["backbone"] = backbone
    if image_size is not None:
        chosen["image_size"] = image_size
    return chosen


def tiles(side: int | None, overlap: float | None, overview: bool) -> dict[str, Any]:
    """Return keyword arguments for `Detector` that say how images are cut into tiles."""
    if side is None:
        if overlap is not None or overview:
            raise InputError("--overlap and --overview say how tiles are cut: give --tile too")
        return {}
    return {"tile": side, "overlap": OVERLAP if overlap is None else overlap, "overview": overview}


def given_frame(
    roi: str | None,
    ignore: Path | None,
    align: Path | None,
    align_on: str | None,
    search: int | None,
) -> Frame | None:
    """Return where to look on an image, None where nothing is said of it.

    Raises
    ------
    InputError
        A rectangle or file is none, or alignment is only half said.
    """
    if search is not None and align is None:
        raise InputError("--search says how far a part may be moved: give --align too")
    if (align is None) != (align_on is None):
        raise InputError("--align and --align-on belong together: give both or none")
    if roi is None and ignore is None and align is None:
        return None
    return Frame.read(
        crop=None if roi is None else parse_rectangle("--roi", roi),
        ignore=ignore,
        golden=align,
        align_on=None if align_on is None else parse_rectangle("--align-on", align_on),
        search=SEARCH if search is None else search,
    )


def training_setup(
    method: str,
    output: Path,
    resume: bool,
    tensorboard: bool,
    devices: int,
    precision: str,
) -> TrainingSetup:
    """Return how `fit` trains a bundle: its files lie beside it, in ``OUTPUT.training``.

    Raises
    ------
    InputError
        Something of a training is asked for of a method that has none.
    """
    if find_method(method).trains_on is None:
        if resume or tensorboard or devices > 1 or precision != "32-true":
            raise InputError(
                f"{method} takes no gradient steps: leave --resume, --tensorboard, --devices and "
                "--precision out"
            )
        return TrainingSetup()
    if precision not in get_args(Precision):
        raise InputError(f"--precision {precision}: give {' or '.join(get_args(Precision))}")
    folder = output.with_name(f"{output.name}.training")
    return TrainingSetup(
        folder,
        resume=resume,
        tensorboard=tensorboard,
        devices=devices,
        precision=cast(Precision, precision),
    )


def _detector_value(key: str, value: str) -> bool | int | list[int]:
    if key == "square":
        if value not in ("true", "false"):
            raise InputError(f"--set square={value}: give true or false")
        return value == "true"
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        raise InputError(f"--set {key}={value}: give whole numbers, such as {key}=8") from None
    if key == "resize" and len(numbers) != 1:
        raise InputError(f"--set resize={value}: give one number, the short side in pixels")
    return numbers if key == "layers" else numbers[0]


def given_decision(
    alpha: float | None, alpha_review: float | None, base: Decision | None = None
) -> Decision:
    """Return the two levels, each as given or else as in ``base``."""
    start = base or Decision()
    strict = start.alpha if alpha is None else alpha
    loose = start.alpha_review if alpha_review is None else alpha_review
    # Whoever asks for a large alpha alone must not be left with a review level under it.
    return Decision(strict, loose if alpha_review is not None else max(loose, strict))


def parse_eval_size(text: str) -> int | None:
    """Return the evaluation size, None for ``original``."""
    if text == "original":
        return None
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--eval-size {text!r}: give a number of pixels or `original`")
    return int(text)
