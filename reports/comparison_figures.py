"""A comparison as figures, each a page wide: heatmaps side by side, curves, costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D

from yoco_eval.printable import one_line, shortened

from .comparison import Comparison, LengthCurves, NeedleTask
from .comparison_tables import COSTS, CURVES, METRICS, NEEDLES, QUANTITIES, effective_text
from .heatmap import (
    CELL_FONT,
    CUT,
    add_color_bar,
    cell_figures,
    draw_heatmap,
    fit_font,
    grid_height,
    text_width,
)
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
    file_name,
    short_names,
)
from .stage_figure import stage_panel
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

# Inches.
_BAR = 0.64  # right of heatmaps: the colour bar
_CAPTION = 0.3  # above each heatmap: checkpoint, figures
_GAP = 0.12  # between heatmaps
_LEGEND_ROW = 0.16
_DODGE = 0.5  # the span of intervals at one context length, in parts of the distance to the next
_CUT = "prompts cut to the backend's max_length"
_NOTE = 0.16  # below heatmaps


@dataclass(frozen=True)
class _Plot:
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


def panels(comparison: Comparison) -> list[Panel]:
    """All figures that the results allow; heatmaps first, of many checkpoints behind the rest."""
    heatmaps = [_heatmaps(comparison, task) for task in comparison.needles]
    curves = curve_panels(comparison)
    return [*curves, *heatmaps] if comparison.many else [*heatmaps, *curves]


def curve_panels(comparison: Comparison) -> list[Panel]:
    """Those of figures by context length, without heatmaps."""
    found = [*filter(None, [stage_panel(comparison)])]
    for section, name, title, plots in (
        (NEEDLES, "needles", "Needles by context length", _needle_plots(comparison)),
        (CURVES, "curves", CURVES, _curve_plots(comparison)),
        (COSTS, "costs", COSTS, _cost_plots(comparison)),
    ):
        if drawn := list(plots):
            found.append(_plots(comparison, section, name, title, drawn))
    return found


def _heatmaps(comparison: Comparison, task: NeedleTask) -> Panel:
    columns = _map_columns(task)
    rows = math.ceil(sum(result is not None for result in task.results) / columns)
    height = TITLE + rows * (_CAPTION + grid_height(len(task.depths)) + BELOW)
    height += _NOTE * any(run.cut for run in task.runs)
    draw = partial(_draw_heatmaps, comparison, task, columns, height)
    return Panel(NEEDLES, f"{file_name(task.task)}-heatmaps", one_line(task.task), height, draw)


def _map_columns(task: NeedleTask) -> int:
    """How many heatmaps stand side by side: as many as leave their figures readable."""
    figures = [cell_figures(run, task.runs) for run in task.runs]
    for columns in range(min(len(figures), 4), 1, -1):
        width = _map_width(columns) / len(task.context_lengths)
        if all(fit_font(texts, width) >= CELL_FONT[0] for texts in figures):
            return columns
    return 1


def _map_width(columns: int) -> float:
    """As if there were two heatmaps where there is one: a single one need not fill the page."""
    columns = max(columns, 2)
    return (PAGE_WIDTH - LEFT - _BAR - (columns - 1) * _GAP) / columns


def _draw_heatmaps(
    comparison: Comparison, task: NeedleTask, columns: int, height: float, figure: FigureBase
) -> None:
    draw_title(figure, task.task, height)
    if any(run.cut for run in task.runs):
        figure.text(0.5, 0.06 / height, f"{CUT}: {_CUT}", size=FONT - 1, ha="center", va="bottom")
    width, rows = _map_width(columns), grid_height(len(task.depths))
    names = short_names(comparison.names)
    there = [(name, one) for name, one in zip(names, task.results, strict=True) if one]
    for place, (name, result) in enumerate(there):
        row, column = divmod(place, columns)
        top = TITLE + row * (_CAPTION + rows + BELOW) + _CAPTION
        left = LEFT + column * (width + _GAP)
        ax = add_axes(figure, left, top, width, rows, height)
        draw_heatmap(result.run, ax, task.runs)
        if column:
            ax.set_ylabel("")
            ax.set_yticks([])
        facts = f"mean {result.run.accuracy:.2f}, effective {effective_text(result)}"
        _caption(ax, name, facts)
        if column == columns - 1 or place == len(there) - 1:
            bar = add_axes(figure, left + width + 0.08, top, 0.09, rows, height)
            add_color_bar(figure, bar)


def _caption(ax: Axes, name: str, facts: str) -> None:
    """Two lines above the axes, made to fit their width."""
    for text, size, above, weight in ((name, FONT + 0.5, 11, "bold"), (facts, FONT - 1, 3, None)):
        drawn = ax.annotate(
            text, (0.5, 1), (0, above), xycoords="axes fraction", textcoords="offset points",
            size=size, weight=weight, ha="center", va="bottom", annotation_clip=False,
        )  # fmt: skip
        room = ax.get_window_extent().width
        drawn.set_fontsize(max(SMALL_FONT, size * min(1, room / drawn.get_window_extent().width)))
        letters = len(text)
        while drawn.get_window_extent().width > room and letters > 8:
            letters -= 1
            drawn.set_text(shortened(text, letters))


def _needle_plots(comparison: Comparison) -> Iterator[_Plot]:
    for task in comparison.needles:
        by_length = [result.by_length if result else [] for result in task.results]
        yield _Plot(
            f"{task.task}: accuracy",
            [{one.context_length: one.accuracy for one in ones} or None for ones in by_length],
            [{one.context_length: one.interval for one in ones} for ones in by_length],
            share=True,
            line=comparison.threshold,
            cut=[result.cut if result else () for result in task.results],
        )


def _curve_plots(comparison: Comparison) -> Iterator[_Plot]:
    for curves in comparison.curves:
        if not curves.member:
            title = f"{curves.task}: {METRICS.get(curves.metric, curves.metric)}"
            if any(values := _from_one_token(curves)):
                share = curves.metric == "acc"
                yield _Plot(title, values, share=share, cut=curves.cut)


def _from_one_token(curves: LengthCurves) -> list[dict[int, float] | None]:
    """Without BABILong's 0K, which has no place on a logarithmic axis."""
    return [
        {length: value for length, value in values.items() if length} if values else None
        for values in curves.values
    ]


def _cost_plots(comparison: Comparison) -> Iterator[_Plot]:
    for quantity, (title, unit) in QUANTITIES.items():
        curves = []
        for profile in comparison.profiles:
            rows = [profile.row(profile.models[0], n) for n in profile.lengths] if profile else []
            values = {row.length: getattr(row, quantity) for row in rows if row}
            curves.append({n: value / unit for n, value in values.items() if value} or None)
        if any(curves):
            yield _Plot(title, curves, scale="log" if quantity == "prefill_seconds" else "linear")


def _plots(
    comparison: Comparison, section: str, name: str, title: str, plots: Sequence[_Plot]
) -> Panel:
    names = {
        index: label
        for index, label in enumerate(short_names(comparison.names))
        if any(plot.curves[index] for plot in plots)
    }
    cut = any(lengths for plot in plots for lengths in plot.cut)
    entries = [*names.values(), *[_CUT] * cut]
    legend = math.ceil(len(entries) / _legend_columns(entries)) * _LEGEND_ROW
    rows = math.ceil(len(plots) / PLOT_COLUMNS)
    height = TITLE + legend + rows * (ABOVE + PLOT_HEIGHT + BELOW)
    draw = partial(_draw_plots, title, plots, names, cut, TITLE + legend, height)
    return Panel(section, name, title, height, draw)


def _legend_columns(names: Collection[str]) -> int:
    """How many names stand side by side."""
    widest = text_width(names, FONT) / 72 + 0.5
    return max(1, min(len(names), int((PAGE_WIDTH - 0.2) / widest)))


def _draw_plots(
    title: str,
    plots: Sequence[_Plot],
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
    handles += [Line2D([], [], label=_CUT, **_cross())] * cut
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


def _draw_plot(plot: _Plot, ax: Axes) -> None:
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
