"""The stages that a profile measures, each on made-up parts: train, enroll, save, judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.methods.base import Method, TrainedMethod, TrainingOptions, make_options
from anomalyst.profiling_meter import (
    Memory,
    StepMeter,
    bare_pass,
    count_flops,
    seconds,
    time_in_turn,
)
from anomalyst.profiling_parts import Parts
from anomalyst.profiling_record import Enrolment, Judging, Spread, Training
from anomalyst.types import BoolArray, ByteArray, Progress

_SOURCE = 16  # good and bad images that a generalist's episodes are drawn from
_NEW = 3  # categories whose enrolment is timed
_TO_JUDGE = 1000  # numbers of the images to judge start here: none is a reference


@dataclass(frozen=True)
class Workload:
    """How much is measured: see `anomalyst.profiling.profile`.

    Raises
    ------
    InputError
        A number under 1.
    """

    batch_sizes: tuple[int, ...]
    shots: int
    categories: int
    steps: int

    def __post_init__(self) -> None:
        given = {"shots": self.shots, "categories": self.categories, "steps": self.steps}
        given["batch size"] = min(self.batch_sizes, default=0)
        for name, number in given.items():
            if number < 1:
                raise InputError(f"{name} {number}: give 1 or more")


def train_on_parts(
    detector: Detector, load: Workload, folder: Path, memory: Memory, tell: Progress | None
) -> Training | None:
    """Train for as many steps as the detector's options say; None if the method has none."""
    spec = detector.spec
    if spec.trains_on is None:
        return None
    # Not of `detector.method`: a second network would be held in memory while the first trains.
    options = make_options(spec.load(), detector.options)
    assert isinstance(options, TrainingOptions)
    batch = options.batch_size
    products, good = load.categories, -(-batch // load.categories)  # one whole batch at least
    if spec.generalist:
        products, good = 1, _SOURCE
    bad = good if spec.abnormal_references else 0
    samples = _parts(detector).write(folder, products, good, bad)
    memory.restart()
    with StepMeter(memory, detector.engine.device, tell) as meter:
        detector.train(samples, progress=meter)
        return Training(batch, Spread.of(meter.times), meter.flops, meter.peak())


def takes_references(detector: Detector) -> bool:
    """Whether references are enrolled: not where `Detector.fit` would enroll none either."""
    return detector.spec.needs_category or not detector.method.judges_unseen


def enroll_parts(detector: Detector, load: Workload) -> None:
    """Enroll every category, where the detector has any use for references."""
    if takes_references(detector):
        for product in range(load.categories):
            detector.enroll(*_references(detector, load, product))


def time_enrolment(detector: Detector, load: Workload, memory: Memory) -> Enrolment | None:
    """Time more categories than `enroll_parts` enrolled, on a detector that is warm."""
    if not takes_references(detector):
        return None
    memory.restart()
    times = []
    for product in range(load.categories, load.categories + _NEW):
        name, good, bad = _references(detector, load, product)
        taken = seconds(partial(detector.enroll, name, good, bad), detector.engine.device)
        times.append(taken / (len(good) + len(bad)))
    return Enrolment(len(good), len(bad), Spread.of(times), memory.peak())


def _references(
    detector: Detector, load: Workload, product: int
) -> tuple[str, list[ByteArray], list[tuple[ByteArray, BoolArray]]]:
    """Return a category's name, normal references and, where they are used, an abnormal one."""
    parts = _parts(detector)
    good = [parts.good(product, k) for k in range(load.shots)]
    bad = [parts.bad(product, 0)] if detector.spec.abnormal_references else []
    return Parts.names(product + 1)[-1], good, bad


def saved_bytes(detector: Detector, bundle: Path) -> Mapping[str, int]:
    """Save the bundle, and return the bytes of its files by part, and their ``total``."""
    files = {path.name: path.stat().st_size for path in detector.save(bundle).iterdir()}
    # backbone-0123456789ab.safetensors -> backbone; bundle.json stays
    parts = {name.partition("-")[0]: size for name, size in sorted(files.items())}
    return {**parts, "total": sum(files.values())}


def flops_of(detector: Detector) -> tuple[int, int]:
    """Return the flops of one image: of the backbone alone, and of the judging beyond that."""
    image = _parts(detector).good(0, _TO_JUDGE)
    tensors = _tensors(detector, [image])
    with held_still(detector.method):
        bare = count_flops(partial(bare_pass, detector.engine.backbone, tensors))
        _judge(detector, [image])  # what is computed once a category is no cost of an image
        return bare, count_flops(partial(_judge, detector, [image])) - bare


@contextmanager
def held_still(method: Method) -> Iterator[None]:
    """Switch gradients off: torch's counter follows them, and stumbles in inference mode."""
    network = method.network.parameters() if isinstance(method, TrainedMethod) else ()
    moving = [parameter for parameter in network if parameter.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


def judge_parts(
    detector: Detector, load: Workload, memory: Memory, tell: Progress | None
) -> tuple[Judging, ...]:
    """Time images of the first category, and the backbone alone on the same."""
    engine, parts, found = detector.engine, _parts(detector), []
    for done, batch in enumerate(load.batch_sizes, start=1):
        images = [parts.good(0, _TO_JUDGE + k) for k in range(batch)]
        memory.restart()
        bare = partial(bare_pass, engine.backbone, _tensors(detector, images))
        whole = partial(_judge, detector, images)
        times = time_in_turn([bare, whole], engine.device)
        base, image = (Spread.of([taken / batch for taken in each]) for each in times)
        ratio = median(long / short for short, long in zip(*times, strict=True))
        found.append(Judging(batch, image, base, ratio, memory.peak()))
        if tell:
            tell("judge", done, len(load.batch_sizes))
    return tuple(found)


def _judge(detector: Detector, images: list[ByteArray]) -> None:
    """Judge images in one batch.

    Raises
    ------
    InputError
        One could not be judged.
    """
    name = Parts.names(1)[0]
    for prediction in detector.predict(images, category=name, batch_size=len(images)):
        if prediction.error:
            raise InputError(prediction.error)


def _parts(detector: Detector) -> Parts:
    """Return parts as large as the network sees them, so that decoding and scaling cost little."""
    preprocess = detector.engine.preprocess
    return Parts(preprocess.resize or preprocess.image_size, detector.seed)


def _tensors(detector: Detector, images: list[ByteArray]) -> torch.Tensor:
    engine = detector.engine
    return torch.from_numpy(np.stack([engine.preprocess(i) for i in images])).to(engine.device)
