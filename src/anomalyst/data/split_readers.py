"""Layouts whose train and test split is written in a file: VisA (CSV) and Real-IAD (JSON)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from anomalyst.data.images import display_name
from anomalyst.data.tree_readers import Split, sub_folders
from anomalyst.errors import InputError
from anomalyst.types import Sample

VISA_SPLIT = Path("split_csv") / "1cls.csv"
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
REALIAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")


def find_visa(root: Path) -> dict[str, Path]:
    """Find the folders with a ``Data/Images/Normal``."""
    return {
        name: root / name
        for name in sub_folders(root)
        if os.path.isdir(root / name / "Data" / "Images" / "Normal")
    }


def read_visa(root: Path, category: str, folder: Path) -> Split:
    """Read the official one-class split, ``split_csv/1cls.csv``.

    Its columns are object, split (train, test), label (normal, anomaly), image and mask, the last
    two relative to the root. VisA tells no kinds of defect apart: they are all ``anomaly``.
    """
    table = root / VISA_SPLIT
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := set(VISA_COLUMNS).difference(reader.fieldnames or ()):
                raise InputError(
                    f"{display_name(table)}: no column {', '.join(sorted(missing))}; "
                    "take the file of the official download"
                )
            rows = [row for row in reader if row["object"] == category]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{display_name(table)}: {error.strerror if isinstance(error, OSError) else error}; "
            "VisA is split by this file of the official download"
        ) from error
    split: Split = ([], [])
    for row in rows:
        defect = "good" if row["label"] == "normal" else "anomaly"
        sample = _sample(root, category, defect, row["image"], row["mask"])
        split[row["split"] != "train"].append(sample)
    return _checked(split, table)
