"""Reads what `lm_eval --log_samples` wrote of needle tasks: questions and answers, not the prompts.

A line of such a file holds a whole prompt, megabytes of it. Lines are read one after the other, and
of each only what a report shows is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import ResultsError


@dataclass(frozen=True)
class NeedleSample:
    """One prompt and its answer.

    context_length, tokens: of the grid, and of the prompt itself; in tokens.
    depth: share of the haystack before the needle, 0 to 1.
    sample: its number among those of the same context length and depth.
    excerpt: the needle with its surroundings.
    """

    context_length: int
    depth: float
    sample: int
    question: str
    expected: str
    generated: str
    needle: str
    excerpt: str
    tokens: int
    right: bool


def find_samples(results: Path, task: str) -> Path | None:
    """The samples of a task beside the results file of the same run, if they were logged."""
    name = f"samples_{task}_{results.stem.rpartition('_')[2]}.jsonl"
    # Looked up, not joined: a task's name in a foreign file may be a path to somewhere else.
    found = (path for path in results.parent.glob("samples_*.jsonl") if path.name == name)
    return next(found, None)


def read_samples(path: Path) -> tuple[list[NeedleSample], int]:
    """The samples of a needle task, and how many lines are not such samples and were passed over.

    Raises ResultsError if the file cannot be read.
    """
    samples, unread = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    samples.append(_sample(json.loads(line)))
                except (ArithmeticError, ValueError, TypeError, LookupError, RecursionError):
                    unread += 1
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror or error})") from error
    return samples, unread


def _sample(line: dict[str, Any]) -> NeedleSample:
    doc = line["doc"]
    return NeedleSample(
        context_length=int(doc["context_length"]),
        depth=round(float(doc["depth"]), 9),  # as cells have it
        sample=int(doc["sample"]),
        question=str(doc["question"]),
        expected=str(doc["number"]),
        generated=str(line["filtered_resps"][0]),
        needle=str(doc["needle"]),
        excerpt=str(doc["excerpt"]),
        tokens=int(doc["prompt_tokens"]),
        right=float(line["acc"]) == 1,
    )
