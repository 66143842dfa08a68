"""A benchmark's results as plots, LaTeX and a page: complete, escaped, and the same each time."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from anomalyst.benchmark import plots
from anomalyst.benchmark.columns import best, numeric
from anomalyst.benchmark.comparison import Ranking
from anomalyst.benchmark.latex import escape, latex
from anomalyst.benchmark.page import page
from anomalyst.benchmark.sections import Figure, Section, Table
from test_report import Page

LONG = "onenip, a variant with $8$ turns, <b>bold</b> & a name_that goes on for two lines, 4 shots"
LABELS = [f"{LONG} {i}" for i in range(12)]
TABLE = Table(
    ("method", "variant", "shots", "seeds", "i_auroc", "i_auroc, paper", "aupro", "p_ap"),
    (
        ("a|b", "50 % & more", "1", "3", "0.912 ± 0.010 [0.901, 0.920]", "0.99", "0.9", "–"),  # noqa: RUF001
        (
            "winclip",
            "default",
            "all",
            "2 of 3",
            "0.931 ± 0.002 [0.930, 0.932]",
            "0.98",
            "0.9",
            "not run",
        ),
    ),
)
DEFECTS = Table(("method", "defect", "i_auroc"), (("a", "crack", "0.9"), ("a", "hole", "0.8")))


def ranking(labels: list[str], width: float = 1.5) -> Ranking:
    ranks = {label: 1.0 + number for number, label in enumerate(labels)}
    return Ranking(ranks, 15, 0.001, width, tuple(pairwise(labels)))


def curve(labels: list[str]) -> str:
    points = {1: (0.9, 0.88, 0.91), 2: (0.93, 0.92, 0.94), 4: (1.0, 1.0, 1.0)}
    return plots.shots_curve(dict.fromkeys(labels, points), "image-level AUROC")


def cloud(labels: list[str]) -> str:
    points = {label: (0.01 * (i + 1), 0.9 + 0.005 * i) for i, label in enumerate(labels)}
    return plots.scatter(points, "seconds per image", "image-level AUROC")


def diagram(labels: list[str]) -> str:
    return plots.critical_difference(ranking(labels))


ALL = pytest.mark.parametrize("draw", [diagram, curve, cloud], ids=lambda draw: draw.__name__)


def texts_of(svg: str) -> list[tuple[str, float, float, str]]:
    """Every text of an SVG document: its words, x, y and which end of it x is."""
    found = []
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        place = element.get("transform") or ""
        moved = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", place)
        at = moved.groups() if moved else (element.get("x"), element.get("y"))
        style = element.get("style") or ""
        anchor = re.search(r"text-anchor: (\w+)", style)
        turned = "rotate(-90" in place
        end = "turned" if turned else (anchor[1] if anchor else "start")
        found.append(("".join(element.itertext()), float(at[0] or 0), float(at[1] or 0), end))
    return found


# ---- plots --------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("count", [3, 5, 12])
def test_every_label_is_whole_and_inside_the_plot(draw, count: int) -> None:
    labels = LABELS[:count]
    svg = draw(labels)
    words = " ".join(text for text, *_ in texts_of(svg))
    assert all(label in words for label in labels)  # formulas and tags as they are
    width, height = map(float, re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    for text, x, y, end in texts_of(svg):
        font = FontProperties(family="DejaVu Sans", size=plots._TEXT)
        long = TextToPath().get_text_width_height_descent(text, font, False)[0]
        start = {"start": 0.0, "middle": -long / 2, "end": -long}.get(end)
        if start is None:  # the turned label of an axis
            assert plots._TEXT < x < width and long < y < height, text
        else:
            assert x + start > 0 and x + start + long < width, text
            assert plots._TEXT < y < height - 1, text


@ALL
def test_no_two_labels_stand_on_one_line(draw) -> None:
    own = [(y, text) for text, _, y, _ in texts_of(draw(LABELS)) if text in " ".join(LABELS)]
    heights = sorted(y for y, text in own if len(text) > 8)
    gaps = [after - before for before, after in pairwise(heights)]
    assert len(gaps) >= 12 and min(gaps) > plots._TEXT


@ALL
def test_the_same_data_gives_the_same_text_without_a_date(draw) -> None:
    svg = draw(LABELS[:3])
    assert svg == draw(LABELS[:3]) and svg != draw([*LABELS[:2], "another"])
    assert "date" not in svg and "metadata" not in svg
    assert f"fill: {plots.PAPER}" in svg and plots.INK in svg  # dark on a ground of its own


def test_marks_differ() -> None:
    marks = [plots._mark(index) for index in range(56)]
    assert len({(mark["color"], mark["marker"]) for mark in marks}) == 56


@pytest.mark.parametrize("ground", ["#ffffff", "#15181c"])
def test_colours_stand_out_on_both_grounds_of_the_page(ground: str) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in plots._COLOURS:
        dark, light = sorted((luminance(colour), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) > 3.7


def test_no_tick_above_one_and_none_twice() -> None:
    same = plots.scatter({"a": (1000.0, 1.0), "b": (1000.0, 1.0)}, "MB", "image-level AUROC")
    for svg in (same, curve(["a"]), cloud(["a", "b"])):
        numbers = [text for text, *_ in texts_of(svg) if re.fullmatch(r"\d\.\d+", text)]
        assert numbers and max(map(float, numbers)) <= 1
    wide = plots.scatter({"a": (0.02, 0.9), "b": (1.1, 0.8)}, "s", "image-level AUROC")
    ticks = [
        text for text, _, y, _ in texts_of(wide) if text in ("0.02", "0.05", "0.1", "0.5", "1")
    ]
    assert ticks == ["0.02", "0.05", "0.1", "0.5", "1"]


def test_wide_characters_get_more_room() -> None:
    def width(label: str) -> float:
        return float(re.findall(r'width="([\d.]+)pt"', diagram(["a", "b", label]))[0])

    assert plots._wrapped("変種" * 12, 30) == ["変種" * 7 + "変", "種" + "変種" * 4]
    # Fifteen of them fill a line: an em each, whatever matplotlib's own font has of them.
    assert width("変" * 15) - width("a") > 15 * 0.9 * plots._TEXT


# ---- columns ------------------------------------------------------------------------------------


def test_columns_of_numbers() -> None:
    assert numeric(TABLE) == (False, False, False, True, True, True, True, False)
    signed = (("\N{MINUS SIGN}0.01", "< 0.001"), ("+0.02", "–"))  # noqa: RUF001
    assert numeric(Table(("x", "p"), signed)) == (True, True)
    assert numeric(Table(("x", "y"), (("8 turns", "1e"),))) == (False, False)
    assert numeric(Table(("x",), ())) == (False,)


def test_best_is_one_alone_among_rivals() -> None:
    assert best(TABLE) == {(1, 4)}  # aupro is a tie, p_ap has none, printed figures are not ours
    assert best(DEFECTS) == frozenset()
    assert best(Table(("method", "i_ap"), (("a", "0.9"),))) == frozenset()
    assert best(Table(("method", "p"), (("a", "0.9"), ("b", "0.1")))) == frozenset()


# ---- LaTeX --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a\b", r"a\textbackslash{}b"),
        ("100 % & $5 #1 i_ap {x}", r"100 \% \& \$5 \#1 i\_ap \{x\}"),
        ("~^<>|", r"\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"),
        ("0.9 ± 0.1", r"0.9 $\pm$ 0.1"),
        ("\N{MINUS SIGN}1 – “x”", r"$-$1 \textendash{} \textquotedblleft{}x\textquotedblright{}"),  # noqa: RUF001
        ("--steps a-b", r"-{}-steps a-b"),
        ("[0.9, 1]", "{[}0.9, 1]"),
        ("*", "{*}"),
        ("a\nb\tc", "a b c"),
        ("a\udce9\0", "a??"),
        ("変種é", "変種é"),
    ],
)
def test_latex_escapes(text: str, expected: str) -> None:
    assert escape(text) == expected


def test_latex_tables() -> None:
    sections = [
        Section("MVTec & co", 2, ("Ours: 50 %.",), ("seeds: 0",), TABLE),
        Section("crack", 3, table=DEFECTS),
    ]
    text = latex(sections, "A_B")
    lines = text.splitlines()
    assert lines[0].startswith("% Needs") and r"\section{A\_B}" in lines
    assert r"\subsection{MVTec \& co}" in lines and r"\subsubsection{crack}" in lines
    assert r"Ours: 50 \%." in lines and r"  \item seeds: 0" in lines
    assert r"\begin{tabular}{lllrrrrl}" in lines and r"\begin{tabular}{llr}" in lines
    expected = (
        r"winclip & default & all & 2 of 3 & \textbf{0.931 $\pm$ 0.002 [0.930, 0.932]} & 0.98 "
        r"& 0.9 & not run \\"
    )
    assert expected in lines and text.count(r"\textbf") == 1
    for name in ("table", "tabular", "adjustbox", "itemize"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") > 0
    assert r"\section{A\_B}" not in latex([Section("Own title", 1)], "A_B")


# ---- page ---------------------------------------------------------------------------------------


def sections(*, title: str = "Part <1>") -> list[Section]:
    figures = (Figure("one", curve([LONG]), "One & all."), Figure("two", curve([LONG]), "Again."))
    return [
        Section(title, 2, ("A <p> first.",), ("seeds: 0",), TABLE, figures),
        Section("bottle", 3, table=DEFECTS),
        Section("cable", 3, ("Nothing.",)),
        Section("Not run", 2, items=("x, seed 1: error: <no room>",)),
    ]


def test_page_is_escaped_whole_and_alone() -> None:
    text = page("Title & <script>", sections())
    found = Page(text)  # fails on tags that do not close
    assert found.text.startswith("Title & <script>") and "<script" not in text
    for words in ("Part <1>", "A <p> first.", "x, seed 1: error: <no room>", "One & all."):
        assert words in found.text
    assert len(found.all("svg")) == 2 and all(s["aria-hidden"] == "true" for s in found.all("svg"))
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|\bsrc=", text)
    assert {a["href"] for a in found.all("a") if not (a["href"] or "").startswith("#")} == {
        "results.csv",
        "results.parquet",
        "results.tex",
    }
    assert page("Title & <script>", sections()) == text
    assert "prefers-color-scheme: dark" in text and len(found.all("style")) == 1


def test_every_link_and_reference_of_a_page_has_one_target() -> None:
    text = page("Title", sections())
    found = Page(text)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in found.all("a") if (a["href"] or "").startswith("#")]  # type: ignore[index]
    assert len(links) == 5 and set(links) <= set(ids)
    used = re.findall(r'(?:xlink:href="|url\()#([^")]+)', text)
    assert used and set(used) <= set(ids)


def test_a_page_folds_level_three_and_marks_the_best() -> None:
    text = page("Title", sections(title="Title"))
    found = Page(text)
    assert re.findall(r"<summary>(.*?)</summary>", text) == ["bottle", "cable"]
    assert len(found.all("details")) == 2 and not any("open" in d for d in found.all("details"))
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Not run", "How to read the figures"]
    assert re.findall(r'class="number best">([^<]*)<small>(.*?)</small>', text) == [
        ("0.931 ± 0.002", "[0.930, 0.932]")
    ]
    assert '<th scope="col" class="number">i_auroc<small>paper</small></th>' in text
    assert '<th scope="row">winclip</th><td>default</td><td>all</td>' in text


def test_a_page_takes_the_colours_of_its_theme() -> None:
    text = page("Title", sections())
    body = text[text.index("<body>") :]
    assert plots.INK not in body and plots.PAPER not in body and "fill: var(--paper)" in body
    assert "<style" not in body and "DejaVu" not in body


def test_a_page_of_nothing_and_of_bad_names() -> None:
    empty = Page(page("Title", []))
    assert empty.text.startswith("Title") and not empty.all("section")
    lonely = page("Title", [Section("a\udce9", 3, table=Table(("method",), (("b\udce9",),)))])
    assert "a?" in lonely and "b?" in lonely and "How to read" not in lonely
    lonely.encode()
