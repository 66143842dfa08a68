"""``results.csv`` and ``results.parquet``: every figure on a line of its own, for other tools."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anomalyst.benchmark.rows import Row
from anomalyst.evaluation import METRICS

NOT_RUN = "not run"
COLUMNS = (
    "part",
    "method",
    "variant",
    "setting",
    "shots",
    "abnormal",
    "seed",
    "category",
    "defect",
    "metric",
    "value",
    "status",
    "n_normal",
    "n_anomalous",
    "backbone",
    "weights_sha256",
    "image_size",
    "eval_size",
    "cell",
)
_SETTINGS = ("backbone", "weights_sha256", "image_size", "eval_size")
_COSTS = ("images_per_second", "peak_rss_mb")


def records(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield every figure as a mapping of `COLUMNS`.

    A line is of one metric of one cell and one ``category``; ``mean`` stands for the mean over the
    categories of a seed. ``defect`` names a type of defect where the line is of that type alone. A
    cell that was not run has one line, without metric and value.
    """
    for row in rows:
        for seed in row.seeds:
            for line in _of_seed(row, seed):
                yield dict.fromkeys(COLUMNS) | line


def _of_seed(row: Row, seed: int) -> Iterator[dict[str, Any]]:
    outcomes = row.seeds[seed]
    start: dict[str, Any] = {"part": row.part or None, "method": row.method, "seed": seed}
    start |= {"variant": row.variant, "shots": row.shots, "abnormal": row.abnormal}
    start |= {"setting": outcomes[0].cell.setting}
    for outcome in outcomes:
        of_cell = start | {"cell": outcome.cell.name}
        if outcome.metrics is None:
            yield of_cell | {"category": outcome.cell.category, "status": NOT_RUN}
            continue
        of_cell |= {"status": "done", **{key: outcome.metrics[key] for key in _SETTINGS}}
        for key in _COSTS:
            cost = {"category": outcome.cell.category, "metric": key}
            yield of_cell | cost | {"value": outcome.metrics.get(key)}
        defects = outcome.metrics.get("defects", {})
        for name, figures in outcome.metrics["categories"].items():
            yield from _lines(of_cell | {"category": name}, figures)
            for defect, found in defects.get(name, {}).items():
                yield from _lines(of_cell | {"category": name, "defect": defect}, found)
    mean = row.figures().get(seed)
    if mean is not None:
        yield from _lines(start | {"category": "mean", "status": "done"}, mean)


def _lines(start: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    counts = {key: figures[key] for key in ("n_normal", "n_anomalous")}
    for metric in METRICS:
        yield {**start, **counts, "metric": metric, "value": figures[metric]}


def as_csv(rows: Sequence[Row]) -> bytes:
    """Return the records as CSV; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(rows))
    return text.getvalue().encode(errors="replace")


def as_parquet(rows: Sequence[Row]) -> bytes:
    """Return the records as Parquet, with types of their own; what is not known is null."""
    import pyarrow
    import pyarrow.parquet

    whole = ("shots", "abnormal", "seed")
    number = ("value", "n_normal", "n_anomalous")  # means of counts are no whole numbers
    kinds = {key: pyarrow.int64() for key in whole} | {key: pyarrow.float64() for key in number}
    schema = pyarrow.schema([(key, kinds.get(key, pyarrow.string())) for key in COLUMNS])
    lines = [
        {key: value if value is None or key in kinds else str(value) for key, value in line.items()}
        for line in records(rows)
    ]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines, schema=schema), buffer)
    return buffer.getvalue()
