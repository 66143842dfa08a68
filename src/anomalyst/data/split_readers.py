"""Layouts whose train and test split is written in a file: VisA (CSV) and Real-IAD (JSON)."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from anomalyst.data.images import display_name, folder_entries, reason
from anomalyst.data.tree_readers import Split, sub_folders
from anomalyst.errors import InputError
from anomalyst.types import Sample

VISA_SPLIT = Path("split_csv") / "1cls.csv"
REALIAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")


def find_visa(root: Path) -> dict[str, Path]:
    """Find the folders with a ``Data/Images/Normal``."""
    return {
        name: root / name
        for name in sub_folders(root)
        if os.path.isdir(root / name / "Data" / "Images" / "Normal")
    }


def read_visa(category: str, _folder: Path, root: Path) -> Split:
    """Read the official one-class split, ``split_csv/1cls.csv``.

    Its columns are object, split (train, test), label (normal, anomaly), image and mask, the last
    two relative to the root. VisA tells no kinds of defect apart: all are ``anomaly``.
    """
    table = root / VISA_SPLIT
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("object") == category]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unusable(table, error) from error
    split: Split = ([], [])
    try:
        for row in rows:
            defect = {"normal": "good", "anomaly": "anomaly"}[row["label"]]
            part = split[("train", "test").index(row["split"])]
            part.append(_sample(root, category, defect, row["image"], row["mask"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _unusable(table, error) from error
    return _checked(split, category, table)


def find_realiad(root: Path) -> dict[str, Path]:
    """Find the JSON files of the categories whose images are there, else of all categories."""
    folder = root / "realiad_jsons"
    if os.path.isdir(folder / "realiad_jsons"):
        folder = folder / "realiad_jsons"
    if not os.path.isdir(folder):
        return {}
    tables = {
        Path(name).stem: folder / name for name in folder_entries(folder) if name.endswith(".json")
    }
    images = _realiad_images(root)
    present = {name: path for name, path in tables.items() if os.path.isdir(images / name)}
    return present or tables


def read_realiad(category: str, table: Path, root: Path) -> Split:
    """Read ``realiad_jsons/CATEGORY.json`` (the multi-view split of the official download).

    ``meta`` holds ``prefix`` and ``normal_class``; the entries of ``train`` and ``test`` hold
    ``anomaly_class`` (``OK`` or a code of two letters), ``image_path`` and ``mask_path`` (null
    for a normal image), both below ``prefix`` in the folder of one resolution: the first there is
    of ``realiad_1024``, ``realiad_512``, ``realiad_256`` and ``realiad_raw``.
    """
    split: Split = ([], [])
    try:
        content = json.loads(table.read_text(encoding="utf-8"))
        images = _realiad_images(root) / content["meta"]["prefix"]
        normal = content["meta"]["normal_class"]
        for part, name in zip(split, ("train", "test"), strict=True):
            for entry in content[name]:
                code = entry["anomaly_class"]
                defect = "good" if code == normal else code
                part.append(
                    _sample(images, category, defect, entry["image_path"], entry["mask_path"])
                )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _unusable(table, error) from error
    return _checked(split, category, table)


def _realiad_images(root: Path) -> Path:
    there = [root / name for name in REALIAD_IMAGES if os.path.isdir(root / name)]
    return there[0] if there else root / REALIAD_IMAGES[0]


def _sample(root: Path, category: str, defect: str, image: str, mask: str | None) -> Sample:
    if defect == "good":
        return Sample(root / image, category, 0, defect)
    there = root / mask if mask and os.path.isfile(root / mask) else None
    return Sample(root / image, category, 1, defect, there)


def _checked(split: Split, category: str, table: Path) -> Split:
    """Return the split sorted by path, once every image that it names is there."""
    paths = [sample.path for part in split for sample in part]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{display_name(table)}: {len(missing)} of {len(paths)} images of {category!r} are "
            f"missing, the first is {display_name(missing[0])}; unpack the download again"
        )
    if not split[0]:
        raise InputError(f"{display_name(table)}: no training image of {category!r} in it")
    train, test = (sorted(part, key=lambda sample: sample.path.parts) for part in split)
    return train, test


def _unusable(table: Path, error: Exception) -> InputError:
    return InputError(
        f"{display_name(table)}: cannot read the split ({type(error).__name__}: {reason(error)}); "
        "take this file from the official download"
    )
