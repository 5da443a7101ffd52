"""Collects the results of checkpoints: from each folder the newest of every task, under one name.

A folder may hold several files, benchmarks in one and needles in another, of any lm-eval backend,
and profiles beside them. What is not used is named with the reason, and nothing in a folder can
stop a report of the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .profile import NotAProfile, Profile, load_profile
from .results import NeedleRun, ResultsError, ResultsFile, parse_cells, read_results
from .samples import find_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Score:
    """A metric's value and, where lm-eval tells it, its standard error."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class TaskRun:
    """The newest result of a task or group.

    n_shot: examples in each prompt; None for a group whose tasks have different numbers.
    scores: by metric and filter, as lm-eval names them, in its order: "acc,none".
    members: the tasks of a group, those of its sub-groups too; empty for a task.
    """

    task: str
    n_shot: int | None
    file: ResultsFile
    scores: dict[str, Score]
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """What is known of one checkpoint.

    tasks: by name and number of examples.
    needles: by task, those of `tasks` that left cells.
    samples: by needle task, where its samples were logged.
    """

    name: str
    path: Path
    tasks: dict[tuple[str, int | None], TaskRun] = field(default_factory=dict)
    needles: dict[str, NeedleRun] = field(default_factory=dict)
    samples: dict[str, Path] = field(default_factory=dict)
    profile: Profile | None = None
    skipped: tuple[Skipped, ...] = ()

    def needle_task(self, task: str) -> TaskRun:
        """The task's entry in `tasks`, from the file that its cells are from."""
        path = self.needles[task].path
        return next(
            run for run in self.tasks.values() if run.task == task and run.file.path == path
        )


def load_checkpoints(
    paths: Sequence[str | Path], names: Sequence[str] | None = None
) -> list[Checkpoint]:
    """What each path holds, in the order given.

    paths: folders, searched with their subfolders, or single results files.
    names: of the checkpoints; by default those of the folders, with as many of the parents as it
        takes to tell them apart.
    Raises ResultsError: a path is not there, is given twice or holds no results; names that do not
    fit.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise ResultsError(
                f"{path}: no such file or folder; give what lm_eval got as --output_path"
            )
    names = _check_names(names, len(paths)) if names else _names(paths)
    checkpoints = [_load(path, name) for path, name in zip(paths, names, strict=True)]
    _check_apart(checkpoints)
    return checkpoints


def _check_apart(checkpoints: Sequence[Checkpoint]) -> None:
    """A file that counts for two, of a folder and one within it, would compare with itself."""
    owners: dict[Path, Checkpoint] = {}
    for checkpoint in checkpoints:
        for file in {run.file.path.resolve() for run in checkpoint.tasks.values()}:
            other = owners.setdefault(file, checkpoint)
            if other is not checkpoint:
                raise ResultsError(
                    f"{other.path} and {checkpoint.path}: both hold {file.name}; give each "
                    "checkpoint's own folder"
                )


def _check_names(names: Sequence[str], paths: int) -> Sequence[str]:
    if len(names) != paths:
        raise ResultsError(f"--names: {len(names)} given for {paths} results; give one for each")
    if not all(name.strip() for name in names):
        raise ResultsError("--names: one is empty; give a name for each of the results")
    for name in names:
        if names.count(name) > 1:
            raise ResultsError(f"--names: two are named {name}; give different names")
    return names


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents before them as tell those of equal name apart."""
    resolved = [path.resolve() for path in paths]
    for path, whole in zip(paths, resolved, strict=True):
        if resolved.count(whole) > 1:
            raise ResultsError(f"{path}: given twice; give each folder once")
    parts = [(path.parent if path.is_file() else path).parts for path in resolved]
    if len(set(parts)) < len(parts):  # files of one folder
        parts = [path.parts for path in resolved]
    names = []
    for mine in parts:
        taken = 1
        while sum(other[-taken:] == mine[-taken:] for other in parts) > 1:
            taken += 1
        names.append("/".join(mine[-taken:]))
    return names


def _load(path: Path, name: str) -> Checkpoint:
    files, profiles, skipped = _read_files(path)
    files, of_others = _one_model(files)
    if of_others:
        logger.warning(
            "%s holds results of several models; only those of %s count. Give each model's own "
            "folder to compare them", path, files[-1].model,
        )  # fmt: skip
    skipped += of_others
    tasks: dict[tuple[str, int | None], TaskRun] = {}
    needles: dict[str, NeedleRun] = {}
    for file in files:
        found = {run.task: run for run in _task_runs(file)}
        for task, raw in file.needle_cells().items():
            try:
                cells = parse_cells(raw)
            except ResultsError as error:
                skipped.append(Skipped(file.path, f"task {task}: {error}"))
                del found[task]
                continue
            needles[task] = NeedleRun(name, task, file.path, file.date, cells)
        for task in found:
            if task in needles and needles[task].path != file.path:
                del needles[task]  # the newest result counts, although it has no cells
        tasks |= {(run.task, run.n_shot): run for run in found.values()}
    told = {run.file.path for run in tasks.values()} | {skip.path for skip in skipped}
    for file in files:
        if file.path not in told:
            reason = "its results are all in newer files" if _task_runs(file) else "has no results"
            skipped.append(Skipped(file.path, reason))
    skipped += [Skipped(file, "an older profile") for file, _ in profiles[:-1]]
    samples = {task: find_samples(run.path, task) for task, run in needles.items()}
    if not (tasks or profiles):
        first = f" ({skipped[0].path.name}: {skipped[0].reason})" if skipped else ""
        raise ResultsError(
            f"{path}: no results in it{first}; make some with lm_eval ... --output_path {path}"
        )
    return Checkpoint(
        name,
        path,
        tasks,
        needles,
        {task: file for task, file in samples.items() if file},
        profiles[-1][1] if profiles else None,
        tuple(sorted(skipped, key=lambda skip: str(skip.path))),
    )


def _read_files(
    path: Path,
) -> tuple[list[ResultsFile], list[tuple[Path, Profile]], list[Skipped]]:
    """Results and profiles, each oldest first, and the other JSON files."""
    results, profiles, skipped = [], [], []
    for file in [path] if path.is_file() else sorted(path.rglob("*.json")):
        if not file.is_file():
            continue
        if not file.stat().st_size:
            skipped.append(Skipped(file, "empty"))
            continue
        try:
            results.append(read_results(file))
        except ResultsError as error:
            try:
                profiles.append((file, load_profile(file)))
            except ResultsError as other:
                reason = str(error if isinstance(other, NotAProfile) else other)
                skipped.append(Skipped(file, reason.removeprefix(f"{file}: ")))
    results.sort(key=lambda found: found.date)
    profiles.sort(key=lambda found: found[0].stat().st_mtime)
    return results, profiles, skipped


def _one_model(files: list[ResultsFile]) -> tuple[list[ResultsFile], list[Skipped]]:
    """The files of the model that the newest one is of; the others, which are mixed up with it."""
    if not files:
        return [], []
    newest = files[-1]
    mine = [file for file in files if file.model_id == newest.model_id]
    reason = f"of another model than {newest.path.name}, {{}}; give its results by themselves"
    others = [
        Skipped(file.path, reason.format(" ".join(filter(None, file.model_id))))
        for file in files
        if file.model_id != newest.model_id
    ]
    return mine, others


def _task_runs(file: ResultsFile) -> list[TaskRun]:
    """Every task and group that the file has at least one figure or the cells of."""
    runs, needles = [], file.needle_cells()
    results = mapping(file.data.get("results"))
    for task, metrics in {**dict.fromkeys(needles), **results}.items():
        scores = {}
        for metric, value in mapping(metrics).items():
            if "," in metric and "_stderr," not in metric and is_number(value):
                error = metrics.get(metric.replace(",", "_stderr,", 1))
                scores[metric] = Score(float(value), float(error) if is_number(error) else None)
        if scores or task in needles:
            members = tuple(_members(task, mapping(file.data.get("group_subtasks"))))
            runs.append(TaskRun(task, _shots(task, members, file.data), file, scores, members))
    return runs


def _members(group: str, subtasks: dict[str, Any], seen: tuple[str, ...] = ()) -> list[str]:
    """The tasks and groups below a group, at any depth, each once."""
    found: list[str] = []
    direct = subtasks.get(group)
    for member in direct if isinstance(direct, list) else []:
        if isinstance(member, str) and member not in (group, *seen):
            found += [member, *_members(member, subtasks, (*seen, group))]
    return list(dict.fromkeys(found))


def _shots(task: str, members: tuple[str, ...], data: dict[str, Any]) -> int | None:
    shots = mapping(data.get("n-shot"))
    told = (shots.get(name) for name in members or (task,))
    found = {number for number in told if isinstance(number, int)}
    return found.pop() if len(found) == 1 else None


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: a file may hold anything."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value of a results file is a figure: lm-eval writes "N/A" where there is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
