"""A benchmark's plots as SVG texts: the same data gives the same text.

Each has an opaque ground of its own, so that it can be read as a file on a page of any colour. A
page that follows the reader's theme puts its own colours for `PAPER`, `INK` and `RULE`; the others
have a contrast of more than 3.7 on both of its grounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from textwrap import wrap
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

from anomalyst.benchmark.comparison import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, RULE = "#fefefe", "#1b1f24", "#d8dde3"
_COLOURS = ("#2b7bba", "#c8591a", "#2f8a4f", "#8f62c9", "#c94a5f", "#178a94", "#8a7a14", "#b8549b")
_MARKERS = "osD^vPX"  # as many as have no divisor in common with the colours: 56 pairs
_TEXT = 9
_LINE = 0.17  # inches of height of a line of text
_MARGIN = 0.12  # inches around all
_SIDE = 30  # characters of a label beside a row
_BELOW = 62  # characters of a label below the axes


def critical_difference(ranking: Ranking) -> str:
    """Return the rows at their average ranks, best first, with a bar beside each group.

    A line for each row, unlike the usual diagram with its labels on two sides: long ones fit.
    """
    labels = [_wrapped(label, _SIDE) for label in ranking.ranks]
    heights = [max(1.6, 0.7 + len(lines)) for lines in labels]
    places = [sum(heights[:row]) + height / 2 for row, height in enumerate(heights)]
    ranks = list(ranking.ranks.values())
    top, most = -2.4, max(len(ranks), 1 + ranking.critical_difference)
    with _style():
        figure, axes = _axes(3.4, _LINE * (sum(heights) - top))
        axes.set_xlim(0.7, 1.14 * most)
        axes.set_ylim(sum(heights), top)
        axes.hlines(places, 0, ranks, color=RULE, linewidth=1)
        axes.plot(ranks, places, "o", color=_COLOURS[0], markersize=6)
        for place, rank, lines in zip(places, ranks, labels, strict=True):
            _note(axes, f"{rank:.2f}", (rank, place), (7, 0))
            _side_label(axes, lines, place)
        axes.plot([1, 1 + ranking.critical_difference], [-0.6] * 2, "|-", color=INK, markersize=7)
        _note(axes, f"critical difference {ranking.critical_difference:.2f}", (1, -0.6), (0, 10))
        _group_bars(axes, ranking, dict(zip(ranking.ranks, places, strict=True)))
        axes.set_xticks(range(1, len(ranks) + 1, 1 + len(ranks) // 13))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.set_xlabel("average rank (1 is best)")
        return _svg(figure, labels)


def shots_curve(
    series: Mapping[str, Mapping[int, tuple[float, float, float]]], y_label: str
) -> str:
    """Return a line for each label through its (mean, low, high) in [0, 1] by number of shots."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = sorted({shots for points in series.values() for shots in points})
    with _style():
        figure, axes = _axes(4.6, 2.9)
        axes.set_xscale("log", base=2)
        for index, (label, points) in enumerate(series.items()):
            apart = 2 ** (0.2 * ((index + 0.5) / len(series) - 0.5))  # intervals stand side by side
            shots = sorted(points)
            means = [points[x][0] for x in shots]
            spread = [[mean - points[x][1] for mean, x in zip(means, shots, strict=True)]]
            spread += [[points[x][2] - mean for mean, x in zip(means, shots, strict=True)]]
            axes.errorbar(
                [x * apart for x in shots], means, spread, label=label, **_mark(index), capsize=2
            )
        axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel("normal references a category")
        _fraction_axis(axes, y_label)
        return _svg(figure, _legend(axes))


def scatter(points: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> str:
    """Return a mark for each label at its (x, y), x on a logarithmic axis, y in [0, 1].

    The marks are hollow: of two in one place both are seen.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    with _style():
        figure, axes = _axes(4.6, 2.9)
        axes.set_xscale("log")
        for index, (label, (x, y)) in enumerate(points.items()):
            hollow = {"linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.8}
            axes.plot(x, y, label=label, **_mark(index) | hollow, markersize=8)
        margin = max((high / low) ** 0.06, 1.04)
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_locator(FixedLocator(_log_ticks(low / margin, high * margin)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel(x_label)
        _fraction_axis(axes, y_label)
        return _svg(figure, _legend(axes))


def _side_label(axes: Axes, lines: Sequence[str], place: float) -> None:
    """Draw a label left of the axes, each line by itself: only so does SVG align its right end."""
    for number, line in enumerate(lines):
        down = (number - (len(lines) - 1) / 2) * _LINE * 72
        axes.annotate(
            line,
            (0, place),
            (-6, -down),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
        )


def _group_bars(axes: Axes, ranking: Ranking, places: Mapping[str, float]) -> None:
    """Draw a bar right of the axes beside the rows of each group."""
    for number, group in enumerate(ranking.groups):
        ends = (places[group[0]] - 0.5, places[group[-1]] + 0.5)
        axes.plot(
            [1.03 + 0.035 * number] * 2,
            ends,
            color=INK,
            linewidth=3,
            clip_on=False,
            transform=axes.get_yaxis_transform(),
        )


def _note(axes: Axes, text: str, at: tuple[float, float], away: tuple[int, int]) -> None:
    axes.annotate(
        text, at, away, textcoords="offset points", va="center_baseline", fontsize=_TEXT - 1
    )


def _log_ticks(low: float, high: float) -> Sequence[float]:
    """Return round numbers for a logarithmic axis, evenly spaced ones if it is short."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if high / low < 5:
        found = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    else:
        steps = (1, 2, 5) if high / low <= 100 else (1, 3)
        found = LogLocator(subs=steps).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]


def _mark(index: int) -> dict[str, Any]:
    """Return how the line or mark of this number looks; no two of 56 are alike."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[index // len(_COLOURS) % 3],
        "linewidth": 1.5,
    }


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure whose axes are so many inches large; labels come on top of that."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72)  # as SVG: what is measured is what is drawn
    axes = figure.add_axes((0, 0, 1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.margins(y=0.08)
    return figure, axes


def _fraction_axis(axes: Axes, label: str) -> None:
    """Set the vertical axis for values in [0, 1], without ticks above 1."""
    low, high = axes.get_ylim()
    if high > 1:
        axes.set_ylim(low, 1 + 0.03 * (1 - low))
    axes.set_ylabel(label)


def _legend(axes: Axes) -> list[list[str]]:
    """Put the labels below the axes, where no number of them can hide a point; return them."""
    handles, labels = axes.get_legend_handles_labels()
    wrapped = [_wrapped(label, _BELOW) for label in labels]
    axes.legend(
        handles,
        ["\n".join(lines) for lines in wrapped],
        loc="upper left",
        bbox_to_anchor=(0, -0.17),
        handlelength=3,
        ncols=2 if max(map(_cells, labels)) <= _BELOW // 2 - 4 else 1,
    )
    return wrapped


def _wrapped(label: str, most: int) -> list[str]:
    """Return the label in lines of at most so many cells."""
    return wrap(label, max(8, most * len(label) // _cells(label)))


def _cells(text: str) -> int:
    """Return how wide a text is: East Asian characters take two cells."""
    return len(text) + _wide(text)


def _wide(text: str) -> int:
    return sum(east_asian_width(character) in "WF" for character in text)


@contextmanager
def _style() -> Iterator[None]:
    """Set what the plots have in common; labels are never read as formulas."""
    from matplotlib import rc_context

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "anomalyst",
        "text.parse_math": False,
        "text.color": INK,
        "font.size": _TEXT,
        "axes.labelcolor": INK,
        "axes.labelsize": _TEXT,
        "axes.edgecolor": RULE,
        "axes.facecolor": PAPER,
        "figure.facecolor": PAPER,
        "axes.grid": True,
        "axes.formatter.useoffset": False,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.borderaxespad": 0.0,
        "lines.markersize": 5,
    }
    with rc_context(settings), warnings.catch_warnings():
        # The reader's fonts draw the text; matplotlib's own only measures it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _unmeasured(wide: int) -> float:
    """Return the inches that so many East Asian characters, an em each, take beyond the measured.

    Matplotlib's own font lacks them; what it measures instead depends on its version.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    if not wide:
        return 0.0
    font = FontProperties(size=_TEXT)
    measured = TextToPath().get_text_width_height_descent(
        "\N{CJK UNIFIED IDEOGRAPH-5909}", font, False
    )[0]
    return wide * max(0.0, _TEXT - measured) / 72


def _svg(figure: Figure, labels: Sequence[Sequence[str]]) -> str:
    """Return the figure as an SVG document without a date, with room for its labels."""
    from matplotlib.transforms import Bbox

    more = _unmeasured(max(_wide(line) for lines in labels for line in lines))
    x0, y0, x1, y1 = figure.get_tightbbox().extents
    box = Bbox.from_extents(x0 - _MARGIN - more, y0 - _MARGIN, x1 + _MARGIN + more, y1 + _MARGIN)
    text = StringIO()
    nothing: dict[str, str | None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing, bbox_inches=box)
    return text.getvalue()
