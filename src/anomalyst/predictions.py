"""Predictions to files: ``predictions.jsonl``, score maps and overlays, in input order."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from anomalyst.errors import InputError
from anomalyst.files import replace_file
from anomalyst.scale.sources import Source, judge
from anomalyst.types import Prediction

if TYPE_CHECKING:
    from anomalyst.inference import ImageSource

FILE = "predictions.jsonl"


class Predictor(Protocol):
    """A `Detector`, or the `Runtime` of an export."""

    def predict(
        self,
        images: Iterable[ImageSource],
        *,
        category: str | None = None,
        keep_pixels: bool = False,
    ) -> Iterator[Prediction]:
        """Yield one prediction an image."""

    def heat_unit(self, category: str | None) -> float:
        """Return the map value at which a heat map turns strong."""


def to_record(
    prediction: Prediction, map_file: str | None = None, overlay: str | None = None
) -> dict[str, object]:
    """Return one line of ``predictions.jsonl``: the contract's keys, in its order."""
    return {
        "image": prediction.image,
        "category": prediction.category,
        "score": prediction.score,
        "p_value": prediction.p_value,
        "verdict": prediction.verdict,
        "threshold": prediction.threshold,
        "calibrated": prediction.calibrated,
        "regions": [
            {"bbox": list(r.bbox), "area": r.area, "score": r.score} for r in prediction.regions
        ],
        "map": map_file,
        "overlay": overlay,
        "error": prediction.error,
    }


@dataclass(frozen=True)
class OutputChoice:
    """What `write_predictions` writes beside the lines."""

    maps: bool = False
    overlays: bool = False


def write_predictions(
    detector: Predictor,
    images: Iterable[ImageSource | Source],
    folder: Path,
    *,
    category: str | None = None,
    choice: OutputChoice | None = None,
) -> Iterator[dict[str, object]]:
    """Predict, write every result as it comes, and pass each record on.

    Lines go to ``predictions.jsonl.partial``, which takes its final name when all are done; what a
    stopped run has finished stays readable there. An earlier ``predictions.jsonl`` is replaced
    only then.

    Raises
    ------
    InputError
        The folder cannot be written.
    """
    records = judge_into(detector, images, folder, category=category, choice=choice)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.partial"
        with partial.open("wb") as lines:
            for record in records:
                lines.write(to_line(record))
                lines.flush()
                yield record
        partial.replace(folder / FILE)


def judge_into(
    detector: Predictor,
    images: Iterable[ImageSource | Source],
    folder: Path,
    *,
    category: str | None = None,
    choice: OutputChoice | None = None,
    first: int = 0,
) -> Iterator[dict[str, object]]:
    """Return one record an image, lazily; its map and overlay are in the folder by then.

    ``first`` is the place of the first image in the whole list: files are named by it.
    """
    wanted = choice or OutputChoice()
    found = judge(detector, images, category, wanted.overlays)
    return (
        _write_one(detector, prediction, folder, number, wanted)
        for number, prediction in enumerate(found, first)
    )


def to_line(record: Mapping[str, object]) -> bytes:
    """Return a record as a line of ``predictions.jsonl``."""
    # A file name may hold bytes that are no text: they are written as escapes.
    text = json.dumps(record, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what stands in the way of writing results into an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write results ({error.strerror or error}); "
            "choose a folder with room that you may write to"
        ) from error


def _write_one(
    detector: Predictor, prediction: Prediction, folder: Path, number: int, wanted: OutputChoice
) -> dict[str, object]:
    if prediction.error is not None or not (wanted.maps or wanted.overlays):
        return to_record(prediction)
    # Numbered, so that it may be cut: 255 bytes is the most that a file name can have.
    stem = Path(prediction.image).stem.encode("utf-8", "replace")[:160].decode("utf-8", "ignore")
    name = f"{number:06d}-{stem}"
    map_file = f"maps/{name}.npy" if wanted.maps else None
    overlay = f"overlays/{name}.png" if wanted.overlays else None
    if map_file is not None and prediction.map is not None:
        blob = io.BytesIO()
        np.save(blob, prediction.map)
        _place(folder / map_file, blob.getvalue())
    if overlay is not None:
        _place(folder / overlay, overlay_png(detector, prediction))
    return to_record(prediction, map_file, overlay)


def _place(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    replace_file(path, content)


def overlay_png(detector: Predictor, prediction: Prediction) -> bytes:
    """Return the heat map over the image, in the detector's fixed units, as PNG.

    The prediction must come from ``predict(..., keep_pixels=True)``.
    """
    from PIL import Image

    from anomalyst.overlay import heat_overlay

    if prediction.pixels is None or prediction.map is None or prediction.category is None:
        raise ValueError("the prediction holds no pixels: predict with keep_pixels=True")
    unit = detector.heat_unit(prediction.category)
    picture = heat_overlay(prediction.pixels, prediction.map, unit, prediction.regions)
    blob = io.BytesIO()
    Image.fromarray(picture).save(blob, "PNG")
    return blob.getvalue()
