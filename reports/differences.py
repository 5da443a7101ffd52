"""Which of two checkpoints is better, at which context lengths and depths, and how sure that is.

Every pair of checkpoints is tested on every task that both were evaluated on. Needle tasks are
tested at each context length, over all depths and over the shallower and the deeper half, and over
all lengths together; benchmarks by their means. The p-values of a whole report are corrected
together, so that all that it states holds at once at the level of 5 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from yoco_eval.lengths import format_length

from .benchmarks import Benchmark
from .heatmap import format_depths
from .results import NeedleCell, NeedleRun, mapping
from .runs import Checkpoint
from .samples import NeedleSample
from .setups import MARKED, REFUSED, differing
from .statistics import LEVEL, fisher, holm, mcnemar, z_test
from .task_runs import TaskRun

PAIRED, UNPAIRED, MEANS = "McNemar's exact test", "Fisher's exact test", "z-test"

_FEWEST_DOCUMENTS = 30  # with fewer, a mean is not distributed normally enough

Cell = tuple[int, float]  # context length, depth
Answers = dict[Cell, dict[int, bool]]  # whether each sample was answered right


@dataclass(frozen=True)
class PairTest:
    """Two checkpoints on one task, or on a part of its prompts.

    first, second: which of the checkpoints, by their place.
    method: `PAIRED`, `UNPAIRED` or `MEANS`.
    scores: of the first and the second on what was compared: shares of right answers, or a
        benchmark's metric.
    p, corrected: the p-value by itself, and corrected for all tests of the report.
    prompts: of the first and the second. The same ones where the test is paired.
    context_length: in tokens; None where all lengths are taken together.
    depths: the shallowest and the deepest needle, 0 to 1; None in benchmarks.
    part: which half of the depths: "shallow" or "deep"; None for all of them.
    n_shot: of a benchmark, examples in each prompt.
    """

    task: str
    first: int
    second: int
    method: str
    scores: tuple[float, float]
    p: float
    corrected: float = 1.0
    prompts: tuple[int, int] | None = None
    context_length: int | None = None
    depths: tuple[float, float] | None = None
    part: str | None = None
    n_shot: int | None = None
    higher_is_better: bool = True

    @property
    def significant(self) -> bool:
        return self.corrected < LEVEL

    @property
    def better(self) -> int:
        """Which checkpoint has the better score: its place."""
        first_is_better = (self.scores[0] > self.scores[1]) == self.higher_is_better
        return self.first if first_is_better else self.second


@dataclass(frozen=True)
class Finding:
    """A significant difference, in a task and at a run of neighbouring context lengths.

    where: "at 256K and above, depth 0 to 50 %", each length of it tested by itself; empty for a
        benchmark.
    scores: of the better and the worse one, the means over the tests.
    p: the largest corrected p-value of the tests.
    regression: whether the worse one comes later in the order of the checkpoints.
    """

    task: str
    better: int
    worse: int
    where: str
    scores: tuple[float, float]
    p: float
    tests: tuple[PairTest, ...]

    @property
    def regression(self) -> bool:
        return self.worse > self.better


@dataclass(frozen=True)
class Caveat:
    """A pair of checkpoints that is not tested on a task, or not prompt by prompt, and why."""

    task: str
    first: int
    second: int
    refused: bool
    reason: str


def needle_tests(
    checkpoints: Sequence[Checkpoint], samples: Sequence[dict[str, Sequence[NeedleSample]]]
) -> tuple[list[PairTest], list[Caveat]]:
    """Tests, not yet corrected, of all pairs on all needle tasks.

    samples: of each checkpoint the logged ones, by task. They stand in for answers that the cells
        of older files do not tell one by one.
    """
    answers = [
        {task: _answers(run, logged.get(task, ())) for task, run in checkpoint.needles.items()}
        for checkpoint, logged in zip(checkpoints, samples, strict=True)
    ]
    tests: list[PairTest] = []
    caveats: list[Caveat] = []
    for (i, first), (j, second) in combinations(enumerate(checkpoints), 2):
        for task in first.needles:
            if task not in second.needles:
                continue
            runs = first.needle_task(task), second.needle_task(task)
            cells = _cells(first.needles[task]), _cells(second.needles[task])
            common = sorted(cells[0].keys() & cells[1].keys())
            if reason := _refusal(runs, common):
                caveats.append(Caveat(task, i, j, True, reason))
                continue
            paired = answers[i][task], answers[j][task]
            if reason := _obstacle(runs, paired):
                caveats.append(Caveat(task, i, j, False, reason))
            if cells[0].keys() != cells[1].keys():
                reason = "compared at the context lengths and depths that both have"
                caveats.append(Caveat(task, i, j, False, reason))
            for region in _regions(common):
                if _obstacle(runs, paired):
                    method, counted = UNPAIRED, _unpaired(region.cells, cells)
                else:
                    method, counted = PAIRED, _paired(region.cells, paired)
                if counted:
                    tests.append(
                        PairTest(
                            task, i, j, method, **counted, context_length=region.context_length,
                            depths=region.depths, part=region.part,
                        )
                    )  # fmt: skip
    return tests, caveats


def benchmark_tests(
    checkpoints: Sequence[Checkpoint], benchmarks: Sequence[Benchmark]
) -> tuple[list[PairTest], list[Caveat]]:
    """Tests, not yet corrected, of all pairs on all benchmarks with standard errors.

    They are not paired: results files hold means. Those of two checkpoints on the same documents
    usually vary together, so that true differences may be missed, and hardly any is made up.
    """
    tests, caveats = [], []
    for benchmark in benchmarks:
        key = benchmark.task, benchmark.n_shot
        there = [i for i, score in enumerate(benchmark.scores) if score]
        for i, j in combinations(there, 2):
            runs = checkpoints[i].tasks[key], checkpoints[j].tasks[key]
            if refused := differing(*runs, REFUSED):
                reason = f"not compared: another {_listed(refused)}"
                caveats.append(Caveat(benchmark.task, i, j, True, reason))
                continue
            if {"limit", "documents"} & set(differing(*runs, MARKED)):
                caveats.append(Caveat(benchmark.task, i, j, False, "not of the same documents"))
            a, b = benchmark.scores[i], benchmark.scores[j]
            if not (a.error and b.error):
                reason = "not tested: without a standard error above 0"
                caveats.append(Caveat(benchmark.task, i, j, False, reason))
            elif min(map(_documents, runs)) < _FEWEST_DOCUMENTS:
                reason = f"not tested: fewer than {_FEWEST_DOCUMENTS} documents"
                caveats.append(Caveat(benchmark.task, i, j, False, reason))
            else:
                p = z_test((a.value, a.error), (b.value, b.error))
                tests.append(
                    PairTest(
                        benchmark.task, i, j, MEANS, (a.value, b.value), p, n_shot=benchmark.n_shot,
                        higher_is_better=benchmark.higher_is_better,
                    )
                )  # fmt: skip
    return tests, caveats


def correct(tests: Sequence[PairTest]) -> list[PairTest]:
    """The tests with their p-values corrected for the number of all of them."""
    corrected = holm([test.p for test in tests])
    return [replace(test, corrected=p) for test, p in zip(tests, corrected, strict=True)]


def find(tests: Sequence[PairTest]) -> list[Finding]:
    """What the significant ones among corrected tests say, in their order."""
    groups: dict[tuple, list[PairTest]] = {}
    for test in tests:
        groups.setdefault((test.task, test.n_shot, test.first, test.second), []).append(test)
    return [finding for group in groups.values() for finding in _find_in(group)]


def _find_in(tests: Sequence[PairTest]) -> list[Finding]:
    """The findings about one pair on one task."""
    lengths = sorted({test.context_length for test in tests if test.context_length})
    runs: dict[tuple[int, str | None], list[list[int]]] = {}  # of neighbours in `lengths`
    telling: dict[tuple[int, str | None, int], list[PairTest]] = {}
    for place, length in enumerate(lengths):
        here = [test for test in tests if test.context_length == length and test.significant]
        for better in sorted({test.better for test in here}):
            part, chosen = _most_specific([test for test in here if test.better == better])
            telling[better, part, place] = chosen
            found = runs.setdefault((better, part), [])
            if found and found[-1][-1] == place - 1:
                found[-1].append(place)
            else:
                found.append([place])
    findings = []
    for (better, part), found in runs.items():
        for places in found:
            chosen = [test for place in places for test in telling[better, part, place]]
            where = _lengths([lengths[place] for place in places], lengths)
            findings.append(_finding(better, where + (_depths(chosen) if part else ""), chosen))
    if not findings:
        for test in tests:
            if test.context_length is None and test.significant:
                where = "" if test.method == MEANS else "over all context lengths"
                findings.append(_finding(test.better, where, [test]))
    return findings


def _most_specific(tests: Sequence[PairTest]) -> tuple[str | None, list[PairTest]]:
    """The half of the depths in which there is a difference, None if in both or in no certain one.

    tests: the significant ones at one context length with the same checkpoint ahead.
    """
    halves = [test for test in tests if test.part]
    if len(halves) == 1:
        return halves[0].part, halves
    return None, [test for test in tests if not test.part] or halves


def _finding(better: int, where: str, tests: Sequence[PairTest]) -> Finding:
    one = tests[0]
    first, second = (sum(test.scores[k] for test in tests) / len(tests) for k in (0, 1))
    worse, scores = one.second, (first, second)
    if better == one.second:
        worse, scores = one.first, (second, first)
    p = max(test.corrected for test in tests)
    return Finding(one.task, better, worse, where, scores, p, tuple(tests))


def _lengths(run: Sequence[int], tested: Sequence[int]) -> str:
    low, high = format_length(run[0]), format_length(run[-1])
    if len(run) == 1:
        return f"at {low}"
    if len(run) == len(tested):
        return "at all context lengths"
    if run[-1] == tested[-1]:
        return f"at {low} and above"
    return f"up to {high}" if run[0] == tested[0] else f"from {low} to {high}"


def _depths(tests: Sequence[PairTest]) -> str:
    shallowest = min(test.depths[0] for test in tests)
    deepest = max(test.depths[1] for test in tests)
    return f", depth {' to '.join(dict.fromkeys(format_depths([shallowest, deepest])))} %"


@dataclass(frozen=True)
class _Region:
    context_length: int | None
    part: str | None
    cells: tuple[Cell, ...]

    @property
    def depths(self) -> tuple[float, float]:
        depths = [depth for _, depth in self.cells]
        return min(depths), max(depths)


def _regions(cells: Sequence[Cell]) -> list[_Region]:
    """The parts of a grid that are tested; they depend on the grid alone, not on the answers."""
    regions = []
    lengths = sorted({length for length, _ in cells})
    for length in lengths:
        here = tuple(cell for cell in cells if cell[0] == length)
        shallow = tuple(cell for cell in here if cell[1] <= 0.5)
        deep = tuple(cell for cell in here if cell[1] > 0.5)
        regions.append(_Region(length, None, here))
        if shallow and deep:
            regions += [_Region(length, "shallow", shallow), _Region(length, "deep", deep)]
    if len(lengths) > 1:
        regions.append(_Region(None, None, tuple(cells)))
    return regions


def _paired(cells: Iterable[Cell], answers: tuple[Answers, Answers]) -> dict | None:
    """Scores, p-value and prompts; None if so few that no answers could be significant."""
    first, second = answers
    pairs = [
        (first[cell][sample], second[cell][sample])
        for cell in cells
        for sample in first[cell].keys() & second[cell].keys()
    ]
    if mcnemar(len(pairs), 0) >= LEVEL:
        return None
    scores = tuple(sum(right) / len(pairs) for right in zip(*pairs, strict=True))
    p = mcnemar(pairs.count((True, False)), pairs.count((False, True)))
    return {"scores": scores, "p": p, "prompts": (len(pairs), len(pairs))}


def _unpaired(
    cells: Sequence[Cell], grids: tuple[dict[Cell, NeedleCell], dict[Cell, NeedleCell]]
) -> dict | None:
    """As `_paired`, by the cells' counts."""
    right = [sum(grid[cell].correct for cell in cells) for grid in grids]
    total = [sum(grid[cell].samples for cell in cells) for grid in grids]
    if fisher((total[0], total[0]), (0, total[1])) >= LEVEL:
        return None
    p = fisher((right[0], total[0]), (right[1], total[1]))
    scores = right[0] / total[0], right[1] / total[1]
    return {"scores": scores, "p": p, "prompts": tuple(total)}


def _refusal(runs: tuple[TaskRun, TaskRun], common: Sequence[Cell]) -> str | None:
    if refused := differing(*runs, REFUSED):
        return f"not compared: another {_listed(refused)}"
    return None if common else "not compared: no context length and depth in common"


def _obstacle(
    runs: tuple[TaskRun, TaskRun], answers: tuple[Answers | None, Answers | None]
) -> str | None:
    """Why the answers cannot be compared prompt by prompt; None if they can."""
    if "seed" in differing(*runs, MARKED):
        return "not paired: other prompts (another seed)"
    if None in answers:
        return "not paired: an older results file does not tell which prompts were right"
    return None


def _cells(run: NeedleRun) -> dict[Cell, NeedleCell]:
    return {(cell.context_length, cell.depth): cell for cell in run.cells}


def _answers(run: NeedleRun, logged: Sequence[NeedleSample]) -> Answers | None:
    """From the cells, else from logged samples; None if neither has them all."""
    if all(cell.right is not None for cell in run.cells):
        return {
            key: dict.fromkeys(cell.right, True) | dict.fromkeys(cell.wrong, False)
            for key, cell in _cells(run).items()
        }
    answers: Answers = {}
    for sample in logged:
        cell = answers.setdefault((sample.context_length, sample.depth), {})
        cell[sample.sample] = sample.right
    whole = all(
        len(answers.get(key, ())) == cell.samples and sum(answers[key].values()) == cell.correct
        for key, cell in _cells(run).items()
    )
    return answers if whole else None


def _documents(run: TaskRun) -> int:
    """How many documents a score is of; of a group, of all its tasks."""
    counts = mapping(run.file.data.get("n-samples"))
    told = [mapping(counts.get(task)).get("effective") for task in run.members or (run.task,)]
    return sum(count for count in told if isinstance(count, int))


def _listed(settings: Sequence[str]) -> str:
    return " and ".join(settings)
