"""The section on results by context length: RULER, BABILong, losses, whatever is no needle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from yoco_eval.lengths import format_length
from yoco_eval.printable import listed

from .cells import CHECKPOINT, NOTHING, Cell, Section, Table, transposed
from .comparison import Comparison, LengthCurves
from .curve_plots import Plot, plot_panels
from .heatmap import CUT
from .pairs import task_name
from .panels import Panel
from .part import Part
from .section_notes import (
    METRICS,
    cut_note,
    effective_told,
    figure_cell,
    incomparable,
    length_cell,
    noted_cut,
)
from .single_model import beside
from .task_runs import BUCKETS

CURVES = "By context length"
BINS = (
    "Lengths are bins of logged prompts, which have as many tokens or fewer, and more than half of "
    "that, with 4 characters for a token."
)


def _sections(comparison: Comparison) -> Iterator[Section]:
    yield _by_length(comparison)


def _panels(comparison: Comparison) -> list[Panel]:
    return plot_panels(comparison, CURVES, "curves", CURVES, list(_curve_plots(comparison)))


def _by_length(comparison: Comparison) -> Section:
    if comparison.single:
        return Section(CURVES, tables=(*_by_metric(comparison), *_members(comparison)))
    tables = [_curves(comparison, c) for c in comparison.curves if not c.member]
    tables += _members(comparison)
    text = "Means alone; whether they differ significantly is not tested." if tables else ""
    shown = {curves.task for curves in comparison.curves} | comparison.member_tasks
    if any(test.task in shown for test in comparison.tests):
        text = (
            "Means; whether they differ is tested where samples were logged (--log_samples), or "
            "lm-eval tells standard errors."
        )
    return Section(CURVES, text, tables=tuple(tables))


def _members(comparison: Comparison) -> Iterable[Table]:
    """Of each group, folded, its tasks at each context length, and over all of them."""
    rows: dict[str, dict[str, list[tuple[Cell, ...]]]] = {}
    for curves in comparison.curves:
        if curves.member and curves.metric not in BUCKETS:
            of_task = rows.setdefault(curves.group, {}).setdefault(curves.task, [])
            of_task += [(Cell(curves.task), *row) for row in _rows_of(curves)]
    for group, members in comparison.members.items():
        for member in members:
            cells = (figure_cell(s.value) if s else Cell(NOTHING) for s in member.scores)
            of_task = rows.setdefault(group, {}).setdefault(member.task, [])
            of_task.append((Cell(member.task), Cell("all"), *cells))
    for group, tasks in rows.items():
        table = [row for of_task in tasks.values() for row in of_task]
        binned = any(curves.binned and curves.group == group for curves in comparison.curves)
        yield Table(
            f"{group}: its tasks", ("task", "context", *comparison.names), tuple(table),
            notes=(BINS,) * binned, folded=True,
        )  # fmt: skip


def _by_metric(comparison: Comparison) -> Iterable[Table]:
    """Of one model, tables with a column for each task."""
    metrics: dict[str, dict[str, Table]] = {}
    for one in comparison.curves:
        if not one.member:
            keys = {(other.task, other.n_shot) for other in comparison.curves}
            column = task_name((one.task, one.n_shot), keys)
            metrics.setdefault(one.metric, {})[column] = _curves(comparison, one)
    for metric, tables in metrics.items():
        yield beside(METRICS.get(metric, metric), tables)


def _rows_of(curves: LengthCurves) -> list[tuple[Cell, ...]]:
    """A row for each context length."""
    return [
        (
            length_cell(n),
            *(
                figure_cell(values[n], CUT * (n in cut))
                if values and n in values
                else Cell(NOTHING)
                for values, cut in zip(curves.values, curves.cut, strict=True)
            ),
        )
        for n in curves.context_lengths
    ]


def _curves(comparison: Comparison, curves: LengthCurves) -> Table:
    rows = _rows_of(curves)
    foot: tuple[Cell, ...] = ()
    if curves.effective_lengths:
        shown = [
            effective_told(n, values, cut) if values else NOTHING
            for n, values, cut in zip(
                curves.effective_lengths, curves.values, curves.cut, strict=True
            )
        ]
        foot = (Cell("effective"), *map(Cell, shown))
    title = f"{curves.task}: {METRICS.get(curves.metric, curves.metric)}"
    notes = [*incomparable(comparison, curves.task), *cut_note(comparison, curves.cut)]
    notes += [BINS] * curves.binned
    left_out = [
        f"{name} {listed(map(format_length, lengths))}"
        for name, lengths in zip(comparison.names, curves.left_out, strict=True)
        if lengths
    ]
    if left_out:
        told = ", ".join(left_out)
        notes.append(f"Left out, since their tokens begin at another length: {told}.")
    table = Table(title, ("context", *comparison.names), tuple(rows), foot, notes=tuple(notes))
    return transposed(table, CHECKPOINT) if comparison.many else table


def _curve_plots(comparison: Comparison) -> Iterator[Plot]:
    for curves in comparison.curves:
        if not curves.member:
            title = f"{curves.task}: {METRICS.get(curves.metric, curves.metric)}"
            if any(values := _from_one_token(curves)):
                share = curves.metric == "acc"
                yield Plot(title, values, share=share, cut=curves.cut)


def _from_one_token(curves: LengthCurves) -> list[dict[int, float] | None]:
    """Without BABILong's 0K, which has no place on a logarithmic axis."""
    return [
        {length: value for length, value in values.items() if length} if values else None
        for values in curves.values
    ]


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    names = comparison.names
    for curves in comparison.curves:
        of = {
            "kind": "by length", "task": curves.task, "n_shot": curves.n_shot,
            "metric": curves.metric,
        }  # fmt: skip
        for name, values, cut in zip(names, curves.values, curves.cut, strict=True):
            for length, value in (values or {}).items():
                yield {
                    **of, "checkpoint": name, "context_length": length, "value": value,
                    "note": noted_cut(cut.get(length)),
                }  # fmt: skip
        for name, effective in zip(names, curves.effective_lengths or (), strict=False):
            if effective is not None:
                yield of | {"kind": "effective length", "checkpoint": name, "value": effective}


PART = Part(_sections, _panels, _rows)
