"""The section on needles: accuracy by context length, effective lengths, heatmaps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from yoco_eval.lengths import format_length
from yoco_eval.printable import listed, one_line, shortened

from .cells import CHECKPOINT, NOTHING, Cell, Section, Table, transposed
from .comparison import Comparison, NeedleResult, NeedleTask
from .curve_plots import CUT_LABEL, Plot, plot_panels
from .heatmap import (
    CELL_FONT,
    CUT,
    add_color_bar,
    cell_figures,
    draw_heatmap,
    fit_font,
    grid_height,
)
from .panels import BELOW, LEFT, TITLE, Panel, add_axes, draw_title, file_name, short_names
from .part import Part
from .samples import EVERY
from .section_notes import cut_note, effective_told, incomparable, length_cell, noted_cut
from .single_model import beside
from .statistics import prompts_needed
from .style import FONT, PAGE_WIDTH, SMALL_FONT
from .task_runs import Score

NEEDLES = "Needles"
GAPS = "†: shorter context lengths, at which others were evaluated, were left out."
_NORMAL = 1.96  # standard errors in half of a 95 % interval
# Inches.
_BAR = 0.64  # right of heatmaps: the colour bar
_CAPTION = 0.3  # above each heatmap: checkpoint, figures
_GAP = 0.12  # between heatmaps
_NOTE = 0.16  # below heatmaps


def _sections(comparison: Comparison) -> Iterator[Section]:
    yield Section(NEEDLES, tables=tuple(_needle_tables(comparison)))


def _panels(comparison: Comparison) -> list[Panel]:
    plots = list(_needle_plots(comparison))
    return [
        *(_heatmaps(comparison, task) for task in comparison.needles),
        *plot_panels(comparison, NEEDLES, "needles", "Needles by context length", plots),
    ]


def _needle_tables(comparison: Comparison) -> Iterable[Table]:
    tables = {task.task: tuple(_needles(comparison, task)) for task in comparison.needles}
    if comparison.single and tables:
        whole = {task: found[0] for task, found in tables.items()}
        yield beside("accuracy, with 95 % intervals", whole)
    else:
        yield from (table for found in tables.values() for table in found)
    yield from _every_needle(comparison)


def _needles(comparison: Comparison, task: NeedleTask) -> Iterable[Table]:
    """Of many checkpoints two: accuracies alone, a row for each, and all of it, folded."""
    rows = [
        (
            length_cell(length),
            *(_accuracy(result, length, comparison.threshold) for result in task.results),
        )
        for length in task.context_lengths
    ]
    foot = (Cell("effective"), *map(effective_cell, task.results))
    intervals = tuple(_interval_notes(comparison, task))
    notes = [*incomparable(comparison, task.task), effective_note(comparison)]
    notes += [] if comparison.many else intervals
    notes += few_note(comparison, task)
    if any(result and result.gaps for result in task.results):
        notes.append(GAPS)
    notes += cut_note(comparison, [result.cut if result else None for result in task.results])
    sources = dict.fromkeys((row.source, row.context_length) for row in task.published)
    for source, length in sources:
        models = ", ".join(
            f"{row.model} {row.accuracy:.2f}"
            for row in task.published
            if (row.source, row.context_length) == (source, length)
        )
        notes.append(
            f"Published, not measured here, at {format_length(length)} ({source}): {models}."
        )
    header = ("context", *comparison.names)
    title = f"{task.task}: accuracy, with 95 % intervals"
    whole = Table(title, header, tuple(rows), foot, notes=tuple(notes))
    if comparison.many:
        yield transposed(replace(whole, title=f"{task.task}: accuracy"), CHECKPOINT)
        yield replace(whole, notes=intervals, folded=True)
    else:
        yield whole


def _every_needle(comparison: Comparison) -> Iterable[Table]:
    """Of tasks that ask for all needles of a text, one after the other."""
    rows = [
        (Cell(task.task), *(_of_every_needle(score) for score in scores))
        for task, scores in _scores_of_every_needle(comparison)
    ]
    if rows:
        title = "every needle of a text asked for in turn: accuracy, with 95 % intervals"
        notes = ["Of all context lengths, by lm-eval's standard errors of the texts' shares."]
        if not comparison.single:
            notes.append(
                "Tested text by text where samples were logged, by in how many texts either "
                "answers more, else by these errors."
            )
        table = Table(title, ("task", *comparison.names), tuple(rows), notes=tuple(notes))
        yield transposed(table, CHECKPOINT) if comparison.many else table


def _scores_of_every_needle(
    comparison: Comparison,
) -> Iterator[tuple[NeedleTask, list[Score | None]]]:
    """The tasks that any checkpoint has such a score of, and those of all."""
    for task in comparison.needles:
        scores = [
            checkpoint.needle_task(task.task).scores.get(f"{EVERY},none") if result else None
            for checkpoint, result in zip(comparison.runs, task.results, strict=True)
        ]
        if any(scores):
            yield task, scores


def _of_every_needle(score: Score | None) -> Cell:
    if score is None:
        return Cell(NOTHING)
    detail = ""
    if score.error:  # of answers that are all right, it is 0 and tells nothing
        low, high = (score.value + sign * _NORMAL * score.error for sign in (-1, 1))
        detail = f"{max(0, low):.2f}–{min(1, high):.2f}"
    return Cell(f"{score.value:.2f}", detail, value=score.value)


def _interval_notes(comparison: Comparison, task: NeedleTask) -> Iterable[str]:
    """What the intervals are, and where they do not tell of other haystacks."""
    yield (
        "Intervals: Wilson's, widened where samples, each of which has a haystack of its own, "
        "differ by more than chance."
    )
    found: dict[int | None, list[str]] = {}
    for name, result in zip(comparison.names, task.results, strict=True):
        for haystacks in {one.haystacks for one in result.by_length} if result else ():
            found.setdefault(haystacks, []).append(name)
    if None in found:
        yield f"Not told which prompts were right, taken for independent: {listed(found[None])}."
    if 1 in found:
        yield f"Of one sample, which tells nothing of other haystacks: {listed(found[1])}."


def _accuracy(result: NeedleResult | None, length: int, threshold: float) -> Cell:
    if not result or not (found := result.at(length)):
        return Cell(NOTHING)
    low, high = found.interval
    detail = f"{_apart(low, threshold)}–{high:.2f}"
    mark = CUT * (length in result.cut)
    return Cell(f"{found.accuracy:.2f}{mark}", detail, value=found.accuracy)


def _apart(value: float, threshold: float) -> str:
    """Two decimals, or as many as it takes to see on which side of the threshold the value is."""
    decimals = 2
    while round(value, decimals) == round(threshold, decimals) and decimals < 6:
        decimals += 1
    return f"{value:.{decimals}f}"


def effective_note(comparison: Comparison) -> str:
    """What an effective context length is."""
    return (
        "Effective: the longest evaluated context length at which, and at all shorter ones, the "
        f"95 % interval of the accuracy lies above {comparison.threshold:g}."
    )


def few_note(comparison: Comparison, task: NeedleTask) -> Iterable[str]:
    """What the star at effective context lengths means, where there is one."""
    if task.too_few_prompts:
        yield (
            "*: all prompts of the next length were right, but they are too few to tell: it takes "
            f"{prompts_needed(comparison.threshold)} of each length."
        )


def effective_cell(result: NeedleResult | None) -> Cell:
    """The effective context length of one of the checkpoints, by which tables are sorted."""
    if result is None:
        return Cell(NOTHING)
    return Cell(effective_text(result), value=result.effective_length or 0)


def effective_text(result: NeedleResult) -> str:
    """The effective context length; with a star where more prompts might show a longer one.

    With a dagger where shorter ones were left out, a double one where prompts of longer ones were
    cut.
    """
    lengths = result.run.context_lengths
    length = effective_told(result.effective_length, lengths, result.cut)
    return length + "*" * result.too_few_prompts + "†" * result.gaps


def _needle_plots(comparison: Comparison) -> Iterator[Plot]:
    for task in comparison.needles:
        by_length = [result.by_length if result else [] for result in task.results]
        yield Plot(
            f"{task.task}: accuracy",
            [{one.context_length: one.accuracy for one in ones} or None for ones in by_length],
            [{one.context_length: one.interval for one in ones} for ones in by_length],
            share=True,
            line=comparison.threshold,
            cut=[result.cut if result else () for result in task.results],
        )


def _heatmaps(comparison: Comparison, task: NeedleTask) -> Panel:
    columns = _map_columns(task)
    rows = math.ceil(sum(result is not None for result in task.results) / columns)
    height = TITLE + rows * (_CAPTION + grid_height(len(task.depths)) + BELOW)
    height += _NOTE * bool(_notes_below(task))
    draw = partial(_draw_heatmaps, comparison, task, columns, height)
    return Panel(
        NEEDLES, f"{file_name(task.task)}-heatmaps", one_line(task.task), height, draw, True
    )


def _notes_below(task: NeedleTask) -> list[str]:
    """What the marks at a figure's effective lengths mean."""
    cut, few = f"{CUT}: {CUT_LABEL}", "*: more prompts might show a longer one"
    return [cut] * any(run.cut for run in task.runs) + [few] * task.too_few_prompts


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
    notes = "; ".join(_notes_below(task))
    figure.text(0.5, 0.06 / height, notes, size=FONT - 1, ha="center", va="bottom")
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


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for task in comparison.needles:
        yield from _task_rows(comparison.names, task)
    for task, scores in _scores_of_every_needle(comparison):
        for name, score in zip(comparison.names, scores, strict=True):
            if score is not None:
                yield {
                    "kind": "every needle", "checkpoint": name, "task": task.task,
                    "metric": EVERY, "value": score.value, "stderr": score.error,
                }  # fmt: skip


def _task_rows(names: list[str], task: NeedleTask) -> Iterator[dict[str, Any]]:
    for row in task.published:
        yield {
            "kind": "published", "checkpoint": row.model, "task": task.task, "metric": "acc",
            "context_length": row.context_length, "value": row.accuracy, "source": row.source,
        }  # fmt: skip
    for name, result in zip(names, task.results, strict=True):
        if not result:
            continue
        of = {"checkpoint": name, "task": task.task, "metric": "acc"}
        for cell in result.run.cells:
            yield {
                **of, "kind": "cell", "context_length": cell.context_length, "depth": cell.depth,
                "deepest": cell.depth, "value": cell.accuracy, "samples": cell.samples,
                "note": noted_cut(cell.cut_to),
            }  # fmt: skip
        for one in result.by_length:
            yield {
                **of, "kind": "by length", "context_length": one.context_length,
                "value": one.accuracy, "low": one.interval.low, "high": one.interval.high,
                "samples": one.samples, "note": noted_cut(result.cut.get(one.context_length)),
            }  # fmt: skip
        notes = {"too few prompts": result.too_few_prompts, "shorter ones left out": result.gaps}
        yield {
            **of, "kind": "effective length", "value": result.told_length,
            "note": ", ".join(note for note, holds in notes.items() if holds),
        }  # fmt: skip


PART = Part(_sections, _panels, _rows)
