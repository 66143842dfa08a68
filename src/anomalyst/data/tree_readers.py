"""Layouts that are told by their folders: MVTec AD, MPDD, BTAD, BMAD and folders of images.

A layout is a pair of functions: ``find_...`` maps the categories below a root to their folders
(none means that the root has another layout), ``read_...`` returns the (train, test) samples of one
category. What lies beside the folders that a layout names is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from anomalyst.data.images import IMAGE_SUFFIXES, display_name, folder_entries, list_images
from anomalyst.errors import InputError
from anomalyst.types import Sample

Split = tuple[list[Sample], list[Sample]]

MPDD_CATEGORIES = frozenset(
    {"bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"}
)
GOOD_FOLDERS = frozenset({"good", "ok", "normal"})
MASK_FOLDERS = frozenset({"masks", "mask", "ground_truth"})
NO_CATEGORY = MASK_FOLDERS | {"train", "test", "val", "valid", "validation"}
TEST_EVERY = 5


class BmadForm(NamedTuple):
    """Where a category of BMAD has what; ``{}`` stands for ``good`` or ``Ungood``."""

    train: str
    images: str
    masks: str


# Each of BMAD's data sets is laid out in another way; the first form that fits counts.
BMAD_FORMS = (
    BmadForm("train/good", "test/{}/img", "test/{}/label"),  # brain
    BmadForm("train/good", "test/img/{}", "test/label/{}"),  # liver
    BmadForm("Train/train/good", "Test/test/{}", "Test/test_label/{}"),  # retina (RESC)
    BmadForm("train/good", "test/{}", "ground_truth/{}"),  # chest, OCT2017, tissue: no masks
    BmadForm("valid/good/img", "test/{}/img", "test/{}/anomaly_mask"),  # as MVFA hands it on
)
BMAD_BAD = ("Ungood", "ungood")


def find_mvtec(root: Path) -> dict[str, Path]:
    """Find the folders with a ``train/good``, or take the root when it has one itself."""
    return _find_split(root, "good")


def read_mvtec(category: str, folder: Path, _root: Path) -> Split:
    """Read ``train/good``, ``test/DEFECT`` and ``ground_truth/DEFECT/STEM_mask.png``."""
    return _read_split(category, folder, "good")


def find_mpdd(root: Path) -> dict[str, Path]:
    """Find the categories of an MVTec tree when every name is one of MPDD's."""
    found = find_mvtec(root)
    return found if MPDD_CATEGORIES.issuperset(found) else {}


def find_btad(root: Path) -> dict[str, Path]:
    """Find the folders with a ``train/ok``, or take the root when it has one itself."""
    return _find_split(root, "ok")


def read_btad(category: str, folder: Path, _root: Path) -> Split:
    """Read ``train/ok``, ``test/{ok,ko}`` and ``ground_truth/ko/STEM`` (png; bmp in 03)."""
    return _read_split(category, folder, "ok")


def find_bmad(root: Path) -> dict[str, Path]:
    """Find the folders with test images called ``Ungood``, or take the root when it has some."""
    if any(_bmad_forms(root)):
        return {root.resolve().name: root}
    return {name: root / name for name in sub_folders(root) if any(_bmad_forms(root / name))}


def read_bmad(category: str, folder: Path, _root: Path) -> Split:
    """Read the training images, the ``good`` and ``Ungood`` test images, and the latter's masks.

    What BMAD holds out for validation is not read. MVFA's download (Huang et al., CVPR 2024) has no
    training images; its good images for validation are the references, there as here.
    """
    form, bad = next(_bmad_forms(folder))
    training = folder / form.train
    if os.path.isdir(training / "img"):
        training /= "img"
    test: list[Sample] = []
    good = folder / form.images.format("good")
    if os.path.isdir(good):
        test += _samples(list_images(good), category, "good", {})
    masks = _masks_in(folder / form.masks.format(bad))
    test += _samples(list_images(folder / form.images.format(bad)), category, bad, masks)
    test.sort(key=lambda sample: sample.path.parts)
    return _samples(list_images(training), category, "good", {}), test


def _bmad_forms(folder: Path) -> Iterator[tuple[BmadForm, str]]:
    """Yield the forms that a folder has, each with what it calls defective images."""
    for form in BMAD_FORMS:
        for bad in BMAD_BAD:
            if all(os.path.isdir(folder / name) for name in (form.train, form.images.format(bad))):
                yield form, bad


def find_folder(root: Path) -> dict[str, Path]:
    """Find the folders that have a folder of good images, or take the root.

    The root is one category when it has such a folder itself, or holds images and no folder.
    """
    names = sub_folders(root)
    if _good_among(names) or (not names and _has_images(root)):
        return {root.resolve().name: root}
    return {
        name: root / name
        for name in names
        if name.lower() not in NO_CATEGORY and _good_among(sub_folders(root / name))
    }


def read_folder(category: str, folder: Path, _root: Path) -> Split:
    """Read good images, defective ones (one folder a defect) and their masks.

    The 2nd, 7th, 12th ... good image by name is a test image when there are defective ones, and
    all others train; without defective images all train and nothing is tested. Masks lie in
    ``masks/DEFECT`` or, where no two defects share a file name, in ``masks``.
    """
    names = sub_folders(folder)
    if not names:
        return _samples(list_images(folder), category, "good", {}), []
    good_folders = _good_among(names)
    if len(good_folders) > 1:
        raise InputError(
            f"{display_name(folder)}: {' and '.join(good_folders)} both stand for good images; "
            "move these into one folder"
        )
    good = _samples(list_images(folder / good_folders[0]), category, "good", {})
    bad = _read_defects(folder, category, [name for name in names if name not in good_folders])
    if not bad:
        return good, []
    train = [sample for place, sample in enumerate(good) if place % TEST_EVERY != 1]
    return train, good[1::TEST_EVERY] + bad


def sub_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, hidden ones left out."""
    return [name for name in folder_entries(folder) if os.path.isdir(folder / name)]


def _good_among(names: list[str]) -> list[str]:
    return [name for name in names if name.lower() in GOOD_FOLDERS]


def _has_images(folder: Path) -> bool:
    return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in folder_entries(folder))


def _find_split(root: Path, good: str) -> dict[str, Path]:
    if os.path.isdir(root / "train" / good):
        return {root.resolve().name: root}
    return {
        name: root / name
        for name in sub_folders(root)
        if os.path.isdir(root / name / "train" / good)
    }


def _read_split(category: str, folder: Path, good: str) -> Split:
    train = _samples(list_images(folder / "train" / good), category, "good", {})
    test: list[Sample] = []
    if os.path.isdir(folder / "test"):
        for name in sub_folders(folder / "test"):
            images = folder / "test" / name
            if not _has_images(images):
                continue
            defect = "good" if name == good else name
            masks = _masks_in(folder / "ground_truth" / name)
            test += _samples(list_images(images), category, defect, masks)
    return train, test


def _read_defects(folder: Path, category: str, names: list[str]) -> list[Sample]:
    mask_folders = [folder / name for name in names if name.lower() in MASK_FOLDERS]
    found: list[Sample] = []
    for name in names:
        if folder / name in mask_folders or not _has_images(folder / name):
            continue
        masks: dict[str, Path] = {}
        for mask_folder in mask_folders:
            masks |= _masks_in(mask_folder / name) or _masks_in(mask_folder)
        found += _samples(list_images(folder / name), category, name, masks)
    owners: dict[Path, Path] = {}
    for sample in found:
        if sample.mask is None:
            continue
        owner = owners.setdefault(sample.mask, sample.path)
        if owner.parent != sample.path.parent:
            raise InputError(
                f"{display_name(sample.mask)}: mask of both {display_name(owner)} and "
                f"{display_name(sample.path)}; give each defect its own folder of masks"
            )
    return found


def _masks_in(folder: Path) -> dict[str, Path]:
    """Return a folder's images by stem; none where there is no such folder."""
    if not os.path.isdir(folder) or not _has_images(folder):
        return {}
    return {path.stem: path for path in list_images(folder)}


def _samples(
    images: list[Path], category: str, defect: str, masks: Mapping[str, Path]
) -> list[Sample]:
    if defect == "good":
        return [Sample(path, category, 0, defect) for path in images]
    return [
        Sample(path, category, 1, defect, masks.get(f"{path.stem}_mask", masks.get(path.stem)))
        for path in images
    ]
