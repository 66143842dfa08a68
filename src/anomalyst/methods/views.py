"""Views: fixed changes of a preprocessed image, each with a name that the feature cache keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class View(NamedTuple):
    """A change of images ``[B, 3, H, W]``; ``name`` tells it from every other, its settings too."""

    name: str
    apply: Callable[[Tensor], Tensor]


def _unchanged(images: Tensor) -> Tensor:
    return images


PLAIN = View("image", _unchanged)


@dataclass(frozen=True)
class Affine:
    """Turn by ``angle`` radians, shift by shares of half a side, mirror left to right.

    Same canvas, bilinear, border mirrored; non-square images keep their proportions.
    """

    angle: float = 0.0
    right: float = 0.0
    down: float = 0.0
    mirror: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images ``[B, 3, H, W]`` so changed."""
        height, width = images.shape[-2:]
        cosine, sine = (f(torch.tensor(self.angle)).item() for f in (torch.cos, torch.sin))
        flip = -1.0 if self.mirror else 1.0
        # The matrix leads from the new picture to the old one, hence the shifts' signs.
        # Grid coordinates run over [-1, 1] on either axis, hence the aspect ratio off the diagonal.
        matrix = images.new_tensor(
            [
                [flip * cosine, -sine * height / width, -self.right],
                [flip * sine * width / height, cosine, -self.down],
            ]
        )
        grid = functional.affine_grid(
            matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
        )
        return functional.grid_sample(
            images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )


def turned(count: int) -> tuple[View, ...]:
    """Return ``count`` views evenly turned, the image itself first."""
    others = (View(f"turn {k}/{count}", Affine(2 * pi * k / count)) for k in range(1, count))
    return (PLAIN, *others)


def _grey(images: Tensor) -> Tensor:
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    return (images * luma[:, None, None]).sum(1, keepdim=True).expand_as(images)


def variants() -> tuple[View, ...]:
    """Return 22 variants of an image to stretch a few shots by, itself first.

    Those of INP-Former's official code: eight small rotations, eight shifts, the mirrored and the
    grey image, three quarter turns; made from the normalised image, as there.
    """
    small = [Affine(angle=sign * k * pi / 16) for k in range(1, 5) for sign in (1, -1)]
    corners = [(size * x, size * y) for size in (0.2, 0.1) for x in (1, -1) for y in (1, -1)]
    shifts = [Affine(right=right, down=down) for right, down in corners]
    quarters = [Affine(angle=k * pi / 2) for k in range(1, 4)]
    first = [View(str(change), change) for change in (*small, *shifts, Affine(mirror=True))]
    last = [View(str(change), change) for change in quarters]
    return (PLAIN, *first, View("grey", _grey), *last)
