"""The one preprocessing function: training, evaluation, prediction, export and serving call it.

numpy and Pillow only, so that the runtime without torch gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from PIL import Image

from anomalyst.errors import InputError, unknown
from anomalyst.types import ByteArray, FloatArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ASPECT = 32


@dataclass(frozen=True)
class Preprocess:
    """Resize (antialiased bicubic), crop if a preset says so, normalise.

    By default the whole image is kept: its short side becomes ``image_size`` and its long side the
    multiple of ``multiple`` nearest to the length that keeps the aspect, so that the grid of
    patches is whole and the distortion at most half a patch.

    Attributes
    ----------
    image_size
        Side of the tensor in pixels: the short one by default, both with ``square`` or ``resize``.
    multiple
        Patch size (or stride) that both sides of the tensor are multiples of.
    mean, std
        Per channel, of pixels in [0, 1].
    square
        Distort the image to a square instead of keeping its aspect.
    resize
        Resize to this short side (both sides with ``square``), then crop the central
        ``image_size`` square, as the protocols of several papers do. None: no crop.

    Raises
    ------
    InputError
        When the values do not fit together.
    """

    image_size: int
    multiple: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    square: bool = False
    resize: int | None = None

    def __post_init__(self) -> None:
        size, step = self.image_size, self.multiple
        if step < 1:
            raise InputError(f"multiple {step} is not valid: give the patch size, 1 or more")
        if size < 1 or size % step:
            below = max(size // step, 1) * step
            raise InputError(
                f"image size {size} is not a positive multiple of {step}: "
                f"the nearest are {below} and {below + step}"
            )
        if self.resize is not None and self.resize < size:
            raise InputError(
                f"resize {self.resize} is smaller than the crop of {size}: give {size} or more"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"mean {self.mean} and std {self.std} need three values each, std above 0"
            )

    def __call__(self, image: ByteArray) -> FloatArray:
        """Return the tensor of one RGB image, uint8 ``[H, W, 3]`` -> float32 ``[3, h, w]``."""
        height, width = self._resized_size(*image.shape[:2])
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
        if self.resize is not None:
            top, left = self._crop_at(height, width)
            pixels = pixels[top : top + self.image_size, left : left + self.image_size]
        return self.normalized(pixels)

    def normalized(self, pixels: ByteArray) -> FloatArray:
        """Return the tensor of an image of the right size, uint8 ``[h, w, 3]`` -> ``[3, h, w]``."""
        scale, offset = self._affine()
        tensor = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        # (h, w, 3) -> (3, h, w) while multiplying: one pass over the pixels less
        np.multiply(pixels.transpose(2, 0, 1), scale[:, None, None], out=tensor)
        tensor += offset[:, None, None]
        return tensor

    def pixels(self, tensor: FloatArray) -> ByteArray:
        """Return the resized image, uint8 ``[h, w, 3]``, behind a tensor ``[3, h, w]``."""
        scale, offset = self._affine()
        values = (tensor - offset[:, None, None]) / scale[:, None, None]
        image: ByteArray = values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        return np.ascontiguousarray(image)

    def _affine(self) -> tuple[FloatArray, FloatArray]:
        """Return factor and offset ``[3]`` from a pixel in 0 to 255 to a normalised value."""
        std = np.array(self.std)
        scale = (1 / (255 * std)).astype(np.float32)
        return scale, (-np.array(self.mean) / std).astype(np.float32)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w) of the tensor for an image of this size."""
        if self.resize is not None:
            return self.image_size, self.image_size
        return self._resized_size(height, width)

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return (top, left, height, width) of what the tensor covers, in the image's pixels."""
        if self.resize is None:
            return 0.0, 0.0, float(height), float(width)
        resized = self._resized_size(height, width)
        top, left = self._crop_at(*resized)
        down, across = height / resized[0], width / resized[1]
        return top * down, left * across, self.image_size * down, self.image_size * across

    def to_dict(self) -> dict[str, object]:
        """Return what ``from_dict`` takes, ready for JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Preprocess:
        """Return the preprocessing that ``to_dict`` described; unknown keys are an error."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("preprocessing key", key, known)
        missing = [key for key in known if key not in values]
        if missing:
            raise InputError(f"preprocessing: no value for {', '.join(missing)}")
        resize = values["resize"]
        return cls(
            image_size=_whole("image_size", values["image_size"]),
            multiple=_whole("multiple", values["multiple"]),
            mean=_triple("mean", values["mean"]),
            std=_triple("std", values["std"]),
            square=_flag("square", values["square"]),
            resize=None if resize is None else _whole("resize", resize),
        )

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w) before the crop."""
        short_to = self.image_size if self.resize is None else self.resize
        if self.square:
            return short_to, short_to
        short, long = min(height, width), max(height, width)
        if long > MAX_ASPECT * short:
            raise InputError(
                f"image of {width}x{height} pixels is more than {MAX_ASPECT} times as long as "
                "wide: cut it into pieces"
            )
        step = self.multiple if self.resize is None else 1
        long_to = (2 * long * short_to + short * step) // (2 * short * step) * step
        return (short_to, long_to) if height <= width else (long_to, short_to)

    def _crop_at(self, height: int, width: int) -> tuple[int, int]:
        """Return (top, left) of the central square in a resized image."""
        return (height - self.image_size) // 2, (width - self.image_size) // 2


def _whole(key: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InputError(f"preprocessing: {key} must be a whole number, not {value!r}")


def _flag(key: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise InputError(f"preprocessing: {key} must be true or false, not {value!r}")


def _triple(key: str, value: object) -> tuple[float, float, float]:
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    if len(numbers) == 3 and all(isinstance(number, (int, float)) for number in numbers):
        return float(numbers[0]), float(numbers[1]), float(numbers[2])
    raise InputError(f"preprocessing: {key} must be three numbers, not {value!r}")
