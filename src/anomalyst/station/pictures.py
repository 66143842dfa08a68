"""Pictures as a browser shows them: the part, its map, its outlines, its nearest good neighbour."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from anomalyst.data.images import read_image
from anomalyst.data.masks import Ignored
from anomalyst.overlay import heat_overlay
from anomalyst.station.refusals import Refusal
from anomalyst.types import ByteArray, Region, ScoreMap

SATURATED = 2.0
"""The map's value, in heat units, that is white; half of it, mid-grey, is where it turns strong."""

_SHOWN = {"image/png", "image/jpeg", "image/webp"}
_TYPES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"BM", "image/bmp"),
    (b"II", "image/tiff"),
    (b"MM", "image/tiff"),
    (b"RIFF", "image/webp"),
)
_AT_ONCE = threading.Semaphore(2)  # a picture of 100 megapixels takes 300 MB while it is decoded


def media_type(content: bytes) -> str:
    """Return the media type of a picture by its first bytes."""
    return next((t for magic, t in _TYPES if content.startswith(magic)), "application/octet-stream")


def pack_map(score_map: ScoreMap, unit: float) -> bytes:
    """Return a map on the method's own grid, and all that is needed to draw it, as ``.npz``."""
    arrays: dict[str, Any] = {
        "values": score_map.values.astype(np.float32),
        "size": np.array(score_map.size),
        "sigma": np.array(score_map.sigma),
        "box": np.array(score_map.box),
        "unit": np.array(unit),
    }
    if score_map.ignored is not None:
        arrays["ignored"] = np.packbits(score_map.ignored.mask)
        arrays["ignored_shape"] = np.array(score_map.ignored.mask.shape)
        arrays["shift"] = np.array(score_map.ignored.shift)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


def unpack_map(packed: bytes) -> tuple[ScoreMap, float]:
    """Return the map that `pack_map` packed, and its heat unit."""
    with np.load(io.BytesIO(packed), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    height, width = (int(n) for n in arrays["size"])
    ignored = None
    if "ignored" in arrays:
        rows, columns = (int(n) for n in arrays["ignored_shape"])
        bits = np.unpackbits(arrays["ignored"], count=rows * columns)
        down, right = (int(n) for n in arrays["shift"])
        mask = bits.reshape(rows, columns).astype(bool)
        ignored = Ignored(mask, (height, width), (down, right))
    top, left, tall, wide = (float(n) for n in arrays["box"])
    sigma, unit = float(arrays["sigma"]), float(arrays["unit"])
    box = (top, left, tall, wide)
    return ScoreMap(arrays["values"], (height, width), sigma, box, ignored), unit


def image_file(content: bytes, side: int | None) -> tuple[bytes, str]:
    """Return a picture as browsers show it, with its media type; at most ``side`` pixels long."""
    kind = media_type(content)
    if side is None and kind in _SHOWN:
        return content, kind
    with _AT_ONCE:
        return _png(_shrunk(read_image(content), side)), "image/png"


def map_file(packed: bytes, side: int | None) -> bytes:
    """Return a map as 8-bit grey PNG: 0 is black, `SATURATED` heat units and more are white."""
    score_map, unit = unpack_map(packed)
    if unit <= 0:
        raise Refusal(404, "this map has no unit to draw it in: calibrate the recipe again")
    with _AT_ONCE:
        values = score_map.at(*_size(score_map.size, side))
        grey = np.rint((values / (SATURATED * unit)).clip(0, 1) * 255).astype(np.uint8)
        return _png(grey)


def overlay_file(
    content: bytes, packed: bytes, regions: Sequence[dict[str, Any]], side: int | None
) -> bytes:
    """Return a picture under its heat map with its regions outlined, as PNG."""
    score_map, unit = unpack_map(packed)
    found = [Region(tuple(r["bbox"]), r["area"], r["score"]) for r in regions]
    with _AT_ONCE:
        values = score_map.at(*score_map.size)
        drawn = heat_overlay(read_image(content), values, unit, found)
        return _png(_shrunk(drawn, side))


def _size(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """Return a (height, width) of which the longer is at most ``side``."""
    scale = min(1.0, (side or max(size)) / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shrunk(pixels: ByteArray, side: int | None) -> ByteArray:
    height, width = _size((pixels.shape[0], pixels.shape[1]), side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), reducing_gap=2.0))


def _png(pixels: ByteArray) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG", compress_level=1)
    return packed.getvalue()
