"""Tasks by context length document by document, as the files of `lm_eval --log_samples` tell them.

Documents of lm-eval's own long-context tasks say how long they are, or their prompts are: those of
LongBench v2, InfiniteBench, Graphwalks and LongProc, whose results are means over all lengths, are
put into bins by the characters of their prompts, so that those of all models are the same.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from .results import ResultsError, check_regular, is_number
from .samples import find_samples
from .task_runs import BUCKETS, TaskRun

_LONG = re.compile(r"(longbench2|infinitebench|graphwalks|longproc)(_\w[\w.]*)?")
_CHARACTERS = 4  # of a token, about: a bin of 128K has prompts of up to 512 Ki characters
_SHORTEST = 1024  # tokens of a bin
_LONGEST = 1 << 30  # bytes of a line, far more than any prompt's

# A prompt's digest, and which document with that prompt it is.
Key = tuple[str, int]
Scores = dict[int, dict[Key, float]]  # by context length in tokens


@dataclass(frozen=True)
class Logged:
    """What was logged of a task.

    metric: that of the scores, without its filter.
    binned: whether context lengths are bins of prompts, named by their upper ends.
    scores: by context length and document.
    """

    metric: str
    binned: bool
    scores: Scores

    def means(self) -> dict[int, float]:
        """At each context length."""
        return {n: sum(of.values()) / len(of) for n, of in sorted(self.scores.items())}


def united(parts: Iterable[Mapping[Key, float]]) -> dict[Key, float]:
    """The documents of several tasks, which may have prompts in common."""
    return {
        (f"{place}/{prompt}", n): value
        for place, part in enumerate(parts)
        for (prompt, n), value in part.items()
    }


def is_long(task: str) -> bool:
    """Whether it is one of lm-eval's tasks, or a group of them, that are put into bins here."""
    return _LONG.fullmatch(task) is not None


def logged_scores(run: TaskRun) -> tuple[Logged | None, list[tuple[Path, str]]]:
    """The scores of a task's documents; None where none were logged that tell their length.

    Also the files that cannot be read, each with the reason.
    """
    binned = is_long(run.task)
    of_lengths = next((name for name in run.by_length if name not in BUCKETS), None)
    known = run.by_length.get(of_lengths or "", {})
    if run.members or run.cells or not (binned or known):
        return None, []
    metric, _, chosen = next(iter(run.scores), "").partition(",") if binned else ("", "", "")
    metric = metric or of_lengths or ""
    [single] = known if len(known) == 1 else [None]
    scores: Scores = {}
    unread: list[tuple[Path, str]] = []
    for file in run.files:
        path = find_samples(file.path, run.task)
        if path is None:
            continue
        found: Scores = {}
        seen: Counter[str] = Counter()
        try:
            for line in _lines(path):
                if chosen and line.get("filter") not in (None, chosen):
                    continue
                length = _bin(line) if binned else _length(line, single)
                value = line.get(metric, line.get(str(length)))
                prompt = line.get("prompt_hash")
                if length is None or not is_number(value) or not isinstance(prompt, str):
                    continue
                if isfinite(value):
                    found.setdefault(length, {})[prompt, seen[prompt]] = float(value)
                    seen[prompt] += 1
        except ResultsError as error:
            unread.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        for length, of_length in found.items():
            source = known[length].source if length in known else None
            if length not in scores and (binned or source == file.path):
                scores[length] = of_length
    return (Logged(metric, binned, scores) if scores else None), unread


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a file, one after the other; what is none is passed over.

    Raises:
        ResultsError: it cannot be read.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            for line in iter(lambda: file.readline(_LONGEST), b""):
                try:
                    told = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(told, dict):
                    yield told
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror or error})") from error


def _length(line: Mapping[str, Any], single: int | None) -> int | None:
    """The context length that a document tells: as this project's, as RULER's, or the run's."""
    doc = line.get("doc")
    for name in ("context_length", "max_length"):
        if isinstance(doc, dict) and isinstance(doc.get(name), int):
            return doc[name]
    return single


def _bin(line: Mapping[str, Any]) -> int | None:
    """The bin of a prompt: the power of two that it has as many tokens as, about, or fewer."""
    try:
        prompt = line["arguments"]["gen_args_0"]["arg_0"]
    except (LookupError, TypeError):
        return None
    if isinstance(prompt, list) and prompt:  # a chat as servers get it
        prompt = json.dumps(prompt, ensure_ascii=False)
    if not isinstance(prompt, str) or not prompt:
        return None
    tokens = -(-len(prompt) // _CHARACTERS)
    return max(_SHORTEST, 1 << (tokens - 1).bit_length())
