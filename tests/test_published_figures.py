"""The figures in the shipped configurations are those that the papers print, one by one."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from anomalyst.benchmark.config import BenchmarkConfig, PublishedRow
from anomalyst.benchmark.reading import load_benchmark
from anomalyst.evaluation import METRICS
from conftest import SHARED

pytestmark = pytest.mark.skipif(
    not (SHARED / "papers").is_dir(), reason="no papers beside the project"
)


def text(name: str) -> str:
    """Return a text with nothing of what marks up its tables; a cross is an x in all of them."""
    plain = (SHARED / name).read_text(encoding="utf-8")
    return re.sub(r"</?(?:sup|b|u)>|†|\*\*", "", plain).translate({0xD7: "x"})


def printed(row: PublishedRow) -> list[str]:
    """Return a row's figures in percent with two decimals, ``-`` for none."""
    values = [getattr(row, key) for key in METRICS]
    return ["-" if value is None else f"{Decimal(str(value)).scaleb(2):.2f}" for value in values]


def same(found: list[str], expected: list[str]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a == b or ("-" not in (a, b) and Decimal(a) == Decimal(b)) for a, b in pairs)


def only(row: PublishedRow, *keys: str) -> list[str]:
    """Return the figures of some metrics, once no other has any."""
    figures = dict(zip(METRICS, printed(row), strict=True))
    assert all(value == "-" for key, value in figures.items() if key not in keys)
    return [figures[key] for key in keys]


def rows_of(part: BenchmarkConfig) -> tuple[PublishedRow, ...]:
    assert part.published is not None
    return part.published.rows


def between(paper: str, start: str, end: str) -> list[str]:
    return paper[paper.index(start) : paper.index(end)].splitlines()


@pytest.mark.parametrize(
    ("name", "end"), [("inp-former-table-2", "Table 3."), ("inp-former-table-3", "Figure 3.")]
)
def test_inp_former_with_all_metrics(name: str, end: str) -> None:
    start = f"Table {name[-1]}."
    lines = between(text("papers/inp-former.txt"), start, end)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    table = {re.sub(r" \[\d+\]", "", c[0]).casefold(): c[1:] for c in cells if c[1].count("/") == 2}
    table = {key: value for key, value in table.items() if re.search(r"\d/", value[0])}
    parts = load_benchmark(name).parts
    assert [len(rows_of(part)) for part in parts] == [len(table)] * 3
    for place, part in enumerate(parts):
        for row in rows_of(part):
            image, pixel = table[row.method.casefold()][2 * place : 2 * place + 2]
            assert same(printed(row), [*image.split("/"), *pixel.split("/")])


def test_inp_former_single_class() -> None:
    lines = between(text("papers/inp-former.txt"), "Table 4.", "Table 5.")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    table = {re.sub(r" \[\d+\]", "", c[0]).casefold(): c[1:] for c in cells if "." in c[1]}
    parts = load_benchmark("inp-former-table-4").parts
    assert [len(rows_of(part)) for part in parts] == [len(table)] * 3 == [5] * 3
    for place, part in enumerate(parts):
        for row in rows_of(part):
            expected = table[row.method.casefold()][3 * place : 3 * place + 3]
            assert same(only(row, "i_auroc", "p_ap", "aupro"), expected)


def test_inp_former_ablation() -> None:
    lines = between(text("papers/inp-former.txt"), "Table 5.", "Figure 4.")
    table = [re.findall(r"[\d.]+(?:/[\d.]+)+", line) for line in lines]
    table = [cells for cells in table if cells]
    parts = load_benchmark("inp-former-table-5").parts
    for place, part in enumerate(parts):
        assert [row.variant for row in rows_of(part)] == [v.name for v in part.variants]
        for row, cells in zip(rows_of(part), table, strict=True):
            expected = "/".join(cells[2 * place : 2 * place + 2]).split("/")
            assert same(printed(row), expected)


@pytest.mark.parametrize(
    ("name", "start"),
    [("iipad-table-1", "4.1 EXPERIMENT SETTING"), ("iipad-table-2", "Overall Performance")],
)
def test_iipad_against_others(name: str, start: str) -> None:
    paper = text("papers/iipad.txt")
    methods = "WinCLIP|AnomalyCLIP|SPADE|PatchCore|FastRecon|PromptAD|InCTRL|IIPAD"
    wanted = rf"({methods})\S*((?:\t[\d.-]+){{8}})"
    section = "\n".join(between(paper, start, f"Table {name[-1]}: "))
    table, shots = {}, iter((1, 2, 4))
    count = None
    for method, figures in re.findall(wanted, section):
        count = next(shots) if method == "SPADE" else count
        table[method.casefold(), count] = figures.split()
    seen = set()
    for part in load_benchmark(name).parts:
        place = 4 * (not part.name.startswith("MVTec"))
        for row in rows_of(part):
            key = row.method.removesuffix(" (one for all)").casefold(), row.shots
            expected = table[key][place : place + 4]
            assert same(only(row, "i_auroc", "i_ap", "p_auroc", "aupro"), expected)
            seen.add((*key, place))
    told = {(*key, p) for key, f in table.items() for p in (0, 4) if set(f[p : p + 4]) != {"-"}}
    assert seen == told


@pytest.mark.parametrize("name", ["iipad-table-4", "iipad-table-5", "iipad-table-6"])
def test_iipad_ablations_in_the_order_of_the_paper(name: str) -> None:
    paper = text("papers/iipad.txt")
    section = paper[paper.index(f"Table {name[-1]}: ") :]
    marked = r"(?:\\checkmark|\\times|x)\s+((?:\d\d\.\d\s+){3}\d\d\.\d)"
    mvtec, visa = load_benchmark(name).parts
    figures = [match.split() for match in re.findall(marked, section)][: len(mvtec.variants)]
    for part, place in ((mvtec, 0), (visa, 2)):
        assert [row.variant for row in rows_of(part)] == [v.name for v in part.variants]
        found = [only(row, "i_auroc", "p_auroc") for row in rows_of(part)]
        expected = [four[place : place + 2] for four in figures]
        assert all(same(*pair) for pair in zip(found, expected, strict=True))


# What stands before the four figures of a row in the tables 7 to 12.
MARKS = {
    "the whole method": "✓ ",
    "no abnormal features": "✓ ",  # the paper has the marks of Table 7 the wrong way round
    "no cross-attention": r"\checkmark x \checkmark ",
    "no projection of CLS": r"x \checkmark \checkmark ",
    "no noise": "x ",
    "sentences without defects": "✓ x ",
    "the last layer alone": r"\checkmark x ",
}


def test_iipad_appendix() -> None:
    paper = " ".join(text("papers/iipad.txt").split())
    mvtec, visa = load_benchmark("iipad-tables-7-12").parts
    for one, other in zip(rows_of(mvtec), rows_of(visa), strict=True):
        assert one.variant == other.variant
        figures = [*only(one, "i_auroc", "p_auroc"), *only(other, "i_auroc", "p_auroc")]
        before = MARKS.get(one.variant, f"{one.variant.rpartition(' = ')[2]} ")
        assert before + " ".join(f"{Decimal(figure):.1f}" for figure in figures) in paper


def test_onenip_and_the_appendix_of_inp_former() -> None:
    """Their figures are in our specifications of the methods alone."""
    onenip, inp_former = text("methods/onenip.md"), text("methods/inp_former.md")
    for part in [*load_benchmark("onenip-main").parts, *load_benchmark("onenip-resolutions").parts]:
        for row in rows_of(part):
            keys = ("i_auroc", "i_ap", "p_auroc", "p_ap")
            if row.variant == "decoder fixed":
                assert digits(only(row, "i_auroc", "p_auroc", "p_ap"), 2) in onenip
            else:
                figures = only(row, *keys)
                assert f"{digits(figures[:2], 1)}, {digits(figures[2:], 1)}" in onenip
    (part,) = load_benchmark("onenip-paper-ablation").parts
    for row in rows_of(part):
        assert digits(only(row, "i_auroc", "p_auroc", "i_ap", "p_ap"), 1) in onenip
    for name in ("inp-former-table-s5", "inp-former-tables-s6-s7", "inp-former-table-s8"):
        for part in load_benchmark(name).parts:
            for row in rows_of(part):
                figures = printed(row)
                assert f"{digits(figures[:3], 1)} · {digits(figures[3:], 1)}" in inp_former


def digits(figures: list[str], decimals: int) -> str:
    return "/".join(f"{Decimal(figure):.{decimals}f}" for figure in figures)


def test_nagl() -> None:
    paper = text("papers/nagl-summary.txt")
    names = {"nagl": "Ours", "patchcore": "PatchCore", "winclip": "WinCLIP", "ResAD": "ResAD"}
    for config in ("nagl-cross-domain", "nagl-medical"):
        for part in load_benchmark(config).parts:
            for row in rows_of(part):
                setting = rf"\(N^{row.shots}" + (r"+A^1" if row.abnormal else "") + r"\)"
                (line,) = [
                    line
                    for line in paper.splitlines()
                    if line.startswith(f"| {setting} | {names[row.method]} |")
                    and (line.count("|") == 6) == (config == "nagl-medical")
                ]
                place = 2 * (part.name.startswith("VisA"))
                expected = line.split(" | ")[2 + place : 4 + place]
                assert same(only(row, "i_auroc", "p_auroc"), [e.strip(" |") for e in expected])
    mvtec, visa = load_benchmark("nagl-paper-ablation").parts
    for one, other in zip(rows_of(mvtec), rows_of(visa), strict=True):
        figures = [*only(one, "i_auroc", "p_auroc"), *only(other, "i_auroc", "p_auroc")]
        number = one.variant.split()[0]
        four = " | ".join(f"{Decimal(figure):.1f}" for figure in figures)
        assert re.search(rf"\| {number}: [^|]+ \| {re.escape(four)} \|", paper)


def test_anople() -> None:
    paper = text("papers/anople-summary.txt")
    table = {}
    for line in paper.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6:
            table[cells[0].casefold()] = cells[1:]
    for place, part in enumerate(load_benchmark("anople-main").parts):
        for row in rows_of(part):
            expected = [*table[row.method.casefold()][2 * place : 2 * place + 2], "-"][:2]
            assert same(only(row, "i_auroc", "aupro"), expected)
    mvtec, visa, realiad = (
        {row.variant: digits(only(row, "i_auroc"), 1) for row in rows_of(part)}
        for part in load_benchmark("anople-paper-ablation").parts
    )
    lines = {
        "text prompts alone": "Text prompt only",
        "visual prompts alone": "Visual prompt only",
        "text to image": "T→I unidirectional",
        "full": "T↔I bidirectional",
        "one scale without prefix": "w/o multi-scale / prefix",
    }
    for variant, words in lines.items():
        assert f"| {words} | {mvtec[variant]} | {visa[variant]} |" in paper
    assert f"| w/o alignment loss | {mvtec['no alignment']} |" in paper
    assert f"→{realiad['no alignment']} (Real-IAD)" in paper
    assert [mvtec["full"], visa["full"], realiad["full"]] == table["anople"][::2]
    assert f"I→T ({visa['image to text']}%)" in paper
    scales = (mvtec[name] for name in ("one scale without prefix", "all scales without prefix"))
    assert (
        "single-scale without prefix {}% → multi-scale without prefix {}%".format(*scales) in paper
    )
