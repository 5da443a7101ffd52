"""Collects the results of checkpoints: from each folder those of one model, under one name.

A folder may hold several files, benchmarks in one and needles in another, of any lm-eval backend,
and profiles beside them. Runs of a task at several context lengths are united, of other tasks the
newest counts. What is not used is named with the reason, and nothing in a folder can stop a report
of the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path

from yoco_eval.printable import listed

from .models import name_folders, name_models, settle
from .profile import NotAProfile, Profile, load_profile
from .results import NeedleRun, ResultsError, ResultsFile, read_results
from .samples import find_samples
from .task_runs import TaskRun, predicts_only, task_runs
from .united import unite

logger = logging.getLogger(__name__)

_UNSCORED = "has no scores: run without --predict_only"


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """What is known of one checkpoint.

    tasks: by name and number of examples.
    needles: by task, those of `tasks` that left cells.
    samples: by needle task, where its samples were logged, by the results file of the same run.
    """

    name: str
    path: Path
    tasks: dict[tuple[str, int | None], TaskRun] = field(default_factory=dict)
    needles: dict[str, NeedleRun] = field(default_factory=dict)
    samples: dict[str, dict[Path, Path]] = field(default_factory=dict)
    profile: Profile | None = None
    skipped: tuple[Skipped, ...] = ()

    def needle_task(self, task: str) -> TaskRun:
        """The task's entry in `tasks`, which has its cells."""
        return next(run for run in self.tasks.values() if run.task == task and run.cells)


def load_checkpoints(
    paths: Sequence[str | Path], names: Sequence[str] | None = None
) -> list[Checkpoint]:
    """What each path holds, in the order given.

    paths: folders, searched with their subfolders, or single results files.
    names: of the checkpoints; by default those of the folders, with as many of the parents as it
        takes to tell them apart; of files in one folder those of their models.
    Raises ResultsError: a path is not there, is given twice or holds no results; names that do not
    fit.
    """
    places = [Path(path) for path in paths]
    for path in places:
        _check_there(path)
    names = _check_names(names, len(places)) if names else _names(places)
    checkpoints = [_load(path, name) for path, name in zip(places, names, strict=True)]
    _check_apart(checkpoints)
    return checkpoints


def _check_apart(checkpoints: Sequence[Checkpoint]) -> None:
    """A file that counts for two, of a folder and one within it, would compare with itself."""
    owners: dict[Path, Checkpoint] = {}
    for checkpoint in checkpoints:
        files = {file.path for run in checkpoint.tasks.values() for file in run.files}
        for file in sorted(path.resolve() for path in files):
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
        if models := _models(paths):
            return models
        parts = [path.parts for path in resolved]
    names = []
    for mine in parts:
        taken = 1
        while sum(other[-taken:] == mine[-taken:] for other in parts) > 1:
            taken += 1
        names.append("/".join(mine[-taken:]))
    return name_folders(names)


def _models(paths: Sequence[Path]) -> list[str] | None:
    """The names of the models of results files, if these tell all of them apart."""
    try:
        names = [file.model for file in _named([read_results(path) for path in paths])]
    except ResultsError:
        return None
    return names if len(set(names)) == len(names) else None


def _load(path: Path, name: str) -> Checkpoint:
    files, profiles, skipped = _read_files(path)
    files, of_others = _one_model(files)
    if of_others:
        logger.warning(
            "%s holds results of several models; only those of %s count. Give each model's own "
            "folder to compare them", path, files[-1].model,
        )  # fmt: skip
    tasks, left_out = _collect(files)
    skipped += [*of_others, *left_out]
    skipped += [Skipped(file, "an older profile") for file, _ in profiles[:-1]]
    if not (tasks or profiles):
        raise ResultsError(
            f"{path}: no results in it{_first(skipped)}; make some with "
            f"lm_eval ... --output_path {path}"
        )
    needles = {run.task: _needle_run(run, name) for run in tasks.values() if run.cells}
    return Checkpoint(
        name,
        path,
        tasks,
        needles,
        {task: _samples(run) for task, run in needles.items()},
        profiles[-1][1] if profiles else None,
        tuple(sorted(skipped, key=lambda skip: str(skip.path))),
    )


def load_needle_run(path: str | Path, task: str | None = None) -> NeedleRun:
    """The needle results at `path`, which must be of one model: of the newest run and its like.

    path: a folder or a file, as for `load_checkpoints`.
    task: the task to read; needed only where there are several needle tasks.
    Raises ResultsError: no needle results, several tasks or models to choose from, malformed cells.
    """
    path = Path(path)
    _check_there(path)
    if path.is_file():
        files = _named([read_results(path)])
        skipped: list[Skipped] = []
    else:
        files, _, skipped = _read_files(path)
    skipped += [Skipped(file.path, _UNSCORED) for file in files if predicts_only(file)]
    files = [file for file in files if file.needle_cells()]
    if not files:
        folder = path.parent if path.is_file() else path
        raise ResultsError(
            f"{path}: no needle results{_first(skipped)}; make some with "
            f"lm_eval ... --tasks yoco_needle --output_path {folder}"
        )
    tasks = sorted({name for file in files for name in file.needle_cells()})
    if task is None:
        if len(tasks) > 1:
            raise ResultsError(
                f"{path}: several needle tasks; choose one with --task: {listed(tasks, 20)}"
            )
        task = tasks[0]
    files = [file for file in files if task in file.needle_cells()]
    if not files:
        raise ResultsError(f"{path}: no needle task {task!r}; there is: {listed(tasks, 20)}")
    if len({file.model_id for file in files}) > 1:
        raise ResultsError(f"{path}: several models; choose one of: {_choices(files)}")
    if damage := task_runs(files[-1])[1].get(task):
        raise ResultsError(f"{files[-1].path}: task {task}: {damage}; run the evaluation again")
    found, left_out = _collect(files, task)
    for skip in (*skipped, *left_out):
        logger.warning("skipped %s: %s", skip.path, skip.reason)
    run = _needle_run(next(run for run in found.values() if run.cells), files[-1].model)
    if len(run.sources) > 1:
        logger.warning(
            "%s: one grid of %d runs: %s",
            task, len(run.sources), listed(sorted(source.name for source in run.sources)),
        )  # fmt: skip
    return run


def _first(skipped: Sequence[Skipped]) -> str:
    """Why the first of the files that are no use is none."""
    return f" ({skipped[0].path.name}: {skipped[0].reason})" if skipped else ""


def _check_there(path: Path) -> None:
    if path.exists():
        return
    if path.suffix == ".json":  # lm-eval writes the date of the run into a file's name
        dated = sorted(path.parent.glob(f"{escape(path.stem)}_????-??-??T*.json"))
        if dated:
            raise ResultsError(f"{path}: no such file; there is {listed(map(str, dated))}")
    raise ResultsError(f"{path}: no such file or folder; give what lm_eval got as --output_path")


def _needle_run(run: TaskRun, name: str) -> NeedleRun:
    return NeedleRun(name, run.task, run.file.path, run.file.date, run.cells)


def _samples(run: NeedleRun) -> dict[Path, Path]:
    found = {source: find_samples(source, run.task) for source in sorted(run.sources)}
    return {source: samples for source, samples in found.items() if samples}


def _collect(
    files: Sequence[ResultsFile], only: str | None = None
) -> tuple[dict[tuple[str, int | None], TaskRun], list[Skipped]]:
    """The results of files of one model, and what is not among them.

    files: oldest first. only: the one task that is wanted.
    """
    runs: dict[tuple[str, int | None], list[TaskRun]] = {}
    skipped: list[Skipped] = []
    superseded: dict[Path, str] = {}
    for file in files:
        found, damaged = task_runs(file)
        for task, error in damaged.items():
            if only in (None, task):
                skipped.append(Skipped(file.path, f"task {task}: {error}"))
        nothing = _UNSCORED if predicts_only(file) else "has no results"
        superseded[file.path] = "its results are all in newer files" if found else nothing
        for run in found:
            if only in (None, run.task):
                runs.setdefault((run.task, run.n_shot), []).append(run)
    tasks: dict[tuple[str, int | None], TaskRun] = {}
    reasons: dict[tuple[Path, str], list[str]] = {}
    for key, alike in runs.items():
        tasks[key], left_out = unite(alike[::-1])
        for one in left_out:
            reasons.setdefault((one.run.file.path, one.reason), []).append(one.run.task)
    skipped += _drop_older_needles(tasks)
    for (path, reason), members in reasons.items():
        named = members[0] if len(members) == 1 else f"{members[0]} and {len(members) - 1} more"
        skipped.append(Skipped(path, f"{named}: {reason}"))
    told = {file.path for run in tasks.values() for file in run.files}
    told |= {skip.path for skip in skipped}
    skipped += [Skipped(path, why) for path, why in superseded.items() if path not in told]
    return tasks, skipped


def _drop_older_needles(tasks: dict[tuple[str, int | None], TaskRun]) -> list[Skipped]:
    """Leaves of each needle task the newest alone, where there are several numbers of examples."""
    newest: dict[str, TaskRun] = {}
    skipped = []
    needles = [run for run in tasks.values() if run.cells]
    for run in sorted(needles, key=lambda run: run.file.date, reverse=True):
        other = newest.setdefault(run.task, run)
        if other is not run:
            del tasks[run.task, run.n_shot]
            reason = f"not united with {other.file.path.name}: another number of examples"
            skipped += [Skipped(file.path, f"{run.task}: {reason}") for file in run.files]
    return skipped


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
    return _named(results), profiles, skipped


def _named(files: Sequence[ResultsFile]) -> list[ResultsFile]:
    """Files, oldest first, whose models are called by what tells them from the others."""
    models = settle([file.model_id for file in files])
    names = name_models(models)
    return [
        replace(file, model=names[model], model_id=model)
        for file, model in zip(files, models, strict=True)
    ]


def _one_model(files: list[ResultsFile]) -> tuple[list[ResultsFile], list[Skipped]]:
    """The files of the model that the newest one is of; the others, which are mixed up with it."""
    if not files:
        return [], []
    newest = files[-1]
    mine = [file for file in files if file.model_id == newest.model_id]
    reason = f"of another model, {{}}, than {newest.path.name}; give its results by themselves"
    others = [
        Skipped(file.path, reason.format(file.model))
        for file in files
        if file.model_id != newest.model_id
    ]
    return mine, others


def _choices(files: Sequence[ResultsFile]) -> str:
    """Each model's newest folder; its file where the folder holds another model's results too."""
    choices = []
    for model_id in dict.fromkeys(file.model_id for file in files):
        newest = [file for file in files if file.model_id == model_id][-1]
        folder = newest.path.parent
        shared = any(file.model_id != model_id and folder in file.path.parents for file in files)
        choices.append(f"{newest.path if shared else folder} ({newest.model})")
    return listed(sorted(choices), 20)
