"""The effective context length of each task against the stage of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, NullLocator

from yoco_eval.lengths import format_length
from yoco_eval.printable import one_line, shortened

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
from .part import Part
from .stages import Stages
from .style import FONT, GRID, PAGE_WIDTH, SMALL_FONT, series

EFFECTIVE = "Effective context length"
FEWEST = 3  # checkpoints that make a curve
_NAME_LETTERS = 14  # of a checkpoint, at the axis
_MARGIN = 0.15  # inches, around names that stand upright
_MOST_LABELS = 16
_WIDE = 20  # the last step by the first one, from where the axis is logarithmic


@dataclass(frozen=True)
class _Plot:
    """values: of each checkpoint, in tokens; 0 if not even the shortest context length passes, None
    without results. lengths: those that were evaluated.
    """

    task: str
    values: Sequence[int | None]
    lengths: Sequence[int]


def _panels(comparison: Comparison) -> list[Panel]:
    """A plot for each task that has effective lengths; none where they are of few checkpoints."""
    plots = [plot for plot in _find_plots(comparison) if _count(plot) >= FEWEST]
    if comparison.stages is None or not plots:
        return []
    rows = math.ceil(len(plots) / PLOT_COLUMNS)
    names = [shortened(name, _NAME_LETTERS) for name in short_names(comparison.names)]
    below = BELOW if comparison.stages.told else text_width(names, FONT - 1) / 72 + _MARGIN
    height = TITLE + rows * (ABOVE + PLOT_HEIGHT + below)
    title = f"{EFFECTIVE} by {'training step' if comparison.stages.told else 'stage'}"
    draw = partial(_draw, title, plots, names, comparison.stages, below, height)
    return [Panel(EFFECTIVE, "effective-length", title, height, draw)]


def _find_plots(comparison: Comparison) -> list[_Plot]:
    plots = []
    for task in comparison.needles:
        values = [one.told_length if one else None for one in task.results]
        plots.append(_Plot(task.task, values, task.context_lengths))
    for curves in comparison.curves:
        if curves.effective_lengths and not curves.member:
            plots.append(_Plot(curves.task, curves.effective_lengths, curves.context_lengths))
    return plots


def _count(plot: _Plot) -> int:
    return sum(value is not None for value in plot.values)


def _draw(
    title: str,
    plots: Sequence[_Plot],
    names: Sequence[str],
    stages: Stages,
    below: float,
    height: float,
    figure: FigureBase,
) -> None:
    """below: inches, for what stands at the axes of stages."""
    draw_title(figure, title, height)
    whole = (PAGE_WIDTH - RIGHT) / min(len(plots), PLOT_COLUMNS)
    for place, plot in enumerate(plots):
        row, column = divmod(place, PLOT_COLUMNS)
        top = TITLE + row * (ABOVE + PLOT_HEIGHT + below) + ABOVE
        left = column * whole + LEFT
        ax = add_axes(figure, left, top, whole - LEFT, PLOT_HEIGHT, height)
        _draw_plot(plot, names, stages, ax)


def _draw_plot(plot: _Plot, names: Sequence[str], stages: Stages, ax: Axes) -> None:
    title = ax.set_title(one_line(plot.task, TITLE_LETTERS), size=FONT, pad=4)
    room = 1.1 * ax.get_window_extent().width
    title.set_fontsize(max(SMALL_FONT, FONT * min(1, room / title.get_window_extent().width)))
    there = [(x, v) for x, v in zip(stages.steps, plot.values, strict=True) if v is not None]
    none = math.log2(min(plot.lengths)) - 1  # where those stand that have no effective length
    heights = [math.log2(v) if v else none for _, v in there]
    ax.plot([x for x, _ in there], heights, **series(0))
    ticks = [none, *map(math.log2, plot.lengths)]
    labels = ["none", *map(format_length, plot.lengths)]
    step = math.ceil(len(ticks) / _MOST_LABELS)
    ax.set_yticks(ticks[::step], labels[::step], size=FONT - 1)
    ax.set_ylim(none - 0.4, ticks[-1] + 0.4)
    first, last = stages.steps[0], stages.steps[-1]
    if stages.told and first and last > _WIDE * first:  # such as stages of 64k, 256k and 1m
        ax.set_xscale("log")
        ratio = (last / first) ** 0.04
        ax.set_xlim(first / ratio, last * ratio)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        room = 0.04 * (last - first)
        ax.set_xlim(first - room, last + room)
    if stages.told:
        ax.xaxis.set_major_formatter(_step_text)
        ax.set_xlabel("Training step", size=FONT)
        ax.tick_params(axis="x", length=2, labelsize=FONT - 1)
    else:
        step = math.ceil(len(names) / _MOST_LABELS)
        ax.set_xticks(stages.steps[::step], names[::step], size=FONT - 1, rotation=90)
        ax.tick_params(axis="x", length=2)
    ax.tick_params(axis="y", length=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.set_axisbelow(True)


def _step_text(step: float, _: object) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if step >= unit:
            return f"{step / unit:g}{letter}"
    return f"{step:g}"


PART = Part(panels=_panels)
