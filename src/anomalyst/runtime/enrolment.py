"""References of one category into an exported bundle, where the graph says what they add. No torch.

Some methods keep of a reference what the graph computes of it anyway (the patches of AnomalyDINO),
and compare with all of it. For those the graph has outputs ``new_NAME`` beside the score: what an
image would add to the references of that name. Enrolling appends it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from anomalyst.errors import InputError
from anomalyst.inference import ImageSource, Item, by_shape, network_inputs, read_batches
from anomalyst.retrieval import CategoryIndex, mistaken, pooled
from anomalyst.runtime.engines import NEW
from anomalyst.types import FloatArray, Progress

if TYPE_CHECKING:
    from anomalyst.runtime.judge import Runtime

_log = logging.getLogger(__name__)


@dataclass
class Learned:
    """What new references of a category come to.

    ``rows`` hold for each input of the graph what to append, ``descriptors`` one ``[1, C]`` an
    image.
    """

    sha256: list[str] = field(default_factory=list)
    rows: dict[str, list[FloatArray]] = field(default_factory=dict)
    descriptors: list[FloatArray] = field(default_factory=list)


def learn(
    runtime: Runtime, category: str, normal: Sequence[ImageSource], progress: Progress | None
) -> Learned:
    """Return what those references add; see `Runtime.enroll`. The runtime stays as it is."""
    _check_call(runtime, category, normal)
    index = CategoryIndex(runtime.descriptors)
    learned = Learned()
    for items in _new_references(runtime, category, normal, progress):
        for positions in by_shape(items):
            same = [items[p] for p in positions]
            descriptors = _take(runtime, same, learned)
            _warn_of_strangers(category, same, index, descriptors)
            index.remember(category, descriptors)
    if not learned.sha256:
        raise InputError(f"category {category!r} has all {len(normal)} images given already")
    return learned


def _check_call(runtime: Runtime, category: str, normal: Sequence[ImageSource]) -> None:
    if not runtime.manifest.grows:
        raise InputError(
            f"this export of {runtime.manifest.method} cannot enroll, as more follows from "
            "references than the graph computes: enroll with the bundle, and export it again"
        )
    if not category.strip() or not category.isprintable() or category.startswith("__"):
        raise InputError(f"category {category!r}: give a printable name, not starting with __")
    if not normal:
        raise InputError(f"category {category!r}: give at least one normal reference image")


def _new_references(
    runtime: Runtime, category: str, sources: Sequence[ImageSource], progress: Progress | None
) -> Iterator[list[Item]]:
    """Yield batches of the images that are not enrolled yet, each content once."""
    seen, done = set(runtime.references.get(category, ())), 0
    for batch in read_batches(sources, runtime.preprocess, 8):
        fresh = []
        for item in batch:
            if item.error:
                raise InputError(f"reference of {category!r}: {item.error}")
            if item.sha256 not in seen:
                seen.add(item.sha256)
                fresh.append(item)
        yield fresh
        done += len(batch)
        if progress:
            progress(f"enroll {category}", done, len(sources))


def _take(runtime: Runtime, items: Sequence[Item], learned: Learned) -> FloatArray:
    """Add what images of one shape come to, and return their descriptors ``[B, C]``."""
    preprocess = runtime.preprocess
    groups: list[Sequence[Item]] = [items]
    if preprocess.tiling is not None:
        (item,) = items
        groups = [parts for _, parts in network_inputs(item, preprocess)]
    found = []
    for parts in groups:
        images = np.stack([part.tensor for part in parts if part.tensor is not None])
        outputs = runtime.look_through(images)
        for name in runtime.manifest.grows:
            rows = outputs[NEW + name]  # (B, n, ...)
            learned.rows.setdefault(name, []).append(rows.reshape(-1, *rows.shape[2:]))
        found.append(outputs["descriptor"])
    descriptors: FloatArray = found[0] if preprocess.tiling is None else pooled(found)
    learned.sha256 += [item.sha256 for item in items]
    learned.descriptors.append(descriptors)
    return descriptors


def _warn_of_strangers(
    category: str, items: Sequence[Item], index: CategoryIndex, descriptors: FloatArray
) -> None:
    """Warn of images that hardly show what the category's earlier references show."""
    for item, similar in zip(items, index.compare(descriptors), strict=True):
        if (found := mistaken(category, similar)) is not None:
            _log.warning("%s: looks %s; taken as normal all the same", item.name, found)
