"""The record of a profile: plain values, with units in their names or words. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

RANDOM = "random weights: figures of cost only"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``count`` measurements, in seconds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Return that of one measurement or more."""
        many = [*times] if len(times) > 1 else [*times, *times]
        low, median, high = quantiles(many, n=4, method="inclusive")
        return cls(median, low, high, len(times))


@dataclass(frozen=True)
class Peak:
    """Most memory at a time, in MB of 1e6 bytes.

    Attributes
    ----------
    host_mb
        Resident memory over that of the idle process; None where the system tells none.
    gpu_mb
        Of all tensors on the GPU together; None without one.
    """

    host_mb: float | None
    gpu_mb: float | None


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes
    ----------
    backbone
        Of the frozen network, cut behind its last tap; of a CLIP both towers.
    method
        Of the network that the method adds to it.
    trained
        Of these, those that take gradient steps.
    """

    backbone: int
    method: int
    trained: int


@dataclass(frozen=True)
class Training:
    """Gradient steps of ``batch_size`` images (or episodes) each: time and flops of one step."""

    batch_size: int
    step: Spread
    flops: int
    memory: Peak


@dataclass(frozen=True)
class Enrolment:
    """References of a new category: how many, normal and abnormal, and the time of one."""

    normal: int
    abnormal: int
    reference: Spread
    memory: Peak


@dataclass(frozen=True)
class Judging:
    """Images judged ``batch_size`` at a time: the time of one image.

    Attributes
    ----------
    image
        From its pixels to its `Prediction`, whose map is not drawn at the image's own size yet.
    backbone
        Of the backbone run once, alone, on the same images: in turn with that, round by round.
    ratio
        Of the two in one round, the median over the rounds.
    """

    batch_size: int
    image: Spread
    backbone: Spread
    ratio: float
    memory: Peak


@dataclass(frozen=True)
class SizeProfile:
    """What a method costs at one image size.

    Attributes
    ----------
    backbone_flops, method_flops
        Of one image: of the backbone run once alone, and of all that judging does beyond that.
    training, enrolment
        None of a method that takes no gradient steps, or that is asked to do without references.
    bundle
        Bytes of the saved bundle's files by part, and their ``total``.
    """

    image_size: int
    backbone_flops: int
    method_flops: int
    judging: tuple[Judging, ...]
    training: Training | None
    enrolment: Enrolment | None
    bundle: Mapping[str, int]


@dataclass(frozen=True)
class Profile:
    """What a method costs at every size asked for, and on what that was measured.

    ``note`` says where the weights are random.
    """

    method: str
    options: Mapping[str, Any]
    backbone: str
    layers: tuple[int, ...]
    weights_sha256: str
    note: str | None
    device: str
    shots: int
    categories: int
    seed: int
    parameters: Parameters
    sizes: tuple[SizeProfile, ...]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


# ---- of an exported bundle ----------------------------------------------------------------------


@dataclass(frozen=True)
class RuntimeTimes:
    """Pictures judged ``batch_size`` at a time on so many ``threads``: the time of one picture.

    Attributes
    ----------
    threads
        Of the network; None is the engine's own choice.
    decode
        From the bytes of a JPEG file to pixels, and their hash.
    preprocess
        Region, resizing, normalising: from pixels to the network's input.
    graph
        Backbone, method and the descriptor that tells a category.
    judging
        From what the graph gives to the `Prediction` of a good part: category, p-value, verdict.
    from_file, from_pixels
        One call of `Runtime.predict`, which decodes in the background, with files' bytes or arrays.
    """

    batch_size: int
    threads: int | None
    decode: Spread
    preprocess: Spread
    graph: Spread
    judging: Spread
    from_file: Spread
    from_pixels: Spread


@dataclass(frozen=True)
class Drawing:
    """What only some pictures need, the time of one: the map at its size, regions, overlay."""

    map: Spread
    regions: Spread
    overlay: Spread


@dataclass(frozen=True)
class ColdStart:
    """A process of its own.

    Attributes
    ----------
    started
        From its start to its first result.
    loaded
        Of that, loading the export.
    memory_mb
        Its most resident memory, by the pictures judged at a time up to then; None where the
        system tells none.
    """

    started: Spread
    loaded: Spread
    memory_mb: Mapping[int, float | None]


@dataclass(frozen=True)
class RuntimeProfile:
    """What judging by an exported bundle costs, and on what that was measured.

    ``picture`` is (width, height) of the made-up picture, ``picture_bytes`` its JPEG file's size;
    ``network_inputs`` are the (count, height, width) in which the network gets one.
    """

    export: str
    method: str
    format: str
    int8: bool
    engine: str
    category: str | None
    calibrated: bool
    picture: tuple[int, int]
    picture_bytes: int
    network_inputs: tuple[tuple[int, int, int], ...]
    times: tuple[RuntimeTimes, ...]
    drawing: Drawing
    cold: ColdStart
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain
