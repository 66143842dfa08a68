"""Backbone: a frozen feature extractor, cut after its last tapped layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec, find_backbone
from anomalyst.features.libraries import make_tower
from anomalyst.features.linears import QuickLinears
from anomalyst.features.towers import Tower
from anomalyst.features.weights import choose_tensors, read_weights, tensors_sha256

MakeTower = Callable[[BackboneSpec, Sequence[int]], Tower]
"""What builds the network of a record, without weights; ``make_tower`` gives its tapped layers."""


class Backbone(nn.Module):
    """A frozen network that gives one feature map a tapped layer.

    Make one with `load` or `from_state`.

    Attributes
    ----------
    spec
        What is known of it.
    layers
        The taps, in the order in which their maps come.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        layers: Sequence[int],
        tower: Tower,
        tensors: Mapping[str, Tensor],
        origin: str,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layers = spec.check_layers(layers)
        self.tower = tower
        self.tower.adopt(choose_tensors(spec, self.tower, tensors, origin))
        self._multiple = max(spec.strides[layer] for layer in self.layers)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(
        cls,
        id: str,
        layers: Sequence[int] | None = None,
        *,
        weights: str | None = None,
        offline: bool = False,
        device: str | torch.device = "cpu",
        make: MakeTower = make_tower,
    ) -> Backbone:
        """Return a backbone with weights from the first source that has them.

        Parameters
        ----------
        id
            See `anomalyst.features.backbones.find_backbone`.
        layers
            Taps; the backbone's default ones if not given.
        weights
            ``file:PATH`` to take the weights from there.
        offline
            Forbid a download.
        make
            Builds the network, of a method that has its own.

        Raises
        ------
        InputError
            Unknown id, layers that it does not have, or no weights.
        """
        spec = find_backbone(id)
        taps = spec.check_layers(spec.default_taps if layers is None else layers)
        tower = make(spec, taps)  # what the method cannot use is said before weights are missed
        return cls(spec, taps, tower, *read_weights(spec, weights, offline)).to(device)

    @classmethod
    def from_state(
        cls,
        id: str,
        layers: Sequence[int],
        tensors: Mapping[str, Tensor],
        make: MakeTower = make_tower,
    ) -> Backbone:
        """Return the backbone whose `state` this is; looks for no weights and needs no network."""
        spec = find_backbone(id)
        return cls(spec, layers, make(spec, layers), tensors, f"saved state of {id}")

    @property
    def stride(self) -> int:
        """Pixels between grid points of the first tapped layer."""
        return self.spec.strides[self.layers[0]]

    @property
    def identity(self) -> str:
        """What fixes the features beside the tensors: two networks may share their weights."""
        spec = self.spec
        taps = f"{spec.library}:{spec.architecture} norm={spec.final_norm} layers={self.layers}"
        return f"{taps} {self.tower.name}".rstrip()

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over names, types, shapes and bytes of `state`."""
        return tensors_sha256(self.state())

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the tapped forward pass needs, and no others."""
        return {name: tensor.contiguous() for name, tensor in self.tower.state().items()}

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: a frozen network has no other."""
        return super().train(False)

    if TYPE_CHECKING:

        def __call__(self, images: Tensor) -> list[Tensor]: ...

    @torch.inference_mode()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map ``[B, C, H / stride, W / stride]`` a tapped layer.

        Parameters
        ----------
        images
            Normalised float32 ``[B, 3, H, W]``, sides multiples of the stride.

        Notes
        -----
        The maps are inference tensors: ``clone`` them, outside inference mode, before autograd.

        Raises
        ------
        InputError
            Images of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images of shape {list(images.shape)}: give [B, 3, height, width]")
        height, width = images.shape[2:]
        if height % self._multiple or width % self._multiple or not height or not width:
            raise InputError(
                f"images of {height}x{width} pixels: {self.spec.id} with layers "
                f"{list(self.layers)} needs sides that are multiples of {self._multiple}"
            )
        with QuickLinears():
            maps: list[Tensor] = self.tower(images)
        return maps
