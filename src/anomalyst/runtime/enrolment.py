"""References of one category into an exported bundle, where the graph says what they add. No torch.

Some methods keep of a reference what the graph computes of it anyway (the patches of AnomalyDINO),
and compare with all of it. For those the graph has outputs ``new_NAME`` beside the score: what an
image would add to the references of that name. Enrolling appends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from anomalyst.enrolment import new_references, require_printable, warn_of_strangers
from anomalyst.errors import InputError
from anomalyst.inference import ImageSource, Item, by_shape, network_inputs
from anomalyst.retrieval import CategoryIndex, pooled
from anomalyst.runtime.engines import NEW
from anomalyst.types import FloatArray, Progress

if TYPE_CHECKING:
    from anomalyst.runtime.judge import Runtime


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
    known, preprocess = runtime.references.get(category, ()), runtime.preprocess
    for items in new_references(preprocess, category, normal, known, (), progress):
        for positions in by_shape(items):
            same = [items[p] for p in positions]
            descriptors = _take(runtime, same, learned)
            names = [item.name for item in same]
            warn_of_strangers(category, names, index.compare(descriptors))
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
    require_printable(category)
    if not normal:
        raise InputError(f"category {category!r}: give at least one normal reference image")


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
