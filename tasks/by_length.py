"""Metrics by context length: a row of lm-eval's table for each; what the results file says of them.

Reports compare runs by two things that tasks leave in their metadata: `BY_LENGTH` names the metrics
NAME whose values NAME@LENGTH are by context length, and digests tell whether prompts were equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

BY_LENGTH = "by_length"  # the key of the metrics' names in a task's metadata

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


def digest(*texts: str) -> str:
    """Eight hexadecimal digits that differ, but for rare accidents, where the texts do."""
    found = blake2b(digest_size=4)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "big"))  # so that texts end where they do
        found.update(data)
    return found.hexdigest()


def digests_by_length(prompts: Iterable[tuple[int, str]]) -> dict[str, str]:
    """A digest per context length, over the digests of its prompts in order.

    Args:
        prompts: the context length and the digest of each.
    """
    found: dict[int, list[str]] = {}
    for length, of_a_prompt in prompts:
        found.setdefault(length, []).append(of_a_prompt)
    return {str(length): digest(*found[length]) for length in sorted(found)}
