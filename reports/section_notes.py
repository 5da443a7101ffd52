"""Cells and notes that several sections of a report have in common."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from yoco_eval.lengths import format_length
from yoco_eval.printable import VALUE, listed, shortened
from yoco_eval.tasks.settings import REFUSED

from .cells import Cell
from .comparison import Comparison
from .heatmap import CUT
from .setups import SetupDifference

METRICS = {"acc": "accuracy", "loss": "loss, nats per token", "loss_to": "loss of all up to there"}
_ENTRIES = 24  # that are shown of a list


def length_cell(tokens: int) -> Cell:
    return Cell(format_length(tokens), value=tokens)


def figure_cell(value: float, mark: str = "") -> Cell:
    return Cell(f"{value:.3f}{mark}", value=value)


def effective_told(effective: int | None, lengths: Iterable[int], cut: dict[int, int]) -> str:
    """An effective context length, marked where it might be longer, had no prompts been cut."""
    whole = [length for length in lengths if length < min(cut, default=inf)]
    ends = bool(cut) and (effective or 0) == max(whole, default=0)
    return (format_length(effective) if effective else "none") + CUT * ends


def cut_note(comparison: Comparison, cut: Iterable[dict[int, int] | None]) -> Iterable[str]:
    """What the mark at figures means, where there are any. cut: of each checkpoint, by length."""
    told = [
        f"{name} {_span(lengths.values())} tokens"
        for name, lengths in zip(comparison.names, cut, strict=True)
        if lengths
    ]
    if told:
        mark = f"{CUT}: prompts cut to the backend's max_length"
        yield f"{mark} ({', '.join(told)}); effective lengths end before."


def noted_cut(tokens: int | None) -> str:
    """What a row of numbers says of prompts that were cut to so many tokens."""
    return "" if tokens is None else f"prompts cut to {tokens} tokens"


def _span(numbers: Iterable[int]) -> str:
    least, *more = sorted(set(numbers))
    return f"{least} to {more[-1]}" if more else f"{least}"


def incomparable(comparison: Comparison, task: str) -> Iterable[str]:
    """In what the checkpoints' prompts differ so much that a task's scores do not compare."""
    for difference in comparison.setup_differences:
        if difference.effect == REFUSED and task in difference.tasks:
            values = values_told(comparison, difference)
            yield f"{task} does not compare: another {difference.setting} ({values})."


def values_told(comparison: Comparison, difference: SetupDifference) -> str:
    """Each checkpoint's value, of a long list its first entries."""
    there = [
        (name, value)
        for name, value in zip(comparison.names, difference.values, strict=True)
        if value is not None
    ]
    told = {value: shortened(listed(value.split(", "), _ENTRIES), VALUE) for _, value in there}
    alike = " (not the same further on)" if len(set(told.values())) < len(told) else ""
    return ", ".join(f"{name} {told[value]}" for name, value in there) + alike
