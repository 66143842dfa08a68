"""A part's rows as plots and as a table of comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from anomalyst.benchmark.comparison import (
    ALPHA,
    LEAST_PAIRS,
    Ranking,
    Scores,
    paired_tests,
    rank_rows,
)
from anomalyst.benchmark.plots import critical_difference, scatter, shots_curve
from anomalyst.benchmark.rows import Row
from anomalyst.benchmark.sections import Figure, Table

PAIRED = (
    "Every two rows over the categories that both have, by their means over the seeds. p is that "
    "of Wilcoxon's signed-rank test, two-sided and exact; categories without a difference are left "
    f"out, and under {LEAST_PAIRS} others it cannot fall below .05 and is not given. Holm's "
    "correction is for all pairs of this table."
)
_METRIC, _NAME = "i_auroc", "image-level AUROC"
_NONE = "\N{EN DASH}"


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """Return the plots that the rows of one part have enough figures for."""
    return [*_ranks(rows), *_by_shots(rows), *_by_cost(rows)]


def comparison_table(rows: Sequence[Row], metric: str) -> Table:
    """Return a line for every two rows that have categories in common; see `PAIRED`."""
    heads = ("one", "other", "categories", "one less other", "p", "p (Holm)")
    lines = [
        (
            test.one,
            test.other,
            str(test.categories),
            f"{test.difference:+.3f}".replace("-", "\N{MINUS SIGN}"),
            _p_text(test.p),
            _p_text(test.p_holm),
        )
        for test in paired_tests(scores_of(rows, metric))
    ]
    return Table(heads, tuple(lines))


def scores_of(rows: Sequence[Row], metric: str) -> Scores:
    """Return each category's mean over the seeds that have it, of the rows that have any."""
    found = {label_of(row): _category_means(row, metric) for row in rows}
    return {label: scores for label, scores in found.items() if scores}


def label_of(row: Row) -> str:
    """Return the row in words; no two rows of a part have one in common."""
    return _label(row.method, row.variant, row.shots, row.abnormal)


def _label(method: str, variant: str, shots: int | None, abnormal: int | None) -> str:
    words = [method]
    if variant != "default":
        words.append(variant)
    if shots is not None:
        words.append(f"{shots} shot" + "s" * (shots != 1))
    if abnormal is not None:
        words.append(f"{abnormal} abnormal")
    return ", ".join(words)


def _category_means(row: Row, metric: str) -> dict[str, float]:
    means = {}
    for category in row.categories:
        values = [figures[metric] for figures in row.figures(category).values()]
        if known := [value for value in values if value is not None]:
            means[category] = statistics.fmean(known)
    return means


def _p_text(p: float | None) -> str:
    if p is None:
        return _NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _ranks(rows: Sequence[Row]) -> Iterator[Figure]:
    if ranking := rank_rows(scores_of(rows, _METRIC)):
        caption = _ranks_caption(ranking)
        yield Figure("critical-difference", critical_difference(ranking), caption)


def _ranks_caption(ranking: Ranking) -> str:
    start = (
        f"Average ranks by {_NAME} over the {ranking.categories} categories that all of these "
        f"rows have. Friedman's test of all rows: p {_equals(ranking.friedman_p)}"
    )
    if ranking.friedman_p >= ALPHA:
        return f"{start}, so no difference is claimed: one bar joins all rows."
    return (
        f"{start}. A bar joins rows that do not differ at {ALPHA:g}: their ranks lie less than "
        "the critical difference of Nemenyi's test apart."
    )


def _equals(p: float) -> str:
    text = _p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _by_shots(rows: Sequence[Row]) -> Iterator[Figure]:
    """Yield a line for each method and variant that has figures of two numbers of shots."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    intervals = False
    for row in rows:
        spread = row.summary()["metrics"][_METRIC]
        if row.shots is not None and spread:
            mean, low, high = (spread[key] for key in ("mean", "low", "high"))
            intervals |= low is not None
            bounds = (mean, mean) if low is None else (low, high)
            label = _label(row.method, row.variant, None, row.abnormal)
            found.setdefault(label, {})[row.shots] = (mean, *bounds)
    series = {label: points for label, points in found.items() if len(points) > 1}
    if series:
        bars = "; bars are the bootstrap 95 % interval of the mean over seeds" if intervals else ""
        caption = f"Mean {_NAME} over categories and seeds by number of references{bars}."
        yield Figure("shots", shots_curve(series, _NAME), caption)


def _by_cost(rows: Sequence[Row]) -> Iterator[Figure]:
    """Yield accuracy against time and against memory, of the rows that were run to their end."""
    seconds: dict[str, tuple[float, float]] = {}
    memory: dict[str, tuple[float, float]] = {}
    for row in rows:
        spread = row.summary()["metrics"][_METRIC]
        if not spread:
            continue
        speeds = _values(row, "images_per_second")
        peaks = _values(row, "peak_rss_mb")
        if speeds:
            taken = statistics.fmean(1 / speed for speed in speeds)
            seconds[label_of(row)] = (taken, spread["mean"])
        if peaks:
            memory[label_of(row)] = (max(peaks), spread["mean"])
    if len(seconds) > 1:
        caption = (
            f"{_NAME} against seconds per image when judging, mean over the row's models. Features "
            "that an earlier model left in the cache cost next to nothing here: compare methods by "
            "`anomalyst profile`."
        )
        svg = scatter(seconds, "seconds per image", _NAME)
        yield Figure("seconds", svg, _capital(caption))
    if len(memory) > 1:
        caption = f"{_NAME} against the process's peak memory in MB, the most of the row's models."
        svg = scatter(memory, "peak memory in MB", _NAME)
        yield Figure("memory", svg, _capital(caption))


def _values(row: Row, key: str) -> list[float]:
    """Return a figure of each of the row's models that were measured."""
    metrics = [o.metrics for outcomes in row.seeds.values() for o in outcomes if o.metrics]
    return [found[key] for found in metrics if found.get(key)]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
