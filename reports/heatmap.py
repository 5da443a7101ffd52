"""Draws needle results as a heatmap: a figure, a CSV table, or blocks in the terminal.

Context length runs across and needle depth down; accuracy is the colour, on one scale from 0 to 1,
and a figure in each cell. Cells without results are hatched in a figure, a dash in the terminal.
"""

import logging
import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure, FigureBase
from matplotlib.textpath import TextPath
from rich.console import Console
from rich.style import Style
from rich.text import Text

from yoco_eval.lengths import format_length
from yoco_eval.printable import VALUE, one_line

from .files import FIGURES, check_path, to_csv, write_figure, write_text
from .results import NeedleCell, NeedleRun, common_grid
from .style import COLUMN_WIDTH, FONT, PAGE_WIDTH, TITLE_FONT, figure_style

logger = logging.getLogger(__name__)

COLORS = matplotlib.colormaps["viridis"]  # perceptually uniform, and safe for the colour-blind
SCALE = Normalize(0, 1)
CUT = "‡"  # behind a context length at which prompts were cut
MISSING = "#f2f2f2"
HATCH = "#bdbdbd"
# Sizes on paper, in inches, and of fonts in points.
ROW_HEIGHT = (0.14, 0.26)  # of a grid of many rows, of few
HEIGHT = (1.1, 7.5)  # of the whole grid
CELL_FONT = (4.5, 7)  # the smallest that can be read; the largest that is wanted
COMFORTABLE_FONT = 5.5  # smaller ones make the figure a page wide
SEAM = 0.5  # between cells, in points

CSV_COLUMNS = (
    "model", "task", "context_length", "depth", "samples", "correct", "accuracy", "cut_to",
)  # fmt: skip


def save_heatmap(run: NeedleRun, path: str | Path, title: str | None = None) -> None:
    """Writes the heatmap to `path`, whose suffix says how: .png, .svg, .pdf or .csv.

    title: stands in the figure in place of the model's name.
    Raises ResultsError for another suffix or a folder that is not there.
    """
    path = Path(path)
    check_output(path)
    if path.suffix.lower() == ".csv":
        write_text(path, _csv(run))
        return
    with figure_style():
        write_figure(path, heatmap_figure(run, title))


def check_output(path: Path) -> None:
    """Raises ResultsError if `save_heatmap` cannot write to such a path."""
    check_path(path, (*FIGURES, ".csv"))


def heatmap_figure(
    run: NeedleRun, title: str | None = None, beside: Sequence[NeedleRun] = ()
) -> Figure:
    """One heatmap with title and colour bar, as wide as a paper's column or, if need be, page.

    beside: as in `draw_heatmap`.
    """
    lengths, depths = common_grid([run, *beside])
    ticks = text_width(format_depths(depths), FONT) / 72
    left, right = 0.32 + ticks, 0.6
    figures, columns = cell_figures(run, beside), len(lengths)
    for width in (COLUMN_WIDTH, PAGE_WIDTH):
        grid_width = width - left - right
        if fit_font(figures, grid_width / columns) >= COMFORTABLE_FONT:
            break
    height = grid_height(len(depths))

    name = one_line(title or run.model, VALUE)
    heading = textwrap.wrap(name, int(width * 72 / (TITLE_FONT * 0.66)))
    facts = textwrap.wrap(describe(run), int(width * 72 / (FONT * 0.56)))
    facts += ["hatched: no result"] * (len(run.cells) < len(lengths) * len(depths))
    if run.cut:
        facts.append(cut_note(run))
    top = 0.1 + (1.3 * TITLE_FONT * len(heading) + 1.4 * FONT * len(facts)) / 72
    longest = text_width(_labels(run, lengths), FONT) / 72
    slanted = longest > 0.9 * grid_width / columns
    bottom = 0.37 + (0.7 * longest if slanted else 0)

    total = height + top + bottom
    figure = Figure(figsize=(width, total))
    frame = (left / width, bottom / total, grid_width / width, height / total)
    ax = figure.add_axes(frame)
    draw_heatmap(run, ax, beside)
    bar = figure.add_axes((1 - (right - 0.08) / width, frame[1], 0.09 / width, frame[3]))
    add_color_bar(figure, bar)

    y = 1 - 0.05 / total
    for lines, size, weight in ((heading, TITLE_FONT, "bold"), (facts, FONT, "normal")):
        for line in lines:
            text = figure.text(0.5, y, line, size=size, weight=weight, ha="center", va="top")
            room = 0.96 * figure.bbox.width / text.get_window_extent().width
            text.set_fontsize(size * min(1, room))  # wide letters
            y -= (1.3 if weight == "bold" else 1.4) * size / 72 / total
    return figure


def draw_heatmap(run: NeedleRun, ax: Axes, beside: Sequence[NeedleRun] = ()) -> QuadMesh:
    """Draws the cells and both axes, without title and colour bar, into `ax` as it lies now.

    beside: runs that are drawn side by side with this one: all have one grid, and as many digits.
    Returns the coloured cells. Fonts are sized to fit; figures too small to read are left out, with
    a warning.
    """
    lengths, depths = common_grid([run, *beside])
    accuracy = {(cell.context_length, cell.depth): cell.accuracy for cell in run.cells}
    grid = [[accuracy.get((n, depth), math.nan) for n in lengths] for depth in depths]
    ax.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
    ax.set_facecolor(MISSING)
    if len(run.cells) < len(lengths) * len(depths):
        ax.patch.set(hatch="////////", edgecolor=HATCH, linewidth=0)
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())  # in inches
    cell_width, cell_height = box.width / len(lengths), box.height / len(depths)
    seam = min(SEAM, 2 * min(cell_width, cell_height))
    mesh = ax.pcolormesh(grid, cmap=COLORS, norm=SCALE, edgecolors="white", linewidth=seam)
    _label_lengths(ax, _labels(run, lengths), cell_width)
    _label_depths(ax, depths, cell_height)
    ax.tick_params(length=0, pad=3)
    ax.spines[:].set_visible(False)

    figures = cell_figures(run, beside)
    font = fit_font(figures, cell_width, cell_height)
    if font < CELL_FONT[0]:
        logger.warning(
            "%d x %d cells are drawn without figures, being too small for them; a .csv has them",
            len(lengths),
            len(depths),
        )
        return mesh
    for cell, text in figures.items():
        ax.text(
            lengths.index(cell.context_length) + 0.5,
            depths.index(cell.depth) + 0.5,
            text,
            size=font,
            color=_ink(cell.accuracy),
            ha="center",
            va="center_baseline",
        )
    return mesh


def grid_height(rows: int) -> float:
    """How high, in inches, a grid of so many depths is drawn."""
    row = min(max(2.6 / rows, ROW_HEIGHT[0]), ROW_HEIGHT[1])
    return min(max(rows * row, HEIGHT[0]), HEIGHT[1])


def add_color_bar(figure: FigureBase, ax: Axes) -> None:
    """Fills `ax`, upright and narrow, with the colour bar of every heatmap."""
    bar = figure.colorbar(ScalarMappable(SCALE, COLORS), cax=ax, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("Accuracy", size=FONT, labelpad=3)
    bar.ax.set_yticks(bar.get_ticks(), ["0", "0.25", "0.5", "0.75", "1"], size=FONT)
    bar.ax.tick_params(length=2, width=0.6, pad=2)
    bar.ax.spines["outline"].set_visible(False)


def print_heatmap(run: NeedleRun, console: Console, title: str | None = None) -> None:
    """Prints the heatmap in blocks no wider than the console, coloured if the console is."""
    labels = [f"{depth} %" for depth in format_depths(run.depths)]
    corner = "depth"
    margin = max(len(label) for label in [corner, *labels])
    cells = {(cell.context_length, cell.depth): cell for cell in run.cells}
    figures = cell_figures(run)
    lengths = run.context_lengths
    labels_of = dict(zip(lengths, _labels(run, lengths), strict=True))
    column = 1 + max(5, *map(len, labels_of.values()))  # 5: a blank before 0.95
    per_block = max(1, (console.width - margin - 1) // column)

    console.print(Text(one_line(title or run.model, VALUE), style="bold"))
    missing = len(run.cells) < len(lengths) * len(run.depths)
    console.print(Text(describe(run) + ", -: no result" * missing))
    if run.cut:
        console.print(Text(cut_note(run)))
    for start in range(0, len(lengths), per_block):
        block = lengths[start : start + per_block]
        header = "".join(f"{labels_of[n]:>{column - 1}} " for n in block)
        console.print()
        console.print(Text(f"{corner:>{margin}} {header}", style="bold"))
        for depth, label in zip(run.depths, labels, strict=True):
            line = Text(f"{label:>{margin}} ")
            for n in block:
                cell = cells.get((n, depth))
                if cell is None:
                    line.append(f"{'-':>{column - 1}} ", style="dim")
                else:
                    color = to_hex(COLORS(SCALE(cell.accuracy)))
                    style = Style(color=_ink(cell.accuracy), bgcolor=color)
                    line.append(f"{figures[cell]:>{column - 1}} ", style=style)
            console.print(line)


def describe(run: NeedleRun) -> str:
    """The line below the title: mean accuracy, samples per cell, prompts, runs if several."""
    samples = sorted({cell.samples for cell in run.cells})
    span = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    return (
        f"mean accuracy {run.accuracy:.3f}, "
        f"{span} sample{'s' * (span != '1')} per cell, "
        f"{run.prompts} prompt{'s' * (run.prompts != 1)}"
        + f", {len(run.sources)} runs"
        * (len(run.sources) > 1)
    )


def cut_note(run: NeedleRun) -> str:
    """What the mark at context lengths means."""
    left = sorted(set(run.cut.values()))
    span = f"{left[0]}" if len(left) == 1 else f"{left[0]} to {left[-1]}"
    return f"{CUT}: prompts cut to {span} tokens, the backend's max_length"


def cell_figures(run: NeedleRun, beside: Sequence[NeedleRun] = ()) -> dict[NeedleCell, str]:
    """Every cell's accuracy as text: one decimal if that is exact in all cells, else two.

    beside: runs whose cells count, too.
    Only exact values are written 0.00 and 1.00: 399 of 400 is 0.99.
    """
    if all(10 * cell.correct % cell.samples == 0 for one in (run, *beside) for cell in one.cells):
        return {cell: f"{cell.accuracy:.1f}" for cell in run.cells}
    figures = {}
    for cell in run.cells:
        exact = cell.correct in (0, cell.samples)
        shown = cell.accuracy if exact else min(max(cell.accuracy, 0.01), 0.99)
        figures[cell] = f"{shown:.2f}"
    return figures


def format_depths(depths: list[float]) -> list[str]:
    """Depths in percent with at most one decimal, or as many as it takes to tell them apart."""
    for decimals in range(1, 8):  # read depths have 9 decimals, so 7 in percent
        labels = [f"{100 * depth:.{decimals}f}".removesuffix(".0") for depth in depths]
        if len(set(labels)) == len(depths):
            break
    return labels


def _csv(run: NeedleRun) -> str:
    return to_csv(
        CSV_COLUMNS,
        (
            {"model": run.model, "task": run.task}
            | {name: getattr(cell, name) for name in CSV_COLUMNS[2:]}
            for cell in run.cells
        ),
    )


def fit_font(figures: dict[NeedleCell, str], width: float, height: float = math.inf) -> float:
    """The font size, in points, of the cells' figures in cells of width x height inches."""
    widest = text_width(set(figures.values()), 1)
    return min(CELL_FONT[1], 72 * width / (widest + 0.6), 72 * height / 1.25)


def _labels(run: NeedleRun, lengths: Iterable[int]) -> list[str]:
    cut = run.cut
    return [format_length(n) + CUT * (n in cut) for n in lengths]


def _label_lengths(ax: Axes, labels: list[str], cell_width: float) -> None:
    slanted = text_width(labels, FONT) > 0.9 * 72 * cell_width
    step = math.ceil(1.1 * FONT / (72 * cell_width))
    style: dict[str, Any] = {}
    if slanted:
        style = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ticks = range(0, len(labels), step)
    ax.set_xticks([i + 0.5 for i in ticks], labels[::step], size=FONT, **style)
    ax.set_xlabel("Context length (tokens)", size=FONT)


def _label_depths(ax: Axes, depths: list[float], cell_height: float) -> None:
    step = math.ceil(1.1 * FONT / (72 * cell_height))
    ticks = range(0, len(depths), step)
    ax.set_yticks([i + 0.5 for i in ticks], format_depths(depths)[::step], size=FONT)
    ax.set_ylabel("Needle depth (%)", size=FONT)


def text_width(texts: Iterable[str], size: float) -> float:
    """The width of the widest text at font size `size`, in points."""
    return size * max(map(_width, texts))


@lru_cache(1 << 12)
def _width(text: str) -> float:
    """Of a text in points of its font's size; long to find, and the same on many heatmaps."""
    return TextPath((0, 0), text, size=1).get_extents().width


def _ink(accuracy: float) -> str:
    """Black or white, whichever has the higher contrast (as in WCAG) on the cell's colour."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in COLORS(SCALE(accuracy))[:3]
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
