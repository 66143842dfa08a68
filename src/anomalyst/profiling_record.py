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
