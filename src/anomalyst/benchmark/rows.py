"""Outcomes in rows: one method, variant and number of references over its seeds and categories."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from anomalyst.benchmark.cells import Outcome
from anomalyst.benchmark.generalist import PARTS
from anomalyst.evaluation import METRICS, mean_metrics

_LEAST_SEEDS = 5  # of three, one resample in 27 is all the lowest: 95 % would be the whole range
Spread: TypeAlias = "dict[str, float | None]"


@dataclass(frozen=True)
class Row:
    """A table's row: the outcomes of one method, variant and number of references, by seed.

    ``part`` is the benchmark's that it belongs to, empty where there is only one.
    """

    part: str
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
            elif category is None and outcomes and all(o.metrics for o in outcomes):
                found[seed] = mean_metrics(list(rows.values()))
        return found

    def summary(self, category: str | None = None) -> dict[str, Any]:
        """Return mean, deviation and interval of each metric over the seeds."""
        figures = self.figures(category)
        part = {"part": self.part} if self.part else {}
        return {
            **part,
            "method": self.method,
            "variant": self.variant,
            "shots": self.shots,
            "abnormal": self.abnormal,
            "seeds": list(figures),
            "seeds_not_run": [seed for seed in self.seeds if seed not in figures],
            "metrics": spreads(list(figures.values())),
        }

    @property
    def key(self) -> tuple[str, str, int | None, int | None]:
        """What tells it from the other rows of its part."""
        return self.method, self.variant, self.shots, self.abnormal

    @property
    def by_reference(self) -> dict[str, list[dict[str, Any]]]:
        """Each seed's figures on known types of defects and on others, where they were told apart.

        One list for each of `PARTS`; no seed that failed.
        """
        metrics = [o.metrics or {} for outcomes in self.seeds.values() for o in outcomes]
        found = [each["by_reference"] for each in metrics if "by_reference" in each]
        return {part: [figures[part] for figures in found] for part in PARTS} if found else {}

    def defects(self, category: str) -> dict[str, list[dict[str, Any]]]:
        """Return each type of defect's figures of a category, one entry a seed that has them."""
        found: dict[str, list[dict[str, Any]]] = {}
        for outcomes in self.seeds.values():
            for outcome in outcomes:
                told_apart = (outcome.metrics or {}).get("defects", {})
                for name, figures in told_apart.get(category, {}).items():
                    found.setdefault(name, []).append(figures)
        return found


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the rows of the table, in the order of the cells."""
    groups: dict[tuple[str, str, str, int | None, int | None], dict[int, list[Outcome]]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        key = (cell.part, cell.method, cell.variant, cell.shots, cell.abnormal)
        seeds = groups.setdefault(key, {})
        seeds.setdefault(cell.seed, []).append(outcome)
    return [Row(*key, seeds) for key, seeds in groups.items()]


def _categories(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Return the figures by category of the cells of one seed that were run."""
    return {
        name: row
        for outcome in outcomes
        if outcome.metrics
        for name, row in outcome.metrics["categories"].items()
    }


def _spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean, sample standard deviation and the mean's bootstrap 95 % interval over seeds.

    None where a metric is not defined; four seeds and fewer have no interval.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = _interval(tuple(known)) if len(known) >= _LEAST_SEEDS else (None, None)
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": deviation, "low": low, "high": high}


@cache  # tables are written many times over, most rows as they were
def _interval(values: tuple[float, ...]) -> tuple[float, float]:
    """Return the percentile bootstrap 95 % interval of the mean; the same numbers each time."""
    drawn = np.random.default_rng(0).choice(np.array(values), (10_000, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def spreads(figures: Sequence[Mapping[str, Any]]) -> dict[str, Spread | None]:
    """Return each metric's mean, deviation and interval; None where it is not defined."""
    return {key: _spread([row[key] for row in figures]) for key in METRICS}
