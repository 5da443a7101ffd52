"""The section that says who is better, where, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from .cells import Section
from .comparison import Comparison, p_text
from .differences import Finding, on_which
from .pairs import advances, matrices, regressions, sort_pairs
from .part import Part


def _sections(comparison: Comparison) -> Iterator[Section]:
    yield _differences(comparison)


def _differences(comparison: Comparison) -> Section:
    tests = len(comparison.tests)
    if len(comparison.names) < 2:
        return Section("Differences")
    if not tests:
        return Section("Differences", f"No tests were made: {_why_none(comparison)}.")
    plural = "test" if tests == 1 else "tests"
    if not comparison.findings:
        none = f"None is significant at the 5 % level ({tests} {plural}, Holm)."
        return Section("Differences", none + _nearest(comparison))
    others = [finding for finding in comparison.findings if not finding.regression]
    text = f"Significant at the 5 % level, corrected for {tests} {plural} (Holm):"
    if comparison.many:
        pairs = sort_pairs(comparison)
        return Section(
            "Differences",
            text,
            tuple(f"REGRESSION: {told}" for told in regressions(comparison, pairs)),
            tuple(advances(comparison, pairs)),
            tuple(_told(comparison, comparison.findings)),
            tuple(matrices(comparison, pairs)),
        )
    return Section(
        "Differences",
        text,
        tuple(f"REGRESSION: {told}" for told in _told(comparison, comparison.regressions)),
        tuple(_told(comparison, others)),
    )


def _why_none(comparison: Comparison) -> str:
    tasks = [{task for task, _ in run.tasks} for run in comparison.runs]
    if not any(one & other for one, other in combinations(tasks, 2)):
        return "no two have a task in common"
    there = comparison.caveats or comparison.curves
    return "see below" if there else "there is too little in common"


def _nearest(comparison: Comparison) -> str:
    """Of which difference one is surest: few samples may leave large ones without significance."""
    test = min(comparison.tests, key=lambda test: test.p)
    if test.corrected == 1:
        return ""
    names = [comparison.names[place] for place in (test.first, test.second)]
    scores = [f"{name} {score:.3g}" for name, score in zip(names, test.scores, strict=True)]
    of = " ".join(filter(None, [test.name, on_which(test)]))
    return f" Nearest to it: {of} ({', '.join(scores)}; corrected, {p_text(test.corrected)})."


def _told(comparison: Comparison, findings: Sequence[Finding]) -> Iterable[str]:
    """The findings as sentences, one for all benchmarks in which the same one is better, and one
    for all tasks of groups."""
    members = comparison.member_tasks
    together = [one for one in findings if not one.where or one.task in members]
    yield from (comparison.sentence(one) for one in findings if one not in together)
    benchmarks: dict[str, list[Finding]] = {}
    for finding in together:
        benchmarks.setdefault(comparison.claim(finding), []).append(finding)
    for claim, alike in benchmarks.items():
        tasks = ", ".join(
            f"{_benchmark_name(comparison, one)} ({one.scores[0]:.3g} against {one.scores[1]:.3g})"
            for one in alike
        )
        yield f"{claim} in {tasks}, {p_text(max(one.p for one in alike))}"


def _benchmark_name(comparison: Comparison, finding: Finding) -> str:
    """The task, with its number of examples where it was run with several."""
    found = {one.n_shot for one in comparison.benchmarks if one.task == finding.task}
    shots = finding.tests[0].n_shot
    return finding.task if len(found) < 2 else f"{finding.task} ({shots}-shot)"


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    names = comparison.names
    for test in comparison.tests:
        depth, deepest = test.depths or (None, None)
        samples, other_samples = test.prompts or (None, None)
        yield {
            "kind": "test", "checkpoint": names[test.first], "other": names[test.second],
            "task": test.task, "n_shot": test.n_shot, "metric": test.method,
            "context_length": test.context_length,
            "depth": depth, "deepest": deepest, "value": test.scores[0],
            "other_value": test.scores[1], "samples": samples, "other_samples": other_samples,
            "p": test.p, "p_corrected": test.corrected,
            "note": "every needle" * test.every_needle,
        }  # fmt: skip


PART = Part(_sections, rows=_rows)
