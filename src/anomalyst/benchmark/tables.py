"""Outcomes to tables: ``results.csv`` with every figure, ``results.md`` with means over seeds."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalyst.benchmark.cells import Outcome
from anomalyst.benchmark.config import BenchmarkConfig
from anomalyst.evaluation import METRICS, mean_metrics
from anomalyst.files import replace_file

NOT_RUN = "not run"
COLUMNS = ("method", "variant", "shots", "seeds", *METRICS)
_SETTINGS = ("backbone", "weights_sha256", "image_size", "eval_size")
_COUNTS = ("n_normal", "n_anomalous")
_CSV = ("method", "variant", "setting", "shots", "seed", "category", "status", *_COUNTS, *METRICS)


@dataclass(frozen=True)
class Row:
    """A table's row: the outcomes of one method, variant and number of shots, by seed."""

    method: str
    variant: str
    shots: int | None
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
        """Return mean and sample standard deviation of each metric over the seeds."""
        figures = self.figures(category)
        metrics = {key: _spread([row[key] for row in figures.values()]) for key in METRICS}
        return {
            "method": self.method,
            "variant": self.variant,
            "shots": self.shots,
            "seeds": list(figures),
            "seeds_not_run": [seed for seed in self.seeds if seed not in figures],
            "metrics": metrics,
        }

    def texts(self, category: str | None = None) -> list[str]:
        """Return the cells of the row in `COLUMNS`."""
        found = self.summary(category)
        done, total = len(found["seeds"]), len(self.seeds)
        seeds = str(total) if done in (0, total) else f"{done} of {total}"
        shots = "all" if self.shots is None else str(self.shots)
        figures = [_text(value) if done else NOT_RUN for value in found["metrics"].values()]
        return [self.method, self.variant, shots, seeds, *figures]


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the rows of the table, in the order of the cells."""
    groups: dict[tuple[str, str, int | None], dict[int, list[Outcome]]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        seeds = groups.setdefault((cell.method, cell.variant, cell.shots), {})
        seeds.setdefault(cell.seed, []).append(outcome)
    return [Row(*key, seeds) for key, seeds in groups.items()]


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
    """Return mean and sample standard deviation; None where a metric is not defined."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": deviation}


def _text(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    deviation = "" if value["sd"] is None else f" ± {value['sd']:.3f}"
    return f"{value['mean']:.3f}{deviation}"


# ---- results.csv --------------------------------------------------------------------------------


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, (*_CSV, *_SETTINGS, "cell"), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for seed, outcomes in row.seeds.items():
            writer.writerows(_lines(row, seed, outcomes))
    return text.getvalue()


def _lines(row: Row, seed: int, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Yield a line for each category of one seed, and one for their mean."""
    start = {"method": row.method, "variant": row.variant, "shots": row.shots, "seed": seed}
    start["setting"] = outcomes[0].cell.setting
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
    parts = [f"# {config.title}", *_facts(config, outcomes), _table([row.texts() for row in rows])]
    names = list(dict.fromkeys(name for row in rows for name in row.categories))
    if len(names) > 1:
        for name in names:
            parts += [f"## {name}", _table([row.texts(name) for row in rows])]
    failed = [f"- {o.cell.label}: {o.text}" for o in outcomes if o.metrics is None]
    if failed:
        parts += ["## Not run", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _facts(config: BenchmarkConfig, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield what the figures depend on beside what stands in the table."""
    found = [outcome.metrics for outcome in outcomes if outcome.metrics]
    folders = ", ".join(str(path) for path in config.data)
    tested = ", ".join(str(path) for path in config.test or config.data)
    facts: dict[str, Sequence[Any]] = {
        "setting": [config.setting],
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
        "standard deviation over seeds; all metrics are in [0, 1]."
    )


def _distinct(values: Sequence[Any]) -> str:
    words = dict.fromkeys("none" if value is None else str(value) for value in values)
    return ", ".join(words) or NOT_RUN


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(_line_of, (COLUMNS, ["---"] * len(COLUMNS), *rows)))


def _line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
