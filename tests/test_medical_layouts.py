"""Medical data as BMAD, MVFA and NAGL lay it out, and data converted to the layout of MVTec AD."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomalyst.data.layouts import load_dataset
from anomalyst.types import Sample
from test_layouts import plant, refused
from test_layouts import rows as full_rows


def rows(root: Path, samples: tuple[Sample, ...]) -> list[tuple[object, ...]]:
    """Return path, label, defect and mask of each sample."""
    return [(path, *rest) for path, _, *rest in full_rows(root, samples)]


BRAIN = (
    "train/good/00003_60.png",
    "train/good/00003_61.png",
    "valid/good/img/00025_99.png",
    "valid/good/label/00025_99.png",
    "valid/Ungood/img/00124_60.png",
    "valid/Ungood/label/00124_60.png",
    "test/good/img/00000_96.png",
    "test/good/label/00000_96.png",
    "test/Ungood/img/00002_60.png",
    "test/Ungood/img/00002_68.png",
    "test/Ungood/label/00002_60.png",
)


# ---------------------------------------------------------------- BMAD, form by form


def test_brain(tmp_path: Path) -> None:
    root = plant(tmp_path / "brats", *(f"brain/{name}" for name in BRAIN), "readme.txt")
    data = load_dataset(root)
    assert (data.layout, data.categories) == ("bmad", ("brain",))
    assert rows(root / "brain", data.train) == [
        ("train/good/00003_60.png", 0, "good", None),
        ("train/good/00003_61.png", 0, "good", None),
    ]
    assert rows(root / "brain", data.test) == [
        ("test/Ungood/img/00002_60.png", 1, "Ungood", "test/Ungood/label/00002_60.png"),
        ("test/Ungood/img/00002_68.png", 1, "Ungood", None),
        ("test/good/img/00000_96.png", 0, "good", None),
    ]


def test_one_category_is_taken_by_itself(tmp_path: Path) -> None:
    data = load_dataset(plant(tmp_path / "brain", *BRAIN))
    assert (data.layout, data.categories, len(data.train), len(data.test)) == (
        "bmad",
        ("brain",),
        2,
        3,
    )


def test_training_images_in_a_folder_of_their_own(tmp_path: Path) -> None:
    files = [name.replace("train/good/", "train/good/img/") for name in BRAIN]
    data = load_dataset(plant(tmp_path, *(f"brain/{name}" for name in files)))
    assert [sample.path.parent.name for sample in data.train] == ["img", "img"]
    assert len(data.test) == 3


@pytest.mark.parametrize("bad", ["Ungood", "ungood"])
def test_liver(tmp_path: Path, bad: str) -> None:
    plant(
        tmp_path / "liver",
        "train/good/1.png",
        "valid/img/good/2.png",
        f"valid/img/{bad}/3.png",
        f"valid/label/{bad}/3.png",
        "test/img/good/4.png",
        f"test/img/{bad}/5.png",
        f"test/label/{bad}/5.png",
    )
    data = load_dataset(tmp_path)
    assert (data.layout, len(data.train)) == ("bmad", 1)
    assert sorted(rows(tmp_path / "liver", data.test)) == sorted(
        [
            ("test/img/good/4.png", 0, "good", None),
            (f"test/img/{bad}/5.png", 1, bad, f"test/label/{bad}/5.png"),
        ]
    )


def test_retina(tmp_path: Path) -> None:
    plant(
        tmp_path / "RESC",
        "Train/train/good/1.bmp",
        "Val/val/good/2.bmp",
        "Val/val/Ungood/3.bmp",
        "Val/val_label/Ungood/3.bmp",
        "Test/test/good/4.bmp",
        "Test/test/Ungood/5.bmp",
        "Test/test_label/Ungood/5.png",
    )
    data = load_dataset(tmp_path)
    assert (data.layout, data.categories, len(data.train)) == ("bmad", ("RESC",), 1)
    assert rows(tmp_path / "RESC", data.test) == [
        ("Test/test/Ungood/5.bmp", 1, "Ungood", "Test/test_label/Ungood/5.png"),
        ("Test/test/good/4.bmp", 0, "good", None),
    ]


def test_image_labels_alone_beside_masks(tmp_path: Path) -> None:
    """One root of several categories: none is dropped because it looks like MVTec AD too."""
    plant(tmp_path, *(f"brain/{name}" for name in BRAIN))
    files = ("train/good/1.jpeg", "val/good/2.jpeg", "val/Ungood/3.jpeg", "test/good/4.jpeg")
    plant(tmp_path / "OCT2017", *files, "test/Ungood/5.jpeg")
    data = load_dataset(tmp_path)
    assert (data.layout, data.categories) == ("bmad", ("OCT2017", "brain"))
    assert rows(tmp_path / "OCT2017", data.only(["OCT2017"]).test) == [
        ("test/Ungood/5.jpeg", 1, "Ungood", None),
        ("test/good/4.jpeg", 0, "good", None),
    ]


def test_mvfa_has_no_training_images(tmp_path: Path) -> None:
    plant(
        tmp_path / "Brain_AD",
        "valid/good/img/1.png",
        "valid/Ungood/img/2.png",
        "valid/Ungood/anomaly_mask/2.png",
        "test/good/img/3.png",
        "test/Ungood/img/4.png",
        "test/Ungood/anomaly_mask/4.png",
    )
    data = load_dataset(tmp_path)
    assert rows(tmp_path / "Brain_AD", data.train) == [("valid/good/img/1.png", 0, "good", None)]
    assert rows(tmp_path / "Brain_AD", data.test) == [
        ("test/Ungood/img/4.png", 1, "Ungood", "test/Ungood/anomaly_mask/4.png"),
        ("test/good/img/3.png", 0, "good", None),
    ]
    assert load_dataset(tmp_path / "Brain_AD").categories == ("Brain_AD",)


# ---------------------------------------------------------------- BMAD, what can be wrong


def test_without_any_mask(tmp_path: Path) -> None:
    files = [name for name in BRAIN if "label" not in name]
    data = load_dataset(plant(tmp_path, *(f"brain/{name}" for name in files)))
    assert [sample.mask for sample in data.test] == [None, None, None]
    assert [sample.label for sample in data.test] == [1, 1, 0]


@pytest.mark.parametrize("empty", ["train/good", "test/Ungood/img", "test/good/img"])
def test_an_empty_folder_is_named(tmp_path: Path, empty: str) -> None:
    plant(tmp_path / "brain", *(name for name in BRAIN if not name.startswith(f"{empty}/")))
    (tmp_path / "brain" / empty).mkdir(parents=True, exist_ok=True)
    assert refused(tmp_path).startswith(f"{tmp_path / 'brain' / empty}: no images in this folder")


def test_without_training_images(tmp_path: Path) -> None:
    plant(tmp_path / "brain", "test/good/img/1.png", "test/Ungood/img/2.png")
    message = refused(tmp_path)
    assert "no known layout" in message
    assert "bmad: [CATEGORY/]{train/good, test/{good, Ungood}/{img, label}}" in message
    assert "not in the layout bmad, which is" in refused(tmp_path, layout="bmad")


def test_a_category_of_mvtec_beside_one_of_bmad_needs_a_choice(tmp_path: Path) -> None:
    plant(tmp_path, *(f"brain/{name}" for name in BRAIN))
    plant(tmp_path / "nut", "train/good/1.png", "test/good/2.png", "test/bent/3.png")
    assert "could be mvtec or bmad; choose with --layout NAME" in refused(tmp_path)
    assert load_dataset(tmp_path, layout="bmad").categories == ("brain",)


# ---------------------------------------------------------------- in the layout of MVTec AD


@pytest.mark.parametrize(("bad", "layout"), [("lesion", "mvtec"), ("Ungood", "bmad")])
def test_slices_in_the_layout_of_mvtec(tmp_path: Path, bad: str, layout: str) -> None:
    """As NAGL's authors have BraTS (their type is ``lesion``), and others' conversions of BMAD."""
    plant(
        tmp_path / "brain",
        "train/good/1.png",
        "test/good/2.png",
        f"test/{bad}/3.png",
        f"ground_truth/{bad}/3.png",
    )
    data = load_dataset(tmp_path)
    assert (data.layout, data.categories, len(data.train)) == (layout, ("brain",), 1)
    expected = [
        (f"test/{bad}/3.png", 1, bad, f"ground_truth/{bad}/3.png"),
        ("test/good/2.png", 0, "good", None),
    ]
    assert sorted(rows(tmp_path / "brain", data.test)) == sorted(expected)
    assert set(load_dataset(tmp_path, layout="mvtec").test) == set(data.test)


def test_visa_converted_to_the_layout_of_mvtec(tmp_path: Path) -> None:
    """What VisA's own script writes: images are .JPG, masks .png without ``_mask``."""
    plant(
        tmp_path / "1cls" / "candle",
        "train/good/0000.JPG",
        "test/good/0001.JPG",
        "test/bad/000.JPG",
        "ground_truth/bad/000.png",
    )
    data = load_dataset(tmp_path / "1cls")
    assert (data.layout, data.categories) == ("mvtec", ("candle",))
    assert rows(tmp_path / "1cls" / "candle", data.test) == [
        ("test/bad/000.JPG", 1, "bad", "ground_truth/bad/000.png"),
        ("test/good/0001.JPG", 0, "good", None),
    ]


@pytest.mark.parametrize("held_out", ["valid", "val", "validation"])
def test_images_for_validation_are_no_product(tmp_path: Path, held_out: str) -> None:
    plant(tmp_path / "nut", "train/good/1.png", f"{held_out}/good/2.png", "test/bent/3.png")
    data = load_dataset(tmp_path / "nut")
    assert (data.layout, data.categories, len(data.train)) == ("mvtec", ("nut",), 1)
