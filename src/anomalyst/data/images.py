"""Read any usual image file as 8-bit RGB, or say in one line why it cannot be read.

What is read is fixed by the file format alone, never by the content of one image:

- PNG, JPEG, BMP, TIFF and WebP, recognised by their first bytes; of several frames the first;
- EXIF orientation is applied (an EXIF block that cannot be parsed counts as none);
- CMYK becomes RGB, Adobe's inverted JPEG too; colour profiles are ignored;
- alpha, a transparent palette entry or a transparent colour is composited over black;
- 16-bit grey is divided by 257 and rounded (of 16-bit colour Pillow keeps the upper byte); float
  grey must lie in [0, 1] and is multiplied by 255.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from anomalyst.errors import InputError
from anomalyst.types import BoolArray, ByteArray

MAX_PIXELS = 120_000_000
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# The format classes themselves instead of Image.open, because that warns on every image over 89
# megapixels and the only ways to stop it are process-wide.
_FORMATS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"\xff\xd8\xff", JpegImageFile),
    (b"BM", BmpImageFile),
    (b"II", TiffImageFile),
    (b"MM", TiffImageFile),
    (b"RIFF", WebPImageFile),
)
# What Pillow's decoders have been seen or are documented to raise on damaged bytes.
_FAULTS = (
    Image.DecompressionBombError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNING_LOCK = threading.Lock()


def read_image(
    source: str | Path | bytes | npt.NDArray[np.generic] | Image.Image, name: str | None = None
) -> ByteArray:
    """Return RGB pixels, uint8 ``[H, W, 3]``, contiguous, possibly read-only.

    A file's bytes may be given instead of its path, or an array ``[H, W]``, ``[H, W, 3]`` or
    ``[H, W, 4]`` of uint8 or uint16, which follows the rules of this module for alpha and depth.
    Errors call the image ``name``; by default its path.

    Raises
    ------
    InputError
        Missing, unreadable, empty, truncated, no image, over ``MAX_PIXELS`` by its header
        (nothing is decoded then), or pixels that have no fixed meaning in 8 bits.
    """
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source)
    shown = name or display_name(source)
    return _to_rgb(_decode(source, shown), shown)


def header_size(content: bytes, name: str) -> tuple[int, int]:
    """Return (height, width) of a file's bytes as its header says it; nothing is decoded.

    Raises
    ------
    InputError
        Empty, no image, a header that cannot be read, or over ``MAX_PIXELS``.
    """
    opened = _open_stream(io.BytesIO(content), name)
    return opened.height, opened.width


def read_file(path: str | Path) -> bytes:
    """Return a file's content; whatever stands in the way is an `InputError` that names it."""
    with _open_file(path, display_name(path)) as file:
        return file.read()


def read_mask(
    path: str | Path, size: tuple[int, int] | None = None, image: str | Path | None = None
) -> BoolArray:
    """Return where a mask file is above 0 in any channel, bool ``[h, w]``.

    Parameters
    ----------
    size
        (height, width) of the image that the mask belongs to; None takes any.
    image
        That image's file, named in the error when the sizes differ.
    """
    name = display_name(path)
    decoded = _decode(path, name)
    if decoded.mode in ("1", "L", "F") or decoded.mode.startswith("I"):
        # Not by way of 8 bits, where small values of 16 would round to 0.
        mask: BoolArray = np.greater(np.asarray(decoded), 0)
    else:
        mask = np.any(_to_rgb(decoded, name), axis=2)
    if size is not None and mask.shape != size:
        of = "" if image is None else f" {display_name(image)}"
        raise InputError(
            f"{name}: the mask is {mask.shape[1]}x{mask.shape[0]} pixels but its image{of} is "
            f"{size[1]}x{size[0]}; store the mask at the image's size"
        )
    return mask


def list_images(source: str | Path, recursive: bool = False) -> list[Path]:
    """Return the image files of a folder sorted by path; a file is returned as it is.

    Hidden files and folders, and files that are no image by their suffix, are left out; a broken
    link stays, so that whoever reads it says so.
    """
    path = Path(source)
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise InputError(f"{display_name(path)}: no such file or folder")
    found = sorted(_walk(path, recursive), key=lambda file: file.parts)
    if not found:
        raise InputError(
            f"{display_name(path)}: no images in this folder; "
            f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))} count"
        )
    return found


def display_name(source: object) -> str:
    """Return how an error names an image: its path on one printable line."""
    if not isinstance(source, (str, Path)):
        return "image"
    return str(source) if str(source).isprintable() else ascii(str(source))


def reason(error: Exception) -> str:
    """Return an exception's own words on one line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split())[:200] or type(error).__name__


def folder_entries(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, hidden ones left out."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"{display_name(folder)}: {reason(error)}") from error


def _walk(folder: Path, recursive: bool) -> Iterator[Path]:
    for name in folder_entries(folder):
        path = folder / name
        if os.path.isdir(path):
            # A link to a folder may lead back up: never followed.
            if recursive and not os.path.islink(path):
                yield from _walk(path, recursive)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


@contextmanager
def _open_file(path: str | Path, name: str) -> Iterator[BinaryIO]:
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
        file = open(path, "rb") if regular else None  # noqa: SIM115
    except (OSError, ValueError) as error:
        broken = os.path.islink(path) and not os.path.exists(path)
        why = f"link to the missing {os.readlink(path)}" if broken else reason(error)
        raise InputError(f"{name}: {why}") from error
    if file is None:
        what = "is a folder" if os.path.isdir(path) else "is no regular file"
        raise InputError(f"{name}: {what}; give image files, or a folder with some in it")
    with file:
        try:
            yield file
        except OSError as error:
            raise InputError(f"{name}: {reason(error)}") from error


def _undecodable(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: damaged or unsupported image ({reason(error)}); export it again")


def _decode(source: object, name: str) -> Image.Image:
    """Return the first frame, decoded and upright, in the mode that the file has."""
    if isinstance(source, Image.Image):
        _check_size(source, name)
        return _load(source, name)
    if isinstance(source, bytes):
        return _decode_stream(io.BytesIO(source), name)
    if isinstance(source, (str, Path)):
        with _open_file(source, name) as file:
            return _decode_stream(file, name)
    raise InputError(
        f"cannot read an image from {type(source).__name__}: "
        "give a path, the bytes of a file, a numpy array or a PIL image"
    )


def _decode_stream(stream: BinaryIO, name: str) -> Image.Image:
    return _load(_open_stream(stream, name), name)


def _open_stream(stream: BinaryIO, name: str) -> Image.Image:
    """Return an image of which only the header was read."""
    head = stream.read(8)
    stream.seek(0)
    if not head:
        raise InputError(f"{name}: the file is empty (0 bytes)")
    kind = next((kind for magic, kind in _FORMATS if head.startswith(magic)), None)
    if kind is None:
        raise InputError(f"{name}: not a PNG, JPEG, BMP, TIFF or WebP image")
    try:
        image = kind(stream)
    except Image.DecompressionBombError as error:  # WebP, which allocates while it is opened
        raise InputError(f"{name}: {reason(error)}; cut it into smaller images") from error
    except _FAULTS as error:
        raise _undecodable(name, error) from error
    _check_size(image, name)
    return image


def _check_size(image: Image.Image, name: str) -> None:
    pixels = image.width * image.height
    if pixels == 0:
        raise InputError(f"{name}: the image has no pixels")
    if pixels > MAX_PIXELS:
        raise InputError(
            f"{name}: {image.width}x{image.height} is {pixels / 1e6:.0f} megapixels, over the "
            f"limit of {MAX_PIXELS // 1_000_000}; cut it into smaller images"
        )


def _load(image: Image.Image, name: str) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise InputError(
            f"{name}: not read, because PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on and would fill "
            "truncated images with grey; set it to False"
        )
    try:
        with _no_size_warning(image):
            image.load()
    except _FAULTS as error:
        raise _undecodable(name, error) from error
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except _FAULTS:
        return None


@contextmanager
def _no_size_warning(image: Image.Image) -> Iterator[None]:
    """Silence Pillow's second size warning, which only huge TIFF files reach; ours is checked."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or image.width * image.height <= limit:
        yield
        return
    with _WARNING_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _to_rgb(image: Image.Image, name: str) -> ByteArray:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(np.asarray(image), name)
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            rgb = Image.new("RGB", rgba.size)
            rgb.paste(rgba, mask=rgba)
            return np.asarray(rgb)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, ValueError) as error:  # older Pillow cannot convert LAB
        raise _undecodable(name, error) from error


def _grey_to_rgb(grey: npt.NDArray[np.generic], name: str) -> ByteArray:
    """Return deep grey ``[H, W]`` as 8-bit RGB by the fixed scaling of its type."""
    top = 1 if grey.dtype.kind == "f" else 65535
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= top):  # also refuses NaN
        raise InputError(
            f"{name}: pixel values from {low:g} to {high:g}, but {grey.dtype.name} grey must lie "
            f"in [0, {top}]; save it as an 8-bit or 16-bit image"
        )
    if top == 1:
        levels = np.rint(grey.astype(np.float32) * 255).astype(np.uint8)
    else:
        levels = _to_eight_bits(grey)
    return np.repeat(levels[:, :, None], 3, axis=2)


def _array_to_rgb(array: npt.NDArray[np.generic]) -> ByteArray:
    unsigned = array.dtype.kind == "u" and array.dtype.itemsize <= 2
    if not unsigned or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(
            f"cannot read an image from an array {array.dtype.name} {list(array.shape)}: "
            "give uint8 or uint16 of [H, W], [H, W, 3] or [H, W, 4]"
        )
    if array.size == 0:
        raise InputError(f"cannot read an image from an array {list(array.shape)}: no pixels")
    levels = array if array.dtype.itemsize == 1 else _to_eight_bits(array)
    pixels = np.array(levels, dtype=np.uint8, order="C")
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return pixels
    return _to_rgb(Image.fromarray(pixels), "image")


def _to_eight_bits(values: npt.NDArray[np.generic]) -> ByteArray:
    """Map 0 ... 65535 to 0 ... 255: v / 257, rounded."""
    return ((values.astype(np.int32) + 128) // 257).astype(np.uint8)
