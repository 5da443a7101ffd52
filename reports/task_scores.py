"""The benchmarks of several checkpoints: of every task the one metric that counts.

A task counts as in the groups yoco_zero_shot and yoco_few_shot if it was run with as many examples
as there, whether or not it was run in them. Any other counts by the first of lm-eval's metrics, in
the order of its results file, that all checkpoints have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lm_eval.tasks._yaml_loader import load_yaml

import yoco_eval.tasks
from yoco_eval.tasks.published import published_rows
from yoco_eval.tasks.settings import REFUSED

from .results import mapping
from .runs import Checkpoint
from .setups import differing
from .task_runs import Score, TaskRun

GROUPS = ("yoco_zero_shot", "yoco_few_shot")  # their members are shown, and their mean


@dataclass(frozen=True)
class Benchmark:
    """A task's figures.

    n_shot: examples in each prompt; None for a group of tasks with different numbers.
    metric: with its filter, "acc_norm,none".
    scores: of each checkpoint, in their order; None where there is none.
    best: which of the checkpoints have the best score; empty where there is nothing to compare, or
        some are not comparable.
    """

    task: str
    n_shot: int | None
    metric: str
    higher_is_better: bool
    scores: tuple[Score | None, ...]
    best: tuple[int, ...]


@dataclass(frozen=True)
class PublishedModel:
    """What others reported of a model: not measured here.

    training_tokens: of the checkpoint; None if not told.
    scores: of each benchmark, in their order; None where not reported.
    """

    model: str
    source: str
    training_tokens: int | None
    scores: tuple[float | None, ...]


def benchmark_keys(checkpoints: Sequence[Checkpoint]) -> list[tuple[str, int | None]]:
    """The tasks of the table: those of each file in its order, groups behind their members.

    Left out are needle tasks and those measured by context length, which have tables of their own,
    and the members of lm-eval's groups, for which the group stands.
    """
    keys: dict[tuple[str, int | None], None] = {}
    for checkpoint in checkpoints:
        hidden = {
            (member, run.file.path)
            for run in checkpoint.tasks.values()
            if run.task not in GROUPS and run.scores
            for member in run.members
        }
        shown = [
            run
            for run in checkpoint.tasks.values()
            if (run.task, run.file.path) not in hidden and not _elsewhere(run, checkpoint)
        ]
        for run in sorted(shown, key=lambda run: run.task in GROUPS):
            keys[run.task, run.n_shot] = None
    return sorted(keys, key=_place)


def compare_benchmarks(
    checkpoints: Sequence[Checkpoint], keys: Iterable[tuple[str, int | None]] | None = None
) -> list[Benchmark]:
    """A benchmark for every task by name and examples; of None for those of `benchmark_keys`."""
    counting = _counting_metrics()
    benchmarks = []
    for task, n_shot in benchmark_keys(checkpoints) if keys is None else keys:
        runs = [checkpoint.tasks.get((task, n_shot)) for checkpoint in checkpoints]
        there = [run for run in runs if run]
        metric = counting.get((task, n_shot))
        if metric is None or not any(metric in run.scores for run in there):
            common = (m for m in there[0].scores if all(m in run.scores for run in there))
            metric = next(common, next(iter(there[0].scores)))
        scores = tuple(run.scores.get(metric) if run else None for run in runs)
        higher = higher_is_better(there[0], metric)
        comparable = not any(differing(there[0], run, REFUSED) for run in there[1:])
        benchmarks.append(
            Benchmark(
                task, n_shot, metric, higher, scores, _best(scores, higher) if comparable else ()
            )
        )
    return benchmarks


def published_models(benchmarks: Sequence[Benchmark]) -> list[PublishedModel]:
    """The published rows with a figure of the same task, number of examples and metric."""
    models = []
    for row in published_rows():
        scores = tuple(_published(row["scores"], benchmark) for benchmark in benchmarks)
        if any(score is not None for score in scores):
            models.append(
                PublishedModel(row["model"], row["source"], row.get("training_tokens"), scores)
            )
    return models


def _elsewhere(run: TaskRun, checkpoint: Checkpoint) -> bool:
    """Whether the run has another place in a report than the table of benchmarks."""
    of_needles = run.members and all(member in checkpoint.needles for member in run.members)
    return run.task in checkpoint.needles or bool(of_needles) or bool(run.by_length)


@cache
def _group_members() -> dict[str, list[Mapping]]:
    folder = Path(yoco_eval.tasks.__file__).parent
    names = (group.removeprefix("yoco_") for group in GROUPS)
    return {
        group: load_yaml(folder / f"{name}.yaml", resolve_func=False)["members"]
        for group, name in zip(GROUPS, names, strict=True)
    }


def _counting_metrics() -> dict[tuple[str, int | None], str]:
    return {
        (member["name"], member["num_fewshot"]): member["score"]
        for members in _group_members().values()
        for member in members
    }


def _place(key: tuple[str, int | None]) -> tuple[int, int]:
    """Sorts the two groups' members, in their order, and their means before all other tasks."""
    task, n_shot = key
    for index, (group, members) in enumerate(_group_members().items()):
        order = [(member["name"], member["num_fewshot"]) for member in members]
        if key in order:
            return index, order.index(key)
        if task == group:
            return index, len(order)
    return len(GROUPS), 0


def higher_is_better(run: TaskRun, metric: str) -> bool:
    """Whether more of a metric, with or without a filter behind it, is better."""
    told = mapping(mapping(run.file.data.get("higher_is_better")).get(run.task))
    return told.get(metric.partition(",")[0]) is not False


def _best(scores: Sequence[Score | None], higher_is_better: bool) -> tuple[int, ...]:
    values = [score.value for score in scores if score]
    if len(set(values)) < 2:  # one checkpoint only, or all alike
        return ()
    best = max(values) if higher_is_better else min(values)
    return tuple(i for i, score in enumerate(scores) if score and score.value == best)


def _published(scores: Mapping[str, Mapping[str, float]], benchmark: Benchmark) -> float | None:
    """The published figures are all of prompts without examples."""
    if benchmark.n_shot != 0:
        return None
    return scores.get(benchmark.task, {}).get(benchmark.metric.partition(",")[0])
