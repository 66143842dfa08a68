"""What a detector may learn from, and how it takes in references of one category."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomalyst.bundle import AbnormalRecord, ReferenceRecord
from anomalyst.data.images import read_mask
from anomalyst.data.masks import defect_on_grids
from anomalyst.errors import InputError, unknown
from anomalyst.inference import ImageSource, Item, by_shape, read_batches, read_item, source_name
from anomalyst.methods.base import AbnormalReference, MethodSpec
from anomalyst.types import BoolArray, Progress, Sample

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
    plain: list[tuple[list[str], Sequence[Tensor]]] = []
    engine, shown = detector.engine, detector.method.reference_views
    for items in _new_references(detector, category, normal, progress):
        records += [record_of(item) for item in items]
        for positions in by_shape(items):
            same = [items[p] for p in positions]
            found = [detector.method.encode(engine.features(same, view)) for view in shown]
            plain.append(([item.name for item in same], found[0]))
            views.extend(found)
    good = {record.sha256 for record in (*known, *records)}
    bad = list(_new_abnormal(detector, category, abnormal, good, progress))
    if not records and not bad:
        count = len(normal) + len(abnormal)
        raise InputError(f"category {category!r} has all {count} images given already")
    index = CategoryIndex()
    index.load(detector.index.tensors())
    for names, features in plain:
        _warn_of_strangers(category, names, index.similarities(features))
        index.add(category, features)
    for item, reference in bad:
        _require_same_product(category, item, index.similarities(reference.maps)[0])

    if views:
        detector.method.enroll(category, views)
    detector.index.load(index.tensors())
    detector.references[category] = [*known, *records]
    if bad:
        detector.method.enroll_abnormal(category, [reference for _, reference in bad])
        detector.abnormal[category] = [*known_bad, *(_abnormal_record(*pair) for pair in bad)]


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
    if not category.strip() or not category.isprintable() or category.startswith("__"):
        raise InputError(f"category {category!r}: give a printable name, not starting with __")
    if not normal and abnormal and detector.references and category not in detector.references:
        raise unknown("category", category, detector.references)
    if not normal and not (abnormal and detector.references.get(category)):
        raise InputError(f"category {category!r}: give at least one normal reference image")
    if spec.trains_on is not None and not detector.method.trained:
        raise InputError(f"{spec.name} is not trained yet: fit it on a data set first")
    detector.method.require_name(category)


def _new_references(
    detector: Detector,
    category: str,
    sources: Sequence[ImageSource],
    progress: Progress | None,
) -> Iterator[list[Item]]:
    """Yield batches of the normal images that are not enrolled yet, each content once."""
    seen = {record.sha256 for record in detector.references.get(category, [])}
    bad = {record.sha256 for record in detector.abnormal.get(category, [])}
    done = 0
    for batch in read_batches(sources, detector.engine.preprocess, 8):
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


def _warn_of_strangers(
    category: str, names: Sequence[str], similar: Sequence[Mapping[str, float]]
) -> None:
    """Warn of normal images that hardly show what the category's earlier references show."""
    from anomalyst.retrieval import mistaken

    for name, values in zip(names, similar, strict=True):
        if (found := mistaken(category, values)) is not None:
            _log.warning("%s: looks %s; taken as normal all the same", name, found)


# ---- abnormal references ------------------------------------------------------------------------


def _new_abnormal(
    detector: Detector,
    category: str,
    sources: Sequence[AbnormalSource],
    good: set[str],
    progress: Progress | None,
) -> Iterator[tuple[Item, AbnormalReference]]:
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
            defect = None if mask is None else defect_mask(mask, item)
            yield item, _reference(detector.engine, item, defect)
        if progress:
            progress(f"enroll {category}, abnormal", number + 1, len(sources))


def _reference(engine: Engine, item: Item, defect: BoolArray | None) -> AbnormalReference:
    """Return the features of an abnormal image, and its mask on the grid of patches."""
    import torch

    maps = engine.features([item])
    if defect is None:
        return AbnormalReference(maps)
    size, grid = item.size, (maps[0].shape[-2], maps[0].shape[-1])
    box, target = engine.preprocess.box(*size), engine.preprocess.output_size(*size)
    seen = defect_on_grids(defect, box, grid, target, item.name)
    covered, mask = (torch.from_numpy(x).float().to(engine.device) for x in seen)
    return AbnormalReference(maps, covered, mask)


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


def _abnormal_record(item: Item, reference: AbnormalReference) -> AbnormalRecord:
    plain = record_of(item)
    return AbnormalRecord(
        name=plain.name,
        sha256=plain.sha256,
        mask="found" if reference.coverage is None else "given",
    )
