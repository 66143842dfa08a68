"""Data sets on disk: which layout a folder has, its samples, and how to draw from them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anomalyst.data.images import display_name, folder_entries
from anomalyst.data.split_readers import find_realiad, find_visa, read_realiad, read_visa
from anomalyst.data.tree_readers import (
    Split,
    find_bmad,
    find_btad,
    find_folder,
    find_mpdd,
    find_mvtec,
    read_bmad,
    read_btad,
    read_folder,
    read_mvtec,
)
from anomalyst.errors import InputError, unknown
from anomalyst.types import Sample


@dataclass(frozen=True)
class Layout:
    """One way that data sets are laid out on disk.

    ``find(root)`` maps the categories below a root to where each lies; empty: another layout.
    ``read(category, where, root)`` returns its (train, test) samples. ``tree`` says in few words
    what the layout looks like.
    """

    tree: str
    find: Callable[[Path], dict[str, Path]]
    read: Callable[[str, Path, Path], Split]


LAYOUTS = {
    "mvtec": Layout(
        "[CATEGORY/]{train/good, test/good, test/DEFECT, ground_truth/DEFECT/STEM_mask.png}",
        find_mvtec,
        read_mvtec,
    ),
    "mpdd": Layout(
        "as mvtec, categories bracket_black, connector, metal_plate, ...", find_mpdd, read_mvtec
    ),
    "btad": Layout(
        "[CATEGORY/]{train/ok, test/ok, test/ko, ground_truth/ko/STEM.png}", find_btad, read_btad
    ),
    "visa": Layout(
        "split_csv/1cls.csv, CATEGORY/Data/{Images/Normal, Images/Anomaly, Masks/Anomaly}",
        find_visa,
        read_visa,
    ),
    "realiad": Layout(
        "realiad_jsons/CATEGORY.json, realiad_1024/CATEGORY", find_realiad, read_realiad
    ),
    "bmad": Layout(
        "[CATEGORY/]{train/good, test/{good, Ungood}/{img, label}}", find_bmad, read_bmad
    ),
    "folder": Layout(
        "[CATEGORY/]{good (or ok, normal), DEFECT, masks}, or nothing but good images",
        find_folder,
        read_folder,
    ),
}


_KINDS_OF_MVTEC = ("mpdd", "bmad")  # each is read as what it is, not as mvtec


@dataclass(frozen=True)
class Dataset:
    """The samples of a data set, sorted by category and path; ``train`` is normal as a rule."""

    root: Path
    layout: str
    categories: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def only(self, categories: Sequence[str]) -> Dataset:
        """Return the part that belongs to some of the categories."""
        names = _chosen(categories, self.categories)
        return replace(
            self,
            categories=names,
            train=tuple(sample for sample in self.train if sample.category in names),
            test=tuple(sample for sample in self.test if sample.category in names),
        )


def load_dataset(
    root: str | Path, *, layout: str | None = None, categories: Sequence[str] | None = None
) -> Dataset:
    """List the samples of a data set; no image is opened.

    Parameters
    ----------
    root
        The data set's folder, or that of a single category where the layout allows it.
    layout
        One of ``LAYOUTS``; recognised by the folders when None.
    categories
        Read only these; all when None.

    Raises
    ------
    InputError
        No such folder, no known layout or several, an unknown category, a category without
        training images, or a split file that is damaged or names missing images.
    """
    folder = Path(root).expanduser()
    _require_folder(folder)
    name, found = _recognise(folder) if layout is None else _forced(folder, layout)
    names = tuple(found) if categories is None else _chosen(categories, tuple(found))
    splits = [LAYOUTS[name].read(category, found[category], folder) for category in names]
    return Dataset(
        folder,
        name,
        names,
        train=tuple(sample for train, _ in splits for sample in train),
        test=tuple(sample for _, test in splits for sample in test),
    )


def load_together(
    roots: Sequence[str | Path],
    *,
    layout: str | None = None,
    categories: Sequence[str] | None = None,
) -> Dataset:
    """List the samples of one data set, or of several as if they were one.

    A category that several of them have is named ``DATASET/CATEGORY`` after its folder.

    Raises
    ------
    InputError
        As `load_dataset`; or two data sets' folders have one name and a category in common.
    """
    if not roots:
        raise InputError("no data set: give one folder or more")
    found = [load_dataset(root, layout=layout, categories=categories) for root in roots]
    if len(found) == 1:
        return found[0]
    names = [name for data in found for name in data.categories]
    shared = {name for name in names if names.count(name) > 1}
    renamed: list[Dataset] = []
    for data in found:
        full = {name: f"{data.root.resolve().name}/{name}" for name in data.categories}
        full = {name: full[name] if name in shared else name for name in full}
        if any(name in other.categories for other in renamed for name in full.values()):
            raise InputError(
                f"{display_name(data.root)}: another data set's folder has the same name and "
                f"categories; rename one of the folders"
            )
        renamed.append(_renamed(data, full))
    layouts = {data.layout for data in found}
    return Dataset(
        found[0].root,
        layouts.pop() if len(layouts) == 1 else "several",
        tuple(name for data in renamed for name in data.categories),
        tuple(sample for data in renamed for sample in data.train),
        tuple(sample for data in renamed for sample in data.test),
    )


def few_shot(samples: Sequence[Sample], shots: int, seed: int) -> tuple[Sample, ...]:
    """Draw ``shots`` normal samples of each category, sorted by category and path.

    A category's draw depends on the seed, its name and its own files only, not on the order or on
    other categories, and fewer shots are always among more shots of the same seed.

    Raises
    ------
    InputError
        Not one shot, no samples, or a category with fewer normal samples than ``shots``.
    """
    if shots < 1:
        raise InputError(f"{shots} shots are not valid: draw 1 or more normal images")
    drawn: list[Sample] = []
    for category, normal in _normal_by_category(samples).items():
        if len(normal) < shots:
            raise InputError(
                f"{shots} shots of {category!r} need as many normal images, but it has "
                f"{len(normal)}: draw fewer or add images"
            )
        order = seeded_order(len(normal), seed, category)
        drawn += [normal[place] for place in sorted(order[:shots])]
    if not drawn:
        raise InputError("no samples to draw shots from")
    return tuple(drawn)


def hold_out(
    samples: Sequence[Sample], share: float
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split off the last ``floor(n * share)`` of each category's ``n`` normal samples by path.

    Returns (kept, held out), each in the order given; anomalous samples are always kept.

    Raises
    ------
    InputError
        ``share`` is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise InputError(f"share {share} to hold out is not valid: give 0 or more, under 1")
    held: set[Path] = set()
    for normal in _normal_by_category(samples).values():
        # The slack keeps 0.29 * 100 at 29 although it is 28.999999999999996 in floating point.
        count = math.floor(len(normal) * share + 1e-9)
        held.update(sample.path for sample in normal[len(normal) - count :])
    kept = tuple(sample for sample in samples if sample.path not in held)
    return kept, tuple(sample for sample in samples if sample.path in held)


def _renamed(data: Dataset, names: Mapping[str, str]) -> Dataset:
    """Return the data set with other names for its categories."""
    train, test = (
        tuple(replace(sample, category=names.get(sample.category or "")) for sample in samples)
        for samples in (data.train, data.test)
    )
    return replace(data, categories=tuple(names.values()), train=train, test=test)


def _require_folder(root: Path) -> None:
    name = display_name(root)
    if os.path.isfile(root):
        raise InputError(f"{name}: is a file; give the folder of a data set")
    if not os.path.isdir(root):
        raise InputError(f"{name}: no such folder")
    if not folder_entries(root):
        raise InputError(f"{name}: the folder is empty")


def _recognise(root: Path) -> tuple[str, dict[str, Path]]:
    """Return the one layout that fits, with the categories in it."""
    fits = {name: found for name, layout in LAYOUTS.items() if (found := layout.find(root))}
    for kind in _KINDS_OF_MVTEC:
        if kind in fits and set(fits.get("mvtec", {})) <= set(fits[kind]):
            fits.pop("mvtec", None)
    if len(fits) == 1:
        return fits.popitem()
    if fits:
        raise InputError(
            f"{display_name(root)}: could be {' or '.join(fits)}; "
            "choose with --layout NAME (layout= in Python)"
        )
    trees = "; ".join(f"{name}: {layout.tree}" for name, layout in LAYOUTS.items())
    raise InputError(f"{display_name(root)}: no known layout of a data set. Known are {trees}")


def _forced(root: Path, name: str) -> tuple[str, dict[str, Path]]:
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    found = LAYOUTS[name].find(root)
    if not found:
        raise InputError(
            f"{display_name(root)}: not in the layout {name}, which is {LAYOUTS[name].tree}"
        )
    return name, found


def _chosen(wanted: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the wanted categories in the data set's order."""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in known:
            raise unknown("category", name, known)
    if not names:
        raise InputError(f"no category chosen; known are {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _normal_by_category(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Return each category's normal samples, every path once, sorted by path."""
    normal: dict[str, dict[Path, Sample]] = {sample.category or "": {} for sample in samples}
    for sample in samples:
        if sample.label == 0:
            normal[sample.category or ""][sample.path] = sample
    return {
        category: sorted(normal[category].values(), key=lambda sample: sample.path.parts)
        for category in sorted(normal)
    }


def seeded_order(count: int, seed: int, *names: str) -> list[int]:
    """Return an order of 0 ... count - 1 by seed and names, the same with every numpy."""

    def key(place: int) -> bytes:
        return hashlib.sha256("/".join([str(seed), *names, str(place)]).encode()).digest()

    return sorted(range(count), key=key)
