"""What one file says for one section of a report, or for some that belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .cells import Section
from .comparison import Comparison
from .panels import Panel

CSV_COLUMNS = (
    "kind", "checkpoint", "other", "task", "n_shot", "metric", "context_length", "depth",
    "deepest", "value", "other_value", "low", "high", "stderr", "samples", "other_samples", "p",
    "p_corrected", "source", "note",
)  # fmt: skip


def _nothing(comparison: Comparison) -> Iterable[Any]:
    return ()


@dataclass(frozen=True)
class Part:
    """Each is a function of the comparison; what it has nothing to say of, it leaves empty.

    sections: for the terminal, the page, Markdown and LaTeX.
    panels: figures, which say under which section's heading they belong.
    rows: for .csv files, one for each number, by the names of `CSV_COLUMNS`.
    """

    sections: Callable[[Comparison], Iterable[Section]] = _nothing
    panels: Callable[[Comparison], Iterable[Panel]] = _nothing
    rows: Callable[[Comparison], Iterable[dict[str, Any]]] = _nothing
