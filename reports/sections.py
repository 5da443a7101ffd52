"""The sections of a report: each is one file, which is listed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from . import (
    benchmarks_section,
    costs_section,
    curves_section,
    differences_section,
    needles_section,
    setup_section,
    stage_figure,
)
from .cells import Section, Table
from .comparison import Comparison
from .panels import Panel
from .part import CSV_COLUMNS

PARTS = (  # the conclusions first
    stage_figure.PART,
    differences_section.PART,
    needles_section.PART,
    benchmarks_section.PART,
    curves_section.PART,
    costs_section.PART,
    setup_section.PART,
)


def sections(comparison: Comparison, floating: bool = False) -> list[Section]:
    """All there is to say; sections that are empty are left out.

    floating: whether each table stands by itself, with all of its notes; else a section has a note
        once.
    """
    found = [section for part in PARTS for section in part.sections(comparison)]
    if not floating:
        found = [replace(one, tables=tuple(_without_repetition(one.tables))) for one in found]
    return [one for one in found if one.text or one.alarms or one.items or one.tables]


def _without_repetition(tables: Iterable[Table]) -> Iterable[Table]:
    """The tables of a section, each note below the first that it is about."""
    told: set[str] = set()
    for table in tables:
        yield replace(table, notes=tuple(note for note in table.notes if note not in told))
        told.update(table.notes)


def panels(comparison: Comparison) -> list[Panel]:
    """All figures that the results allow; heatmaps first, of many checkpoints behind the rest."""
    found = [panel for part in PARTS for panel in part.panels(comparison)]
    return sorted(found, key=lambda panel: panel.heatmap == comparison.many)


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """All numbers, for programs.

    Raises:
        ValueError: a section names a column that there is not.
    """
    for part in PARTS:
        for row in part.rows(comparison):
            if unknown := sorted(row.keys() - set(CSV_COLUMNS)):
                where = part.rows.__module__.rpartition(".")[2]
                raise ValueError(f"{where}: a row has {', '.join(unknown)}, not in CSV_COLUMNS")
            yield row
