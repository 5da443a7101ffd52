"""Metrics by context length: a row of lm-eval's table for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# What RULER's authors measured for Llama-2-7B at 4K, and ask of other lengths.
RULER_THRESHOLD = 0.856


def metric_at(name: str, context_length: int) -> str:
    """A metric's name at a context length."""
    # With leading zeros, because lm-eval sorts its table by name.
    return f"{name}@{context_length:07d}"


def mean_of_present(values: Iterable[float | None]) -> float | str:
    """The mean of what is not None; "N/A", as lm-eval has it, if nothing is (under --limit)."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else "N/A"


def metric_list(
    name: str, context_lengths: Sequence[int], **others: str | Callable
) -> list[dict[str, Any]]:
    """lm-eval's `metric_list` of a metric by context length, and of `others` with aggregations."""
    aggregations = {**{metric_at(name, c): mean_of_present for c in context_lengths}, **others}
    return [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": True}
        for metric, aggregation in aggregations.items()
    ]


def values_at(
    name: str, context_lengths: Sequence[int], length: int, value: float
) -> dict[str, float | None]:
    """A document's value under its own length's name, None under the others'.

    lm-eval warns of metrics that not every document has a value of.
    """
    return {metric_at(name, c): value if c == length else None for c in context_lengths}


def effective_length(accuracies: Mapping[int, float]) -> int:
    """The longest context length whose mean accuracy is at least RULER's threshold; 0 if none is.

    Args:
        accuracies: 0 to 1, by context length.
    """
    passed = (length for length, accuracy in accuracies.items() if accuracy >= RULER_THRESHOLD)
    return max(passed, default=0)
