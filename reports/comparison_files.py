"""Writes comparisons to files: HTML, figures, Markdown, LaTeX, CSV of all numbers, JSON.

A file whose name ends in `card.md` is a block for a model card, any other `.md` the whole report.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from .comparison import Comparison
from .comparison_page import html
from .comparison_text import latex, markdown
from .files import FIGURES, check_path, to_csv, to_json, write_figure, write_text
from .model_card import model_card
from .panels import stack
from .part import CSV_COLUMNS
from .results import ResultsError
from .sections import panels, rows
from .statistics import CONFIDENCE, LEVEL
from .style import figure_style

KIND = "yoco-eval comparison"  # stands in the JSON
CARD = "card.md"  # how the name of a block for a model card ends
SUFFIXES = (".html", *FIGURES, ".md", ".csv", ".json", ".tex")


def check_output(path: Path) -> None:
    """Raises ResultsError if `save_comparison` cannot write to such a path."""
    check_path(path, SUFFIXES)


def save_comparison(comparison: Comparison, path: str | Path) -> None:
    """Writes it to `path`, whose suffix says how: one of `SUFFIXES`.

    Figures stand one below the other in a .png or .svg, and on pages of their own in a .pdf.
    Raises ResultsError for another suffix, a folder that is not there, or no figure to draw.
    """
    path = Path(path)
    check_output(path)
    if path.suffix.lower() in FIGURES:
        with figure_style():
            _write_figures(comparison, path)
        return
    forms = {".html": html, ".md": markdown, ".csv": _csv, ".json": _json, ".tex": latex}
    form = model_card if path.name.lower().endswith(CARD) else forms[path.suffix.lower()]
    write_text(path, form(comparison))


def _write_figures(comparison: Comparison, path: Path) -> None:
    found = panels(comparison)
    if not found:
        raise ResultsError(
            f"{path}: nothing to draw: no needles, no figures by context length, no profiles; "
            "write the tables to a .md or .tex file"
        )
    if path.suffix.lower() == ".pdf":
        write_figure(path, *(panel.figure() for panel in found))
    else:
        write_figure(path, stack(found))


def _csv(comparison: Comparison) -> str:
    """One figure a row; columns that do not concern it are empty. An effective length 0 is none."""
    return to_csv(CSV_COLUMNS, rows(comparison))


def _json(comparison: Comparison) -> str:
    """All of it but runs and logged samples; lists by checkpoint have its order."""
    data = {
        "kind": KIND,
        "confidence": CONFIDENCE,
        "level": LEVEL,
        **asdict(replace(comparison, runs=())),
        "findings": [
            {"sentence": comparison.sentence(finding), "regression": finding.regression}
            | asdict(finding)
            for finding in comparison.findings
        ],
    }
    del data["runs"]
    for task in data["needles"]:
        for result in filter(None, task["results"]):
            del result["samples"]
            for one in result["by_length"]:
                low, high = one.pop("interval")
                one |= {"accuracy": one["correct"] / one["samples"], "low": low, "high": high}
    return to_json(data, indent=2, default=str) + "\n"
