"""The shift report: one HTML page to print, with nothing to fetch and nothing that runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_DASH = "\N{EN DASH}"
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
p { margin: .3rem 0; } .alarm { border: 2px solid; padding: .5rem .8rem; font-weight: 600; }
.counts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: .8rem 0; padding: 0; }
.counts div { display: flex; flex-direction: column-reverse; }
.counts dd { margin: 0; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #8888;
  vertical-align: top; } td { overflow-wrap: anywhere; }
td.n { font-variant-numeric: tabular-nums; }
img { max-width: 9rem; max-height: 9rem; display: block; }
.sign { display: flex; gap: 3rem; margin-top: 2.5rem; }
.sign span { flex: 1; border-top: 1px solid; padding-top: .2rem; }
@media print { :root { color-scheme: light; font-size: 10pt; } body { margin: 0; max-width: none; }
  tr, .counts, .sign { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Row:
    """A part that asks to be looked at again; ``picture`` is a data URL, None without one."""

    at: str
    part: str
    verdict: str
    score: float | None
    decision: str
    reason: str
    picture: str | None


@dataclass(frozen=True)
class Facts:
    """All that the report says; texts may come from anybody, and are escaped here.

    ``versions`` are (version, bundle, thresholds in words, parts judged), ``hours`` (hour, parts,
    ok, review, ng), ``people`` (name, parts decided, changed to good, changed to defect),
    ``changes`` (time, who, what).
    """

    recipe: str
    since: str
    until: str
    made: str
    counts: Mapping[str, int]
    promises: Sequence[str]
    alarm: str | None
    versions: Sequence[tuple[str, str, str, int]]
    hours: Sequence[tuple[str, int, int, int, int]]
    people: Sequence[tuple[str, int, int, int]]
    changes: Sequence[tuple[str, str, str]]
    rows: Sequence[Row]
    left_out: int = 0


def render(facts: Facts) -> str:
    """Return the page."""
    title = f"Shift report: {escape(facts.recipe)}"
    span = f"{_time(facts.since)} to {_time(facts.until)} (UTC); made {_time(facts.made)}"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{escape(span)}</p>",
        _counts(facts.counts),
        *(f"<p>{escape(line)}</p>" for line in facts.promises),
        f'<p class="alarm">Drift: {escape(facts.alarm)}</p>' if facts.alarm else "",
        _section(
            "What judged",
            ("version", "bundle", "thresholds", "parts"),
            facts.versions,
            "nothing was judged",
        ),
        _section("By the hour", ("hour", "parts", "ok", "review", "ng"), facts.hours, "no parts"),
        _section(
            "Who decided",
            ("name", "decisions", "NG or review taken as good", "OK taken as defect"),
            facts.people,
            "nobody decided anything",
        ),
        _section("What was changed", ("time", "who", "what"), facts.changes, "nothing"),
        _rows(facts),
        '<p class="sign"><span>Name</span><span>Date</span><span>Signature</span></p>',
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width">'
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}{view}</head><body>{body}</body></html>'


def _counts(counts: Mapping[str, int]) -> str:
    found = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value:,}</dd></div>" for name, value in counts.items()
    )
    return f'<dl class="counts">{found}</dl>'


def _section(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[str | int]], nothing: str
) -> str:
    lines = ["".join(_cell(value) for value in row) for row in rows]
    if not lines:
        return f"<h2>{escape(title)}</h2><p>{escape(nothing)}</p>"
    return f"<h2>{escape(title)}</h2>{_table(heads, lines)}"


def _table(heads: Sequence[str], lines: Iterable[str]) -> str:
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: str | int) -> str:
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{escape(value)}</td>"


def _rows(facts: Facts) -> str:
    lines = []
    for row in facts.rows:
        picture = _DASH
        if row.picture is not None:
            picture = f'<img alt="part {escape(row.part)}" src="{escape(row.picture)}">'
        score = _DASH if row.score is None else f"{row.score:.4g}"
        texts = (_time(row.at), row.part, row.verdict, score, row.decision, row.reason)
        lines.append(f"<td>{picture}</td>" + "".join(_cell(text) for text in texts))
    title = "Parts judged NG or review, or decided defective"
    if not lines:
        return f"<h2>{title}</h2><p>none</p>"
    heads = ("picture", "time", "part", "verdict", "score", "decided", "reason")
    more = f"<p>and {facts.left_out} earlier ones</p>" if facts.left_out else ""
    return f"<h2>{title}</h2>{_table(heads, lines)}{more}"


def _time(text: str) -> str:
    """Return a time of the tables as it is read: to the second."""
    return text[:19].replace("T", " ")
