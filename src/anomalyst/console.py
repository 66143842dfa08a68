"""What the command line shows: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from anomalyst.types import Progress


def say(text: str) -> None:
    """Print one line of progress or explanation to stderr."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: object) -> None:
    """Print a result for machines."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a result for people; numbers to three decimals, nothing as a dash."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE, show_edge=False, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console()
    # Off a terminal nothing may be cut: a pipe has no width.
    console.print(table) if console.is_terminal else Console(width=200).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def show_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the per-category table of ``metrics.json`` and its mean."""
    from anomalyst.evaluation import METRICS

    rows = [
        [name, row["n_normal"], row["n_anomalous"], *(row[key] for key in METRICS)]
        for name, row in metrics["categories"].items()
    ]
    if len(rows) > 1:
        rows.append(["mean", "", "", *(metrics["mean"][key] for key in METRICS)])
    show_table(["category", "normal", "anomalous", *METRICS], rows)


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield what to call as work goes on: bars on a terminal, else a line each tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _tell_tenths
        return
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # stdout is where results go: a bar on stderr must leave it alone.
    with Bars(*columns, console=console, redirect_stdout=False) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=done, note=note)

        yield advance


def _tell_tenths(stage: str, done: int, total: int, note: str = "") -> None:
    early = bool(note) and done == 10 and total >= 100  # a tenth of a long training is hours away
    if early or (total >= 20 and done * 10 // total != (done - 1) * 10 // total):
        say(f"{stage} {done}/{total}" + (f", {note}" if note else ""))
