"""Figures of reports before they are drawn, and what all of them measure in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from yoco_eval.printable import one_line, shortened

from .style import PAGE_WIDTH, TITLE_FONT

# Inches.
LEFT, RIGHT = 0.48, 0.2  # beside the axes: labels of the y axis; of the threshold
TITLE = 0.28  # of a figure
ABOVE = 0.22  # each plot: its title
BELOW = 0.45  # labels of the x axis
PLOT_HEIGHT = 1.6

PLOT_COLUMNS = 3
TITLE_LETTERS = 79  # of a title at most
_LONGEST = 24  # letters of a name that stay as they are


@dataclass(frozen=True)
class Panel:
    """A figure that is not drawn yet.

    section: heading of the report under which it belongs.
    name: for files: letters, digits, dots, dashes and underscores.
    height: in inches; it is `PAGE_WIDTH` wide.
    draw: into a figure, or part of one, of that size.
    heatmap: whether it shows cells, which the page has ones to choose instead of.
    """

    section: str
    name: str
    title: str
    height: float
    draw: Callable[[FigureBase], None]
    heatmap: bool = False

    def figure(self) -> Figure:
        return stack([self])


def stack(figures: Sequence[Panel]) -> Figure:
    """The panels in one figure, one below the other."""
    height = sum(panel.height for panel in figures)
    whole = Figure(figsize=(PAGE_WIDTH, height))
    parts = whole.subfigures(
        len(figures), 1, squeeze=False, height_ratios=[p.height for p in figures], hspace=0
    )
    for panel, part in zip(figures, parts[:, 0], strict=True):
        part.set_facecolor("none")
        panel.draw(part)
    return whole


def add_axes(
    figure: FigureBase, left: float, top: float, width: float, below: float, height: float
) -> Axes:
    """Axes in a figure `height` inches high: all measures in inches, from its top left corner."""
    return figure.add_axes(
        (left / PAGE_WIDTH, 1 - (top + below) / height, width / PAGE_WIDTH, below / height)
    )


def draw_title(figure: FigureBase, title: str, height: float) -> None:
    figure.text(
        0.5, 1 - 0.06 / height, one_line(title, TITLE_LETTERS), size=TITLE_FONT, weight="bold",
        ha="center", va="top",
    )  # fmt: skip


def short_names(names: Sequence[str]) -> list[str]:
    """The names, long ones without what all have in common at either end."""
    lines = [one_line(name) for name in names]
    if max(map(len, lines)) <= _LONGEST or len(set(lines)) < 2:
        return [shortened(line, 2 * _LONGEST) for line in lines]
    start = len(commonprefix(lines))
    end = len(commonprefix([line[start:][::-1] for line in lines]))
    # Whole words and numbers stay: step-4000 and step-5000 are not told apart by 4 and 5.
    while start and lines[0][start - 1].isalnum():
        start -= 1
    while end and lines[0][-end].isalnum():
        end -= 1
    cut = [("…" * bool(start), line[start : len(line) - end], "…" * bool(end)) for line in lines]
    return [shortened("".join(parts), 2 * _LONGEST) for parts in cut]


def file_name(task: str) -> str:
    """The text without what no file's name should have."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in task)
