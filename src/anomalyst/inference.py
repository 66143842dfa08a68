"""From image sources to batches of tensors: read in the background, grouped by shape, in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from anomalyst.data.images import display_name, read_file, read_image
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.types import ByteArray, FloatArray, Sample

ImageSource = Sample | Path | str | bytes | ByteArray


@dataclass(frozen=True)
class Item:
    """One source, read: its preprocessed ``tensor`` ``[3, h, w]`` or, if it is bad, its ``error``.

    ``size`` is the original (height, width) in pixels, ``sha256`` the hash of the very bytes (or,
    of an array, the shape and pixels) that the tensor was made from.
    """

    name: str
    category: str | None
    sha256: str = ""
    tensor: FloatArray | None = None
    size: tuple[int, int] = (0, 0)
    pixels: ByteArray | None = None
    error: str | None = None


def read_item(
    source: ImageSource, name: str, preprocess: Preprocess, keep_pixels: bool = False
) -> Item:
    """Read one image: bytes taken from the disk once, decoded once, preprocessed."""
    category = source.category if isinstance(source, Sample) else None
    place = source.path if isinstance(source, Sample) else source
    try:
        if isinstance(place, np.ndarray):
            pixels, content = read_image(place), repr(place.shape).encode() + place.tobytes()
        else:
            content = place if isinstance(place, bytes) else read_file(place)
            pixels = read_image(content, name if place is content else display_name(place))
    except InputError as error:
        return Item(name, category, error=str(error))
    try:
        tensor = preprocess(pixels)
    except InputError as error:
        return Item(name, category, error=f"{name}: {error}")
    digest = hashlib.sha256(content).hexdigest()
    kept = pixels if keep_pixels else None
    return Item(name, category, digest, tensor, (pixels.shape[0], pixels.shape[1]), kept)


def source_name(source: ImageSource, number: int) -> str:
    """Return the path as given, or ``image-N`` for bytes and arrays."""
    if isinstance(source, Sample):
        return str(source.path)
    return str(source) if isinstance(source, (str, Path)) else f"image-{number}"


def read_batches(
    sources: Iterable[ImageSource], preprocess: Preprocess, size: int, keep_pixels: bool = False
) -> Iterator[list[Item]]:
    """Yield up to ``size`` items at a time in the order given, read ahead by two threads.

    One batch is read while another is judged, so memory does not grow with the number of images.
    """

    def read(numbered: tuple[int, ImageSource]) -> Item:
        number, source = numbered
        return read_item(source, source_name(source, number), preprocess, keep_pixels)

    items = _read_ahead(enumerate(sources), read, ahead=size)
    while batch := list(islice(items, size)):
        yield batch


def _read_ahead(
    numbered: Iterable[tuple[int, ImageSource]],
    read: Callable[[tuple[int, ImageSource]], Item],
    ahead: int,
) -> Iterator[Item]:
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="read") as pool:
        waiting: deque[Future[Item]] = deque()
        for entry in numbered:
            waiting.append(pool.submit(read, entry))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def by_shape(items: Iterable[Item]) -> list[list[int]]:
    """Return the positions of the good items, grouped by tensor shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, item in enumerate(items):
        if item.tensor is not None:
            groups.setdefault(item.tensor.shape, []).append(position)
    return list(groups.values())
