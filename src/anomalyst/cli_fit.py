"""The command `anomalyst fit`, and what other commands share with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anomalyst.cli_options import (
    Align,
    AlignOn,
    Alpha,
    AlphaReview,
    CacheFolder,
    CalibrationShare,
    Categories,
    Device,
    Devices,
    Epochs,
    Ignore,
    ImageSize,
    Json,
    Layout,
    Offline,
    Overlap,
    Overview,
    Preset,
    Region,
    Resume,
    Search,
    Seed,
    Settings,
    Shots,
    Steps,
    TensorBoard,
    TileSide,
    Training,
    TrainingPrecision,
    Weights,
)
from anomalyst.console import progress, say, show_json


def fit(
    method: Annotated[str, typer.Argument(help="A method; see `anomalyst methods`.")],
    data: Training,
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle: folder or .zip.")],
    category: Categories = None,
    layout: Layout = None,
    shots: Shots = None,
    seed: Seed = 0,
    backbone: Annotated[str, typer.Option(help="See `anomalyst backbones`.")] = "auto",
    weights: Weights = None,
    image_size: ImageSize = None,
    tile: TileSide = None,
    overlap: Overlap = None,
    overview: Overview = False,
    roi: Region = None,
    ignore: Ignore = None,
    align: Align = None,
    align_on: AlignOn = None,
    search: Search = None,
    preset: Preset = None,
    settings: Settings = None,
    epochs: Epochs = None,
    steps: Steps = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    devices: Devices = 1,
    precision: TrainingPrecision = "32-true",
    calibration: CalibrationShare = 0.2,
    alpha: Alpha = None,
    alpha_review: AlphaReview = None,
    device: Device = "auto",
    offline: Offline = False,
    feature_cache: CacheFolder = None,
    as_json: Json = False,
) -> None:
    """Make a detector from good images and write it as a bundle."""
    from anomalyst import settings as words
    from anomalyst.detector import Detector
    from anomalyst.fitting import fit_bundle

    given = (preset, settings or [], backbone, image_size, epochs, steps)
    chosen = words.detector_settings(method, *given) | words.tiles(tile, overlap, overview)
    chosen |= {"weights": weights, "seed": seed, "device": device, "offline": offline}
    chosen["frame"] = words.given_frame(roi, ignore, align, align_on, search)
    chosen["decision"] = words.given_decision(alpha, alpha_review)
    detector = Detector(method, feature_cache=make_cache(feature_cache), **chosen)
    training = words.training_setup(method, output, resume, tensorboard, devices, precision)
    kept: Any = dict(shots=shots, layout=layout, categories=category, levels=(alpha, alpha_review))
    with progress() as tell:
        fit_bundle(detector, data, output, training, calibration, progress=tell, **kept)
    tell_state(detector, output, as_json)


def make_cache(folder: Path | None) -> Any:
    """Return the feature cache in a folder, None without one."""
    if folder is None:
        return None
    from anomalyst.features.cache import FeatureCache

    return FeatureCache(folder)


def tell_state(detector: Any, bundle: Path, as_json: bool) -> None:
    """Print where the bundle is, and say what the detector can promise."""
    from anomalyst.promises import describe, state

    if as_json:
        show_json({"bundle": str(bundle), "categories": state(detector)})
        return
    for line in describe(detector):
        say(line)
    print(bundle)
