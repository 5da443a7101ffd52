"""Needle tasks prompt by prompt: what cells and the files of `lm_eval --log_samples` tell of each.

A line of such a file holds a whole prompt, megabytes of it. Lines are read one after the other, and
of each only what a report shows is kept.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from yoco_eval.tasks.by_length import digest

from .results import NeedleCell, NeedleRun, ResultsError, check_regular, is_number

Cell = tuple[int, float]  # context length, depth
EVERY = "acc_all"  # the metric of tasks that ask for every needle of a text, one after the other

_LONGEST = 1 << 30  # bytes of a line, far more than any prompt's


@dataclass(frozen=True)
class NeedleSample:
    """One prompt and its answer.

    context_length, tokens: of the grid, and of the prompt itself; in tokens.
    depth: share of the haystack before the needle, 0 to 1.
    sample: its number among those of the same context length and depth.
    excerpt: the needle with its surroundings.
    prompt: its digest, as cells have it; None if the file does not hold it.
    every: where every needle of the text was asked for, the share of right answers; else None.
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
    prompt: str | None = None
    every: float | None = None


class Answer(NamedTuple):
    """Whether a prompt was answered right, and the prompt's digest, None where nothing tells."""

    right: bool
    prompt: str | None


Answers = Mapping[Cell, Mapping[int, Answer] | None]


def answers(run: NeedleRun, logged: Sequence[NeedleSample]) -> Answers:
    """The answers in each cell by sample; None for cells of which nothing tells them one by one.

    logged: samples, which stand in for what the cells of older files do not tell.
    """
    samples: dict[Cell, dict[int, Answer]] = {}
    for one in logged:
        cell = samples.setdefault((one.context_length, one.depth), {})
        cell[one.sample] = Answer(one.right, one.prompt)
    keys = [(cell.context_length, cell.depth) for cell in run.cells]
    return {
        key: _answers(cell, samples.get(key, {})) for key, cell in zip(keys, run.cells, strict=True)
    }


def _answers(cell: NeedleCell, logged: dict[int, Answer]) -> dict[int, Answer] | None:
    if cell.right is None or cell.wrong is None:
        right = sum(answer.right for answer in logged.values())
        return logged if (right, len(logged)) == (cell.correct, cell.samples) else None
    told = dict.fromkeys(cell.right, True) | dict.fromkeys(cell.wrong, False)
    prompts: dict[int, str | None]
    if cell.prompts is not None:
        prompts = dict(zip(sorted(told), cell.prompts, strict=True))
    elif {sample: answer.right for sample, answer in logged.items()} == told:
        prompts = {sample: answer.prompt for sample, answer in logged.items()}
    else:
        prompts = {}
    return {sample: Answer(right, prompts.get(sample)) for sample, right in told.items()}


def clusters(
    cells: Iterable[Mapping[int, Answer] | None],
) -> tuple[list[int], list[int]] | None:
    """How many answers of each sample are right, of how many; None where a cell does not tell.

    All prompts of a sample, whatever their context length and depth, have one haystack in common.
    """
    right: dict[int, int] = {}
    total: dict[int, int] = {}
    for cell in cells:
        if cell is None:
            return None
        for sample, answer in cell.items():
            right[sample] = right.get(sample, 0) + answer.right
            total[sample] = total.get(sample, 0) + 1
    return list(right.values()), list(total.values())


def find_samples(results: Path, task: str) -> Path | None:
    """The samples of a task beside the results file of the same run, if they were logged."""
    name = f"samples_{task}_{results.stem.rpartition('_')[2]}.jsonl"
    # Looked up, not joined: a task's name in a foreign file may be a path to somewhere else.
    logs = results.parent.glob("samples_*.jsonl")
    found = (path for path in logs if path.name == name and path.is_file())
    return next(found, None)


def read_samples(path: Path) -> tuple[list[NeedleSample], int]:
    """The samples of a needle task, and how many lines are not such samples and were passed over.

    Raises ResultsError if the file cannot be read.
    """
    samples, unread = [], 0
    try:
        check_regular(path)
        with path.open("rb") as file:
            for line in iter(lambda: file.readline(_LONGEST), b""):
                if len(line) == _LONGEST:
                    raise OSError(errno.EFBIG, f"a line of over {_LONGEST >> 30} GiB")
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
        prompt=_prompt(line),
        every=float(every) if is_number(every := line.get(EVERY)) else None,
    )


def _prompt(line: dict[str, Any]) -> str | None:
    try:
        return digest(line["arguments"]["gen_args_0"]["arg_0"])
    except (AttributeError, LookupError, TypeError):  # a file may hold anything
        return None
