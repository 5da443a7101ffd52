"""A comparison as one HTML page: figures, tables and samples, with nothing to load from elsewhere.

The figures are matplotlib's, as SVG in the page; cells of heatmaps can be chosen, and show their
samples. All texts from results files are escaped, and the page's security policy allows no script
but its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
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

from .comparison import Comparison, NeedleResult, NeedleTask
from .comparison_figures import Panel, curve_panels, file_name
from .comparison_tables import (
    GAPS,
    NEEDLES,
    NOTHING,
    Cell,
    Section,
    Table,
    cut_note,
    effective_note,
    effective_text,
    incomparable,
    sections,
)
from .files import to_json
from .heatmap import HATCH, MISSING, format_depths, heatmap_figure
from .style import GRID, color, figure_style

_FILES = Path(__file__).parent / "html"
_SVG = "http://www.w3.org/2000/svg"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
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
        curves = curve_panels(comparison)
        shown = [_show(comparison, section, curves) for section in sections(comparison)]
    return environment.get_template("page.html").render(
        version=__version__,
        names=comparison.names,
        style=Markup((_FILES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        effective=_effective(comparison),
        sections=shown,
        data=_embedded(
            {
                "names": list(map(one_line, comparison.names)),
                "samples": [_samples(task) for task in comparison.needles],
                "colors": _COLORS | {"--ink": "#000000"},  # of figures that are saved
            }
        ),
        figure=parts["figure"],
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
    figures = [
        _Drawn(panel.name, panel.title, _svg(panel.figure(), panel.name, panel.title))
        for panel in curves
        if panel.section == section.title
    ]
    return _Shown(section, heatmaps, figures)


def _effective(comparison: Comparison) -> Table:
    rows = []
    notes: list[str] = []
    for task in comparison.needles:
        cells = [
            Cell(effective_text(result), value=result.effective_length or 0)
            if result
            else Cell(NOTHING)
            for result in task.results
        ]
        rows.append((Cell(task.task), *cells))
        notes += incomparable(comparison, task.task)
        if any(result and result.gaps for result in task.results) and GAPS not in notes:
            notes.append(GAPS)
        cut = [result.cut if result else None for result in task.results]
        for note in cut_note(comparison, cut):
            notes += [note] * (note not in notes)
    notes.append(effective_note(comparison))
    header = ("task", *comparison.names)
    return Table("Effective context length", header, tuple(rows), notes=tuple(notes))


def _heatmaps(comparison: Comparison, place: int) -> Iterator[_Drawn]:
    task = comparison.needles[place]
    for index, result in enumerate(task.results):
        if result:
            name = one_line(comparison.names[index])
            figure = heatmap_figure(result.run, name, task.runs)
            prefix = f"heatmap-{place}-{index}"
            title = f"{name}, {task.task}: accuracy by context length and needle depth"
            svg = _svg(figure, prefix, title, _cells(figure, task, place, name, index, result))
            yield _Drawn(f"{file_name(name)}-{file_name(task.task)}", title, svg)


def _cells(
    figure: Figure, task: NeedleTask, place: int, name: str, index: int, result: NeedleResult
) -> ET.Element:
    """A rectangle over each cell, for the script to attach to."""
    dots = 72 / figure.dpi
    box = figure.axes[0].get_window_extent()
    left, top = box.x0 * dots, (figure.bbox.height - box.y1) * dots
    width = box.width * dots / len(task.context_lengths)
    height = box.height * dots / len(task.depths)
    depths = dict(zip(task.depths, format_depths(task.depths), strict=True))
    cells = ET.Element(f"{{{_SVG}}}g", {"class": "cells"})
    for cell in sorted(result.run.cells, key=lambda cell: (cell.depth, cell.context_length)):
        column = task.context_lengths.index(cell.context_length)
        row = task.depths.index(cell.depth)
        label = (
            f"{name}, {format_length(cell.context_length)} tokens, depth {depths[cell.depth]} %: "
            f"{cell.correct} of {cell.samples} right"
        )
        if cell.cut_to is not None:
            label += f", of prompts cut to {cell.cut_to} tokens"
        attributes = {
            "class": "cell", "role": "button", "tabindex": "-1", "aria-label": label,
            "data-task": place, "data-checkpoint": index, "data-column": column, "data-row": row,
            "data-key": _cell_key(cell.context_length, cell.depth),
        }  # fmt: skip
        group = ET.SubElement(cells, f"{{{_SVG}}}g", {k: str(v) for k, v in attributes.items()})
        ET.SubElement(group, f"{{{_SVG}}}title").text = label
        corner = {"x": left + column * width, "y": top + row * height}
        size = {"width": width, "height": height}
        ET.SubElement(group, f"{{{_SVG}}}rect", {k: f"{v:.2f}" for k, v in (corner | size).items()})
    return cells


def _cell_key(context_length: int, depth: float) -> str:
    return f"{context_length}/{float(depth)}"


def _svg(figure: Figure, prefix: str, title: str, overlay: ET.Element | None = None) -> Markup:
    """The figure as an element of the page, in the page's colours.

    prefix: of all ids, which one page must not have twice. overlay: drawn on top.
    """
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    text = file.getvalue().decode()
    for variable, value in _COLORS.items():
        text = text.replace(value, f"var({variable})")
    root = ET.fromstring(text)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for key, value in list(element.items()):
            if key == "id" and f"#{value}" in text:
                element.set(key, f"{prefix}-{value}")
            elif key == "id":
                del element.attrib[key]
            elif key.endswith("href"):
                element.set(key, value.replace("#", f"#{prefix}-"))
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.set("role", "group" if overlay is not None else "img")
    root.set("aria-label", one_line(title))
    if overlay is not None:
        root.append(overlay)
    return Markup(ET.tostring(root, encoding="unicode"))


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
