"""Data sets on disk: every layout is recognised by itself, and draws are reproducible."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from anomalyst.data.layouts import Dataset, few_shot, hold_out, load_dataset
from anomalyst.errors import InputError
from anomalyst.types import Sample

REAL = Path("/work/shared/data")
FIRST_DRAW = ["003.png", "029.png", "115.png", "174.png"]


def plant(root: Path, *files: str) -> Path:
    """Create empty files: no layout opens an image."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def rows(root: Path, samples: tuple[Sample, ...]) -> list[tuple[object, ...]]:
    return [
        (
            sample.path.relative_to(root).as_posix(),
            sample.category,
            sample.label,
            sample.defect,
            None if sample.mask is None else sample.mask.relative_to(root).as_posix(),
        )
        for sample in samples
    ]


def refused(root: Path, layout: str | None = None, categories: list[str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset(root, layout=layout, categories=categories)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


MVTEC = (
    "train/good/001.png",
    "train/good/000.png",
    "train/good/.hidden.png",
    "train/good/Thumbs.db",
    "test/good/000.png",
    "test/crack/000.png",
    "test/crack/001.png",
    "test/bent/000.png",
    "test/empty/readme.txt",
    "test_nomask/bent/009.png",
    "ground_truth/crack/000_mask.png",
    "ground_truth/bent/000.png",
    "license.txt",
)


def mvtec(root: Path, *categories: str) -> Path:
    return plant(root, *(f"{category}/{file}" for category in categories for file in MVTEC))


# ---------------------------------------------------------------- MVTec and its kin


def test_mvtec(tmp_path: Path) -> None:
    mvtec(tmp_path, "nut", "bolt")
    plant(tmp_path, "readme.txt", "extras/picture.png")
    data = load_dataset(str(tmp_path))
    assert (data.root, data.layout, data.categories) == (tmp_path, "mvtec", ("bolt", "nut"))
    assert rows(tmp_path, data.train[:2]) == [
        ("bolt/train/good/000.png", "bolt", 0, "good", None),
        ("bolt/train/good/001.png", "bolt", 0, "good", None),
    ]
    assert [sample.category for sample in data.train] == ["bolt", "bolt", "nut", "nut"]
    assert rows(tmp_path, data.test[4:]) == [
        ("nut/test/bent/000.png", "nut", 1, "bent", "nut/ground_truth/bent/000.png"),
        ("nut/test/crack/000.png", "nut", 1, "crack", "nut/ground_truth/crack/000_mask.png"),
        ("nut/test/crack/001.png", "nut", 1, "crack", None),
        ("nut/test/good/000.png", "nut", 0, "good", None),
    ]


def test_mvtec_of_one_category(tmp_path: Path) -> None:
    root = mvtec(tmp_path, "nut") / "nut"
    data = load_dataset(root)
    assert (data.layout, data.categories, len(data.train), len(data.test)) == (
        "mvtec",
        ("nut",),
        2,
        4,
    )


def test_mvtec_without_test_images(tmp_path: Path) -> None:
    data = load_dataset(plant(tmp_path, "nut/train/good/a.png"))
    assert (data.layout, len(data.train), data.test) == ("mvtec", 1, ())


def test_mvtec_masks_of_good_images_do_not_count(tmp_path: Path) -> None:
    mvtec(tmp_path, "nut")
    plant(tmp_path, "nut/ground_truth/good/000_mask.png")
    assert {s.mask for s in load_dataset(tmp_path / "nut").test if s.label == 0} == {None}


def test_chosen_categories_alone_are_read(tmp_path: Path) -> None:
    mvtec(tmp_path, "nut", "bolt", "cap")
    (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
    data = load_dataset(tmp_path, categories=["nut", "bolt"])
    assert data.categories == ("bolt", "nut")
    assert {sample.category for sample in data.train + data.test} == {"bolt", "nut"}
    assert load_dataset(tmp_path, categories="nut").categories == ("nut",)
    assert "did you mean 'bolt'? Known: bolt, cap, empty, nut" in refused(
        tmp_path, categories=["blot"]
    )
    assert "no category chosen" in refused(tmp_path, categories=[])
    assert f"{tmp_path / 'empty' / 'train' / 'good'}: no images" in refused(tmp_path)


def test_only(tmp_path: Path) -> None:
    data = load_dataset(mvtec(tmp_path, "nut", "bolt"))
    assert data.only(["nut"]) == load_dataset(tmp_path, categories=["nut"])
    with pytest.raises(InputError, match="unknown category 'cap'"):
        data.only(["nut", "cap"])


def test_mpdd(tmp_path: Path) -> None:
    data = load_dataset(mvtec(tmp_path, "metal_plate", "tubes"))
    assert (data.layout, data.categories) == ("mpdd", ("metal_plate", "tubes"))
    assert len(data.test) == 8
    assert load_dataset(tmp_path, layout="mvtec").test == data.test
    mvtec(tmp_path, "nut")
    assert load_dataset(tmp_path).layout == "mvtec"


def test_btad(tmp_path: Path) -> None:
    for category, suffix in (("01", "png"), ("03", "bmp")):
        plant(
            tmp_path / category,
            "train/ok/0001.bmp",
            "train/ok/0000.bmp",
            "test/ok/0002.bmp",
            "test/ko/0003.bmp",
            f"ground_truth/ko/0003.{suffix}",
        )
    data = load_dataset(tmp_path)
    assert (data.layout, data.categories, len(data.train)) == ("btad", ("01", "03"), 4)
    assert rows(tmp_path, data.test) == [
        ("01/test/ko/0003.bmp", "01", 1, "ko", "01/ground_truth/ko/0003.png"),
        ("01/test/ok/0002.bmp", "01", 0, "good", None),
        ("03/test/ko/0003.bmp", "03", 1, "ko", "03/ground_truth/ko/0003.bmp"),
        ("03/test/ok/0002.bmp", "03", 0, "good", None),
    ]
    assert load_dataset(tmp_path / "03").categories == ("03",)


# ---------------------------------------------------------------- split files


def visa(root: Path) -> Path:
    table = [["object", "split", "label", "image", "mask"]]
    for name in ("candle", "pcb1"):
        base = f"{name}/Data"
        table += [
            [name, "train", "normal", f"{base}/Images/Normal/0002.JPG", ""],
            [name, "test", "normal", f"{base}/Images/Normal/0001.JPG", ""],
            [name, "train", "normal", f"{base}/Images/Normal/0000.JPG", ""],
            [name, "test", "anomaly", f"{base}/Images/Anomaly/000.JPG", f"{base}/Masks/000.png"],
            [name, "test", "anomaly", f"{base}/Images/Anomaly/001.JPG", f"{base}/Masks/001.png"],
        ]
        plant(root, f"{base}/Masks/000.png")
    plant(root, *(row[3] for row in table[1:]))
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    return root


def test_visa(tmp_path: Path) -> None:
    data = load_dataset(visa(tmp_path))
    assert (data.layout, data.categories) == ("visa", ("candle", "pcb1"))
    base = "candle/Data"
    candle = data.only(["candle"])
    assert rows(tmp_path, candle.train) == [
        (f"{base}/Images/Normal/0000.JPG", "candle", 0, "good", None),
        (f"{base}/Images/Normal/0002.JPG", "candle", 0, "good", None),
    ]
    assert rows(tmp_path, candle.test) == [
        (f"{base}/Images/Anomaly/000.JPG", "candle", 1, "anomaly", f"{base}/Masks/000.png"),
        (f"{base}/Images/Anomaly/001.JPG", "candle", 1, "anomaly", None),
        (f"{base}/Images/Normal/0001.JPG", "candle", 0, "good", None),
    ]


def test_visa_faults(tmp_path: Path) -> None:
    table = visa(tmp_path) / "split_csv" / "1cls.csv"
    text = table.read_text()
    image = tmp_path / "pcb1" / "Data" / "Images" / "Normal" / "0002.JPG"
    image.unlink()
    message = refused(tmp_path)
    assert f"1 of 5 images of 'pcb1' are missing, the first is {image}" in message
    assert load_dataset(tmp_path, categories=["candle"]).categories == ("candle",)
    for damaged in (
        text.replace("normal", "fine"),
        text.replace("train", "fit"),
        text.replace("label", "class"),
        text.replace("object", "thing"),
        text.replace("candle,train,normal,", "candle,train\n"),
        "",
    ):
        table.write_text(damaged)
        assert str(table) in refused(tmp_path, categories=["candle"])
    table.write_bytes(b"\xff\xfe\0\0")
    assert "UnicodeDecodeError" in refused(tmp_path)
    table.unlink()
    assert "No such file" in refused(tmp_path)


def realiad(root: Path, jsons: str = "realiad_jsons", images: str = "realiad_1024") -> Path:
    for name in ("mint", "usb"):
        content = {
            "meta": {"prefix": f"{name}/", "normal_class": "OK"},
            "train": [
                {
                    "category": name,
                    "anomaly_class": "OK",
                    "image_path": f"OK/S{number}/{name}_C1.jpg",
                    "mask_path": None,
                }
                for number in (2, 1)
            ],
            "test": [
                {
                    "category": name,
                    "anomaly_class": code,
                    "image_path": f"NG/{code}/S1/{name}_C1.jpg",
                    "mask_path": f"NG/{code}/S1/{name}_C1.png",
                }
                for code in ("QS", "AK")
            ],
        }
        plant(root, f"{jsons}/{name}.json", f"{images}/{name}/NG/AK/S1/{name}_C1.png")
        (root / jsons / f"{name}.json").write_text(json.dumps(content))
        entries = [*content["train"], *content["test"]]
        plant(root, *(f"{images}/{name}/{entry['image_path']}" for entry in entries))
    return root


@pytest.mark.parametrize("jsons", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
@pytest.mark.parametrize("images", ["realiad_1024", "realiad_256"])
def test_realiad(tmp_path: Path, jsons: str, images: str) -> None:
    data = load_dataset(realiad(tmp_path, jsons, images))
    assert (data.layout, data.categories) == ("realiad", ("mint", "usb"))
    mint = data.only(["mint"])
    assert rows(tmp_path, mint.train) == [
        (f"{images}/mint/OK/S1/mint_C1.jpg", "mint", 0, "good", None),
        (f"{images}/mint/OK/S2/mint_C1.jpg", "mint", 0, "good", None),
    ]
    bad = f"{images}/mint/NG"
    assert rows(tmp_path, mint.test) == [
        (f"{bad}/AK/S1/mint_C1.jpg", "mint", 1, "AK", f"{bad}/AK/S1/mint_C1.png"),
        (f"{bad}/QS/S1/mint_C1.jpg", "mint", 1, "QS", None),
    ]


def test_realiad_prefers_1024_and_reads_what_is_unpacked(tmp_path: Path) -> None:
    realiad(tmp_path, images="realiad_256")
    realiad(tmp_path, images="realiad_1024")
    assert all("realiad_1024" in sample.path.parts for sample in load_dataset(tmp_path).train)
    (tmp_path / "realiad_1024" / "usb").rename(tmp_path / "realiad_256" / "packed")
    assert load_dataset(tmp_path).categories == ("mint",)


def test_realiad_faults(tmp_path: Path) -> None:
    realiad(tmp_path)
    table = tmp_path / "realiad_jsons" / "mint.json"
    content = json.loads(table.read_text())
    for damaged in ("{", "[]", "{}", json.dumps({**content, "meta": {}}), '{"meta": null}'):
        table.write_text(damaged)
        assert str(table) in refused(tmp_path)
    table.write_text(json.dumps({**content, "train": []}))
    assert "no training image of 'mint'" in refused(tmp_path)
    table.write_text(json.dumps(content))
    (tmp_path / "realiad_1024").rename(tmp_path / "elsewhere")
    assert "4 of 4 images of 'mint' are missing" in refused(tmp_path)


# ---------------------------------------------------------------- folders of images


@pytest.mark.parametrize("good", ["good", "ok", "OK", "Normal"])
def test_folder_with_defects(tmp_path: Path, good: str) -> None:
    root = tmp_path / "gear"
    plant(root, *(f"{good}/{number:02}.png" for number in range(12)))
    plant(root, "scratch/0.png", "scratch/1.png", "dent/7.png", "docs/readme.txt")
    plant(root, "masks/0.bmp", "masks/7_mask.png")
    data = load_dataset(root)
    assert (data.layout, data.categories) == ("folder", ("gear",))
    assert [int(s.path.stem) for s in data.train] == [0, 2, 3, 4, 5, 7, 8, 9, 10]
    assert rows(root, data.test) == [
        (f"{good}/01.png", "gear", 0, "good", None),
        (f"{good}/06.png", "gear", 0, "good", None),
        (f"{good}/11.png", "gear", 0, "good", None),
        ("dent/7.png", "gear", 1, "dent", "masks/7_mask.png"),
        ("scratch/0.png", "gear", 1, "scratch", "masks/0.bmp"),
        ("scratch/1.png", "gear", 1, "scratch", None),
    ]


def test_folder_of_good_images_alone(tmp_path: Path) -> None:
    plant(tmp_path / "gear", "good/a.png", "good/b.png", "masks/a.png")
    plant(tmp_path / "cap", "good/c.png", "bad/x.png")
    data = load_dataset(tmp_path)
    assert data.categories == ("cap", "gear")
    assert [s.path.name for s in data.train] == ["c.png", "a.png", "b.png"]
    assert [s.path.name for s in data.test] == ["x.png"]


def test_plain_folder(tmp_path: Path) -> None:
    root = plant(tmp_path / "lid", "b.png", "a.jpg", "notes.txt")
    data = load_dataset(root)
    assert rows(root, data.train) == [
        ("a.jpg", "lid", 0, "good", None),
        ("b.png", "lid", 0, "good", None),
    ]
    assert (data.layout, data.categories, data.test) == ("folder", ("lid",), ())


def test_folder_masks_by_defect(tmp_path: Path) -> None:
    plant(tmp_path, "good/a.png", "dent/0.png", "scratch/0.png", "masks/0.png")
    assert "mask of both" in refused(tmp_path)
    plant(tmp_path, "masks/dent/0.png", "masks/scratch/0_mask.png")
    bad = [s for s in load_dataset(tmp_path).test if s.label]
    assert [s.mask and s.mask.parent.name for s in bad] == ["dent", "scratch"]


def test_folder_with_two_kinds_of_good(tmp_path: Path) -> None:
    plant(tmp_path, "good/a.png", "ok/b.png")
    assert "good and ok both stand for good images" in refused(tmp_path)


# ---------------------------------------------------------------- which layout


def test_no_known_layout_lists_them_all(tmp_path: Path) -> None:
    plant(tmp_path, "cats/a.png", "dogs/b.png")
    message = refused(tmp_path)
    for name in ("mvtec", "mpdd", "btad", "visa", "realiad", "folder"):
        assert f"{name}: " in message
    assert "no known layout" in refused(plant(tmp_path / "mixed", "a.png", "sub/b.png"))


def test_several_layouts_need_a_choice(tmp_path: Path) -> None:
    plant(tmp_path, "nut/train/good/a.png", "01/train/ok/b.png")
    assert "could be mvtec or btad; choose with --layout NAME (layout= in Python)" in refused(
        tmp_path
    )
    assert load_dataset(tmp_path, layout="btad").categories == ("01",)
    assert load_dataset(tmp_path, layout="mvtec").categories == ("nut",)
    assert "not in the layout visa, which is split_csv" in refused(tmp_path, layout="visa")
    assert "did you mean 'mvtec'" in refused(tmp_path, layout="mvtek")


def test_bad_roots(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "gone")
    assert "the folder is empty" in refused(tmp_path)
    assert "is a file" in refused(plant(tmp_path, "a.png") / "a.png")


def test_links_in_circles_end(tmp_path: Path) -> None:
    mvtec(tmp_path, "nut")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "up").symlink_to(tmp_path)
    assert load_dataset(tmp_path).categories == ("nut",)


# ---------------------------------------------------------------- drawing


def normals(category: str, count: int) -> list[Sample]:
    return [Sample(Path(f"{category}/{n:03}.png"), category, 0, "good") for n in range(count)]


def test_few_shot_is_seeded_nested_and_independent() -> None:
    nuts, bolts = normals("nut", 50), normals("bolt", 9)
    bad = [Sample(Path("nut/bad.png"), "nut", 1, "bent"), Sample(Path("nut/what.png"), "nut")]
    alone = few_shot(nuts, 4, seed=3)
    assert len(set(alone)) == 4
    assert list(alone) == sorted(alone, key=lambda sample: sample.path)
    mixed = nuts + bad + bolts + nuts[:5]
    random.Random(0).shuffle(mixed)
    drawn = few_shot(mixed, 4, seed=3)
    assert [sample for sample in drawn if sample.category == "nut"] == list(alone)
    assert [sample.category for sample in drawn] == ["bolt"] * 4 + ["nut"] * 4
    for shots in range(1, 50):
        assert set(few_shot(nuts, shots, 3)) < set(few_shot(nuts, shots + 1, 3))
    moved = [Sample(Path("/elsewhere") / s.path, "nut", 0) for s in nuts]
    assert [s.path.name for s in few_shot(moved, 4, 3)] == [s.path.name for s in alone]


def test_few_shot_draws_evenly() -> None:
    nuts = normals("nut", 10)
    counts = dict.fromkeys(nuts, 0)
    for seed in range(1000):
        for sample in few_shot(nuts, 2, seed):
            counts[sample] += 1
    assert min(counts.values()) > 150  # 200 expected, standard deviation 12.6
    assert max(counts.values()) < 250


def test_few_shot_never_changes() -> None:
    """The published few-shot numbers name their images by seed: this draw is part of them."""
    names = [sample.path.name for sample in few_shot(normals("bottle", 209), 4, seed=0)]
    assert names == FIRST_DRAW


def test_few_shot_faults() -> None:
    with pytest.raises(InputError, match="it has 3: draw fewer"):
        few_shot(normals("nut", 3), 4, 0)
    with pytest.raises(InputError, match="it has 0"):
        few_shot([Sample(Path("bad.png"), "nut", 1)], 1, 0)
    with pytest.raises(InputError, match="0 shots"):
        few_shot(normals("nut", 3), 0, 0)
    with pytest.raises(InputError, match="no samples"):
        few_shot([], 1, 0)


def test_hold_out() -> None:
    nuts, bolts = normals("nut", 11), normals("bolt", 4)
    bad = Sample(Path("zzz.png"), "nut", 1)
    mixed = [*nuts, bad, *bolts]
    random.Random(1).shuffle(mixed)
    kept, held = hold_out(mixed, 0.2)
    assert sorted(s.path.as_posix() for s in held) == ["nut/009.png", "nut/010.png"]
    assert [s for s in mixed if s not in held] == list(kept)
    assert hold_out(mixed, 0) == (tuple(mixed), ())


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(100, 0.29, 29), (3, 0.99, 2), (1, 0.5, 0)]
)
def test_hold_out_counts(count: int, share: float, expected: int) -> None:
    assert len(hold_out(normals("nut", count), share)[1]) == expected


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_hold_out_refuses(share: float) -> None:
    with pytest.raises(InputError, match=r"share .* is not valid"):
        hold_out(normals("nut", 3), share)


# ---------------------------------------------------------------- the real thing


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images under {REAL}")
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mvtec", {"bottle": (209, 20, 63), "screw": (320, 41, 119), "transistor": (213, 60, 40)}),
        (
            "source",
            {
                "commutator": (230, 103, 50),
                "cookie": (31, 14, 32),
                "lens": (48, 27, 97),
                "magnetic_tile": (685, 267, 388),
                "tire": (210, 25, 87),
            },
        ),
    ],
)
def test_real_images(name: str, counts: dict[str, tuple[int, int, int]]) -> None:
    data = load_dataset(REAL / name)
    assert (data.layout, data.categories) == ("mvtec", tuple(counts))

    def count(data: Dataset) -> tuple[int, int, int]:
        labels = [sample.label for sample in data.test]
        return len(data.train), labels.count(0), labels.count(1)

    assert {category: count(data.only([category])) for category in counts} == counts
    assert all((s.mask is not None) == (s.label == 1) for s in data.test)
