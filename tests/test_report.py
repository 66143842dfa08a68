"""The report: self-contained, escaped, and plain about what is not known."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalyst.metrics import ErrorBound, ImageMetrics, PixelMetrics
from anomalyst.report import (
    CategoryReport,
    ReportData,
    ReportImage,
    gallery,
    illustrate,
    thumbnail,
    write_report,
)
from anomalyst.scoring import Calibration, Decision, find_regions
from anomalyst.types import ScoreMap

VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def category(
    images: list[ReportImage], calibration: Calibration | None = None, masks: bool = False
) -> CategoryReport:
    decision = Decision()
    image_metrics, pixel_metrics = ImageMetrics(), PixelMetrics()
    judged = []
    for image in images:
        image_metrics.update(image.score, image.label)
        p_value = calibration.p_value(image.score) if calibration else None
        verdict = None if p_value is None else decision.verdict(p_value)
        judged.append(replace(image, p_value=p_value, verdict=verdict))
    if masks:
        pixel_metrics.update(np.arange(16.0).reshape(4, 4), np.arange(16).reshape(4, 4) > 11)
    return CategoryReport(
        name="bottle",
        images=judged,
        image_result=image_metrics.result(),
        pixel_result=pixel_metrics.result() if masks else None,
        unit=0.5,
        calibration=calibration,
        decision=decision,
    )


def images_of(normal: list[float], **defects: list[float]) -> list[ReportImage]:
    found = [ReportImage(f"good/{i}.png", 0, "good", s) for i, s in enumerate(normal)]
    for name, scores in defects.items():
        found += [ReportImage(f"{name}/{i}.png", 1, name, s) for i, s in enumerate(scores)]
    return found


def hundred() -> Calibration:
    """1 % is above 0.99 and 5 % above 0.95: the scores 0.01, 0.02 … 1 without the last."""
    return Calibration.of([i / 100 for i in range(1, 100)], [i / 100 for i in range(1, 100)])


def written(folder: Path, *categories: CategoryReport, **fields: object) -> Page:
    data = ReportData("A test", categories, {}, {"Command": "anomalyst evaluate"})
    write_report(folder / "report.html", replace(data, **fields))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    image, score_map = np.zeros((60, 80, 3), np.uint8), scores_of(60, 80)
    picture, overlay = illustrate(image, score_map, 0.5, ())
    images = [
        replace(i, picture=picture, overlay=overlay) for i in images_of([0.1, 0.97], crack=[2, 0.5])
    ]
    page = written(tmp_path, category(images, hundred(), masks=True))
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        "http:" not in raw and "https:" not in raw and "//" not in re.sub('base64,[^"]*', "", raw)
    )
    assert "@import" not in raw and "<script" not in raw and not page.all("link")
    assert "default-src 'none'" in raw
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/", "#")), (tag, target)
    for target in re.findall(r"url\(([^)]*)\)", raw):
        assert target.startswith("#")


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    one = category(images_of([0.1, 0.2], crack=[2, 0.5]), hundred(), masks=True)
    page = written(tmp_path, one, replace(one, name="screw"))
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', raw)
    assert {target for group in used for target in group if target} <= set(ids)


def test_the_page_is_sane_for_a_screen_reader(tmp_path: Path) -> None:
    images = [replace(i, picture=b"\xff\xd8", overlay=b"\xff\xd8") for i in images_of([0], a=[2.0])]
    page = written(tmp_path, category(images, hundred()))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("scope") for attributes in page.all("th"))
    assert all("aria-hidden" in attributes for attributes in page.all("svg"))


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>&\"'"
    image = ReportImage(nasty, 1, nasty, 2.0, picture=b"\xff\xd8", overlay=b"\xff\xd8")
    page = written(
        tmp_path,
        replace(category([image], hundred()), name=nasty),
        title=nasty,
        provenance={nasty: nasty},
        notes=[nasty],
    )
    assert not page.all("script")
    assert page.text.count(nasty) >= 8  # title, note, category, defect, path and provenance
    assert any(nasty in (attributes["alt"] or "") for attributes in page.all("img"))


def test_a_file_name_that_is_no_unicode_is_shown_with_a_question_mark(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", errors="surrogateescape")
    assert "caf?.png" in written(tmp_path, category([ReportImage(name, 0, "good", 0.1)])).text


def test_undefined_metrics_are_dashes(tmp_path: Path) -> None:
    page = written(tmp_path, category(images_of([0.1, 0.2, 0.6], crack=[0.5, 0.7]), None))
    # 5 of the 6 pairs are in order; recall 1/2 at precision 1, then 1 at 2/3.
    assert "bottle 3 2 0.833 0.833 0.800" + 4 * " \N{EN DASH}" in page.text
    assert "AUPRO curve" not in page.text and "PRO curve" not in page.text


def test_without_calibration_it_says_so_and_ranks_by_score(tmp_path: Path) -> None:
    page = written(tmp_path, category(images_of([0.1, 0.4, 0.2], crack=[0.9, 0.3]), None))
    assert page.text.count("Not calibrated: no verdicts.") == 2
    assert "p =" not in page.text and "false reject" not in page.text.split("How to read")[0]
    order = [page.text.index(f"{path}.png") for path in ("good/1", "good/2", "good/0")]
    assert order == sorted(order)
    assert page.text.index("crack/1.png") < page.text.index("crack/0.png")
    assert "no region is outlined" in page.text


def test_verdicts_are_counted_and_said_in_plain_words(tmp_path: Path) -> None:
    images = images_of([0.1, 0.5, 0.97, 5.0], crack=[5.0, 6.0, 0.98], dent=[0.2])
    page = written(tmp_path, category(images, hundred()))
    assert (
        "Of 4 normal images, 1 was rejected (false reject) and 1 sent to review: "
        "2 of 4 (50.0 %) flagged." in page.text
    )
    assert (
        "Of 4 anomalous images, 2 were rejected, 1 sent to review and 1 passed as ok (miss): "
        "3 of 4 (75.0 %) caught." in page.text
    )
    assert "Normal 4 2 1 1 false rejects" in page.text
    assert "Anomalous 4 1 misses 1 2" in page.text
    # A crack scores above 11 of 12 pairs' normals or level; a dent above 1 of 4.
    assert "crack 3 2 1 0 0.875" in page.text
    assert "dent 1 0 0 1 0.250" in page.text
    assert "ok missed · dent" in page.text and "ng false reject · normal image" in page.text
    assert "above a score of 0.99" in page.text and "review above 0.95" in page.text


@pytest.mark.parametrize(("held_out", "left"), [(41, "go to review"), (5, "every image is judged")])
def test_too_few_held_out_images_are_said(tmp_path: Path, held_out: int, left: str) -> None:
    scores = np.linspace(0.1, 0.4, held_out).tolist()
    page = written(tmp_path, category(images_of([0.2], a=[3.0]), Calibration.of(scores, scores)))
    assert f"{held_out} held-out normal images cannot support" in page.text
    assert "takes at least 99" in page.text and left in page.text


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (images_of([0.1, 0.2]), "There are no anomalous test images"),
        (images_of([], crack=[0.1, 0.2]), "There are no normal test images"),
        (images_of([0.0, 0.0], crack=[0.0]), "normal (2)"),
        (images_of([7.0, 7.0], crack=[np.nextafter(7.0, 8.0)]), "normal (2)"),
        ([], "No test image could be judged."),
    ],
)
def test_one_class_and_constant_scores_make_a_report(
    tmp_path: Path, images: list[ReportImage], said: str
) -> None:
    same = Calibration.of([7.0] * 19, [7.0] * 19)
    for calibration in (None, same):
        assert said in written(tmp_path, category(images, calibration)).text


def test_an_inexact_histogram_is_said(tmp_path: Path) -> None:
    one = category(images_of([0.1], crack=[0.5]), None, masks=True)
    assert one.pixel_result is not None
    binned = replace(one.pixel_result, exact=False, error_bound=ErrorBound(0.0012, 0, 0, 0.0034))
    assert "come from a histogram" not in written(tmp_path, one).text
    text = written(tmp_path, replace(one, pixel_result=binned)).text
    assert "0.0012 (AUROC)" in text and "0.0034 (AUPRO)" in text


def test_gallery_takes_the_worst_first_then_typical_ones() -> None:
    rng = np.random.default_rng(0)
    images = images_of(
        rng.random(30).tolist(),
        crack=(1 + rng.random(30)).tolist(),
        dent=(2 + rng.random(9)).tolist(),
    )
    shown = gallery(images)
    assert [len(group) for group in shown] == [8, 8, 8]
    assert len({i for group in shown for i in group}) == 24
    by_score = sorted(range(len(images)), key=lambda i: images[i].score)
    normal = [i for i in by_score if images[i].label == 0]
    anomalous = [i for i in by_score if images[i].label == 1]
    assert list(shown.normal) == normal[:-9:-1] and list(shown.anomalous) == anomalous[:8]
    assert [images[i].defect for i in shown.typical] == ["crack", "dent"] * 4
    cracks = [image.score for image in images if image.defect == "crack"]
    first = images[shown.typical[0]].score
    assert abs(first - np.median(cracks)) <= 1.0001 * min(abs(cracks - np.median(cracks)))


def scores_of(height: int, width: int, values: np.ndarray | None = None) -> ScoreMap:
    values = np.zeros((3, 4), np.float32) if values is None else values.astype(np.float32)
    return ScoreMap(values, (height, width), 0.0, (0.0, 0.0, float(height), float(width)))


def test_illustrations_are_small_and_outline_regions_and_small_defects() -> None:
    image = np.full((900, 1200, 3), 90, dtype=np.uint8)
    values = np.zeros((30, 40))
    values[18:22, 28:34] = 5.0
    score_map = scores_of(900, 1200, values)
    mask = np.zeros((900, 1200), dtype=bool)
    mask[101:103, 202:204] = True  # would fall between the pixels of a nearest-neighbour resize
    regions = find_regions(score_map.at(900, 1200), 1.0)
    picture, overlay = illustrate(image, score_map, 1.0, regions, mask)
    small, heat = (np.asarray(Image.open(BytesIO(file))).astype(int) for file in (picture, overlay))
    assert small.shape == heat.shape == (320, 427, 3)
    assert np.ptp(small) <= 4
    changed = np.abs(heat - small).max(axis=2) > 40
    assert changed[30:44, 66:80].any()  # the ground truth's outline
    assert changed[188:238, 294:368].mean() > 0.5  # the region
    assert not changed[:, 380:].any() and not changed[250:].any()


@pytest.mark.parametrize("shape", [(100, 60), (320, 800), (3, 2000), (1, 1)])
def test_thumbnails_never_grow(shape: tuple[int, int]) -> None:
    assert thumbnail(np.zeros((*shape, 3), np.uint8)).shape[:2] == shape


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    good = category(images_of([0.1], crack=[0.5]), None)
    written(tmp_path / "new", good)
    before = (tmp_path / "new" / "report.html").read_bytes()
    with pytest.raises(ValueError, match="unit"):
        written(tmp_path / "new", replace(good, unit=0.0))
    assert (tmp_path / "new" / "report.html").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_same_results_make_the_same_file(tmp_path: Path) -> None:
    one = category(images_of([0.1, 0.3], crack=[0.5, 0.2]), hundred(), masks=True)
    written(tmp_path / "a", one)
    written(tmp_path / "b", one)
    files = [(tmp_path / name / "report.html").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_importing_loads_neither_torch_nor_matplotlib_nor_jinja2() -> None:
    code = (
        "import sys, anomalyst.report, anomalyst.overlay;"
        "print([m for m in ('torch', 'matplotlib', 'jinja2', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_strip_shows_the_image_once_for_each_map_at_its_own_maximum() -> None:
    from io import BytesIO

    from anomalyst.report import attention_strip

    grey = np.full((224, 448, 3), 128, dtype=np.uint8)
    left = np.zeros((4, 8), dtype=np.float32)
    left[:, :2] = 1e-6
    size = (224, 448)
    maps = [
        ScoreMap(values, size, 0.0, (0.0, 0.0, 224.0, 448.0))
        for values in (left, np.zeros((4, 8), dtype=np.float32), 1000 * left[:, ::-1])
    ]
    strip = np.asarray(Image.open(BytesIO(attention_strip(grey, maps)))).astype(int)
    assert strip.shape == (112, 3 * 224 + 2 * 3, 3)
    panels = [strip[:, k * 227 : k * 227 + 224] for k in range(3)]
    coloured = [np.abs(panel - 128).max(axis=2) > 40 for panel in panels]
    assert coloured[0][:, :40].all() and not coloured[0][:, 100:].any()
    assert not coloured[1].any()
    assert coloured[2][:, -40:].all() and not coloured[2][:, :100].any()
