"""A benchmark's results as a part of a LaTeX document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anomalyst.benchmark.columns import best, numeric
from anomalyst.benchmark.sections import Section, Table

_COMMANDS = {1: "section", 2: "subsection", 3: "subsubsection"}
_CHARACTERS = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "''",
        "`": "{`}",
        "±": r"$\pm$",
        "\N{MULTIPLICATION SIGN}": r"$\times$",
        "\N{MINUS SIGN}": "$-$",
        "\N{EN DASH}": r"\textendash{}",
        "\N{EM DASH}": r"\textemdash{}",
        "\N{LEFT DOUBLE QUOTATION MARK}": r"\textquotedblleft{}",
        "\N{RIGHT DOUBLE QUOTATION MARK}": r"\textquotedblright{}",
    }
)


def latex(sections: Sequence[Section], title: str) -> str:
    r"""Return the sections with their tables, to be read in by ``\input``; plots are left out.

    The best figure of each metric is bold, see `columns.best`.
    """
    parts = [r"% Needs \usepackage{booktabs,adjustbox} and UTF-8."]
    if not any(section.level == 1 for section in sections):
        parts.append(rf"\section{{{escape(title)}}}")
    for section in sections:
        parts.append(rf"\{_COMMANDS[section.level]}{{{escape(section.title)}}}")
        parts += map(escape, section.paragraphs)
        if section.items:
            items = (rf"  \item {escape(item)}" for item in section.items)
            parts.append("\n".join((r"\begin{itemize}", *items, r"\end{itemize}")))
        if section.table:
            parts.append("\n".join(_table(section.table, section.title)))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return a text as LaTeX prints it; line breaks become spaces, what has no print "?"."""
    plain = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    escaped = plain.translate(_CHARACTERS).replace("--", "-{}-")
    if escaped[:1] in (
        "[",
        "*",
    ):  # what follows a line's end in a table would be read as its option
        escaped = f"{{{escaped[0]}}}{escaped[1:]}"
    return escaped


def _table(table: Table, caption: str) -> Iterator[str]:
    """Yield the lines of a table that is scaled down where the page is too small for it."""
    bold = best(table)
    yield r"\begin{table}[htbp]"
    yield rf"\centering\caption{{{escape(caption)}}}"
    yield r"\begin{adjustbox}{max width=\textwidth, max totalheight=0.85\textheight}"
    columns = "".join("r" if is_number else "l" for is_number in numeric(table))
    yield rf"\begin{{tabular}}{{{columns}}}"
    yield r"\toprule"
    yield rf"{' & '.join(map(escape, table.heads))} \\"
    yield r"\midrule"
    for line, row in enumerate(table.rows):
        cells = (
            rf"\textbf{{{escape(cell)}}}" if (line, column) in bold else escape(cell)
            for column, cell in enumerate(row)
        )
        yield rf"{' & '.join(cells)} \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{adjustbox}"
    yield r"\end{table}"
