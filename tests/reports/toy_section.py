"""A section that is added as docs/architecture.md tells: how many seconds the evaluations took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yoco_eval.reports.cells import CHECKPOINT, NOTHING, Cell, Section, Table
from yoco_eval.reports.comparison import Comparison
from yoco_eval.reports.curve_plots import Plot, plot_panels
from yoco_eval.reports.panels import Panel
from yoco_eval.reports.part import Part
from yoco_eval.reports.runs import Checkpoint

TIMES = "Times"


def _seconds(comparison: Comparison) -> list[dict[int, float]]:
    """Of each checkpoint, by the longest context length of a results file."""
    return [_by_length(checkpoint) for checkpoint in comparison.runs]


def _by_length(checkpoint: Checkpoint) -> dict[int, float]:
    """Each file counts once, of however many tasks it is, and all files of a task do."""
    files = {file.path: file for run in checkpoint.tasks.values() for file in run.files}
    longest: dict[Path | None, int] = {}
    for run in checkpoint.tasks.values():
        for scores in run.by_length.values():
            for length, score in scores.items():
                longest[score.source] = max(length, longest.get(score.source, 0))
    seconds: dict[int, float] = {}
    for path, file in files.items():
        told = file.data.get("total_evaluation_time_seconds")
        if path in longest and told is not None:
            seconds[longest[path]] = seconds.get(longest[path], 0) + float(told)
    return seconds


def _sections(comparison: Comparison) -> Iterator[Section]:
    rows = tuple(
        (Cell(name), Cell(f"{total:.0f}", value=total) if total else Cell(NOTHING))
        for name, seconds in zip(comparison.names, _seconds(comparison), strict=True)
        for total in [sum(seconds.values())]
    )
    tables = (Table("evaluation, s", (CHECKPOINT, "all tasks"), rows),)
    yield Section(TIMES, tables=tables if any(_seconds(comparison)) else ())


def _panels(comparison: Comparison) -> list[Panel]:
    curves = _seconds(comparison)
    plots = [Plot("evaluation, s", curves)] if any(curves) else []
    return plot_panels(comparison, TIMES, "times", TIMES, plots)


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for name, seconds in zip(comparison.names, _seconds(comparison), strict=True):
        for length, value in seconds.items():
            yield {"kind": "time", "checkpoint": name, "context_length": length, "value": value}


PART = Part(_sections, _panels, _rows)
