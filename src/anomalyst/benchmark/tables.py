"""Outcomes to sections: tables of means over seeds, the papers' figures in columns of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from anomalyst.benchmark.cells import Outcome
from anomalyst.benchmark.config import Benchmark, BenchmarkConfig, PublishedRow
from anomalyst.benchmark.figures import PAIRED, comparison_table, figures_of
from anomalyst.benchmark.records import NOT_RUN
from anomalyst.benchmark.rows import Row, Spread, rows_of, spreads
from anomalyst.benchmark.sections import Section, Table
from anomalyst.evaluation import METRICS
from anomalyst.methods import REGISTRY
from anomalyst.training_setup import FULL

_NONE = "–"  # noqa: RUF001
_APART = (
    "same: defects of a type among the abnormal references', other: of other types, each with all "
    "normal images and averaged over the categories that have such defects; none: all defects, "
    "judged without abnormal references."
)
_BY_DEFECT = "Defects of one type beside all normal images of the category, mean over seeds."
_READING = (
    "Mean over categories, then mean ± sample standard deviation over seeds and, of five seeds "
    "and more, the bootstrap 95 % interval of that mean; all metrics are in [0, 1]."
)
_COMPARED = ("i_auroc", "p_ap")
_SETTINGS = ("backbone", "weights_sha256", "image_size", "eval_size")


def sections_of(
    benchmark: Benchmark, outcomes: Sequence[Outcome], plots: bool = False
) -> list[Section]:
    """Return what the results say, part by part, with plots if asked for."""
    found: list[Section] = []
    for part in benchmark.parts:
        own = [outcome for outcome in outcomes if outcome.cell.part == part.name]
        found += _part_sections(part, own, plots)
    for part in benchmark.left_out:
        said = ("Left out: its data is not there.",)
        found.append(Section(part.name, 2, said, table=main_table(_unrun(part), part)))
    failed = tuple(f"{o.cell.label}: {o.text}" for o in outcomes if o.metrics is None)
    return [*found, Section("Not run", 2, items=failed)] if failed else found


def main_table(rows: Sequence[Row], part: BenchmarkConfig, category: str | None = None) -> Table:
    """Return the rows' means, beside each metric the paper's figure where there is one."""
    printed = part.published.rows if part.published and category is None else ()
    papers = [key for key in METRICS if any(getattr(row, key) is not None for row in printed)]
    by_key: dict[tuple[Any, ...], PublishedRow] = {}
    for line in printed:
        by_key[line.method, line.variant, line.shots, line.abnormal] = line
    abnormal = any(row.abnormal is not None for row in rows)
    abnormal = abnormal or any(line.abnormal is not None for line in printed)
    heads = [*_name_heads(abnormal), "seeds"]
    for key in METRICS:
        heads += [key, f"{key}, paper"] if key in papers else [key]
    lines = []
    for row in rows:
        ours = _texts(row, category)
        lines.append([*_names(row, abnormal), *_beside(ours, by_key.pop(row.key, None), papers)])
    for line in by_key.values():  # methods that are none of ours, or rows that were not asked for
        missing = NOT_RUN if line.method in REGISTRY else _NONE
        texts = [missing] * (1 + len(METRICS))
        lines.append([*_names(line, abnormal), *_beside(texts, line, papers)])
    return Table(tuple(heads), tuple(tuple(line) for line in lines))


def _part_sections(
    part: BenchmarkConfig, outcomes: Sequence[Outcome], plots: bool
) -> Iterator[Section]:
    rows = rows_of(outcomes)
    figures = tuple(figures_of(rows)) if plots else ()
    done = sum(outcome.metrics is not None for outcome in outcomes)
    said = [f"{done} of {len(outcomes)} models. {_READING}"]
    if part.published and part.published.rows:
        said.append(
            f"Columns marked “paper” are printed figures, not ours: {part.published.source}."
        )
    facts = tuple(_facts(part, outcomes))
    yield Section(part.name or "Results", 2, tuple(said), facts, main_table(rows, part), figures)
    for metric in _COMPARED:
        compared = comparison_table(rows, metric)
        if any(line[-1] != _NONE for line in compared.rows):  # enough categories for a test
            yield Section(f"Compared by {metric}", 3, (PAIRED,), table=compared)
    if told_apart := _told_apart(rows):
        abnormal = any(row.abnormal is not None for row in rows)
        heads = (*_name_heads(abnormal), "type", *METRICS)
        yield Section("By type of defect", 3, (_APART,), table=Table(heads, told_apart))
    names = list(dict.fromkeys(name for row in rows for name in row.categories))
    for name in names:
        table = _defect_table(rows, name)
        if len(names) > 1:
            yield Section(name, 3, table=main_table(rows, part, name))
        if len(table.rows) > len(rows):  # a single type is the category's row again
            yield Section(f"{name}, by defect", 3, (_BY_DEFECT,), table=table)


def _unrun(part: BenchmarkConfig) -> list[Row]:
    """Return the rows that a part would have."""
    rows = []
    for method, variant in product(part.methods, part.variants):
        for shots, abnormal in product(part.shots or (None,), part.counts_of(method)):
            key = (method, variant.name, shots, abnormal)
            rows.append(Row(part.name, *key, dict.fromkeys(part.seeds, ())))
    return rows


def _name_heads(abnormal: bool) -> list[str]:
    return ["method", "variant", "shots", *["abnormal"] * abnormal]


def _names(row: Row | PublishedRow, abnormal: bool) -> list[str]:
    """Return the cells of a line that say what it is about."""
    shots = "all" if row.shots is None else str(row.shots)
    references = [_NONE if row.abnormal is None else str(row.abnormal)] if abnormal else []
    return [row.method, row.variant, shots, *references]


def _texts(row: Row, category: str | None) -> list[str]:
    """Return the number of seeds and every metric."""
    found = row.summary(category)
    done, total = len(found["seeds"]), len(row.seeds)
    seeds = str(total) if done == total else f"{done} of {total}"
    return [seeds, *(_text(value) if done else NOT_RUN for value in found["metrics"].values())]


def _beside(
    texts: Sequence[str], printed: PublishedRow | None, papers: Sequence[str]
) -> Iterator[str]:
    """Yield our cells, after each metric that the paper has the paper's."""
    yield texts[0]
    for key, text in zip(METRICS, texts[1:], strict=True):
        yield text
        if key in papers:
            value = getattr(printed, key, None)
            deviation = printed.sd.get(key) if printed else None
            spread = "" if deviation is None else f" ± {deviation:.3f}"
            yield _NONE if value is None else f"{value:.4f}".rstrip("0").ljust(5, "0") + spread


def _text(value: Spread | None) -> str:
    if value is None:
        return _NONE
    deviation = "" if value["sd"] is None else f" ± {value['sd']:.3f}"
    interval = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{deviation}{interval}"


def _facts(part: BenchmarkConfig, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield what the figures depend on beside what stands in the table."""
    found = [outcome.metrics for outcome in outcomes if outcome.metrics]
    folders = part.bundle or ", ".join(map(str, part.data)) or None
    tested = ", ".join(str(path) for path in part.test or part.data)
    generalist = part.setting == "generalist"
    more: dict[str, Sequence[str]] = {"references by": [part.references]} if generalist else {}
    given = {"": part.options} | {name: keys.options for name, keys in part.by_method.items()}
    options = [
        f"{name} {key}={value}".strip() for name in given for key, value in given[name].items()
    ]
    if options:
        more["options"] = options
    if part.precision != FULL:
        more["precision of training"] = [part.precision]
    facts: dict[str, Sequence[Any]] = {
        "setting": [part.setting],
        **more,
        "trained on": [folders],
        "tested on": [tested],
        "seeds": part.seeds,
        **{key: [metrics[key] for metrics in found] for key in _SETTINGS},
        **{
            key: [metrics["environment"][key] for metrics in found]
            for key in ("platform", "gpu", "anomalyst", "torch")
        },
        "day": [metrics["environment"]["date"][:10] for metrics in found],
    }
    for key, values in facts.items():
        words = dict.fromkeys("none" if value is None else str(value) for value in values)
        yield f"{key}: {', '.join(words) or NOT_RUN}"


def _told_apart(rows: Sequence[Row]) -> tuple[tuple[str, ...], ...]:
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
                lines.append((*_names(row, True), part, *map(_text, spreads(figures).values())))
    return tuple(lines)


def _defect_table(rows: Sequence[Row], category: str) -> Table:
    abnormal = any(row.abnormal is not None for row in rows)
    lines = []
    for row in rows:
        for defect, figures in row.defects(category).items():
            texts = map(_mean, spreads(figures).values())
            lines.append((*_names(row, abnormal), defect, str(figures[0]["n_anomalous"]), *texts))
    return Table((*_name_heads(abnormal), "defect", "images", *METRICS), tuple(lines))


def _mean(value: Mapping[str, float | None] | None) -> str:
    return _NONE if value is None else f"{value['mean']:.3f}"
