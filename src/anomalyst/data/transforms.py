"""The one preprocessing function: training, evaluation, prediction, export and serving call it.

numpy and Pillow only, so that the runtime without torch gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from PIL import Image

from anomalyst.data.frame import Arrays, Frame
from anomalyst.data.masks import Box, Ignored
from anomalyst.errors import InputError, unknown
from anomalyst.tiling import Tile, Tiling
from anomalyst.types import ByteArray, FloatArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ASPECT = 32
_SETTINGS = ("image_size", "multiple", "mean", "std", "square", "resize")  # always mentioned


@dataclass(frozen=True)
class Seen:
    """An image as the network sees it.

    Attributes
    ----------
    tensor
        float32 ``[3, h, w]``.
    box
        (top, left, height, width) of what it covers, in the image's pixels.
    ignored
        What of the image counts for nothing; the tensor is 0 there.
    overview
        The same part once more, as small as a tile, where that is looked at beside the tiles.
    """

    tensor: FloatArray
    box: Box
    ignored: Ignored | None = None
    overview: FloatArray | None = None


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
    frame
        Where to look on the original image; None is all of it.
    tiling
        Tiles that the tensor is cut into before the network sees it; None is the whole at once.

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
    frame: Frame | None = None
    tiling: Tiling | None = None

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
        if self.tiling is not None:
            self._check_tiling(self.tiling)

    def _check_tiling(self, tiling: Tiling) -> None:
        if self.square or self.resize is not None:
            raise InputError(
                "tiles are for images as they are: leave out square and resize (the preset), or "
                "the tiles"
            )
        if tiling.side % self.multiple:
            below = max(tiling.side // self.multiple, 1) * self.multiple
            raise InputError(
                f"tile {tiling.side} is not a multiple of {self.multiple}: the nearest are "
                f"{below} and {below + self.multiple}"
            )

    def __call__(self, image: ByteArray) -> FloatArray:
        """Return the tensor of one RGB image, uint8 ``[H, W, 3]`` -> float32 ``[3, h, w]``."""
        return self.see(image).tensor

    def see(self, image: ByteArray) -> Seen:
        """Return the tensor of one RGB image, uint8 ``[H, W, 3]``, and where it lies on it.

        Raises
        ------
        InputError
            The frame does not fit the image, or the image is too long.
        """
        top, left, ignored = 0, 0, None
        if self.frame is not None:
            top, left, height, width, ignored = self.frame.spot(image)
            image = image[top : top + height, left : left + width]
        box = _moved(self._box(*image.shape[:2]), top, left)
        if ignored is not None:
            # Before resizing, so that nothing of an ignored pixel reaches its neighbours.
            size = image.shape[0], image.shape[1]
            hidden = ignored.at((top, left, *size), size)
            image = np.where(hidden[..., None], self._fill(), image)
        tensor, overview = self._tensor(image), None
        if ignored is not None and ignored.at(box, (tensor.shape[1], tensor.shape[2])).all():
            raise InputError("the ignore mask leaves nothing of the region; mark less of it")
        _blank(tensor, ignored, box)
        if (small := self.overview) is not None and len(self.tiles(*tensor.shape[1:])) > 1:
            overview = small._tensor(image)
            _blank(overview, ignored, box)
        return Seen(tensor, box, ignored, overview)

    def input_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return each (h, w) that the network gets for an image of this size, tiles first."""
        size = self.output_size(height, width)
        tiles = self.tiles(*size)
        found = [(tiles[0].height * self.multiple, tiles[0].width * self.multiple)]
        if (small := self.overview) is not None and len(tiles) > 1:
            found.append(small.output_size(height, width))
        return found

    @property
    def least_side(self) -> int:
        """Pixels that no side of the network's input has fewer of."""
        return self.image_size if self.tiling is None else min(self.image_size, self.tiling.side)

    def tiles(self, height: int, width: int) -> list[Tile]:
        """Return the tiles of a tensor of that size."""
        rows, columns = height // self.multiple, width // self.multiple
        if self.tiling is None:
            return [Tile(0, 0, rows, columns)]
        return self.tiling.tiles(rows, columns, self.multiple)

    @property
    def overview(self) -> Preprocess | None:
        """What makes the small tensor that is looked at beside the tiles; None where none is."""
        if self.tiling is None or not self.tiling.overview:
            return None
        return replace(self, image_size=self.tiling.side, tiling=None)

    @property
    def doubled(self) -> Preprocess:
        """The same at twice the resolution, tile for tile."""
        tiling = self.tiling
        return replace(
            self,
            image_size=2 * self.image_size,
            multiple=2 * self.multiple,
            resize=None if self.resize is None else 2 * self.resize,
            tiling=None if tiling is None else replace(tiling, side=2 * tiling.side),
        )

    def _fill(self) -> ByteArray:
        """Return the pixel ``[3]`` that comes nearest to a tensor of 0."""
        return np.asarray(np.rint(255 * np.array(self.mean)).clip(0, 255), dtype=np.uint8)

    def _tensor(self, image: ByteArray) -> FloatArray:
        """Return the tensor of the part of an image that is looked at."""
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
        return self._resized_size(*self._region(height, width)[2:])

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return (top, left, height, width) of what the tensor covers, in the image's pixels.

        Where a frame aligns, that of a part that lies right; `see` tells that of each.
        """
        top, left, *size = self._region(height, width)
        return _moved(self._box(*size), top, left)

    def _region(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of the part of an image that is looked at."""
        if self.frame is None:
            return 0, 0, height, width
        x, y, across, along = self.frame.region(height, width)
        return y, x, along, across

    def _box(self, height: int, width: int) -> Box:
        """Return what the tensor covers of the part that is looked at."""
        if self.resize is None:
            return 0.0, 0.0, float(height), float(width)
        resized = self._resized_size(height, width)
        top, left = self._crop_at(*resized)
        down, across = height / resized[0], width / resized[1]
        return top * down, left * across, self.image_size * down, self.image_size * across

    def to_dict(self) -> dict[str, object]:
        """Return what ``from_dict`` takes beside the frame's arrays, ready for JSON.

        What is not asked for is not mentioned.
        """
        values: dict[str, object] = {key: getattr(self, key) for key in _SETTINGS}
        values |= {"mean": list(self.mean), "std": list(self.std)}
        if self.frame is not None:
            values["frame"] = self.frame.to_dict()
        if self.tiling is not None:
            values["tiling"] = asdict(self.tiling)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, object], arrays: Arrays | None = None) -> Preprocess:
        """Return the preprocessing that ``to_dict`` described; unknown keys are an error.

        ``arrays`` are those of the frame.
        """
        known = [field.name for field in fields(Preprocess)]
        for key in values:
            if key not in known:
                raise unknown("preprocessing key", key, known)
        missing = [key for key in _SETTINGS if key not in values]
        if missing:
            raise InputError(f"preprocessing: no value for {', '.join(missing)}")
        resize, frame, tiling = values["resize"], values.get("frame"), values.get("tiling")
        return cls(
            image_size=_whole("image_size", values["image_size"]),
            multiple=_whole("multiple", values["multiple"]),
            mean=_triple("mean", values["mean"]),
            std=_triple("std", values["std"]),
            square=_flag("square", values["square"]),
            resize=None if resize is None else _whole("resize", resize),
            frame=Frame.from_dict(frame, arrays or {}) if isinstance(frame, dict) else None,
            tiling=Tiling(**tiling) if isinstance(tiling, dict) else None,
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


def _blank(tensor: FloatArray, ignored: Ignored | None, box: Box) -> None:
    """Set what is ignored of a tensor to 0."""
    if ignored is not None:
        tensor[:, ignored.at(box, (tensor.shape[1], tensor.shape[2]))] = 0


def _moved(box: Box, top: int, left: int) -> Box:
    return box[0] + top, box[1] + left, box[2], box[3]


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
