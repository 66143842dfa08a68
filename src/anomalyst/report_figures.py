"""The report's figures as inline SVG: text stays text, and colours follow the page's theme."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

from anomalyst.pixel_store import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no CSS variables: these colours stand for them until the SVG text exists.
_INK, _RULE, _NORMAL, _ANOMALOUS = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {
    _INK: "var(--ink)",
    _RULE: "var(--rule)",
    _NORMAL: "var(--normal)",
    _ANOMALOUS: "var(--anomalous)",
}
_TEXT_SIZE = 10
_BINS = 32


def score_histogram(
    normal: Sequence[float],
    anomalous: Sequence[float],
    thresholds: Sequence[tuple[str, float]],
    *,
    name: str,
) -> str:
    """Return a histogram of both classes with a vertical line at each (verdict, score).

    ``name`` makes the figure's ids unique within the page.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(5.2, 2.7)
    edges = _bin_edges([*normal, *anomalous, *(score for _, score in thresholds)])
    series = (
        ("normal", normal, _NORMAL, "solid"),
        ("anomalous", anomalous, _ANOMALOUS, (0, (4, 1.5))),
    )
    for label, scores, colour, style in series:
        if len(scores):
            counts, _ = np.histogram(scores, edges)
            label = f"{label} ({len(scores)})"
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.3, label=label)
            axes.stairs(counts, edges, color=colour, linewidth=1.3, linestyle=style)
    for (verdict, score), style in zip(thresholds, (":", "--"), strict=False):
        label = f"{verdict} above {score:.4g}"
        axes.axvline(score, color=_INK, linewidth=1.3, linestyle=style, label=label)
    axes.set_xlabel("image score", fontsize=_TEXT_SIZE, color=_INK)
    axes.set_ylabel("images", fontsize=_TEXT_SIZE, color=_INK)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _legend(axes, columns=2)
    return _svg(figure, name)


def curve_plot(
    curves: Sequence[tuple[str, Curve]],
    *,
    x_label: str,
    y_label: str,
    x_limit: float,
    name: str,
) -> str:
    """Return a plot of up to two labelled curves ``[n, 2]`` of (x, y), each from 0 to 1."""
    figure, axes = _figure(3.4, 3.4)
    for (label, curve), style in zip(curves, ("solid", (0, (5, 1.5))), strict=False):
        axes.plot(
            curve[:, 0], curve[:, 1], color=_NORMAL, linestyle=style, linewidth=1.8, label=label
        )
    axes.set_xlim(-0.02 * x_limit, 1.02 * x_limit)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(x_label, fontsize=_TEXT_SIZE, color=_INK)
    axes.set_ylabel(y_label, fontsize=_TEXT_SIZE, color=_INK)
    _legend(axes, columns=1)
    return _svg(figure, name)


def _bin_edges(values: Sequence[float]) -> Curve:
    """Return equal bins over the values, never too narrow to tell their edges apart."""
    low, high = min(values), max(values)
    least = 1e-6 * max(abs(low), abs(high)) or 1.0
    margin = max(0.0, least - (high - low)) / 2
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of so many inches with one quiet set of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    # Room in inches for labels and two lines of legend: equal boxes in plots that stand in a row.
    figure.subplots_adjust(0.62 / width, 0.5 / height, 1 - 0.12 / width, 1 - 0.48 / height)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=_TEXT_SIZE, color=_RULE, labelcolor=_INK)
    axes.grid(color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_RULE)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        borderaxespad=0.2,
        ncols=columns,
        fontsize=_TEXT_SIZE,
        frameon=False,
        labelcolor=_INK,
        handlelength=2.2,
        columnspacing=1.6,
    )


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as an ``<svg>`` element that can stand in an HTML page."""
    from matplotlib import rc_context

    figure.patch.set_visible(False)
    figure.axes[0].patch.set_visible(False)
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing: dict[str, str | None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows the namespaces
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)  # the page decides the size
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
