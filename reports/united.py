"""One model's runs of one task in one setup, joined: a grid, or values by context length.

The newest run decides: older ones with its setup add the context lengths and depths that it lacks,
or at which its prompts were cut and theirs were not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yoco_eval.printable import shown

from .models import model_args
from .results import NeedleCell, mapping
from .setups import common, other_samples, setting_text, setup
from .task_runs import BUCKETS, Score, TaskRun

# What runs that are one may differ in. The lengths at which they were evaluated have prompts of
# their own, and a run's longest input says nothing of shorter prompts.
_MAY_DIFFER = frozenset(
    {"context lengths", "depths", "documents", "limit", "max_length", "lm-eval"}
)
_IF_TOLD = frozenset({"special tokens"})  # which not all files tell
_OF_THE_LENGTHS = frozenset(
    "version config_source cells prompts by_length context_lengths max_seq_lengths depths".split()
)
_LONGEST = 40  # letters of a value that is told


@dataclass(frozen=True)
class LeftOut:
    """A run that is not used, although not all of it is in newer ones, and why."""

    run: TaskRun
    reason: str


def unite(runs: Sequence[TaskRun]) -> tuple[TaskRun, list[LeftOut]]:
    """All runs of one task that can be one; the newest alone of a task that is not by length.

    runs: of one model, the newest first.
    """
    newest, *older = runs
    if not newest.context_lengths:
        why = f"not united with {newest.file.path.name}: nothing is by context length there"
        return newest, [LeftOut(run, why) for run in older if run.context_lengths]
    joined = [newest]
    left_out: list[LeftOut] = []
    for run in older:
        other: TaskRun | None = newest
        reason = _obstacle(newest, run)
        if reason is None:
            # One that is not the newest may be, too, whose prompts at a common length are others.
            other, reason = next(_others(joined, run), (None, None))
        if other is None:
            joined.append(run)
        elif run.context_lengths:
            left_out.append(LeftOut(run, f"not united with {other.file.path.name}: {reason}"))
    cells = _cells(joined)
    by_length = {
        metric: _values(metric, [run.by_length.get(metric, {}) for run in joined])
        for metric in dict.fromkeys(metric for run in joined for metric in run.by_length)
    }
    used = {cell.source for cell in cells}
    used |= {score.source for values in by_length.values() for score in values.values()}
    for run in joined:
        if run.file.path not in used and any(map(run.file.cut, run.context_lengths)):
            left_out.append(LeftOut(run, "its prompts were cut, those of another run were not"))
    joined = [run for run in joined if run.file.path in used]
    if len(joined) == 1:
        return joined[0], left_out
    files = tuple(run.file for run in joined)
    united = replace(joined[0], files=files, scores={}, by_length=by_length, cells=cells)
    return united, left_out


def _others(joined: Sequence[TaskRun], run: TaskRun) -> Iterator[tuple[TaskRun, str]]:
    """Those of the joined runs that have other prompts at a common length, or not as many."""
    for one in joined:
        if _other_prompts(one, run):
            yield one, "other prompts"
        mine, theirs = other_samples(one, run) or ({}, {})
        if mine:
            told = (setting_text("samples", counts) for counts in (theirs, mine))
            yield one, _differing("samples", *told)


def _cells(runs: Sequence[TaskRun]) -> tuple[NeedleCell, ...]:
    cells: dict[tuple[int, float], NeedleCell] = {}
    for run in runs:
        for cell in run.cells:
            newer = cells.setdefault((cell.context_length, cell.depth), cell)
            if newer.cut_to is not None and cell.cut_to is None:
                cells[cell.context_length, cell.depth] = cell
    return tuple(sorted(cells.values()))


def _values(metric: str, runs: Sequence[dict[int, Score]]) -> dict[int, Score]:
    """At each length the newest value of whole prompts.

    Of a bucket the newest that begins at the length before.
    """
    lengths = sorted({length for run in runs for length in run})
    values = {}
    for before, length in zip([0, *lengths], lengths, strict=False):
        found = [run[length] for run in runs if length in run]
        flaws = [(metric in BUCKETS and s.after != before, s.cut_to is not None) for s in found]
        values[length] = found[flaws.index(min(flaws))]  # the first of those that are best
    return values


def _obstacle(newest: TaskRun, run: TaskRun) -> str | None:
    """Why the run's setup is not that of the newest; None if it is."""
    if bool(newest.cells) != bool(run.cells):
        return "needle cells in one of them only"
    if set(newest.members) != set(run.members):
        return "other tasks in the group"
    mine, theirs = _settings(newest), _settings(run)
    if other_samples(newest, run) is not None:  # see `_others`
        del mine["samples"], theirs["samples"]
    differing = [
        _differing(name, theirs.get(name), mine.get(name))
        for name in dict.fromkeys([*mine, *theirs])
        if mine.get(name) != theirs.get(name)
        and not (name in _IF_TOLD and None in (mine.get(name), theirs.get(name)))
    ]
    return " and ".join(differing) or None


def _differing(name: str, theirs: Any, mine: Any) -> str:
    told = [_text(value) for value in (theirs, mine)]
    if max(map(len, told)) > _LONGEST:
        return f"another {name}"
    return f"{name} {told[0]}, not {told[1]}"


def _text(value: Any) -> str:
    try:
        return str(value)
    except (RecursionError, ValueError):  # a file may hold anything
        return shown(value)


def _settings(run: TaskRun) -> dict[str, Any]:
    """All that must be the same for two runs to be one, of a run that is of one file."""
    data, leaves = run.file.data, run.leaves(run.file)
    settings: dict[str, Any] = {
        name: value for name, value in setup(run).items() if name not in _MAY_DIFFER
    }
    if not _limited_nothing(run):
        settings["limit"] = mapping(data["config"]).get("limit")
    args = model_args(data)  # which lm-eval puts into every task's metadata
    metadata = [run.file.metadata(leaf) for leaf in leaves]
    for name in dict.fromkeys(name for one in metadata for name in one):
        if name not in _OF_THE_LENGTHS and name not in args:
            value = common([one.get(name) for one in metadata])
            settings.setdefault(name.replace("_", " "), _text(value))
    if run.n_shot and data.get("chat_template_sha"):
        settings["few-shot turns"] = data.get("fewshot_as_multiturn")
    return settings


def _limited_nothing(run: TaskRun) -> bool:
    """Whether all documents were evaluated, or as many as if there had been no --limit."""
    if mapping(run.file.data["config"]).get("limit") is None:
        return True
    counts = mapping(run.file.data.get("n-samples"))
    told = [mapping(counts.get(leaf)) for leaf in run.leaves(run.file)]
    return all(one and one.get("effective") == one.get("original") for one in told)


def _other_prompts(newer: TaskRun, run: TaskRun) -> bool:
    """Whether the digests of their prompts differ where both have results."""
    cells = {(cell.context_length, cell.depth): cell for cell in run.cells}
    for cell in newer.cells:
        other = cells.get((cell.context_length, cell.depth))
        if other and any(
            prompt != _prompts(other).get(sample, prompt)
            for sample, prompt in _prompts(cell).items()
        ):
            return True
    for leaf in newer.leaves(newer.file):
        mine, theirs = (
            mapping(one.file.metadata(leaf).get("prompts")) for one in (newer, run)
        )  # fmt: skip
        for length in mine.keys() & theirs.keys():
            if mine[length] != theirs[length] and _same_bucket(newer, run, length):
                return True
    return False


def _prompts(cell: NeedleCell) -> dict[int, str]:
    """The digests by number of the sample, where they are told."""
    if cell.prompts is None or cell.right is None or cell.wrong is None:
        return {}
    return dict(zip(sorted((*cell.right, *cell.wrong)), cell.prompts, strict=True))


def _same_bucket(newer: TaskRun, run: TaskRun, length: str) -> bool:
    """Whether the prompts at a length begin at the same place in a document."""
    begins = [
        {str(n): score.after for n, score in one.by_length.get(metric, {}).items()}.get(length)
        for one in (newer, run)
        for metric in BUCKETS
    ]
    return None in begins or len(set(begins)) == 1
