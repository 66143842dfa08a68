"""Images to predictions, whatever computes the scores: torch, or an exported graph. numpy only.

One pass a batch, one decision each: categories, warnings, thresholds and regions are found here and
nowhere else, so that a detector and the runtime of its export cannot drift apart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError, unknown
from anomalyst.inference import SOURCES, ImageSource, Item, by_shape, read_batches
from anomalyst.retrieval import mistaken, nearest
from anomalyst.scoring import Calibration, Decision, find_regions
from anomalyst.tiled import TiledGlance
from anomalyst.types import FloatArray, Prediction, Region, Sample, ScoreMap

_log = logging.getLogger(__name__)
_ONE_IMAGE = (str, Path, bytes, Sample, np.ndarray)


@contextmanager
def unwarned() -> Iterator[None]:
    """Keep warnings of images that look like another product away meanwhile."""
    before = _log.level
    _log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _log.setLevel(before)


class Glance(Protocol):
    """What a judge has seen of a batch of images of one shape, before categories count."""

    def descriptors(self) -> FloatArray:
        """Return ``[B, C]`` by which `Judge.compare` tells a category; empty without any."""

    def score(self, at: Sequence[int], category: str | None) -> tuple[FloatArray, Sequence[float]]:
        """Return raw maps ``[len(at), h, w]`` and image scores of those images of the batch.

        Raises
        ------
        InputError
            They cannot be judged as that category.
        """


class Judge(Protocol):
    """What scores images by category; what follows from the scores is `predict`'s business."""

    @property
    def preprocess(self) -> Preprocess:
        """What makes the network's input of an image."""

    @property
    def categories(self) -> Sequence[str]:
        """The categories with references or a calibration."""

    @property
    def calibration(self) -> Mapping[str, Calibration]:
        """What normal scores look like, of the categories that are calibrated."""

    @property
    def decision(self) -> Decision:
        """The false-reject rates that make verdicts."""

    @property
    def sigma(self) -> float:
        """Gaussian smoothing of the map, in pixels of the network's input."""

    @property
    def needs_category(self) -> bool:
        """Whether an image is compared with references of its own category."""

    @property
    def needs_name(self) -> bool:
        """Whether images of any category are judged by its name alone."""

    def knows(self, category: str) -> bool:
        """Tell whether images of that category can be judged."""

    def compare(self, descriptors: FloatArray) -> Sequence[Mapping[str, float]]:
        """Return for each image its cosine to every category's nearest reference."""

    def look(self, items: Sequence[Item], likely: str | None) -> Glance:
        """Pass good items of one shape through the network.

        ``likely`` is a category that some of them are known to be of, where one is known.
        """


def predict(
    judge: Judge,
    images: ImageSource | Iterable[ImageSource],
    category: str | None,
    batch_size: int,
    keep_pixels: bool,
) -> Iterator[Prediction]:
    """Yield one prediction an image in the order given; a bad image's has its ``error`` set.

    A category that the judge does not know is refused at once.
    """
    if category is not None and not judge.knows(category):
        raise unknown("category", category, judge.categories)
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: give 1 or more")
    if not isinstance(images, (*_ONE_IMAGE, Iterable)):
        raise InputError(f"{type(images).__name__} is no image: {SOURCES}, or several of them")
    sources = [images] if isinstance(images, _ONE_IMAGE) else images
    return _judge_all(judge, sources, category, batch_size, keep_pixels)


def _judge_all(
    judge: Judge,
    sources: Iterable[ImageSource],
    category: str | None,
    batch_size: int,
    keep_pixels: bool,
) -> Iterator[Prediction]:
    warned: set[str] = set()
    for batch in read_batches(sources, judge.preprocess, batch_size, keep_pixels):
        done: dict[int, Prediction] = {}
        for positions in by_shape(batch):
            items = [batch[p] for p in positions]
            done.update(zip(positions, judge_batch(judge, items, category, warned), strict=True))
        for position, item in enumerate(batch):
            yield done.get(position) or Prediction(item.name, item.category, error=item.error)


def judge_batch(
    judge: Judge, items: Sequence[Item], category: str | None, warned: set[str]
) -> list[Prediction]:
    """Judge good items of one shape; of those in tiles, one."""
    given = [category or item.category for item in items]
    likely = next((name for name in given if name), None)
    seen: Glance
    if judge.preprocess.tiling is None:
        seen = judge.look(items, likely)
    else:
        (item,) = items
        seen = TiledGlance(judge, item, likely)
    names = _name_categories(judge, given, seen)
    if judge.needs_category:
        _warn_of_strangers(items, names, judge.compare(seen.descriptors()), warned)
    found: dict[int, Prediction] = {}
    for name in dict.fromkeys(names):
        at = [k for k, other in enumerate(names) if other == name]
        if name is not None and not judge.knows(name):
            error = str(unknown("category", name, judge.categories))
            found.update({k: Prediction(items[k].name, name, error=error) for k in at})
            continue
        try:
            maps, scores = seen.score(at, name)
        except InputError as wrong:
            if name is None:  # nobody said what is needed, of any image
                raise
            found.update({k: Prediction(items[k].name, name, error=str(wrong)) for k in at})
            continue
        pixels_a_patch = judge.preprocess.output_size(*items[0].size)[0] / maps.shape[1]
        sigma = judge.sigma / pixels_a_patch
        for k, values, score in zip(at, maps, scores, strict=True):
            score_map = _score_map(items[k], values, sigma)
            plain = Prediction(
                items[k].name,
                name,
                score,
                score_map=score_map,
                sha256=items[k].sha256,
                pixels=items[k].pixels,
            )
            found[k] = _decide(judge, plain, score_map, score)
    return [found[k] for k in range(len(items))]


def _score_map(item: Item, values: FloatArray, sigma: float) -> ScoreMap:
    """Return an image's map; a patch of which nothing counts has the map's lowest value."""
    assert item.tensor is not None
    rows, columns = values.shape
    down, across = (
        max(s // n, 1) for s, n in zip(item.tensor.shape[1:], values.shape, strict=True)
    )
    hidden = item.hidden(rows * down, columns * across)  # at the size of the tensor
    if hidden is not None:
        patches = hidden.reshape(rows, down, columns, across).all(axis=(1, 3))
        values = np.where(patches, values.min(), values)
    return ScoreMap(values, item.size, sigma, item.box, item.ignored)


def _name_categories(
    judge: Judge, given: Sequence[str | None], seen: Glance
) -> Sequence[str | None]:
    """Return each item's category: the one given, or that of the nearest reference.

    Without any reference, the only category that is calibrated, or None.
    """
    # Zero-shot by name, a guess among the few that have references would be worse than none.
    if all(given) or judge.needs_name:
        return given
    retrieved = [nearest(similar) for similar in judge.compare(seen.descriptors())]
    if retrieved[0] is None and len(judge.categories) == 1:
        return [name or judge.categories[0] for name in given]
    return [name or found for name, found in zip(given, retrieved, strict=True)]


def _warn_of_strangers(
    items: Sequence[Item],
    names: Sequence[str | None],
    similar: Sequence[Mapping[str, float]],
    warned: set[str],
) -> None:
    """Warn of a category's first image that hardly shows what its references show."""
    for item, name, values in zip(items, names, similar, strict=True):
        if name is None or name in warned:
            continue
        if (found := mistaken(name, values)) is not None:
            warned.add(name)
            _log.warning(
                "%s: looks %s; judged as %r all the same, and so are others like it, unnamed",
                item.name,
                found,
                name,
            )


def _decide(judge: Judge, plain: Prediction, score_map: ScoreMap, score: float) -> Prediction:
    """Add p-value, verdict, threshold and regions where the category is calibrated."""
    calibration = judge.calibration.get(plain.category or "")
    if calibration is None:
        return plain
    p_value = calibration.p_value(score)
    level = calibration.pixel_threshold(judge.decision)
    regions: tuple[Region, ...] = ()
    # No smoothed value exceeds the largest patch: most good images need no full-size map.
    if level is not None and float(score_map.values.max()) > level:
        regions = find_regions(score_map.at(*score_map.size), level)
    return replace(
        plain,
        p_value=p_value,
        verdict=judge.decision.verdict(p_value),
        threshold=calibration.threshold(judge.decision.alpha),
        calibrated=True,
        regions=regions,
    )


def heat_threshold(
    calibration: Mapping[str, Calibration], decision: Decision, category: str | None
) -> float | None:
    """Return the pixel threshold as the unit of a category's heat maps, None without any."""
    known = calibration.get(category or "")
    # A threshold of 0 (held-out images equal to the references) is no unit to draw in.
    return (known.pixel_threshold(decision) if known else None) or None
