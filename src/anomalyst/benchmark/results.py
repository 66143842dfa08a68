"""The files of a benchmark's results, whole at every moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomalyst.benchmark.cells import Outcome
from anomalyst.benchmark.config import Benchmark
from anomalyst.benchmark.latex import latex
from anomalyst.benchmark.page import page
from anomalyst.benchmark.records import as_csv, as_parquet
from anomalyst.benchmark.rows import rows_of
from anomalyst.benchmark.sections import Section, Table
from anomalyst.benchmark.tables import sections_of
from anomalyst.files import replace_file


def write_tables(benchmark: Benchmark, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write ``results.csv`` and ``results.md``: quick enough for after every model."""
    replace_file(folder / "results.csv", as_csv(rows_of(outcomes)))
    text = markdown(benchmark.title, sections_of(benchmark, outcomes))
    replace_file(folder / "results.md", text.encode(errors="replace"))


def write_page(benchmark: Benchmark, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write ``results.html`` with plots, ``results.tex`` and ``results.parquet``."""
    sections = sections_of(benchmark, outcomes, plots=True)
    replace_file(folder / "results.html", page(benchmark.title, sections).encode())
    replace_file(folder / "results.tex", latex(sections, benchmark.title).encode(errors="replace"))
    replace_file(folder / "results.parquet", as_parquet(rows_of(outcomes)))


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the sections as Markdown."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"{'#' * section.level} {section.title}", *section.paragraphs]
        if section.items:
            parts.append("\n".join(f"- {item}" for item in section.items))
        if section.table:
            parts.append(_table(section.table))
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    lines = (table.heads, ["---"] * len(table.heads), *table.rows)
    return "\n".join(map(_line, lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
