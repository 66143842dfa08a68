"""Where to look on an image: aligned to a golden sample, cropped, without what does not count.

numpy and Pillow only, as all of preprocessing: the runtime sees the very same pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anomalyst.data.alignment import find_shift, grey
from anomalyst.data.images import read_image, read_mask
from anomalyst.data.masks import Ignored
from anomalyst.errors import InputError
from anomalyst.types import BoolArray, ByteArray

Rectangle = tuple[int, int, int, int]
Arrays = Mapping[str, npt.NDArray[Any]]
SEARCH = 50
ALIKE = 0.5
"""Least correlation with the golden sample's patch; see docs/recipe.md for what is measured."""


class Spot(NamedTuple):
    """Where a frame lies on one image: the region in whole pixels, and what counts for nothing."""

    top: int
    left: int
    height: int
    width: int
    ignored: Ignored | None


@dataclass(frozen=True, eq=False)
class Frame:
    """Region of interest, ignore mask and alignment; all three are optional.

    Align, then crop, then ignore: what is found to be moved takes region and mask with it.

    Attributes
    ----------
    crop
        Region (x, y, width, height) in pixels of the original image; None is all of it.
    ignore
        ``[H, W]``, True where an image counts for nothing: drawn over the whole image, at its size
        or any other of the same shape.
    template
        Grey patch ``[h, w]`` of a golden sample, uint8; None aligns nothing.
    place
        (x, y) of the patch on the golden sample.
    search
        Pixels that a part may be moved by in each direction.

    Raises
    ------
    InputError
        Values that mean nothing.
    """

    crop: Rectangle | None = None
    ignore: BoolArray | None = None
    template: ByteArray | None = None
    place: tuple[int, int] = (0, 0)
    search: int = SEARCH

    def __post_init__(self) -> None:
        if self.crop is not None:
            _check_rectangle("region", self.crop)
        if self.ignore is not None:
            if self.ignore.ndim != 2 or self.ignore.dtype != np.bool_:
                raise InputError(
                    f"ignore mask: {self.ignore.dtype} of shape {list(self.ignore.shape)}; "
                    "give booleans [height, width]"
                )
            if self.ignore.all():
                raise InputError("ignore mask: ignores the whole image; mark less of it")
        if self.template is not None:
            if self.template.ndim != 2 or self.template.dtype != np.uint8:
                raise InputError("golden sample: give its patch as grey uint8 [height, width]")
            if self.template.min() == self.template.max():
                raise InputError(
                    "golden sample: its patch is all of one grey, so nothing can be found by it; "
                    "choose one with edges"
                )
        if self.search < 1:
            raise InputError(f"search {self.search}: give 1 pixel or more")

    @classmethod
    def read(
        cls,
        *,
        crop: Rectangle | None = None,
        ignore: str | Path | BoolArray | None = None,
        golden: str | Path | ByteArray | None = None,
        align_on: Rectangle | None = None,
        search: int = SEARCH,
    ) -> Frame:
        """Make a frame of files or arrays.

        Parameters
        ----------
        crop
            As of the class.
        ignore
            Mask, above 0 where an image counts for nothing.
        golden
            Image of a part that lies right.
        align_on
            Patch (x, y, width, height) of it to find the part by.
        search
            As of the class.

        Raises
        ------
        InputError
            A file cannot be read, the patch is missing or does not lie on the golden sample.
        """
        mask = ignore if isinstance(ignore, np.ndarray) or ignore is None else read_mask(ignore)
        if (golden is None) != (align_on is None):
            raise InputError(
                "alignment takes a golden sample and the patch on it to find parts by: give both"
            )
        if golden is None or align_on is None:
            return cls(crop, mask, None, (0, 0), search)
        _check_rectangle("patch to align on", align_on)
        x, y, width, height = align_on
        pixels = read_image(golden)
        if y + height > pixels.shape[0] or x + width > pixels.shape[1]:
            raise InputError(
                f"patch to align on {_shown(align_on)} reaches out of the golden sample of "
                f"{pixels.shape[1]}x{pixels.shape[0]} pixels"
            )
        template = np.ascontiguousarray(grey(pixels)[y : y + height, x : x + width])
        return cls(crop, mask, template, (x, y), search)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.crop, self.place, self.search, *self._hashes.values()))

    def spot(self, image: ByteArray) -> Spot:
        """Return where the frame lies on an image, uint8 ``[H, W, 3]``.

        Raises
        ------
        InputError
            The part is not found, or the region reaches out of the image.
        """
        height, width = image.shape[:2]
        right, down = self._shift(image)
        x, y, across, along = self.region(height, width)
        if self.crop is not None:
            x, y = x + right, y + down
            if x < 0 or y < 0 or x + across > width or y + along > height:
                raise InputError(
                    f"the part lies {_moved(right, down)}, and its region reaches out of the "
                    "image; take the picture again, or fit with a smaller region"
                )
        ignored = None
        if self.ignore is not None:
            self._require_shape(self.ignore, height, width)
            ignored = Ignored(self.ignore, (height, width), (down, right))
        return Spot(y, x, along, across, ignored)

    def region(self, height: int, width: int) -> Rectangle:
        """Return (x, y, width, height) of the region on an image of that size, before any shift.

        Raises
        ------
        InputError
            It reaches out of the image.
        """
        if self.crop is None:
            return 0, 0, width, height
        x, y, across, along = self.crop
        if x + across > width or y + along > height:
            raise InputError(
                f"region {_shown(self.crop)} (x,y,width,height) reaches out of an image of "
                f"{width}x{height} pixels"
            )
        return self.crop

    def _shift(self, image: ByteArray) -> tuple[int, int]:
        """Return how far right and down the part lies from where the golden sample has it."""
        if self.template is None:
            return 0, 0
        (height, width), size = self.template.shape, image.shape
        if height > size[0] or width > size[1]:
            raise InputError(
                f"an image of {size[1]}x{size[0]} pixels is smaller than the golden sample's "
                f"patch of {width}x{height}"
            )
        right, down, fit = find_shift(image, self.template, self.place, self.search)
        if fit < ALIKE:
            raise InputError(
                f"does not look like the golden sample (correlation {fit:.2f} at best within "
                f"{self.search} pixels, {ALIKE} is needed)"
            )
        return right, down

    @staticmethod
    def _require_shape(mask: BoolArray, height: int, width: int) -> None:
        # Up to a pixel of the mask: a reduced one is rounded.
        if abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width):
            raise InputError(
                f"the ignore mask is {mask.shape[1]}x{mask.shape[0]} pixels and the image "
                f"{width}x{height}: draw it over the whole image, in the same shape"
            )

    # ---- files ----------------------------------------------------------------------------------

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by name, for the bundle."""
        known = {"ignore": self.ignore, "template": self.template}
        return {name: array for name, array in known.items() if array is not None}

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {
            name: hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
            for name, array in self.arrays().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes beside the arrays, ready for JSON; arrays by their hash."""
        return {
            "crop": None if self.crop is None else list(self.crop),
            "place": list(self.place),
            "search": self.search,
            "sha256": dict(self._hashes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], arrays: Arrays) -> Frame:
        """Return the frame that `to_dict` described.

        Raises
        ------
        InputError
            The arrays are not those of the description.
        """
        try:
            crop = None if values["crop"] is None else _rectangle(values["crop"])
            x, y = (int(value) for value in values["place"])
            ignore, template = (arrays.get(name) for name in ("ignore", "template"))
            made = cls(crop, ignore, template, (x, y), int(values["search"]))
            same = made._hashes == values["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"preprocessing: frame is damaged ({error!r})") from None
        if not same:
            raise InputError("preprocessing: the frame's arrays are not those that it was made of")
        return made


def parse_rectangle(option: str, text: str) -> Rectangle:
    """Return the four numbers of ``X,Y,W,H``, as an option of the command line has them."""
    try:
        found = _rectangle([int(part) for part in text.split(",")])
    except ValueError:
        raise InputError(
            f"{option} {text!r}: give X,Y,W,H in pixels of the image, such as 40,20,300,200"
        ) from None
    _check_rectangle(option, found)
    return found


def _rectangle(values: Any) -> Rectangle:
    x, y, width, height = (int(value) for value in values)
    return x, y, width, height


def _check_rectangle(what: str, rectangle: Rectangle) -> None:
    if min(rectangle[:2]) < 0 or min(rectangle[2:]) < 1:
        raise InputError(
            f"{what} {_shown(rectangle)}: x and y start at 0, width and height at 1 pixel"
        )


def _shown(rectangle: Rectangle) -> str:
    return ",".join(map(str, rectangle))


def _moved(right: int, down: int) -> str:
    """Say how far a part is moved."""
    across = f"{abs(right)} pixels too far {'right' if right > 0 else 'left'}"
    along = f"{abs(down)} pixels too far {'down' if down > 0 else 'up'}"
    return " and ".join(text for text, by in ((across, right), (along, down)) if by)
