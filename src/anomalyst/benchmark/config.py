"""What a benchmark measures: its parts, frozen, and what the papers found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anomalyst.errors import InputError
from anomalyst.evaluation import EVAL_SIZE
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.base import find_method
from anomalyst.settings import DETECTOR_KEYS, detector_settings
from anomalyst.training_setup import FULL, Precision

Setting = Literal[
    "single",
    "multi",
    "super-multi",
    "few-shot",
    "few-shot-multi",
    "leave-one-out",
    "generalist",
    "zero-shot",
]
ONE_EACH = ("single", "few-shot", "leave-one-out")  # settings with a model for each category
ELSEWHERE = ("generalist", "zero-shot")  # tested on other data than is trained on
UNSEEN = ("zero-shot", "leave-one-out")  # tested on categories that nothing is known of
SHIPPED_BUNDLE = "shipped"
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


_Model = TypeVar("_Model", bound="Keys")


class Keys(BaseModel):
    """A mapping of known keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Variant(Keys):
    """One row of an ablation: options laid over the common ones, or over those of a training."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = {}
    at_test: dict[str, Any] = {}


class MethodKeys(Keys):
    """Settings of one method among several, laid over the common ones."""

    preset: str | None = None
    backbone: str | None = None
    weights: str | None = None
    image_size: Count | None = None
    options: dict[str, Any] = {}
    steps: Count | None = None
    epochs: Count | None = None


class PublishedRow(Keys):
    """What a paper prints for a method: fractions in [0, 1], deviations where it gives some."""

    method: str = Field(min_length=1)
    variant: str = "default"
    shots: int | None = None
    abnormal: int | None = None
    i_auroc: Fraction | None = None
    i_ap: Fraction | None = None
    i_f1max: Fraction | None = None
    p_auroc: Fraction | None = None
    p_ap: Fraction | None = None
    p_f1max: Fraction | None = None
    aupro: Fraction | None = None
    sd: dict[str, Fraction] = {}


class Published(Keys):
    """A paper's table, kept beside ours and never mixed with it."""

    source: str = Field(min_length=1)
    rows: tuple[PublishedRow, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A title and one part or more, each with data and settings of its own.

    ``left_out`` are parts that cannot be run here, whose lines say so.
    """

    title: str
    parts: tuple[BenchmarkConfig, ...]
    left_out: tuple[BenchmarkConfig, ...] = ()


class BenchmarkConfig(Keys):
    """A part of a benchmark; the keys are described in the documentation of the command.

    ``name`` tells it from the others, empty where it is the only one.
    """

    name: str = ""
    title: str = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    setting: Setting
    data: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    categories: tuple[str, ...] | None = Field(None, min_length=1)
    preset: str | None = None
    backbone: str = "auto"
    weights: str | None = None
    image_size: Count | None = None
    options: dict[str, Any] = {}
    steps: Count | None = None
    epochs: Count | None = None
    precision: Precision = FULL
    bundle: str | None = None
    shots: tuple[Count, ...] = ()
    abnormal: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    references: Literal["category", "type"] = "category"
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field((0,), min_length=1)
    eval_size: int | None = Field(EVAL_SIZE, ge=1)
    variants: tuple[Variant, ...] = Field((Variant(name="default"),), min_length=1)
    by_method: dict[str, MethodKeys] = {}
    published: Published | None = None

    def counts_of(self, method: str) -> tuple[int | None, ...]:
        """Return the numbers of abnormal references that a method is run with."""
        if self.setting != "generalist":
            return (None,)
        able = find_method(method).abnormal_references
        return tuple(count for count in self.abnormal if able or not count)

    def arguments(self, method: str, variant: Variant) -> dict[str, Any]:
        """Return the keyword arguments of the `Detector` of one method and variant.

        The preset comes first, then the common settings and options, then the method's, then the
        variant's.
        """
        own = self.by_method.get(method, MethodKeys())
        trains = find_method(method).trains_on is not None
        steps, epochs = self.steps, self.epochs
        if own.steps or own.epochs:
            steps, epochs = own.steps, own.epochs
        chosen = detector_settings(
            method,
            own.preset or self.preset,
            [],
            backbone=own.backbone or self.backbone,
            image_size=own.image_size or self.image_size,
            steps=steps if trains else None,
            epochs=epochs if trains else None,
        )
        for given in (self.options, own.options, variant.options):
            if "epochs" in given and "steps" in chosen["options"]:
                chosen["options"]["steps"] = None  # the later of the two decides
            for key, value in given.items():
                (chosen if key in DETECTOR_KEYS else chosen["options"])[key] = value
        chosen["backbone"] = find_backbone(find_method(method).backbone_for(chosen["backbone"])).id
        return chosen | {"weights": own.weights or self.weights}


def validate(model: type[_Model], values: Mapping[str, Any], where: str) -> _Model:
    """Return the values as a model; the first that is wrong is named."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = str(first["input"])
        got = "" if first["type"] == "missing" or len(given) > 60 else f", not {given!r}"
        raise InputError(f"{where}: {key}: {first['msg']}{got}") from None
