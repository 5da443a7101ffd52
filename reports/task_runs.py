"""What one results file says of its tasks and groups: figures, and which are by context length.

Tasks say themselves which of their metrics are by length. lm-eval's own RULER tasks, whose metrics
are bare lengths, and BABILong tasks, which take one length a run, are known by their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yoco_eval.lengths import parse_length
from yoco_eval.tasks.by_length import BY_LENGTH

from .results import NeedleCell, ResultsError, ResultsFile, is_number, mapping, parse_cells

BUCKETS = frozenset({"loss"})  # metrics of the tokens from the length before up to the one named
_AT_LENGTH = re.compile(r"(\w+)@(\d{1,12}),")  # acc@0004096,none
_RULER = re.compile(r"(ruler|niah)(_.*)?")
_RULER_METRIC = re.compile(r"(\d{1,12}),")  # 4096,none
_BABILONG = re.compile(r"babilong_qa(\d{1,2})")
_PLACEHOLDER = "bypass,"  # the metric, with a figure of its own, of `lm_eval --predict_only`
_LAST_BABILONG_TASK = 10  # that has lengths: lm-eval runs the others at 0K, whatever is set


@dataclass(frozen=True)
class Score:
    """A metric's value and, where lm-eval tells it, its standard error.

    after: of a value at a context length, the length before in the same run; 0 for the first.
    source: the results file that it is from.
    cut_to: of a value at a context length, tokens that its prompts were cut to; None if they were
        not, as far as is known.
    """

    value: float
    error: float | None = None
    after: int = field(default=0, compare=False)
    source: Path | None = field(default=None, compare=False)
    cut_to: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TaskRun:
    """The results of a task or group: of one run, or of several that `united.unite` joined.

    n_shot: examples in each prompt; None for a group whose tasks have different numbers.
    files: those that the results are from, the newest first.
    scores: by metric and filter, as lm-eval names them, in its order: "acc,none"; without those by
        length. Of several files, those that are of all lengths of a single one are left out.
    by_length: by metric, without length and filter, and by context length in tokens.
    cells: of a needle task.
    members: the tasks of a group, those of its sub-groups too; empty for a task.
    """

    task: str
    n_shot: int | None
    files: tuple[ResultsFile, ...]
    scores: dict[str, Score]
    by_length: dict[str, dict[int, Score]] = field(default_factory=dict)
    cells: tuple[NeedleCell, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def file(self) -> ResultsFile:
        """The newest one."""
        return self.files[0]

    @property
    def context_lengths(self) -> list[int]:
        """Those that it has results at, ascending; empty if it is not by length."""
        found = {length for values in self.by_length.values() for length in values}
        return sorted(found | {cell.context_length for cell in self.cells})

    def leaves(self, file: ResultsFile) -> list[str]:
        """The tasks that its results in one of its files are of: of a group, without sub-groups."""
        return [task for task in self.members if task in file.data["configs"]] or [self.task]


def task_runs(file: ResultsFile) -> tuple[list[TaskRun], dict[str, str]]:
    """Every task and group that the file has a figure or the cells of; by task, what is damaged."""
    runs: list[TaskRun] = []
    damaged: dict[str, str] = {}
    needles, results = file.needle_cells(), mapping(file.data.get("results"))
    for task in dict.fromkeys((*needles, *results)):
        try:
            cells = parse_cells(needles[task], file) if task in needles else ()
        except ResultsError as error:
            damaged[task] = str(error)
            continue
        members = tuple(members_below(task, mapping(file.data.get("group_subtasks"))))
        scores = _scores(mapping(results.get(task)))
        shots = _shots(task, members, file.data)
        runs.append(TaskRun(task, shots, (file,), scores, cells=cells, members=members))
    found: dict[str, TaskRun] = {}
    for run in sorted(runs, key=lambda run: bool(run.members)):  # groups need their tasks
        found[run.task] = _by_length(run, found)
    told = [found[run.task] for run in runs]
    return [run for run in told if run.scores or run.by_length or run.cells], damaged


def predicts_only(file: ResultsFile) -> bool:
    """Whether answers were asked for and not scored."""
    results = mapping(file.data.get("results")).values()
    return any(metric.startswith(_PLACEHOLDER) for one in results for metric in mapping(one))


def _scores(metrics: dict[str, Any]) -> dict[str, Score]:
    scores = {}
    for metric, value in metrics.items():
        if metric.startswith(_PLACEHOLDER) or "_stderr," in metric:
            continue
        if "," in metric and is_number(value):
            error = metrics.get(metric.replace(",", "_stderr,", 1))
            scores[metric] = Score(float(value), float(error) if is_number(error) else None)
    return scores


def _by_length(run: TaskRun, tasks: Mapping[str, TaskRun]) -> TaskRun:
    """The run with what is by length taken out of its scores.

    tasks: the results of this on tasks of the same file, by name.
    """
    scores, leaves = dict(run.scores), run.leaves(run.file)
    values: dict[str, dict[int, Score]] = {}
    named = _named(run)
    bare = {metric: match for metric in scores if (match := _RULER_METRIC.match(metric))}
    for metric, score in run.scores.items():
        match = _AT_LENGTH.match(metric)
        if match and match[1] in named:
            values.setdefault(match[1], {}).setdefault(int(match[2]), score)
            del scores[metric]
    if bare and all(_RULER.fullmatch(leaf) for leaf in leaves):
        values["acc"] = {
            int(match[1]): scores[metric]
            for metric, match in bare.items()
            if scores[metric].value >= 0  # -1 stands for a length that was not evaluated
        }
        if run.members:  # lm-eval's group has its mean at 4096 alone
            values["acc"] = _means([tasks[leaf] for leaf in leaves if leaf in tasks])
        scores = {metric: score for metric, score in scores.items() if metric not in bare}
    elif not named and "acc,none" in scores:
        lengths = [_babilong_length(run.file, leaf) for leaf in leaves]
        if None not in lengths:
            score = scores.pop("acc,none")
            [length, *others] = set(lengths)
            if length is not None and not others:  # a mean over several is of no length
                values["acc"] = {length: score}
    by_length = {
        metric: _with_sources(found, run.file) for metric, found in values.items() if found
    }
    return replace(run, scores=scores, by_length=by_length)


def _named(run: TaskRun) -> set[str]:
    """The metrics that the tasks of a run say are by length."""
    named: set[str] = set()
    for leaf in run.leaves(run.file):
        metadata = run.file.metadata(leaf)
        told, lengths = metadata.get(BY_LENGTH), metadata.get("context_lengths")
        if isinstance(told, list):
            named.update(name for name in told if isinstance(name, str))
        elif isinstance(lengths, list):  # of an older file: whose lengths are those that were set
            matches = filter(None, map(_AT_LENGTH.match, run.scores))
            named.update(match[1] for match in matches if int(match[2]) in lengths)
    return named


def _means(members: Sequence[TaskRun]) -> dict[int, Score]:
    """RULER's unweighted means, at the lengths at which all members have a value."""
    values = [member.by_length.get("acc", {}) for member in members]
    common = set.intersection(*map(set, values)) if values else set()
    return {n: Score(sum(one[n].value for one in values) / len(values)) for n in common}


def _babilong_length(file: ResultsFile, task: str) -> int | None:
    """The one length, in tokens, of a run of lm-eval's BABILong task; None of any other task."""
    match = _BABILONG.fullmatch(task)
    if not match:
        return None
    name = str(file.metadata(task).get("max_seq_lengths") or "0k")
    if name == "0k" or int(match[1]) > _LAST_BABILONG_TASK:
        return 0
    try:
        return parse_length(name)
    except ValueError:
        return None


def _with_sources(values: dict[int, Score], file: ResultsFile) -> dict[int, Score]:
    """The values, the shortest length first, each with the length before and the file."""
    lengths = sorted(values)
    return {
        length: Score(
            values[length].value, values[length].error, after, file.path, file.cut(length)
        )
        for after, length in zip([0, *lengths], lengths, strict=False)
    }


def members_below(group: str, subtasks: dict[str, Any], seen: tuple[str, ...] = ()) -> list[str]:
    """The tasks and groups below a group, at any depth, each once."""
    found: list[str] = []
    direct = subtasks.get(group)
    for member in direct if isinstance(direct, list) else []:
        if isinstance(member, str) and member not in (group, *seen):
            found += [member, *members_below(member, subtasks, (*seen, group))]
    return list(dict.fromkeys(found))


def _shots(task: str, members: tuple[str, ...], data: dict[str, Any]) -> int | None:
    shots = mapping(data.get("n-shot"))
    told = (shots.get(name) for name in members or (task,))
    found = {number for number in told if isinstance(number, int)}
    return found.pop() if len(found) == 1 else None
