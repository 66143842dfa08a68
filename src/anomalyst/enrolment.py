"""What a detector may learn from, and references that it does not have yet, read and recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from anomalyst.bundle import ReferenceRecord
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.inference import ImageSource, Item, read_batches
from anomalyst.methods.base import MethodSpec
from anomalyst.types import Progress, Sample


def record_of(item: Item) -> ReferenceRecord:
    """Return what a bundle keeps of an image: file name and content hash."""
    return ReferenceRecord(name=Path(item.name).name, sha256=item.sha256)


def require_normal(spec: MethodSpec, data: Sequence[Sample]) -> None:
    """Raise unless there are images, and none that the method cannot learn from."""
    if not data:
        raise InputError("no training images: the data set has no train/good images")
    for sample in data:
        if sample.label == 1 and not spec.abnormal_references:
            raise InputError(
                f"{sample.path}: {spec.name} learns from normal images only; "
                "leave anomalous ones out (methods with abnormal references: "
                "see `anomalyst methods`)"
            )


def new_references(
    category: str,
    sources: Sequence[ImageSource],
    known: Sequence[ReferenceRecord],
    preprocess: Preprocess,
    progress: Progress | None,
) -> Iterator[list[Item]]:
    """Yield batches of the images that are not among the known ones, each content once.

    Raises
    ------
    InputError
        An image cannot be read, or all are known.
    """
    seen = {record.sha256 for record in known}
    done, found = 0, False
    for batch in read_batches(sources, preprocess, 8):
        fresh = []
        for item in batch:
            if item.error:
                raise InputError(f"reference of {category!r}: {item.error}")
            if item.sha256 not in seen:
                seen.add(item.sha256)
                fresh.append(item)
        found = found or bool(fresh)
        yield fresh
        done += len(batch)
        if progress:
            progress(f"enroll {category}", done, len(sources))
    if not found:
        raise InputError(f"category {category!r} has all {len(sources)} references already")
