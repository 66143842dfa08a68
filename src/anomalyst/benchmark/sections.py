"""What a benchmark's results say, before it is written down as Markdown, LaTeX or a page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells of text: every row has as many as there are heads, the first ones are names."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A plot as an SVG text, and what it shows in words."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the results: paragraphs, then lines of a list, a table, and plots, each optional.

    ``level`` is 1 for the benchmark itself, 2 for a part of it, 3 below that.
    """

    title: str
    level: int = 2
    paragraphs: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    table: Table | None = None
    figures: tuple[Figure, ...] = ()
