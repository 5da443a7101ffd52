"""A comparison of checkpoints: all that the reports in their several forms have to say.

The checkpoints have the order of their training, from the earliest to the latest: that in which
they were given, or by the step in their names; everything that is of several checkpoints has one
entry for each, in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf
from pathlib import Path

from yoco_eval.printable import VALUE, one_line
from yoco_eval.tasks.by_length import effective_length as ruler_effective_length
from yoco_eval.tasks.published import published_rows

from .datasets import Dataset, dataset
from .differences import (
    Caveat,
    Finding,
    PairTest,
    benchmark_tests,
    correct,
    curve_tests,
    find,
    needle_tests,
)
from .document_scores import Logged, is_long, logged_scores, united
from .document_tests import Curve, document_tests
from .models import CACHE
from .profile import Profile
from .results import NeedleRun, ResultsError, common_grid, mapping
from .runs import Checkpoint, Skipped
from .samples import Answers, NeedleSample, answers, clusters, read_samples
from .setups import SetupDifference, find_differences
from .single_model import evaluated
from .stages import GIVEN, Stages, in_order
from .statistics import Interval, effective_length, interval, wilson
from .task_runs import BUCKETS, TaskRun, members_below
from .task_scores import (
    Benchmark,
    PublishedModel,
    benchmark_keys,
    compare_benchmarks,
    published_models,
)

THRESHOLD = 0.9  # of the effective context length, by default
FEW = 4  # checkpoints, whose differences are read as sentences; of more, pairs are a matrix
_RULER = ("yoco_ruler", "ruler")


@dataclass(frozen=True)
class LengthAccuracy:
    """All prompts of one context length (tokens), with the 95 % interval of their accuracy.

    haystacks: how many samples the prompts are of. None where a file does not tell which prompts
        were right: the interval then takes them for independent.
    """

    context_length: int
    correct: int
    samples: int
    interval: Interval
    haystacks: int | None

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


@dataclass(frozen=True)
class NeedleResult:
    """A needle task of one checkpoint.

    run: with its cells, for heatmaps.
    effective_length: tokens; None if not even the shortest context length passes.
    too_few_prompts: whether that ended at a length all of whose prompts were answered right, so
        that more prompts might show a longer one.
    gaps: whether shorter lengths, at which other checkpoints were evaluated, were left out.
    cut: the lengths at which the backend cut prompts, with the tokens that were left of them. The
        effective length is below all of them.
    samples: those that were logged, by context length and depth; empty if none were.
    """

    run: NeedleRun
    by_length: tuple[LengthAccuracy, ...]
    effective_length: int | None
    too_few_prompts: bool
    gaps: bool
    cut: dict[int, int]
    samples: dict[tuple[int, float], tuple[NeedleSample, ...]]

    @property
    def told_length(self) -> int | None:
        """The effective length as a number, 0 for none; None where nothing tells whether there is
        one."""
        shortest = self.by_length[0].context_length
        if not self.effective_length and (self.too_few_prompts or shortest in self.cut):
            return None
        return self.effective_length or 0

    def at(self, context_length: int) -> LengthAccuracy | None:
        found = [one for one in self.by_length if one.context_length == context_length]
        return found[0] if found else None


@dataclass(frozen=True)
class PublishedNeedles:
    """A published accuracy: not measured here. context_length: tokens of the prompts."""

    model: str
    source: str
    context_length: int
    accuracy: float


@dataclass(frozen=True)
class NeedleTask:
    """A needle task of all checkpoints; None for those that were not evaluated on it."""

    task: str
    results: tuple[NeedleResult | None, ...]
    published: tuple[PublishedNeedles, ...]

    @property
    def runs(self) -> list[NeedleRun]:
        return [result.run for result in self.results if result]

    @property
    def context_lengths(self) -> list[int]:
        return common_grid(self.runs)[0]

    @property
    def depths(self) -> list[float]:
        return common_grid(self.runs)[1]

    @property
    def too_few_prompts(self) -> bool:
        """Whether that is so of any result."""
        return any(result and result.too_few_prompts for result in self.results)


@dataclass(frozen=True)
class LengthCurves:
    """A metric by context length: RULER's and BABILong's accuracy, loss by position.

    metric: "acc" (share of right answers), "loss" (nats per token, of the tokens from the length
        before up to this one) or "loss_to" (of all tokens up to it).
    n_shot: examples in each prompt; None for a group of tasks with different numbers.
    group: of which it is a part, if that is there, too; else empty.
    binned: whether context lengths are bins, by the characters of logged prompts.
    values: by context length in tokens; None for checkpoints that were not evaluated.
    effective_lengths: of RULER, by its authors' rule, in tokens (0: none); else None.
    cut: of each checkpoint, the lengths at which the backend cut prompts, with the tokens that were
        left of them. Effective lengths are below all of them.
    left_out: of each checkpoint, the lengths of losses whose tokens do not begin at the length
        before, and which so do not compare.
    """

    task: str
    n_shot: int | None
    metric: str
    group: str
    binned: bool
    values: tuple[dict[int, float] | None, ...]
    effective_lengths: tuple[int | None, ...] | None
    cut: tuple[dict[int, int], ...]
    left_out: tuple[tuple[int, ...], ...]

    @property
    def member(self) -> bool:
        """Whether it is a part of a group."""
        return bool(self.group)

    @property
    def context_lengths(self) -> list[int]:
        return sorted({length for values in self.values if values for length in values})


@dataclass(frozen=True)
class Source:
    """Where the results of a checkpoint are from.

    dates: of its oldest and newest file used. versions: of lm-eval. datasets: by task.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    dates: tuple[datetime, datetime] | None
    backends: tuple[str, ...]
    versions: tuple[str, ...]
    datasets: dict[str, Dataset]
    skipped: tuple[Skipped, ...]

    @property
    def cache(self) -> list[str]:
        """What was set of the model's cache, as arguments: "sparse=64"."""
        found = [data.settings for data in self.datasets.values()]
        told = [(name, of[name]) for name in CACHE for of in found if name in of]
        return [f"{name}={one_line(value, VALUE)}" for name, value in dict.fromkeys(told)]


@dataclass(frozen=True)
class Comparison:
    """What is known of several checkpoints, and how they differ.

    threshold: of the accuracy, for effective context lengths.
    tests: all that were made, corrected for their number; findings: what the significant ones say.
    caveats: pairs that are not tested, or not prompt by prompt.
    setup_differences: what else than the checkpoint differs.
    stages: where the checkpoints stand in training; None of a few whose order nobody asked about.
    members: by group, lm-eval's long-context tasks that are not among the benchmarks.
    setup: of one that stands alone, how it was evaluated.
    runs: what was read of each checkpoint, for sections that want what no other one does.
    """

    checkpoints: tuple[Source, ...]
    threshold: float
    benchmarks: tuple[Benchmark, ...]
    published: tuple[PublishedModel, ...]
    members: dict[str, tuple[Benchmark, ...]]
    needles: tuple[NeedleTask, ...]
    curves: tuple[LengthCurves, ...]
    profiles: tuple[Profile | None, ...]
    tests: tuple[PairTest, ...]
    findings: tuple[Finding, ...]
    caveats: tuple[Caveat, ...]
    setup_differences: tuple[SetupDifference, ...]
    stages: Stages | None
    setup: tuple[str, ...]
    runs: tuple[Checkpoint, ...]

    @property
    def many(self) -> bool:
        """Whether there are too many checkpoints for a sentence about each pair."""
        return len(self.checkpoints) > FEW

    @property
    def single(self) -> bool:
        """Whether there is nothing to compare with."""
        return len(self.checkpoints) == 1

    @property
    def title(self) -> str:
        """The names of all checkpoints; of many, how many there are."""
        names = self.names
        if self.many:
            return f"{len(names)} checkpoints: {names[0]} to {names[-1]}"
        return " / ".join(names)

    @property
    def names(self) -> list[str]:
        return [checkpoint.name for checkpoint in self.checkpoints]

    @property
    def has_published(self) -> bool:
        """Whether there is any row of the literature."""
        return bool(self.published) or any(task.published for task in self.needles)

    @property
    def member_tasks(self) -> set[str]:
        """Tasks of groups that are there, too."""
        found = {curves.task for curves in self.curves if curves.member}
        return found | {one.task for members in self.members.values() for one in members}

    @property
    def regressions(self) -> list[Finding]:
        """Where a later checkpoint is worse than an earlier one."""
        return [finding for finding in self.findings if finding.regression]

    def sentence(self, finding: Finding) -> str:
        """A finding as a reader is told it, without a full stop."""
        a, b = (f"{score:.3g}" for score in finding.scores)
        return f"{finding.task}: {self.claim(finding)} ({a} against {b}, {p_text(finding.p)})"

    def claim(self, finding: Finding) -> str:
        """Who is better than whom, and where; of a regression, who is worse."""
        better, worse = self.names[finding.better], self.names[finding.worse]
        where = f" {finding.where}" if finding.where else ""
        if finding.regression:
            return f"{worse} is worse than the earlier {better}{where}"
        return f"{better} is better than {worse}{where}"


def p_text(p: float) -> str:
    """A p-value as it stands in a sentence."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def compare(
    checkpoints: Sequence[Checkpoint],
    threshold: float = THRESHOLD,
    published: bool = False,
    order: str | None = None,
) -> Comparison:
    """Compares what `load_checkpoints` found.

    threshold: an effective context length's accuracy is above it with 95 % confidence; 0 or above,
        below 1.
    published: whether rows of the literature stand beside the measured ones.
    order: of the checkpoints, see `stages.in_order`, for figures against the stage of training;
        None for that in which they are given, with such figures of many checkpoints alone.
    Raises ResultsError: an order that the checkpoints do not tell.
    """
    checkpoints, stages = in_order(checkpoints, order or GIVEN)
    skipped: list[list[Skipped]] = [list(checkpoint.skipped) for checkpoint in checkpoints]
    samples = [
        _samples(checkpoint, found) for checkpoint, found in zip(checkpoints, skipped, strict=True)
    ]
    benchmarks = compare_benchmarks(checkpoints)
    told = [
        {task: answers(run, logged.get(task, ())) for task, run in checkpoint.needles.items()}
        for checkpoint, logged in zip(checkpoints, samples, strict=True)
    ]
    of_needles, caveats = needle_tests(checkpoints, told, samples)
    logged = [_logged(one, found) for one, found in zip(checkpoints, skipped, strict=True)]
    groups = _groups(checkpoints)
    members = _long_members(checkpoints, groups)
    of_benchmarks, more = benchmark_tests(
        checkpoints, [*benchmarks, *(one for of_group in members.values() for one in of_group)]
    )
    curves = [*_curves(checkpoints), *_binned_curves(checkpoints, logged, groups)]
    of_documents = document_tests(
        checkpoints,
        logged,
        [Curve(c.task, c.n_shot, c.metric, c.member, c.binned) for c in curves],
    )
    of_curves, at_lengths = curve_tests(
        checkpoints,
        [(c.task, c.n_shot, c.metric) for c in curves if not (c.member or c.binned)],
        {(t.task, t.n_shot, t.first, t.second, t.context_length) for t in of_documents},
    )
    once = {(t.task, t.first, t.second) for t in of_documents if t.task in groups}
    of_benchmarks = [t for t in of_benchmarks if (t.task, t.first, t.second) not in once]
    tests = correct([*of_needles, *of_benchmarks, *of_curves, *of_documents])
    keys = dict.fromkeys(key for checkpoint in checkpoints for key in checkpoint.tasks)
    return Comparison(
        tuple(_source(c, found) for c, found in zip(checkpoints, skipped, strict=True)),
        threshold,
        tuple(benchmarks),
        tuple(published_models(benchmarks)) if published else (),
        members,
        tuple(_needle_tasks(checkpoints, samples, told, threshold, published)),
        tuple(curves),
        tuple(checkpoint.profile for checkpoint in checkpoints),
        tuple(tests),
        tuple(find(tests, checkpoints)),
        (*caveats, *more, *at_lengths),
        tuple(find_differences([c.tasks for c in checkpoints], list(keys))),
        stages if order or len(checkpoints) > FEW else None,
        tuple(evaluated([*checkpoints[0].tasks.values()])) if len(checkpoints) == 1 else (),
        tuple(checkpoints),
    )


def _samples(checkpoint: Checkpoint, skipped: list[Skipped]) -> dict[str, list[NeedleSample]]:
    """The logged samples by task; what cannot be read is added to `skipped`."""
    samples: dict[str, list[NeedleSample]] = {}
    for task, logs in checkpoint.samples.items():
        sources = {(c.context_length, c.depth): c.source for c in checkpoint.needles[task].cells}
        for source, path in logs.items():
            try:
                lines, unread = read_samples(path)
            except ResultsError as error:
                skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
                continue
            # Not those of cells that a newer run has, too.
            found = [s for s in lines if sources.get((s.context_length, s.depth)) == source]
            samples.setdefault(task, []).extend(found)
            cells = checkpoint.needles[task].cells
            answered = sum(cell.samples for cell in cells if cell.source == source)
            there = len({(one.context_length, one.depth, one.sample) for one in found})
            told = [f"{there} of {answered} samples of {task} in it"] * (there < answered)
            told += [f"lines that are no samples of {task}: {unread}"] * bool(unread)
            if told:
                skipped.append(Skipped(path, "; ".join(told)))
    return samples


def _source(checkpoint: Checkpoint, skipped: Sequence[Skipped]) -> Source:
    files = {file.path: file for run in checkpoint.tasks.values() for file in run.files}
    dates = sorted(file.date for file in files.values())
    backends = {str(file.data["config"].get("model")) for file in files.values()}
    versions = [file.data.get("lm_eval_version") for file in files.values()]
    return Source(
        checkpoint.name,
        checkpoint.path,
        tuple(files),
        (dates[0], dates[-1]) if dates else None,
        tuple(sorted(backends)),
        tuple(sorted({version for version in versions if isinstance(version, str)})),
        {run.task: dataset(run) for run in checkpoint.tasks.values()},
        tuple(skipped),
    )


def _needle_tasks(
    checkpoints: Sequence[Checkpoint],
    samples: Sequence[dict[str, list[NeedleSample]]],
    told: Sequence[dict[str, Answers]],
    threshold: float,
    published: bool,
) -> list[NeedleTask]:
    tasks = dict.fromkeys(task for checkpoint in checkpoints for task in checkpoint.needles)
    found = []
    for task in tasks:
        runs = [checkpoint.needles.get(task) for checkpoint in checkpoints]
        lengths, _ = common_grid(filter(None, runs))
        results = tuple(
            _needle_result(run, lengths, logged.get(task, []), answered[task], threshold)
            if run
            else None
            for run, logged, answered in zip(runs, samples, told, strict=True)
        )
        rows = tuple(_published_needles(task)) if published else ()
        found.append(NeedleTask(task, results, rows))
    return found


def _needle_result(
    run: NeedleRun,
    lengths: Sequence[int],
    samples: Sequence[NeedleSample],
    told: Answers,
    threshold: float,
) -> NeedleResult:
    """lengths: those of all checkpoints."""
    by_length = []
    for length in run.context_lengths:
        cells = [cell for cell in run.cells if cell.context_length == length]
        right, total = sum(cell.correct for cell in cells), sum(cell.samples for cell in cells)
        by_sample = clusters(told[length, cell.depth] for cell in cells)
        held = interval(*by_sample) if by_sample else wilson(right, total)
        haystacks = len(by_sample[0]) if by_sample else None
        by_length.append(LengthAccuracy(length, right, total, held, haystacks))
    bounds = {one.context_length: one.interval.low for one in by_length}
    effective = effective_length(below_cut(bounds, run.cut), threshold)
    beyond = [one for one in by_length if one.context_length > (effective or 0)]
    too_few = bool(beyond) and beyond[0].correct == beyond[0].samples
    too_few = too_few and beyond[0].context_length not in run.cut
    gaps = any(length < (effective or 0) for length in set(lengths) - set(run.context_lengths))
    grid: dict[tuple[int, float], tuple[NeedleSample, ...]] = {}
    for sample in samples:
        cell = sample.context_length, sample.depth
        grid[cell] = (*grid.get(cell, ()), sample)
    return NeedleResult(run, tuple(by_length), effective, too_few, gaps, run.cut, grid)


def below_cut(values: dict[int, float], cut: dict[int, int]) -> dict[int, float]:
    """The values at context lengths below those at which prompts were cut."""
    return {length: value for length, value in values.items() if length < min(cut, default=inf)}


def _published_needles(task: str) -> list[PublishedNeedles]:
    return [
        PublishedNeedles(
            row["model"], row["source"], row["context_length"], row["scores"][task]["acc"]
        )
        for row in published_rows()
        if task in row["scores"]
    ]


def _curves(checkpoints: Sequence[Checkpoint]) -> list[LengthCurves]:
    """Groups before single tasks, and those before members of groups."""
    keys = dict.fromkeys(
        key
        for checkpoint in checkpoints
        for key, run in checkpoint.tasks.items()
        if run.by_length and run.task not in checkpoint.needles
    )
    curves = []
    for task, n_shot in keys:
        runs = [checkpoint.tasks.get((task, n_shot)) for checkpoint in checkpoints]
        others = [run for one in checkpoints for run in one.tasks.values() if run.by_length]
        group = next((other.task for other in others if task in other.members), "")
        for metric in dict.fromkeys(metric for run in runs if run for metric in run.by_length):
            values = _values_by_length(metric, runs)
            cut = tuple(_cut(metric, run) for run in runs)
            left_out = tuple(
                tuple(sorted(run.by_length[metric].keys() - one)) if run and one is not None else ()
                for run, one in zip(runs, values, strict=True)
            )
            effective = tuple(
                ruler_effective_length(whole) if whole else None
                for whole in (
                    below_cut(one or {}, lengths) for one, lengths in zip(values, cut, strict=True)
                )
            )
            curves.append(
                LengthCurves(
                    task,
                    n_shot,
                    metric,
                    group,
                    False,
                    values,
                    effective if task in _RULER else None,
                    cut,
                    left_out,
                )
            )
    order = {task: len(r.members) for c in checkpoints for (task, _), r in c.tasks.items()}
    return sorted(curves, key=lambda curve: (curve.member, not order[curve.task]))


def _logged(checkpoint: Checkpoint, skipped: list[Skipped]) -> dict[str, Logged]:
    """What was logged of tasks by context length; what cannot be read is added to `skipped`."""
    found = {}
    for run in checkpoint.tasks.values():
        logged, unread = logged_scores(run)
        skipped += [Skipped(path, reason) for path, reason in unread]
        if logged is not None:
            found[run.task] = logged
    return found


def _groups(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """The largest group of each of lm-eval's long-context tasks that were evaluated in one."""
    groups: dict[str, tuple[int, str]] = {}
    files = {f.path: f for c in checkpoints for run in c.tasks.values() for f in run.files}
    for file in files.values():
        below = mapping(file.data.get("group_subtasks"))
        for group in below:
            members = members_below(group, below)
            for task in filter(is_long, members):  # sub-groups, too, which are not shown
                groups[task] = max(groups.get(task, (0, "")), (len(members), group))
    return {task: group for task, (_, group) in groups.items()}


def _long_members(
    checkpoints: Sequence[Checkpoint], groups: Mapping[str, str]
) -> dict[str, tuple[Benchmark, ...]]:
    """By group, lm-eval's long-context tasks, but those that stand among the benchmarks."""
    shown = benchmark_keys(checkpoints)
    keys = dict.fromkeys(key for one in checkpoints for key in one.tasks if key[0] in groups)
    found: dict[str, tuple[Benchmark, ...]] = {}
    for one in compare_benchmarks(checkpoints, [key for key in keys if key not in shown]):
        found[groups[one.task]] = (*found.get(groups[one.task], ()), one)
    return found


def _binned_curves(
    checkpoints: Sequence[Checkpoint],
    logged: Sequence[Mapping[str, Logged]],
    groups: Mapping[str, str],
) -> list[LengthCurves]:
    """Of lm-eval's long-context tasks whose documents were logged, and of groups of them."""
    keys = dict.fromkeys(key for one in checkpoints for key in one.tasks if is_long(key[0]))
    found = []
    for task, n_shot in keys:
        runs = [one.tasks.get((task, n_shot)) for one in checkpoints]
        told = [_binned(run, of) for run, of in zip(runs, logged, strict=True)]
        if not any(told):
            continue
        metric = next(one.metric for one in told if one)
        values = tuple(one.means() if one and one.metric == metric else None for one in told)
        cut = tuple(
            {n: to for n in means or () if (to := run.file.cut(n)) is not None} if run else {}
            for run, means in zip(runs, values, strict=True)
        )
        nothing_left_out: tuple[tuple[int, ...], ...] = ((),) * len(checkpoints)
        group = groups.get(task, "")
        found.append(
            LengthCurves(task, n_shot, metric, group, True, values, None, cut, nothing_left_out)
        )
    return sorted(found, key=lambda curves: curves.member)


def _binned(run: TaskRun | None, logged: Mapping[str, Logged]) -> Logged | None:
    """What was logged of a task, or of all tasks of a group; None if they have several metrics."""
    found = [logged.get(leaf) for leaf in run.leaves(run.file)] if run else []
    there = [one for one in found if one is not None and one.binned]
    if not there or len(there) < len(found) or len({one.metric for one in there}) > 1:
        return None
    lengths = {length for one in there for length in one.scores}
    scores = {n: united([one.scores.get(n, {}) for one in there]) for n in lengths}
    return Logged(there[0].metric, True, scores)


def _cut(metric: str, run: TaskRun | None) -> dict[int, int]:
    scores = run.by_length.get(metric, {}) if run else {}
    return {n: score.cut_to for n, score in scores.items() if score.cut_to is not None}


def _values_by_length(
    metric: str, runs: Sequence[TaskRun | None]
) -> tuple[dict[int, float] | None, ...]:
    """Of each run; those of buckets that begin at the length before, as others' do not compare."""
    scores = [run.by_length.get(metric) if run else None for run in runs]
    lengths = sorted({length for one in scores if one for length in one})
    before = dict(zip(lengths, [0, *lengths], strict=False))
    return tuple(
        None
        if one is None
        else {
            length: score.value
            for length, score in one.items()
            if metric not in BUCKETS or score.after == before[length]
        }
        for one in scores
    )
