"""From image sources to batches of tensors: read in the background, grouped by shape, in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from anomalyst.data.images import display_name, read_file, read_image
from anomalyst.data.masks import Box, Ignored
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.tiling import Tile
from anomalyst.types import BoolArray, ByteArray, FloatArray, Sample

ImageSource = Sample | Path | str | bytes | ByteArray
SOURCES = "give a path, bytes, a uint8 array or a Sample"

_BATCH_PIXELS = 2 * 448**2  # of the tiles that go through the network together: memory is dear


@dataclass(frozen=True)
class Item:
    """One source, read: its preprocessed ``tensor`` ``[3, h, w]`` or, if it is bad, its ``error``.

    ``size`` is the original (height, width) in pixels, ``box`` (top, left, height, width) of what
    the tensor covers of it, and ``ignored`` what counts for nothing. ``sha256`` is the hash of the
    very bytes (or, of an array, the shape and pixels) that the tensor was made from. ``overview``
    is a smaller tensor of the same part, where one is looked at beside the tiles.
    """

    name: str
    category: str | None
    sha256: str = ""
    tensor: FloatArray | None = None
    size: tuple[int, int] = (0, 0)
    pixels: ByteArray | None = None
    error: str | None = None
    box: Box = (0.0, 0.0, 0.0, 0.0)
    ignored: Ignored | None = None
    overview: FloatArray | None = None

    def hidden(self, height: int, width: int) -> BoolArray | None:
        """Return what of the tensor's part is ignored, at any size; None where nothing can be."""
        return None if self.ignored is None else self.ignored.at(self.box, (height, width))


def read_item(
    source: ImageSource, name: str, preprocess: Preprocess, keep_pixels: bool = False
) -> Item:
    """Read one image: bytes taken from the disk once, decoded once, preprocessed."""
    category = source.category if isinstance(source, Sample) else None
    place = source.path if isinstance(source, Sample) else source
    try:
        if isinstance(place, np.ndarray):
            pixels, content = read_image(place), repr(place.shape).encode() + place.tobytes()
        elif not isinstance(place, (str, Path, bytes)):
            raise InputError(f"{name}: {type(place).__name__} is no image; {SOURCES}")
        else:
            content = place if isinstance(place, bytes) else read_file(place)
            pixels = read_image(content, name if place is content else display_name(place))
    except InputError as error:
        return Item(name, category, error=str(error))
    try:
        seen = preprocess.see(pixels)
    except InputError as error:
        return Item(name, category, error=f"{name}: {error}")
    digest = hashlib.sha256(content).hexdigest()
    item = Item(
        name,
        category,
        digest,
        seen.tensor,
        (pixels.shape[0], pixels.shape[1]),
        pixels if keep_pixels else None,
        box=seen.box,
        ignored=seen.ignored,
        overview=seen.overview,
    )
    return cut(item, preprocess, source.tile) if isinstance(source, Part) else item


@dataclass(frozen=True)
class Part(Sample):
    """One tile of a sample, which is read as if it were an image; None is its overview."""

    tile: Tile | None = None


def cut(item: Item, preprocess: Preprocess, tile: Tile | None) -> Item:
    """Return a tile of a good item, or its overview, as an item of its own; the tensor is a copy.

    Its hash tells it from the item's other parts.
    """
    assert item.tensor is not None
    if tile is None:
        return replace(item, tensor=item.overview, overview=None, sha256=f"{item.sha256} overview")
    step = preprocess.multiple
    top, left, height, width = (step * side for side in tile)
    rows, columns = item.tensor.shape[1:]
    down, across = item.box[2] / rows, item.box[3] / columns
    return replace(
        item,
        tensor=item.tensor[:, top : top + height, left : left + width].copy(),
        box=(item.box[0] + top * down, item.box[1] + left * across, height * down, width * across),
        sha256=f"{item.sha256} {','.join(map(str, tile))}",
        overview=None,
    )


def parts_of(item: Item, preprocess: Preprocess) -> list[Tile | None]:
    """Return the tiles of a good item of which anything counts, and None for its overview."""
    assert item.tensor is not None
    hidden = item.hidden(*item.tensor.shape[1:])
    step, found = preprocess.multiple, list[Tile | None]()
    for tile in preprocess.tiles(*item.tensor.shape[1:]):
        top, left, height, width = (step * side for side in tile)
        if hidden is None or not hidden[top : top + height, left : left + width].all():
            found.append(tile)
    return found if item.overview is None else [*found, None]


def network_inputs(
    item: Item, preprocess: Preprocess
) -> Iterator[tuple[list[Tile | None], list[Item]]]:
    """Yield what the network gets of one good item, in batches of one shape and bounded size."""
    parts = parts_of(item, preprocess)
    tiles = [tile for tile in parts if tile is not None]
    count = max(_BATCH_PIXELS // (tiles[0].height * tiles[0].width * preprocess.multiple**2), 1)
    for first in range(0, len(tiles), count):
        some = list[Tile | None](tiles[first : first + count])
        yield some, [cut(item, preprocess, tile) for tile in some]
    if None in parts:
        yield [None], [cut(item, preprocess, None)]


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
    Of a stream that is taken one by one nothing is read ahead: a camera may wait for the verdict.
    Images that are looked at in tiles are large: they come one by one.
    """
    ahead = size if size > 1 or isinstance(sources, Sequence) else 0
    if preprocess.tiling is not None:
        size = 1

    def read(numbered: tuple[int, ImageSource]) -> Item:
        number, source = numbered
        return read_item(source, source_name(source, number), preprocess, keep_pixels)

    items = _read_ahead(enumerate(sources), read, ahead)
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
