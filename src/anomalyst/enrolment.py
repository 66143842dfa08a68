"""What a detector may learn from, and how it takes in references of one category."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anomalyst.bundle import AbnormalRecord, ReferenceRecord
from anomalyst.data.images import read_mask
from anomalyst.data.masks import defect_on_grids, outside, shows
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError, unknown
from anomalyst.inference import (
    ImageSource,
    Item,
    by_shape,
    network_inputs,
    read_batches,
    read_item,
    source_name,
)
from anomalyst.methods.base import AbnormalReference, MethodSpec
from anomalyst.types import BoolArray, FloatArray, Progress, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from anomalyst.detector import Detector
    from anomalyst.engine import Engine

MaskSource = str | Path | np.ndarray
AbnormalSource = tuple[ImageSource, MaskSource | None]

_log = logging.getLogger(__name__)


def record_of(item: Item) -> ReferenceRecord:
    """Return what a bundle keeps of an image: file name and content hash."""
    return ReferenceRecord(name=Path(item.name).name, sha256=item.sha256)


def require_learnable(spec: MethodSpec, data: Sequence[Sample], shots: int | None = None) -> None:
    """Raise unless there are images, and none that the method cannot learn from, nor so few."""
    if shots is not None and spec.generalist:
        raise InputError(f"{spec.name} learns from all source images: enroll shots later")
    if shots is not None and not spec.few_shot:
        raise InputError(
            f"{spec.name} cannot learn from {shots} image{'s' * (shots != 1)} a category; "
            "`anomalyst methods` shows which can (few_shot)"
        )
    if not data:
        raise InputError("no training images: the data set has no train/good images")
    for sample in data:
        if sample.label == 1 and not spec.abnormal_references:
            raise InputError(
                f"{sample.path}: {spec.name} learns from normal images only; "
                "leave anomalous ones out (methods with abnormal references: "
                "see `anomalyst methods`)"
            )


def category_of(sample: Sample) -> str:
    """Return a training image's category, which it must have."""
    if sample.category is None:
        raise InputError(f"{sample.path}: no category; give each training image one")
    return sample.category


def enroll(
    detector: Detector,
    category: str,
    normal: Sequence[ImageSource],
    abnormal: Sequence[AbnormalSource],
    progress: Progress | None,
) -> None:
    """Add references of one category; see `Detector.enroll`. All is checked before any is kept."""
    _check_call(detector, category, normal, abnormal)
    from anomalyst.retrieval import CategoryIndex

    known = detector.references.get(category, [])
    known_bad = detector.abnormal.get(category, [])
    records: list[ReferenceRecord] = []
    views: list[Sequence[Tensor]] = []
    plain: list[tuple[list[str], FloatArray]] = []
    good_known = [record.sha256 for record in known]
    bad_known = {record.sha256 for record in known_bad}
    preprocess = detector.engine.preprocess
    for items in new_references(preprocess, category, normal, good_known, bad_known, progress):
        records += [record_of(item) for item in items]
        for positions in by_shape(items):
            same = [items[p] for p in positions]
            plain.append(([item.name for item in same], _encoded(detector, same, views)))
    good = {record.sha256 for record in (*known, *records)}
    bad = list(_new_abnormal(detector, category, abnormal, good, progress))
    if not records and not bad:
        count = len(normal) + len(abnormal)
        raise InputError(f"category {category!r} has all {count} images given already")
    index = CategoryIndex()
    index.load(detector.index.tensors())
    for names, descriptors in plain:
        warn_of_strangers(category, names, index.compare(descriptors))
        index.remember(category, descriptors)
    for each in bad:
        _require_same_product(category, each.item, index.compare(each.descriptor)[0])

    if views:
        detector.method.enroll(category, views)
    detector.index.load(index.tensors())
    detector.references[category] = [*known, *records]
    if bad:
        shown = [reference for each in bad for reference in each.references]
        detector.method.enroll_abnormal(category, shown)
        detector.abnormal[category] = [*known_bad, *(each.record for each in bad)]


def _encoded(
    detector: Detector, items: Sequence[Item], views: list[Sequence[Tensor]]
) -> FloatArray:
    """Add the maps of items of one shape to ``views``, and return descriptors ``[B, C]``."""
    from anomalyst.retrieval import described, pooled

    engine, method = detector.engine, detector.method
    preprocess, rows = engine.preprocess, list[FloatArray]()
    groups: Iterable[Sequence[Item]] = [items]
    if preprocess.tiling is not None:
        (item,) = items
        groups = (same for _, same in network_inputs(item, preprocess))
    for same in groups:
        found = [method.encode(engine.features(same, view)) for view in method.reference_views]
        rows.append(described(found[0]))
        views.extend(found)
    return rows[0] if preprocess.tiling is None else pooled(rows)


def _check_call(
    detector: Detector,
    category: str,
    normal: Sequence[ImageSource],
    abnormal: Sequence[AbnormalSource],
) -> None:
    spec = detector.spec
    if abnormal and not spec.abnormal_references:
        raise InputError(
            f"{spec.name} cannot use abnormal references; "
            "`anomalyst methods` shows which methods can"
        )
    require_printable(category)
    if not normal and abnormal and detector.references and category not in detector.references:
        raise unknown("category", category, detector.references)
    if not normal and not (abnormal and detector.references.get(category)):
        raise InputError(f"category {category!r}: give at least one normal reference image")
    if spec.trains_on is not None and not detector.method.trained:
        raise InputError(f"{spec.name} is not trained yet: fit it on a data set first")
    detector.method.require_name(category)


def require_printable(category: str) -> None:
    """Raise where a category's name is none."""
    if not category.strip() or not category.isprintable() or category.startswith("__"):
        raise InputError(f"category {category!r}: give a printable name, not starting with __")


def new_references(
    preprocess: Preprocess,
    category: str,
    sources: Sequence[ImageSource],
    known: Iterable[str],
    bad: Container[str],
    progress: Progress | None,
) -> Iterator[list[Item]]:
    """Yield batches of the normal images that are not enrolled yet, each content once.

    ``known`` are the SHA-256 of normal references, ``bad`` those of abnormal ones.
    """
    seen, done = set(known), 0
    for batch in read_batches(sources, preprocess, 8):
        fresh = []
        for item in batch:
            if item.error:
                raise InputError(f"reference of {category!r}: {item.error}")
            if item.sha256 in bad:
                raise InputError(
                    f"{item.name}: given as normal, but it is an abnormal reference of {category!r}"
                )
            if item.sha256 not in seen:
                seen.add(item.sha256)
                fresh.append(item)
        yield fresh
        done += len(batch)
        if progress:
            progress(f"enroll {category}", done, len(sources))


def warn_of_strangers(
    category: str, names: Sequence[str], similar: Sequence[Mapping[str, float]]
) -> None:
    """Warn of normal images that hardly show what the category's earlier references show."""
    from anomalyst.retrieval import mistaken

    for name, values in zip(names, similar, strict=True):
        if (found := mistaken(category, values)) is not None:
            _log.warning("%s: looks %s; taken as normal all the same", name, found)


# ---- abnormal references ------------------------------------------------------------------------


class _Abnormal(NamedTuple):
    """An abnormal image with what is learned of it; its descriptor is ``[1, C]``."""

    item: Item
    references: list[AbnormalReference]
    descriptor: FloatArray

    @property
    def record(self) -> AbnormalRecord:
        """What a bundle keeps of it."""
        found = self.references[0].coverage is None
        plain = record_of(self.item).model_dump()
        return AbnormalRecord(**plain, mask="found" if found else "given")


def _new_abnormal(
    detector: Detector,
    category: str,
    sources: Sequence[AbnormalSource],
    good: set[str],
    progress: Progress | None,
) -> Iterator[_Abnormal]:
    """Yield the abnormal images that are not enrolled yet, with their features and defect."""
    seen = {record.sha256 for record in detector.abnormal.get(category, [])}
    for number, (source, mask) in enumerate(sources):
        item = read_item(source, source_name(source, number), detector.engine.preprocess)
        if item.error:
            raise InputError(f"abnormal reference of {category!r}: {item.error}")
        if item.sha256 in good:
            raise InputError(
                f"{item.name}: given as abnormal, but it is a normal reference of {category!r}; "
                "take it out of one of the two"
            )
        if item.sha256 not in seen:
            seen.add(item.sha256)
            defect = None if mask is None else _counted(defect_mask(mask, item), item)
            yield _abnormal(detector.engine, item, defect)
        if progress:
            progress(f"enroll {category}, abnormal", number + 1, len(sources))


def _abnormal(engine: Engine, item: Item, defect: BoolArray | None) -> _Abnormal:
    """Return an abnormal image as it is, or in tiles with those that show the defect."""
    from anomalyst.retrieval import described, pooled

    if engine.preprocess.tiling is None:
        whole = _reference(engine, item, defect)
        return _Abnormal(item, [whole], described(whole.maps))
    if defect is None:
        raise InputError(
            f"{item.name}: in tiles an abnormal reference needs its mask, which tells the tiles "
            "that show the defect from those that do not"
        )
    descriptors, found = list[FloatArray](), list[AbnormalReference]()
    for _, parts in network_inputs(item, engine.preprocess):
        maps = engine.features(parts)
        grid = maps[0].shape[-2], maps[0].shape[-1]
        descriptors.append(described(maps))
        found += [_reference(engine, p, defect) for p in parts if shows(defect, p.box, grid)]
    if not found:
        raise outside(item.name)
    return _Abnormal(item, found, pooled(descriptors))


def _reference(engine: Engine, item: Item, defect: BoolArray | None) -> AbnormalReference:
    """Return the features of an abnormal image, and its mask on the grid of patches."""
    import torch

    maps = engine.features([item])
    if defect is None:
        return AbnormalReference(maps)
    assert item.tensor is not None
    grid, target = (maps[0].shape[-2], maps[0].shape[-1]), item.tensor.shape[1:]
    seen = defect_on_grids(defect, item.box, grid, (target[0], target[1]), item.name)
    covered, mask = (torch.from_numpy(x).float().to(engine.device) for x in seen)
    return AbnormalReference(maps, covered, mask)


def _counted(defect: BoolArray, item: Item) -> BoolArray:
    """Return the part of a defect that is not ignored."""
    left = defect if item.ignored is None else item.ignored.left_of(defect)
    if not left.any():
        raise InputError(f"{item.name}: all of its defect is ignored; leave the image out")
    return left


def defect_mask(mask: MaskSource, item: Item) -> BoolArray:
    """Return the mask of an image as bool ``[H, W]``.

    Raises
    ------
    InputError
        It cannot be read, is of another size than the image, or marks nothing or everything.
    """
    if isinstance(mask, np.ndarray):
        if mask.shape != item.size:
            raise InputError(
                f"{item.name}: its mask is an array of shape {list(mask.shape)}, the image has "
                f"{item.size[0]} rows and {item.size[1]} columns; give a mask of the same size"
            )
        name, marked = f"the mask of {item.name}", np.greater(mask, 0)
    else:
        name, marked = str(mask), read_mask(mask, item.size, item.name)
    if not marked.any():
        raise InputError(f"{name}: marks no pixel; mark the defect, or leave the mask out")
    if marked.all():
        raise InputError(
            f"{name}: marks the whole image; mark the defect alone, or leave the mask out"
        )
    if (share := float(marked.mean())) > 0.5:
        _log.warning("%s: marks %.0f %% of the image; is it inverted?", name, 100 * share)
    return marked


def _require_same_product(category: str, item: Item, similar: Mapping[str, float]) -> None:
    """Raise where an abnormal image is not of the category, by its likeness to normal references.

    Its defect changes an image far less than its product does: see docs/benchmarks.md.
    """
    from anomalyst.retrieval import SAME_PRODUCT

    nearest = max(similar, key=lambda name: similar[name])
    own = similar[category]
    if similar[nearest] > own:
        raise InputError(
            f"{item.name}: looks like {nearest!r} (similarity {similar[nearest]:.2f}), not like "
            f"{category!r} ({own:.2f}); give a defect of the same product"
        )
    if own < SAME_PRODUCT:
        raise InputError(
            f"{item.name}: looks like another product than {category!r} (similarity {own:.2f}, "
            f"{SAME_PRODUCT} is expected); give a defect of the same product in the same view"
        )
