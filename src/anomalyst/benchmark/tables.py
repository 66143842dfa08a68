"""Outcomes to tables: ``results.csv`` with every figure, ``results.md`` with means over seeds."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anomalyst.benchmark.cells import Outcome
from anomalyst.benchmark.config import BenchmarkConfig
from anomalyst.benchmark.generalist import PARTS
from anomalyst.evaluation import METRICS, mean_metrics
from anomalyst.files import replace_file
from anomalyst.training_setup import FULL

NOT_RUN = "not run"
_APART = (
    "same: defects of a type among the abnormal references', other: of other types, each with all "
    "normal images and averaged over the categories that have such defects; none: all defects, "
    "judged without abnormal references."
)
_SETTINGS = ("backbone", "weights_sha256", "image_size", "eval_size")
_COUNTS = ("n_normal", "n_anomalous")
_CSV = ("method", "variant", "setting", "shots", "abnormal", "seed", "category", "status")


@dataclass(frozen=True)
class Row:
    """A table's row: the outcomes of one method, variant and number of references, by seed."""

    method: str
    variant: str
    shots: int | None
    abnormal: int | None
    seeds: Mapping[int, Sequence[Outcome]]

    @property
    def categories(self) -> list[str]:
        """The categories that any of its cells has figures of."""
        found = [name for outcomes in self.seeds.values() for name in _categories(outcomes)]
        return list(dict.fromkeys(found))

    def figures(self, category: str | None = None) -> dict[int, dict[str, Any]]:
        """Return each seed's figures of a category, or their mean over all; no seed that failed."""
        found: dict[int, dict[str, Any]] = {}
        for seed, outcomes in self.seeds.items():
            rows = _categories(outcomes)
            if category is not None and category in rows:
                found[seed] = rows[category]
            elif category is None and all(outcome.metrics for outcome in outcomes):
                found[seed] = mean_metrics(list(rows.values()))
        return found

    def summary(self, category: str | None = None) -> dict[str, Any]:
        """Return mean, deviation and interval of each metric over the seeds."""
        figures = self.figures(category)
        return {
            "method": self.method,
            "variant": self.variant,
            "shots": self.shots,
            "abnormal": self.abnormal,
            "seeds": list(figures),
            "seeds_not_run": [seed for seed in self.seeds if seed not in figures],
            "metrics": _spreads(list(figures.values())),
        }

    def texts(self, category: str | None = None) -> list[str]:
        """Return the cells of the row in `columns`."""
        found = self.summary(category)
        done, total = len(found["seeds"]), len(self.seeds)
        seeds = str(total) if done in (0, total) else f"{done} of {total}"
        figures = [_text(value) if done else NOT_RUN for value in found["metrics"].values()]
        return [*self.names, seeds, *figures]

    @property
    def names(self) -> list[str]:
        """The cells of the row that say what it is about."""
        shots = "all" if self.shots is None else str(self.shots)
        abnormal = [] if self.abnormal is None else [str(self.abnormal)]
        return [self.method, self.variant, shots, *abnormal]

    @property
    def by_reference(self) -> dict[str, list[dict[str, Any]]]:
        """Each seed's figures on known types of defects and on others, where they were told apart.

        One list for each of `PARTS`; no seed that failed.
        """
        metrics = [o.metrics or {} for outcomes in self.seeds.values() for o in outcomes]
        found = [each["by_reference"] for each in metrics if "by_reference" in each]
        return {part: [figures[part] for figures in found] for part in PARTS} if found else {}


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the rows of the table, in the order of the cells."""
    groups: dict[tuple[str, str, int | None, int | None], dict[int, list[Outcome]]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        seeds = groups.setdefault((cell.method, cell.variant, cell.shots, cell.abnormal), {})
        seeds.setdefault(cell.seed, []).append(outcome)
    return [Row(*key, seeds) for key, seeds in groups.items()]


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the heads of the table's columns."""
    return [*_heads(rows), "seeds", *METRICS]


def _heads(rows: Sequence[Row]) -> list[str]:
    abnormal = any(row.abnormal is not None for row in rows)
    return ["method", "variant", "shots", *["abnormal"] * abnormal]


def write_tables(config: BenchmarkConfig, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write ``results.csv`` and ``results.md`` into the folder."""
    rows = rows_of(outcomes)
    replace_file(folder / "results.csv", _csv(rows).encode())
    replace_file(folder / "results.md", _markdown(config, outcomes, rows).encode())


def _categories(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Return the figures by category of the cells of one seed that were run."""
    return {
        name: row
        for outcome in outcomes
        if outcome.metrics
        for name, row in outcome.metrics["categories"].items()
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Return mean, sample standard deviation and the mean's bootstrap 95 % interval over seeds.

    None where a metric is not defined; two seeds and fewer have no interval.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = _interval(known) if len(known) > 2 else (None, None)
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": deviation, "low": low, "high": high}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the percentile bootstrap 95 % interval of the mean; the same numbers each time."""
    drawn = np.random.default_rng(0).choice(np.array(values), (10_000, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _spreads(figures: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None] | None]:
    return {key: _spread([row[key] for row in figures]) for key in METRICS}


def _text(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    deviation = "" if value["sd"] is None else f" ± {value['sd']:.3f}"
    interval = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{deviation}{interval}"


# ---- results.csv --------------------------------------------------------------------------------


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, (*_CSV, *_COUNTS, *METRICS, *_SETTINGS, "cell"), lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        for seed, outcomes in row.seeds.items():
            writer.writerows(_lines(row, seed, outcomes))
    return text.getvalue()


def _lines(row: Row, seed: int, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Yield a line for each category of one seed, and one for their mean."""
    start = {"method": row.method, "variant": row.variant, "seed": seed}
    start |= {"shots": row.shots, "abnormal": row.abnormal, "setting": outcomes[0].cell.setting}
    for outcome in outcomes:
        cell = outcome.cell
        if outcome.metrics is None and cell.category is not None:
            failed = {"category": cell.category, "status": NOT_RUN, "cell": cell.name}
            yield start | failed
        for name, found in (outcome.metrics or {"categories": {}})["categories"].items():
            yield start | _line(name, found, outcome)
    mean = row.figures().get(seed)
    joint = len(outcomes) == 1 and outcomes[0].cell.category is None
    cell_name = outcomes[0].cell.name if joint else None
    if mean is None:
        yield start | {"category": "mean", "status": NOT_RUN, "cell": cell_name}
    else:
        yield start | _line("mean", mean, outcomes[0]) | {"cell": cell_name}


def _line(category: str, found: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    figures = {key: found[key] for key in (*_COUNTS, *METRICS)}
    settings = {key: (outcome.metrics or {})[key] for key in _SETTINGS}
    made = {"category": category, "status": "done", "cell": outcome.cell.name}
    return figures | settings | made


# ---- results.md ---------------------------------------------------------------------------------


def _markdown(config: BenchmarkConfig, outcomes: Sequence[Outcome], rows: Sequence[Row]) -> str:
    heads = columns(rows)
    parts = [f"# {config.title}", *_facts(config, outcomes)]
    parts.append(_table(heads, [row.texts() for row in rows]))
    if told_apart := _told_apart(rows):
        parts += [
            "## By type of defect",
            _APART,
            _table([*_heads(rows), "type", *METRICS], told_apart),
        ]
    names = list(dict.fromkeys(name for row in rows for name in row.categories))
    if len(names) > 1:
        for name in names:
            parts += [f"## {name}", _table(heads, [row.texts(name) for row in rows])]
    failed = [f"- {o.cell.label}: {o.text}" for o in outcomes if o.metrics is None]
    if failed:
        parts += ["## Not run", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _facts(config: BenchmarkConfig, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield what the figures depend on beside what stands in the table."""
    found = [outcome.metrics for outcome in outcomes if outcome.metrics]
    folders = config.bundle or ", ".join(map(str, config.data)) or None
    tested = ", ".join(str(path) for path in config.test or config.data)
    generalist = config.setting == "generalist"
    more: dict[str, Sequence[str]] = {"references by": [config.references]} if generalist else {}
    if config.precision != FULL:
        more["precision of training"] = [config.precision]
    facts: dict[str, Sequence[Any]] = {
        "setting": [config.setting],
        **more,
        "trained on": [folders],
        "tested on": [tested],
        "seeds": config.seeds,
        **{key: [metrics[key] for metrics in found] for key in _SETTINGS},
        **{
            key: [metrics["environment"][key] for metrics in found]
            for key in ("platform", "gpu", "anomalyst", "torch")
        },
        "day": [metrics["environment"]["date"][:10] for metrics in found],
    }
    yield "\n".join(f"- {key}: {_distinct(values)}" for key, values in facts.items())
    yield (
        f"{len(found)} of {len(outcomes)} models. Mean over categories, then mean ± sample "
        "standard deviation over seeds and, of three seeds and more, the bootstrap 95 % interval "
        "of that mean; all metrics are in [0, 1]."
    )


def _distinct(values: Sequence[Any]) -> str:
    words = dict.fromkeys("none" if value is None else str(value) for value in values)
    return ", ".join(words) or NOT_RUN


def _told_apart(rows: Sequence[Row]) -> list[list[str]]:
    """Return three lines for each row whose defects are told apart by the references' types."""
    none = {
        (row.method, row.variant, row.shots): list(row.figures().values())
        for row in rows
        if row.abnormal == 0
    }
    lines = []
    for row in rows:
        if parts := row.by_reference:
            parts |= {"none": none.get((row.method, row.variant, row.shots), [])}
            for part, figures in parts.items():
                lines.append([*row.names, part, *map(_text, _spreads(figures).values())])
    return lines


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(_line_of, (heads, ["---"] * len(heads), *rows)))


def _line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
