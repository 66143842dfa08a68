"""What a table's columns hold: numbers or names, and which figure is the best of its column."""

from __future__ import annotations

import re

from anomalyst.benchmark.sections import Table
from anomalyst.evaluation import METRICS

# 0.912, 0.912 ± 0.010 [0.901, 0.920], < 0.001, 2 of 3
_NUMBER = re.compile(
    r"(?:< )?(?P<value>[-+\N{MINUS SIGN}]?\d+(?:\.\d+)?)"
    r"(?: ± \d+(?:\.\d+)?)?(?: \[[^\]]*\])?(?: of \d+)?"
)
_NO_NUMBER = ("", "\N{EN DASH}", "not run")
_OF_ROWS = ("method", "variant", "shots", "abnormal", "seeds")
_PAPER = ", paper"


def numeric(table: Table) -> tuple[bool, ...]:
    """Return for each column whether it holds numbers only, or nothing instead of them."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.heads)
    found = []
    for column in columns:
        cells = [cell for cell in column if cell not in _NO_NUMBER]
        found.append(bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells))
    return tuple(found)


def best(table: Table) -> frozenset[tuple[int, int]]:
    """Return (line, column) of the best figure of each metric, higher being better.

    None of a printed figure's column, none where two are equal as far as they are shown, and none
    in a table whose lines are no rivals, such as the defects of one row.
    """
    if not {head.removesuffix(_PAPER) for head in table.heads} <= {*_OF_ROWS, *METRICS}:
        return frozenset()
    found = set()
    for column, head in enumerate(table.heads):
        values = {
            line: float(number["value"].replace("\N{MINUS SIGN}", "-"))
            for line, row in enumerate(table.rows)
            if head in METRICS and (number := _NUMBER.fullmatch(row[column]))
        }
        highest = [line for line, value in values.items() if value == max(values.values())]
        if len(values) > 1 and len(highest) == 1:
            found.add((highest[0], column))
    return frozenset(found)
