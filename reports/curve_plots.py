"""Curves by context length in plots side by side, one curve for each checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from yoco_eval.printable import one_line

from .comparison import Comparison
from .heatmap import text_width
from .panels import (
    ABOVE,
    BELOW,
    LEFT,
    PLOT_COLUMNS,
    PLOT_HEIGHT,
    RIGHT,
    TITLE,
    TITLE_LETTERS,
    Panel,
    add_axes,
    draw_title,
    short_names,
)
from .style import (
    FONT,
    GRID,
    PAGE_WIDTH,
    SMALL_FONT,
    length_axis,
    series,
    set_scale,
    spacing,
)

CUT_LABEL = "prompts cut to the backend's max_length"
_LEGEND_ROW = 0.16  # inches
_DODGE = 0.5  # the span of intervals at one context length, in parts of the distance to the next


@dataclass(frozen=True)
class Plot:
    """Curves over context length, one for each checkpoint; None for those without.

    bounds: of intervals, in the same order and at the same lengths; empty where there are none.
    """

    title: str
    curves: Sequence[dict[int, float] | None]
    bounds: Sequence[dict[int, tuple[float, float]]] = ()
    share: bool = False  # 0 to 1
    line: float | None = None  # a threshold
    cut: Sequence[Collection[int]] = ()  # at which lengths prompts were cut, in the same order
    scale: str = "linear"


def plot_panels(
    comparison: Comparison, section: str, name: str, title: str, plots: Sequence[Plot]
) -> list[Panel]:
    """A panel with all the plots; none where there are none."""
    if not plots:
        return []
    names = {
        index: label
        for index, label in enumerate(short_names(comparison.names))
        if any(plot.curves[index] for plot in plots)
    }
    cut = any(lengths for plot in plots for lengths in plot.cut)
    entries = [*names.values(), *[CUT_LABEL] * cut]
    legend = math.ceil(len(entries) / _legend_columns(entries)) * _LEGEND_ROW
    rows = math.ceil(len(plots) / PLOT_COLUMNS)
    height = TITLE + legend + rows * (ABOVE + PLOT_HEIGHT + BELOW)
    draw = partial(_draw_plots, title, plots, names, cut, TITLE + legend, height)
    return [Panel(section, name, title, height, draw)]


def _legend_columns(names: Collection[str]) -> int:
    """How many names stand side by side."""
    widest = text_width(names, FONT) / 72 + 0.5
    return max(1, min(len(names), int((PAGE_WIDTH - 0.2) / widest)))


def _draw_plots(
    title: str,
    plots: Sequence[Plot],
    names: dict[int, str],
    cut: bool,
    top: float,
    height: float,
    figure: FigureBase,
) -> None:
    """names: in the legend, by place among the checkpoints. cut: whether its mark is there, too.

    top: of the plots, in inches.
    """
    draw_title(figure, title, height)
    handles = [Line2D([], [], label=name, **series(index)) for index, name in names.items()]
    handles += [Line2D([], [], label=CUT_LABEL, **_cross())] * cut
    figure.legend(
        handles=handles,
        loc="upper center", bbox_to_anchor=(0.5, 1 - (TITLE - 0.08) / height), borderaxespad=0,
        ncols=_legend_columns([str(handle.get_label()) for handle in handles]), frameon=False,
        fontsize=FONT,
    )  # fmt: skip
    columns = min(len(plots), PLOT_COLUMNS)
    whole = (PAGE_WIDTH - RIGHT) / columns
    for place, plot in enumerate(plots):
        row, column = divmod(place, columns)
        above = top + row * (ABOVE + PLOT_HEIGHT + BELOW) + ABOVE
        left = column * whole + LEFT
        _draw_plot(plot, add_axes(figure, left, above, whole - LEFT, PLOT_HEIGHT, height))


def _draw_plot(plot: Plot, ax: Axes) -> None:
    title = ax.set_title(one_line(plot.title, TITLE_LETTERS), size=FONT, pad=4)
    room = 1.1 * ax.get_window_extent().width
    title.set_fontsize(max(SMALL_FONT, FONT * min(1, room / title.get_window_extent().width)))
    lengths = sorted({length for curve in plot.curves for length in curve or ()})
    there = [(i, curve) for i, curve in enumerate(plot.curves) if curve]
    step = min(_DODGE / len(there), 0.05) * spacing(lengths)
    for place, (index, curve) in enumerate(there):
        style = series(index)
        shift = step * (place - (len(there) - 1) / 2) if plot.bounds else 0
        xs = [math.log2(length) + shift for length in sorted(curve)]
        ys = [curve[length] for length in sorted(curve)]
        ax.plot(xs, ys, **style)
        if plot.bounds:
            low, high = zip(*(plot.bounds[index][n] for n in sorted(curve)), strict=True)
            ax.vlines(xs, low, high, color=style["color"], linewidth=0.8, alpha=0.6)
        cut = plot.cut[index] if plot.cut else ()
        crosses = [(x, curve[n]) for x, n in zip(xs, sorted(curve), strict=True) if n in cut]
        if crosses:
            ax.plot(*zip(*crosses, strict=True), **_cross())
    if plot.share:
        ax.set_ylim(-0.02, 1.02)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    else:
        set_scale(ax, plot.scale)
    if plot.line is not None:
        ax.axhline(plot.line, color="0.5", linewidth=0.6, linestyle="--")
        ax.annotate(
            f"{plot.line:g}", (1, plot.line), (1, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", size=SMALL_FONT, color="0.5", va="center",
        )  # fmt: skip
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.set_axisbelow(True)
    length_axis(ax, lengths)
    length_axis(ax, lengths, _thinned(ax))


def _cross() -> dict[str, Any]:
    """How a value is marked at a length at which prompts were cut."""
    ink = matplotlib.rcParams["text.color"]
    return {"color": ink, "marker": "x", "markersize": 4, "linestyle": "none", "zorder": 3}


def _thinned(ax: Axes) -> list[str]:
    """The labels of the x axis without those that would run into the one before."""
    texts, end = [], -math.inf
    for label in ax.get_xticklabels():
        box = label.get_window_extent()
        texts.append(label.get_text() if box.x0 > end else "")
        end = box.x1 + 2 if box.x0 > end else end
    return texts
