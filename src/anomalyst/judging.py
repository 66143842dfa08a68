"""Images to predictions: one backbone pass a batch, one search a category, one decision each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from anomalyst.errors import InputError, unknown
from anomalyst.inference import ImageSource, Item, by_shape, read_batches
from anomalyst.scoring import find_regions
from anomalyst.types import Prediction, Region, ScoreMap

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import Tensor

    from anomalyst.detector import Detector


def judge_all(
    detector: Detector,
    sources: Iterable[ImageSource],
    category: str | None,
    batch_size: int,
    keep_pixels: bool,
) -> Iterator[Prediction]:
    """Yield one prediction an image in the order given; a bad image's has its ``error`` set."""
    preprocess = detector.engine.preprocess
    warned: set[str] = set()
    for batch in read_batches(sources, preprocess, batch_size, keep_pixels):
        done: dict[int, Prediction] = {}
        for positions in by_shape(batch):
            items = [batch[p] for p in positions]
            done.update(zip(positions, _judge(detector, items, category, warned), strict=True))
        for position, item in enumerate(batch):
            yield done.get(position) or Prediction(item.name, item.category, error=item.error)


def _judge(
    detector: Detector, items: Sequence[Item], category: str | None, warned: set[str]
) -> list[Prediction]:
    """Judge good items of one shape."""
    features = detector.method.encode(detector.engine.features(items))
    names = _name_categories(detector, items, features, category)
    if detector.spec.needs_category:
        _warn_of_strangers(items, names, detector.index.similarities(features), warned)
    found: dict[int, Prediction] = {}
    for name in dict.fromkeys(names):
        at = [k for k, other in enumerate(names) if other == name]
        if name is not None and not detector.knows(name):
            error = str(unknown("category", name, detector.references))
            found.update({k: Prediction(items[k].name, name, error=error) for k in at})
            continue
        part = features if len(at) == len(items) else [maps[at] for maps in features]
        try:
            maps, scores = detector.method.score(part, name)
        except InputError as wrong:
            if name is None:  # nobody said what is needed, of any image
                raise
            found.update({k: Prediction(items[k].name, name, error=str(wrong)) for k in at})
            continue
        pixels_a_patch = detector.engine.preprocess.output_size(*items[0].size)[0] / maps.shape[1]
        sigma = detector.method.sigma / pixels_a_patch
        for k, values, score in zip(at, maps.cpu().numpy(), scores.tolist(), strict=True):
            box = detector.engine.preprocess.box(*items[k].size)
            score_map = ScoreMap(values, items[k].size, sigma, box)
            plain = Prediction(
                items[k].name,
                name,
                score,
                score_map=score_map,
                sha256=items[k].sha256,
                pixels=items[k].pixels,
            )
            found[k] = _decide(detector, plain, score_map, score)
    return [found[k] for k in range(len(items))]


def _name_categories(
    detector: Detector, items: Sequence[Item], features: Sequence[Tensor], category: str | None
) -> list[str | None]:
    """Return each item's category: the one given, its own, or that of the nearest reference.

    Without any reference, the only category that is calibrated, or None.
    """
    known = [category or item.category for item in items]
    # Zero-shot by name, a guess among the few that have references would be worse than none.
    by_name = detector.spec.needs_class_name and detector.method.judges_unseen
    if all(known) or by_name:
        return known
    retrieved = detector.index.lookup(features)
    if retrieved[0] is None and len(detector.categories) == 1:
        return [name or detector.categories[0] for name in known]
    return [name or nearest for name, nearest in zip(known, retrieved, strict=True)]


def _warn_of_strangers(
    items: Sequence[Item],
    names: Sequence[str | None],
    similar: Sequence[Mapping[str, float]],
    warned: set[str],
) -> None:
    """Warn of a category's first image that hardly shows what its references show."""
    from anomalyst.retrieval import mistaken

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


def _decide(detector: Detector, plain: Prediction, score_map: ScoreMap, score: float) -> Prediction:
    """Add p-value, verdict, threshold and regions where the category is calibrated."""
    calibration = detector.calibration.get(plain.category or "")
    if calibration is None:
        return plain
    p_value = calibration.p_value(score)
    level = calibration.pixel_threshold(detector.decision)
    regions: tuple[Region, ...] = ()
    # No smoothed value exceeds the largest patch: most good images need no full-size map.
    if level is not None and float(score_map.values.max()) > level:
        regions = find_regions(score_map.at(*score_map.size), level)
    return replace(
        plain,
        p_value=p_value,
        verdict=detector.decision.verdict(p_value),
        threshold=calibration.threshold(detector.decision.alpha),
        calibrated=True,
        regions=regions,
    )
