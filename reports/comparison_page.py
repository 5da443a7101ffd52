"""A comparison as one HTML page: figures, tables and samples, with nothing to load from elsewhere.

The figures are matplotlib's, as SVG in the page; cells of heatmaps can be chosen, and show their
samples. All texts from results files are escaped, and the page's security policy allows no script
but its own.
"""

from __future__ import annotations

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from yoco_eval import __version__
from yoco_eval.lengths import format_length
from yoco_eval.printable import one_line, printable, shortened

from .cells import CHECKPOINT, NOTHING, Cell, Section, Table, transposed
from .comparison import Comparison, NeedleResult, NeedleTask
from .files import to_json
from .heatmap import HATCH, MISSING, format_depths, heatmap_figure
from .inline_svg import SVG, inline_svg
from .needles_section import GAPS, NEEDLES, effective_cell, effective_note, few_note
from .panels import Panel, file_name
from .section_notes import cut_note, incomparable
from .sections import panels, sections
from .stage_figure import EFFECTIVE
from .style import GRID, color, figure_style

_FILES = Path(__file__).parent / "html"
_INK = "#010203"  # drawn where the page's own colour of text shall stand
_COLORS = {  # that are others in the dark
    "--ink": _INK, "--grid": GRID, "--missing": MISSING, "--hatch": HATCH, "--first": color(0),
}  # fmt: skip
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_LONGEST = 2000  # characters of a sample's text that are shown


@dataclass(frozen=True)
class _Drawn:
    """name: for the file that the reader saves."""

    name: str
    title: str
    svg: Markup


@dataclass(frozen=True)
class _Shown:
    """A section with its figures. heatmaps: by task, those of all checkpoints."""

    section: Section
    heatmaps: dict[str, list[_Drawn]]
    figures: list[_Drawn]

    @property
    def id(self) -> str:
        return self.section.title.lower().replace(" ", "-")


def html(comparison: Comparison) -> str:
    """The whole page."""
    script = (_FILES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    environment.filters["key"] = _sort_key
    parts = vars(environment.get_template("parts.html").module)
    with figure_style(**{"axes.facecolor": "none"}, **dict.fromkeys(_INKED, _INK)):
        curves = [panel for panel in panels(comparison) if not panel.heatmap]
        shown = [_show(comparison, section, curves) for section in sections(comparison)]
        stages = [_draw(panel) for panel in curves if panel.section == EFFECTIVE]
    return environment.get_template("page.html").render(
        version=__version__,
        title=comparison.title,
        style=Markup((_FILES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        effective=_effective(comparison),
        stages=stages,
        many=comparison.many,
        sections=shown,
        data=_embedded(
            {
                "names": list(map(one_line, comparison.names)),
                "grids": list(map(_grid, comparison.needles)),
                "samples": [_samples(task) for task in comparison.needles],
                "colors": _COLORS | {"--ink": "#000000"},  # of figures that are saved
            }
        ),
        figure=parts["figure"],
        folded_tables=parts["folded_tables"],
        heatmaps=parts["heatmaps"],
        list=parts["list"],
        table=parts["table"],
    )


def _embedded(data: Any) -> Markup:
    """JSON that can stand in a script element."""
    text = to_json(data, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _show(comparison: Comparison, section: Section, curves: Sequence[Panel]) -> _Shown:
    heatmaps = {}
    if section.title == NEEDLES:
        for place, task in enumerate(comparison.needles):
            heatmaps[task.task] = list(_heatmaps(comparison, place))
    figures = [_draw(panel) for panel in curves if panel.section == section.title]
    return _Shown(section, heatmaps, figures)


def _draw(panel: Panel) -> _Drawn:
    svg = inline_svg(panel.figure(), panel.name, panel.title, _COLORS)
    return _Drawn(panel.name, panel.title, svg)


def _effective(comparison: Comparison) -> Table:
    rows = []
    notes: list[str] = []
    for task in comparison.needles:
        rows.append((Cell(task.task), *map(effective_cell, task.results)))
        notes += incomparable(comparison, task.task)
        if any(result and result.gaps for result in task.results):
            notes.append(GAPS)
        notes += few_note(comparison, task)
        notes += cut_note(comparison, [result.cut if result else None for result in task.results])
    notes = [*dict.fromkeys(notes), effective_note(comparison)]
    header = ("task", *comparison.names)
    table = Table(EFFECTIVE, header, tuple(rows), notes=tuple(notes))
    more_checkpoints = len(comparison.names) > len(rows)  # a table may be high, but not wide
    return transposed(table, CHECKPOINT) if comparison.many and more_checkpoints else table


def _heatmaps(comparison: Comparison, place: int) -> Iterator[_Drawn]:
    task = comparison.needles[place]
    for index, result in enumerate(task.results):
        if result:
            name = one_line(comparison.names[index])
            figure = heatmap_figure(result.run, name, task.runs)
            prefix = f"heatmap-{place}-{index}"
            title = f"{name}, {task.task}: accuracy by context length and needle depth"
            overlay = _cells(figure, task, place, index, result)
            svg = inline_svg(figure, prefix, title, _COLORS, overlay)
            yield _Drawn(f"{file_name(name)}-{file_name(task.task)}", title, svg)


def _cells(
    figure: Figure, task: NeedleTask, place: int, index: int, result: NeedleResult
) -> ET.Element:
    """Where the cells lie and what is in them, for the script to lay a button over each.

    Numbers, to keep the page small: of each cell its column, its row, how many are right, of how
    many, and the tokens that prompts were cut to, if they were.
    """
    dots = 72 / figure.dpi
    box = figure.axes[0].get_window_extent()
    left, top = box.x0 * dots, (figure.bbox.height - box.y1) * dots
    width = box.width * dots / len(task.context_lengths)
    height = box.height * dots / len(task.depths)
    columns = {length: column for column, length in enumerate(task.context_lengths)}
    rows = {depth: row for row, depth in enumerate(task.depths)}
    cells = [
        [
            columns[cell.context_length], rows[cell.depth], cell.correct, cell.samples,
            *([] if cell.cut_to is None else [cell.cut_to]),
        ]
        for cell in sorted(result.run.cells, key=lambda cell: (cell.depth, cell.context_length))
    ]  # fmt: skip
    attributes = {
        "class": "cells", "data-task": f"{place}", "data-checkpoint": f"{index}",
        "data-frame": " ".join(f"{part:.2f}" for part in (left, top, width, height)),
        "data-cells": to_json(cells, separators=(",", ":")),
    }  # fmt: skip
    return ET.Element(f"{{{SVG}}}g", attributes)


def _grid(task: NeedleTask) -> dict[str, list[str]]:
    """How the script names columns and rows, and the cells of `_samples`."""
    return {
        "lengths": list(map(format_length, task.context_lengths)),
        "depths": format_depths(task.depths),
        "columns": list(map(str, task.context_lengths)),
        "rows": [f"{float(depth)}" for depth in task.depths],
    }


def _cell_key(context_length: int, depth: float) -> str:
    return f"{context_length}/{float(depth)}"


def _samples(task: NeedleTask) -> dict[str, list[dict[str, Any]]]:
    """By cell: prompts, each once, with the answers of all checkpoints that got it."""
    cells: dict[str, dict[tuple, dict[str, Any]]] = {}
    for index, result in enumerate(task.results):
        for (context_length, depth), samples in (result.samples if result else {}).items():
            prompts = cells.setdefault(_cell_key(context_length, depth), {})
            for one in samples:
                prompt = {
                    "sample": one.sample, "question": one.question, "expected": one.expected,
                    "needle": one.needle, "excerpt": one.excerpt, "tokens": one.tokens,
                }  # fmt: skip
                texts = {k: shortened(v, _LONGEST) for k, v in prompt.items() if isinstance(v, str)}
                entry = prompts.setdefault(tuple(prompt.values()), prompt | texts | {"answers": []})
                answer = {"generated": shortened(one.generated, _LONGEST), "right": one.right}
                entry["answers"].append({"checkpoint": index} | answer)
    return {key: list(prompts.values()) for key, prompts in cells.items()}


def _sort_key(cell: Cell) -> str:
    """What a cell is sorted by; empty where there is no figure."""
    if cell.value is not None:
        return f"{cell.value:.17g}"
    return "" if cell.text == NOTHING else cell.text
