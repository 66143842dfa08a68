"""A benchmark's results as one HTML file that needs nothing else: no network, light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

from anomalyst.benchmark.columns import best, numeric
from anomalyst.benchmark.plots import INK, PAPER, RULE
from anomalyst.benchmark.sections import Section, Table
from anomalyst.evaluation import METRICS

_VARIABLES = {PAPER: "var(--paper)", INK: "var(--ink)", RULE: "var(--rule)"}
_SMALLEST = 0.72  # of a plot's own size; on a narrower screen it scrolls, so that it can be read


@dataclass(frozen=True)
class _Cell:
    """``detail`` stands in a line of its own: a figure's interval, or whose figures they are."""

    text: str
    detail: str
    is_number: bool
    is_best: bool = False


@dataclass
class _View:
    """A section as the template needs it, with the folded ones below it."""

    anchor: str
    source: Section
    heads: tuple[_Cell, ...]
    lines: tuple[tuple[_Cell, ...], ...]
    figures: tuple[tuple[str, str], ...]
    folded: list[_View] = field(default_factory=list)


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the sections as an HTML page; those of level 3 are folded.

    It names ``results.csv``, ``results.parquet`` and ``results.tex``, which lie beside it.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("anomalyst.benchmark").joinpath("page.html")
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        title=title,
        chapters=_chapters(sections),
        explained=any(set(METRICS) & set(s.table.heads) for s in sections if s.table),
    )
    # Folder names that are no valid Unicode must not cost the whole page.
    return text.encode(errors="replace").decode()


def _chapters(sections: Sequence[Section]) -> list[_View]:
    """Return the sections, those of level 3 below the one that they follow."""
    chapters: list[_View] = []
    for number, section in enumerate(sections, 1):
        view = _view(section, f"s{number}")
        (chapters[-1].folded if section.level > 2 and chapters else chapters).append(view)
    return chapters


def _view(section: Section, anchor: str) -> _View:
    table = section.table or Table((), ())
    is_number = numeric(table)
    figures = tuple(
        (_inline(figure.svg, f"{anchor}-{number}-"), figure.caption)
        for number, figure in enumerate(section.figures, 1)
    )
    heads = tuple(
        _Cell(*_parted(head, ", ", number), number)
        for head, number in zip(table.heads, is_number, strict=True)
    )
    return _View(anchor, section, heads, _lines(table, is_number), figures)


def _lines(table: Table, is_number: Sequence[bool]) -> tuple[tuple[_Cell, ...], ...]:
    bold = best(table)
    return tuple(
        tuple(
            _Cell(*_parted(cell, " [", number), number, (line, column) in bold)
            for column, (cell, number) in enumerate(zip(row, is_number, strict=True))
        )
        for line, row in enumerate(table.rows)
    )


def _parted(text: str, before: str, is_number: bool) -> tuple[str, str]:
    """Return a numeric column's text in two parts, the second from ``before`` on."""
    first, mark, rest = text.partition(before) if is_number else (text, "", "")
    return first, mark.strip(" ,") + rest


def _inline(svg: str, prefix: str) -> str:
    """Return an SVG document of `plots` as an element of the page: own ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows the namespaces
    # Its style sheet would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    width = re.search(r'width="([\d.]+)pt"', svg)
    least = f"{_SMALLEST * float(width[1]):.0f}pt" if width else "0"
    return svg.replace("<svg ", f'<svg aria-hidden="true" style="min-width: {least}" ', 1)
