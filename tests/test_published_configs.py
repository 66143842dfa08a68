"""The shipped configurations of published tables load and plan on the papers' data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from anomalyst.benchmark import SHIPPED, shipped
from anomalyst.benchmark.cells import plan
from anomalyst.benchmark.config import UNSEEN
from anomalyst.benchmark.reading import load_benchmark, present
from anomalyst.methods import REGISTRY
from test_layouts import plant

PUBLISHED = (
    "anople-main",
    "anople-paper-ablation",
    "anople-unseen",
    *(f"iipad-table-{number}" for number in (1, 2, 4, 5, 6)),
    "iipad-tables-7-12",
    *(f"inp-former-table-{number}" for number in (2, 3, 4, 5, "s5", "s8")),
    "inp-former-tables-s6-s7",
    "nagl-cross-domain",
    "nagl-medical",
    "nagl-paper-ablation",
    "onenip-main",
    "onenip-paper-ablation",
    "onenip-resolutions",
)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "papers.md"
MVTEC = ("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut")
MVTEC += ("pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper")
VISA = ("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2")
VISA += ("pcb1", "pcb2", "pcb3", "pcb4", "pipe_fryum")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_table_has_its_command_and_its_row_in_the_documentation(name: str) -> None:
    first = (SHIPPED / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# anomalyst benchmark {name} --root DATA -o out/{name}"
    assert f"| `{name}` |" in PAGE.read_text()


def test_no_other_configuration_has_published_figures() -> None:
    found = {name for name in shipped() if "published:" in (SHIPPED / f"{name}.yaml").read_text()}
    assert found <= set(PUBLISHED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The papers' data sets as their publishers lay them out, of empty files."""
    root = tmp_path_factory.mktemp("data")
    for name in MVTEC:
        plant(root / "mvtec" / name, *(f"train/good/{number}.png" for number in range(5)))
        plant(root / "mvtec" / name, "test/good/0.png", "test/bent/0.png", "test/bent/1.png")
        plant(root / "mvtec" / name, *(f"ground_truth/bent/{n}_mask.png" for n in range(2)))
    for name in ("01", "02", "03"):
        plant(root / "btad" / name, *(f"train/ok/{number}.bmp" for number in range(5)))
        plant(root / "btad" / name, "test/ok/0.bmp", "test/ko/0.bmp", "ground_truth/ko/0.png")
    plant_visa(root / "visa")
    plant_realiad(root / "realiad")
    brain = root / "brats" / "brain"
    plant(brain, *(f"train/good/{number}.png" for number in range(5)), "test/good/img/0.png")
    plant(brain, *(f"test/Ungood/{kind}/{n}.png" for kind in ("img", "label") for n in range(2)))
    return root


def plant_visa(root: Path) -> None:
    rows = [["object", "split", "label", "image", "mask"]]
    for name in VISA:
        images, mask = f"{name}/Data/Images", f"{name}/Data/Masks/Anomaly"
        for number in range(5):
            rows.append([name, "train", "normal", f"{images}/Normal/{number}.JPG", ""])
        rows.append([name, "test", "normal", f"{images}/Normal/5.JPG", ""])
        for number in range(2):
            bad = f"{images}/Anomaly/{number}.JPG"
            rows.append([name, "test", "anomaly", bad, f"{mask}/{number}.png"])
    plant(root, "split_csv/1cls.csv", *(path for row in rows[1:] for path in row[3:] if path))
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def plant_realiad(root: Path) -> None:
    for name in ("mint", "toothbrush"):  # the second is one of MVTec AD's names too
        entries = [("OK", f"OK/S{number}/C1.jpg", None) for number in range(6)]
        entries.append(("AK", "NG/AK/S1/C1.jpg", "NG/AK/S1/C1.png"))
        keys = ("anomaly_class", "image_path", "mask_path")
        listed = [dict(zip(keys, entry, strict=True)) for entry in entries]
        content = {
            "meta": {"prefix": f"{name}/", "normal_class": "OK"},
            "train": listed[:5],
            "test": listed[5:],
        }
        plant(root, f"realiad_jsons/realiad_jsons/{name}.json")
        plant(root, *(f"realiad_1024/{name}/{entry[1]}" for entry in entries))
        table = root / "realiad_jsons" / "realiad_jsons" / f"{name}.json"
        table.write_text(json.dumps(content))


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_row_of_ours_stands_beside_a_cell(name: str, data: Path) -> None:
    benchmark = present(load_benchmark(name, root=data))
    for part in benchmark.parts:
        cells = {(cell.method, cell.variant, cell.shots, cell.abnormal) for cell in plan(part)}
        rows = part.published.rows if part.published else ()
        keys = [(row.method, row.variant, row.shots, row.abnormal) for row in rows]
        assert len(set(keys)) == len(keys)
        for key in keys:
            assert key[0] not in REGISTRY or key in cells
        assert not keys or any(key[0].lower().startswith(part.methods[0]) for key in keys)


def test_parts_of_visa_have_its_own_sentences() -> None:
    for name in PUBLISHED:
        for part in load_benchmark(name).parts:
            if "iipad" not in part.methods:
                continue
            options = [part.arguments("iipad", variant)["options"] for variant in part.variants]
            told = "visa" if part.name == "VisA" else "mvtec"
            generic = [v.name for v in part.variants if v.options.get("sentences") == "generic"]
            assert [o["sentences"] for o in options].count("generic") == len(generic)
            assert {o["sentences"] for o in options} - {"generic"} == {told}
            assert {o["qformer"] for o in options} == {"blipdiffusion"}


def test_one_for_all_calls_every_product_the_same() -> None:
    for part, names in zip(load_benchmark("iipad-table-1").parts, (MVTEC, VISA) * 2, strict=True):
        (variant,) = part.variants
        given = part.arguments("winclip", variant)["options"]["names"]
        assert given == dict.fromkeys(names, "object")


def test_what_judges_unseen_categories_is_set_to() -> None:
    unseen = {"winclip": "zero_shot", "anople": "zero_shot", "inp-former": "score"}
    seen = set()
    for name in PUBLISHED:
        for part in load_benchmark(name).parts:
            for method in part.methods if part.setting in UNSEEN else ():
                (variant,) = part.variants
                value = part.arguments(method, variant)["options"][unseen[method]]
                assert value in (True, "prototypes")
                seen.add((part.setting, method))
    assert seen == {
        ("zero-shot", "winclip"),
        ("zero-shot", "inp-former"),
        ("leave-one-out", "anople"),
        ("leave-one-out", "inp-former"),
    }
