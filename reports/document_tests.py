"""Whether two checkpoints differ on a task by context length, told from its logged documents.

A task's documents are tested at each context length; a group's at each as a mean over its tasks,
each of which weighs as in the group; a task of a group over all context lengths together, so that
there are no more tests than can be corrected for. Documents with the same prompts are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from yoco_eval.tasks.settings import REFUSED

from .differences import PairTest
from .document_scores import Key, Logged, united
from .runs import Checkpoint
from .setups import differing
from .statistics import fisher, mcnemar, z_test
from .task_runs import TaskRun

PAIRED_DOCUMENTS = "McNemar's exact test or paired z-test"
OTHER_DOCUMENTS = "Fisher's exact test or z-test"
_FEWEST = 30  # documents whose mean is distributed normally enough

Stratum = tuple[Mapping[Key, float], Mapping[Key, float]]  # of the first and the second


class Curve(NamedTuple):
    """What is tested. member: whether it is a task of a group that is there, too."""

    task: str
    n_shot: int | None
    metric: str
    member: bool
    pooled: bool  # whether documents of all tasks of a group weigh alike


def document_tests(
    checkpoints: Sequence[Checkpoint],
    logged: Sequence[Mapping[str, Logged]],
    curves: Iterable[Curve],
) -> list[PairTest]:
    """Tests, not yet corrected.

    logged: of each checkpoint, by task.
    """
    tests = []
    for curve in curves:
        key = curve.task, curve.n_shot
        there = [i for i, one in enumerate(checkpoints) if key in one.tasks]
        for i, j in combinations(there, 2):
            runs = checkpoints[i].tasks[key], checkpoints[j].tasks[key]
            if differing(*runs, REFUSED):
                continue
            strata = _strata(curve, runs, (logged[i], logged[j]))
            parts: list[tuple[int, ...]] = [(n,) for n in strata]
            if curve.member and parts:
                parts = [tuple(strata)]
            for lengths in parts:
                chosen = [one for length in lengths for one in strata[length]]
                if found := _test(chosen, curve.pooled):
                    method, scores, p, prompts = found
                    tests.append(
                        PairTest(
                            curve.task, i, j, method, scores, p, prompts=prompts,
                            context_lengths=lengths, n_shot=curve.n_shot,
                        )
                    )  # fmt: skip
    return tests


def _strata(
    curve: Curve, runs: tuple[TaskRun, TaskRun], logged: tuple[Mapping[str, Logged], ...]
) -> dict[int, list[Stratum]]:
    """Of each context length that both have, the documents of each task."""
    leaves = runs[0].leaves(runs[0].file)
    if leaves != runs[1].leaves(runs[1].file):
        return {}
    pairs = [(logged[0].get(leaf), logged[1].get(leaf)) for leaf in leaves]
    found: dict[int, list[Stratum]] = {}
    lengths = {n for pair in pairs for one in pair if one for n in one.scores}
    for length in sorted(lengths):
        if any(run.file.cut(length) is not None for run in runs):
            continue
        told: list[Stratum] = [
            (one.scores[length], other.scores[length])
            for one, other in pairs
            if one and other and length in one.scores and length in other.scores
        ]
        # A mean over fewer tasks is none of the group's; bins need not have documents of all.
        if len(told) == len(pairs) or (curve.pooled and told):
            found[length] = told
    return found


def _test(
    strata: Sequence[Stratum], pooled: bool
) -> tuple[str, tuple[float, float], float, tuple[int, int]] | None:
    """Method, scores, p-value and numbers of documents; None where they are too few."""
    if pooled:
        one: Stratum = united([a for a, _ in strata]), united([b for _, b in strata])
        strata = [one]
    paired = all(first.keys() & second.keys() for first, second in strata)
    values = []
    for first, second in strata:
        keys = sorted(first.keys() & second.keys()) if paired else ()
        ones = [first[key] for key in keys] if paired else [*first.values()]
        others = [second[key] for key in keys] if paired else [*second.values()]
        values.append((np.asarray(ones), np.asarray(others)))
    scores = tuple(float(np.mean([of[k].mean() for of in values])) for k in (0, 1))
    prompts = tuple(sum(len(of[k]) for of in values) for k in (0, 1))
    method = PAIRED_DOCUMENTS if paired else OTHER_DOCUMENTS
    p = _p_value(values, paired)
    if p is None:
        return None
    return method, (scores[0], scores[1]), p, (prompts[0], prompts[1])


def _p_value(values: Sequence[tuple[np.ndarray, np.ndarray]], paired: bool) -> float | None:
    """Exact of right and wrong answers to one task; else that of means, by their normal form."""
    if len(values) == 1 and all(set(np.unique(of)) <= {0.0, 1.0} for of in values[0]):
        [(a, b)] = values
        if paired:
            return mcnemar(int(np.sum(a > b)), int(np.sum(a < b)))
        return fisher((int(a.sum()), len(a)), (int(b.sum()), len(b)))
    if min(sum(len(of[k]) for of in values) for k in (0, 1)) < _FEWEST:
        return None
    if min(len(of) for pair in values for of in pair) < 2:
        return None
    means, squares = [0.0, 0.0], [0.0, 0.0]
    for a, b in values:
        for k, of in enumerate([a - b, np.zeros(2)] if paired else [a, b]):
            means[k] += float(of.mean()) / len(values)
            squares[k] += float(of.var(ddof=1)) / len(of) / len(values) ** 2
    if not sum(squares):
        return None if means[0] != means[1] else 1.0
    return z_test((means[0], squares[0] ** 0.5), (means[1], squares[1] ** 0.5))
