"""What a method costs: parameters, flops, time, memory and bundle size, on made-up images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anomalyst.data.transforms import Preprocess
from anomalyst.detector import Detector
from anomalyst.engine import pick_device
from anomalyst.errors import InputError
from anomalyst.evaluation import environment
from anomalyst.features.backbones import BackboneSpec, find_backbone
from anomalyst.features.random_weights import random_weights
from anomalyst.methods.base import MethodSpec, TrainedMethod, find_method, make_options
from anomalyst.profiling_clock import WARM_UP
from anomalyst.profiling_meter import Memory
from anomalyst.profiling_record import RANDOM, Parameters, Profile, SizeProfile
from anomalyst.profiling_stages import (
    Workload,
    enroll_parts,
    flops_of,
    judge_parts,
    saved_bytes,
    time_enrolment,
    train_on_parts,
)
from anomalyst.types import Progress

_STEPS = 5


def profile(
    method: str,
    *,
    settings: Mapping[str, Any] | None = None,
    image_sizes: Sequence[int] = (),
    batch_sizes: Sequence[int] = (1, 8),
    shots: int = 4,
    categories: int = 1,
    steps: int | None = None,
    random: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Measure what a method costs on this machine. Needs no data: images are made up.

    At each image size a method with gradient steps is trained for a few; references are enrolled;
    the bundle is saved, loaded again, and judges images.

    Parameters
    ----------
    settings
        Keyword arguments of the `Detector`, such as ``backbone``, ``options``, ``device``, or a
        whole `preset`.
    image_sizes
        Short sides in pixels; by default that of the settings or the backbone's own.
    batch_sizes
        Images that are judged together.
    shots, categories
        Normal references a category, and categories.
    steps
        Training steps that are timed, 5 by default.
    random
        Draw the backbone's weights at random, by the seed: they need no file and cost the same.
    progress
        Called with the stage, what is done and what there is to do.

    Raises
    ------
    InputError
        A name, option or number is wrong, or the method cannot work at one of the sizes.
    """
    spec, given = find_method(method), dict(settings or {})
    if steps is not None and spec.trains_on is None:
        raise InputError(f"{method} takes no gradient steps: leave --steps out")
    if random and given.get("weights") is not None:
        raise InputError("random weights and weights of a file: choose one of the two")
    # Small ones first: of what they leave behind, larger ones make use.
    batches = tuple(sorted(set(batch_sizes)))
    load = Workload(batches, shots, categories, _STEPS if steps is None else steps)
    backbone = find_backbone(spec.backbone_for(given.pop("backbone", "auto")))
    own = given.pop("image_size", None) or backbone.image_size
    sizes = sorted(set(image_sizes)) or [own]
    given["options"] = dict(given.get("options") or {})
    options = make_options(spec.load(), given["options"]).model_dump(mode="json")
    if spec.trains_on is not None:
        given["options"]["steps"] = WARM_UP + load.steps
    for size in sizes:
        _require_size(spec, backbone, size, given)
    device = _wake(spec, backbone, given)
    found = _at_sizes(spec, backbone, given, sizes, load, random, device, progress)
    facts = found[0][0]
    return Profile(
        method=method,
        options=options,
        backbone=backbone.id,
        layers=facts.layers,
        weights_sha256=facts.weights_sha256,
        note=RANDOM if random else None,
        device=str(device),
        shots=shots,
        categories=categories,
        seed=given.get("seed", 0),
        parameters=facts.parameters,
        sizes=tuple(each for _, each in found),
        environment=environment(),
    )


class _Facts(NamedTuple):
    """What is the same at every size."""

    layers: tuple[int, ...]
    weights_sha256: str
    parameters: Parameters


def _at_sizes(
    spec: MethodSpec,
    backbone: BackboneSpec,
    given: Mapping[str, Any],
    sizes: Sequence[int],
    load: Workload,
    random: bool,
    device: torch.device,
    tell: Progress | None,
) -> list[tuple[_Facts, SizeProfile]]:
    """Measure size after size, with files in a folder that is removed whatever happens."""
    make, found = partial(Detector, spec.name, backbone=backbone.id, **given), []
    with tempfile.TemporaryDirectory(prefix="anomalyst-") as folder:
        if random:
            file = Path(folder) / "weights.safetensors"
            make = partial(make, weights=random_weights(backbone.id, file, given.get("seed", 0)))
        memory = Memory(device)
        for size in sizes:
            with _named(spec, size), tempfile.TemporaryDirectory(dir=folder) as place:
                at_size = partial(make, image_size=size)
                found.append(_at_size(at_size, load, Path(place), memory, tell))
    return found


def _at_size(
    make: Callable[[], Detector],
    load: Workload,
    folder: Path,
    memory: Memory,
    tell: Progress | None,
) -> tuple[_Facts, SizeProfile]:
    """Go through all stages; ``folder`` is for their files."""
    detector = make()
    training = train_on_parts(detector, load, folder / "images", memory, tell)
    enroll_parts(detector, load)
    bundle = saved_bytes(detector, folder / "bundle")
    # As in use: what training leaves behind is no part of the memory that judging takes.
    detector = Detector.load(folder / "bundle", device=detector.device)
    bare, beyond = flops_of(detector)
    judging = judge_parts(detector, load, memory, tell)
    enrolment = time_enrolment(detector, load, memory)
    backbone = detector.engine.backbone
    facts = _Facts(backbone.layers, backbone.weights_sha256, _parameters(detector))
    size = detector.engine.preprocess.image_size
    return facts, SizeProfile(size, bare, beyond, judging, training, enrolment, bundle)


def _parameters(detector: Detector) -> Parameters:
    frozen = sum(p.numel() for p in detector.engine.backbone.parameters())
    method = detector.method
    own = list(method.network.parameters()) if isinstance(method, TrainedMethod) else []
    trained = sum(p.numel() for p in own if p.requires_grad)
    return Parameters(frozen, sum(p.numel() for p in own), trained)


def _require_size(
    spec: MethodSpec, backbone: BackboneSpec, size: int, given: Mapping[str, Any]
) -> None:
    """Raise where the backbone takes no images of that size: before any of them costs time."""
    crop = {key: given[key] for key in ("square", "resize") if key in given}
    with _named(spec, size):
        Preprocess(size, backbone.stride, backbone.mean, backbone.std, **crop)


@contextmanager
def _named(spec: MethodSpec, size: int) -> Iterator[None]:
    """Say of which method and size an error is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{spec.name} at {size} pixels: {error}") from error
    except torch.cuda.OutOfMemoryError:
        raise InputError(
            f"{spec.name} at {size} pixels: more than the GPU's memory; take smaller images or "
            "batches (--image-size, --batch-size, --set batch_size=...)"
        ) from None


def _wake(spec: MethodSpec, backbone: BackboneSpec, given: Mapping[str, Any]) -> torch.device:
    """Load all code and start the device, as in any idle process; return the device.

    Raises
    ------
    InputError
        There is no such device, or the method cannot use that backbone.
    """
    kind, device = spec.load(), pick_device(given.get("device", "auto"))
    layers = backbone.check_layers(given.get("layers") or kind.default_layers(backbone))
    kind.make_tower(make_options(kind, given["options"]), backbone, layers)
    if spec.trains_on is not None:
        import_module("anomalyst.training_stage")
    torch.zeros(1, device=device)
    return device
