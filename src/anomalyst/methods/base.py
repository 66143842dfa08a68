"""The contract of a method, and how one is found by name.

A method sees feature maps (``[B, C, h, w]``, one per tapped layer of a frozen backbone) and answers
with raw score maps. Reading images, thresholds, files and reports are not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from math import cos, pi
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anomalyst.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from anomalyst.features.backbones import BackboneSpec
    from anomalyst.features.towers import Tower
    from anomalyst.methods.views import View
    from anomalyst.training import Source
    from anomalyst.training_data import TrainingFeatures
    from anomalyst.types import Sample


@dataclass(frozen=True)
class MethodSpec:
    """One registry line: where the method lives and what it can do.

    ``trains_on`` is None for a method without gradient steps, else what those steps see.
    ``generalist`` says that they see other products than are judged later. ``backbone`` is what
    ``auto`` stands for.
    """

    name: str
    home: str
    summary: str
    zero_shot: bool = False
    few_shot: bool = False
    multi_class: bool = False
    abnormal_references: bool = False
    needs_category: bool = False
    needs_class_name: bool = False
    generalist: bool = False
    trains_on: str | None = None
    backbone: str = "auto"

    def backbone_for(self, name: str) -> str:
        """Return the backbone that a name means for this method: ``auto`` is its own."""
        return self.backbone if name == "auto" else name

    def load(self) -> type[Method]:
        """Import the method's module and return its class."""
        module, _, name = self.home.partition(":")
        found: type[Method] = getattr(import_module(module), name)
        return found


class MethodOptions(BaseModel):
    """Base of a method's options: frozen, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Condenser(NamedTuple):
    """Which part of the tapped maps a method uses; ``name`` tells every setting (cache key)."""

    name: str
    apply: Callable[[Sequence[Tensor]], list[Tensor]]


class AbnormalReference(NamedTuple):
    """Feature maps ``[1, C, h, w]`` of an abnormal image, one a tapped layer, and its defect.

    ``mask`` ``[H, W]`` is 1 at the defect, at the size of the network's input, and ``coverage``
    ``[h, w]`` the share of each patch that it covers, somewhere above 0. Both are None where no
    mask was given.
    """

    maps: Sequence[Tensor]
    coverage: Tensor | None = None
    mask: Tensor | None = None


class Method(ABC):
    """One anomaly-detection method over frozen features.

    Parameters
    ----------
    options
        An instance of the class's own ``Options``.
    backbone
        What is known of the feature extractor (stride, width, whether it is a transformer).
    layers
        The tapped layers, in the order in which their feature maps arrive.
    seed
        Fixes every random choice.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]
    sigma: ClassVar[float] = 4.0
    """Gaussian smoothing of the upsampled map, in pixels of the network's input; 0 is none."""

    trained: bool = True
    """False as long as a method that takes gradient steps has not taken them."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings of a `Detector` (``image_size``, ``backbone``, ``options``, ...)."""

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        self.options = options
        self.backbone = backbone
        self.layers = tuple(layers)
        self.seed = seed

    @classmethod
    def default_layers(cls, backbone: BackboneSpec) -> tuple[int, ...]:
        """Return the layers to tap when the user names none."""
        return tuple(backbone.default_taps)

    @classmethod
    def make_tower(
        cls, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int]
    ) -> Tower:
        """Return the frozen network, without weights, that gives the method its feature maps."""
        from anomalyst.features.libraries import make_tower

        return make_tower(backbone, layers)

    def bind(self, tower: Tower) -> None:
        """Take hold of the frozen network, of which some methods run more than its maps."""
        self.tower = tower

    def require_name(self, category: str) -> None:
        """Raise `InputError` where a category's name is of no use to the method."""
        return

    @property
    def shares_references(self) -> bool:
        """Whether a category's scores depend on the references of others too."""
        return False

    def encode(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what enrolment, retrieval and `score` get to see of an image's feature maps.

        Retrieval compares the last map. A method that passes each image through learned parts
        before it knows the category does so here; by default the maps stay as they are.
        """
        return features

    @property
    def judges_unseen(self) -> bool:
        """Whether the categories to be judged are others than those that it is trained on."""
        return False

    @classmethod
    def condenser(cls, options: MethodOptions) -> Condenser | None:
        """Return what turns the tapped maps into the fewer ones that the method uses, if any."""
        return None

    @property
    def reference_views(self) -> Sequence[View]:
        """The views of each reference that `enroll` gets, the image itself first."""
        from anomalyst.methods.views import PLAIN

        return (PLAIN,)

    @abstractmethod
    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        """Add normal references of one category to those that it has.

        ``views`` holds, for each batch of reference views, the feature maps ``[B, C, h, w]`` of
        every tapped layer.
        """

    def enroll_abnormal(self, category: str, references: Sequence[AbnormalReference]) -> None:
        """Add abnormal references of a category that has normal ones."""
        raise ValueError(f"{self.name} uses no abnormal references")

    @abstractmethod
    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        """Return raw score maps ``[B, h, w]`` and image scores ``[B]``, higher is more anomalous.

        ``category`` is an enrolled one, or anything for a method that needs none. No image's result
        depends on the rest of its batch.
        """

    @abstractmethod
    def heat_unit(self, category: str | None) -> float:
        """Return a map value that deserves a strong colour where nothing is calibrated."""

    @property
    def obstacle(self) -> str | None:
        """What stands in the way of exporting the method with these options, None if nothing."""
        return None

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Return all that `score` reads of what is known of a category, for an exported graph.

        ``size`` is that of the network's input, (height, width), None where any may come.
        """
        return {}

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        """Know of one category alone, by what `references` returned: symbols, while exporting."""
        return

    @property
    def grows(self) -> tuple[str, ...]:
        """The `references` that one more image only adds rows to: all of them, or none.

        An export of the method can enroll then.
        """
        return ()

    def gained(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the rows ``[B, n, ...]`` that each image of a batch would add to what `grows`."""
        return {}

    @property
    def explains(self) -> bool:
        """Whether `attention_maps` has something to show in the report."""
        return False

    def attention_maps(self, features: Sequence[Tensor]) -> Tensor:
        """Return maps ``[B, M, h, w]``, none negative, of M things that the method looked at."""
        raise ValueError(f"{self.name} has no attention maps")

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return everything learned, by name, for the bundle."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""


class TrainingOptions(MethodOptions):
    """Options of every method with gradient steps, and the recipe that they make.

    Defaults, and where a paper trains in another way the recipe too, are each method's own.
    """

    epochs: int = Field(200, ge=1, description="passes over the training images")
    steps: int | None = Field(None, ge=1, description="training steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="images a step")
    learning_rate: float = Field(1e-3, gt=0, description="after warm-up")
    final_learning_rate: float = Field(1e-4, ge=0, description="at the end of the half cosine")
    warmup: int = Field(100, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(1e-4, ge=0, description="of all weights")
    clip: float | None = Field(0.1, gt=0, description="largest norm of a step's whole gradient")

    def planned_steps(self, images: int, batch: int) -> int:
        """Return how many steps of ``batch`` are taken on so many images."""
        return self.steps or self.epochs * (images // batch)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step: a line from 0 over the warm-up, then half a cosine.

        Both ends of the line are taken, so the first step has rate 0 and the last of the warm-up
        and the first of the cosine the full one.
        """
        warmup = min(self.warmup, steps)
        high, low = self.learning_rate, self.final_learning_rate
        if step < warmup:
            return high * step / max(warmup - 1, 1)
        return low + (high - low) * (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return what takes the steps, plain AdamW; its rate is set anew before each."""
        from torch.optim import AdamW

        return AdamW(parameters, weight_decay=self.weight_decay)


def stepped(step: int, steps: int, *ends: float) -> float:
    """Return the factor of a learning rate that falls to a tenth behind each share of the steps."""
    return float(0.1 ** sum(step >= steps * end for end in ends))


class TrainedMethod(Method):
    """A method whose ``network`` takes gradient steps on feature maps of the frozen backbone.

    The network, called with a batch of feature maps, returns its losses by name, ``loss`` their
    weighted sum. Everything else that it can do is the method's own business.
    """

    options: TrainingOptions
    network: nn.Module
    trained = False

    def require_trainable(self, samples: Sequence[Sample]) -> None:
        """Raise what `source` would, as far as it can be told before any feature is computed."""
        return

    def source(self, features: TrainingFeatures) -> Source:
        """Return what the steps see; by default the feature maps of the training images."""
        return features

    def finish(self, source: Any) -> None:
        """After the last step, take what else is fixed by the training data, its ``source``."""

    def training_views(self, few_shot: bool) -> Sequence[View]:
        """Return the views of each image that are trained on, the image itself first."""
        return self.reference_views

    def tensors(self) -> dict[str, Tensor]:
        return {f"network.{name}": value for name, value in self.network.state_dict().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        start = "network."
        state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        self.network.load_state_dict(state)
        self.network.to(next(iter(state.values())).device)
        self.trained = True


def find_method(name: str) -> MethodSpec:
    """Return the registry line of a method.

    Raises
    ------
    InputError
        The name is not registered; the nearest that is gets named.
    """
    from anomalyst.methods import REGISTRY

    if name not in REGISTRY:
        raise unknown("method", name, REGISTRY)
    return REGISTRY[name]


def methods() -> list[dict[str, object]]:
    """Return every registered method with its capabilities, without importing any.

    >>> [line["name"] for line in methods()][:2]
    ['patchcore', 'anomaly-dino']
    """
    from anomalyst.methods import REGISTRY

    return [
        {key: value for key, value in asdict(spec).items() if key not in ("home", "backbone")}
        for spec in REGISTRY.values()
    ]


def preset(method: str, name: str) -> dict[str, Any]:
    """Return a method's named settings: keyword arguments of a `Detector`.

    >>> preset("onenip", "fast")["image_size"]
    224

    Raises
    ------
    InputError
        There is no such method or preset; the nearest that is gets named.
    """
    presets = find_method(method).load().presets
    if name not in presets:
        raise unknown(f"preset of {method}", name, presets)
    return {**presets[name], "options": dict(presets[name].get("options", {}))}


def make_options(method: type[Method], given: Mapping[str, Any]) -> MethodOptions:
    """Return the method's options with ``given`` ones set; strings are read as the option's type.

    ``none`` stands for None where the option may be that.

    Raises
    ------
    InputError
        An option is unknown (the nearest is named) or out of range.
    """
    for key in given:
        if key not in method.Options.model_fields:
            raise unknown(f"option of {method.name}", key, method.Options.model_fields)
    fields = method.Options.model_fields
    values = {key: _typed(value, fields[key].annotation) for key, value in given.items()}
    try:
        return method.Options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"option {key}={first['input']!r} of {method.name}: "
            f"{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _typed(value: Any, annotation: Any) -> Any:
    return None if value == "none" and type(None) in get_args(annotation) else value
