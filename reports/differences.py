"""Which of two checkpoints is better, at which context lengths and depths, and how sure that is.

Every pair of checkpoints is tested on every task that both were evaluated on. Needle tasks are
tested at each context length, over all depths and over the shallower and the deeper half, and over
all lengths together, and by how much of each text is answered where every needle of it was asked
for; benchmarks by their means, and other tasks by context length by their means at
each, where lm-eval tells standard errors. Prompts of needle tasks are paired where both
results files tell that they were the same, and those of one sample, which have a haystack in
common, count as a cluster. The p-values of a whole report are corrected together, so that all that
it states holds at once at the level of 5 %.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from yoco_eval.lengths import format_length
from yoco_eval.tasks.settings import MARKED, REFUSED, STATED

from .heatmap import format_depths
from .results import NeedleCell, NeedleRun, mapping
from .runs import Checkpoint
from .samples import EVERY, Answer, Answers, Cell, NeedleSample, clusters
from .setups import PROMPTS, differing
from .statistics import LEVEL, fisher, holm, mcnemar, paired_test, unpaired_test, z_test
from .task_runs import Score, TaskRun
from .task_scores import Benchmark, higher_is_better

# Each takes answers of one sample for a cluster, but for those of the second line.
PAIRED, UNPAIRED = "McNemar's exact and t test", "Fisher's exact and Welch's test"
INDEPENDENT, MEANS = "Fisher's exact test", "z-test"
TEXTS = "exact sign and t test"

_CUT = "prompts were cut"
_FEWEST_DOCUMENTS = 30  # with fewer, a mean is not distributed normally enough
_NO_ERROR = "without a standard error above 0"
_FEW_DOCUMENTS = f"fewer than {_FEWEST_DOCUMENTS} documents"


@dataclass(frozen=True)
class PairTest:
    """Two checkpoints on one task, or on a part of its prompts.

    first, second: which of the checkpoints, by their place.
    method: `PAIRED`, `UNPAIRED`, `INDEPENDENT`, `MEANS` or `TEXTS`.
    scores: of the first and the second on what was compared: shares of right answers, or a
        benchmark's metric.
    p, corrected: the p-value by itself, and corrected for all tests of the report.
    prompts: of the first and the second. The same ones where the test is paired.
    context_lengths: in tokens, of the prompts; several are taken together. Empty in benchmarks.
    depths: the shallowest and the deepest needle, 0 to 1; None in benchmarks.
    part: which half of the depths: "shallow" or "deep"; None for all of them.
    n_shot: of a benchmark, examples in each prompt.
    every_needle: whether the scores are shares of all needles of each text, `samples.EVERY`.
    """

    task: str
    first: int
    second: int
    method: str
    scores: tuple[float, float]
    p: float
    corrected: float = 1.0
    prompts: tuple[int, int] | None = None
    context_lengths: tuple[int, ...] = ()
    depths: tuple[float, float] | None = None
    part: str | None = None
    n_shot: int | None = None
    higher_is_better: bool = True
    every_needle: bool = False

    @property
    def name(self) -> str:
        """The task, and of what in it the scores are, where it has several."""
        return _every_needle(self.task) if self.every_needle else self.task

    @property
    def context_length(self) -> int | None:
        """The one that is tested by itself."""
        return self.context_lengths[0] if len(self.context_lengths) == 1 else None

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
    """A significant difference, in a task and at some of its context lengths.

    task: as `PairTest.name`.
    where: "from 256K to 1M, depth 0 to 50 %", each length of it tested by itself and no evaluated
        one left out in between; or "over 4K and 8K together". Empty for a benchmark.
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
    checkpoints: Sequence[Checkpoint],
    answers: Sequence[Mapping[str, Answers]],
    samples: Sequence[Mapping[str, Sequence[NeedleSample]]],
) -> tuple[list[PairTest], list[Caveat]]:
    """Tests, not yet corrected, of all pairs on all needle tasks.

    answers, samples: of each checkpoint, by task.
    """
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
            cut = {*first.needles[task].cut, *second.needles[task].cut}
            whole = [cell for cell in common if cell[0] not in cut]
            told = answers[i][task], answers[j][task]
            others = _other_prompts(runs)
            obstacles = {cell: _obstacle(told[0][cell], told[1][cell], others) for cell in whole}
            made = []
            for region in regions(whole):
                if found := _test(region.cells, cells, told, obstacles):
                    method, counted = found
                    made.append(
                        PairTest(
                            task, i, j, method, **counted, context_lengths=region.context_lengths,
                            depths=region.depths, part=region.part,
                        )
                    )  # fmt: skip
            tests += made
            reasons = _restrictions(cells, common, obstacles, made)
            caveats += [Caveat(task, i, j, False, reason) for reason in reasons]
            shares = [_shares(samples[k].get(task, ())) for k in (i, j)]
            every = _test_every_needle(runs, cells, told, obstacles, shares)
            if isinstance(every, str):
                caveats.append(Caveat(_every_needle(task), i, j, False, f"not tested: {every}"))
            elif every:
                method, counted = every
                grid = Region(None, tuple(whole))
                tests.append(
                    PairTest(
                        task, i, j, method, **counted, context_lengths=grid.context_lengths,
                        depths=grid.depths, every_needle=True,
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
        there = [(i, score) for i, score in enumerate(benchmark.scores) if score]
        for (i, a), (j, b) in combinations(there, 2):
            runs = checkpoints[i].tasks[key], checkpoints[j].tasks[key]
            if refused := differing(*runs, REFUSED):
                reason = f"not compared: another {_listed(refused)}"
                caveats.append(Caveat(benchmark.task, i, j, True, reason))
                continue
            if {"limit", "documents"} & set(differing(*runs, MARKED)):
                caveats.append(Caveat(benchmark.task, i, j, False, "not of the same documents"))
            if obstacle := _untestable((a, b), list(map(_documents, runs))):
                caveats.append(Caveat(benchmark.task, i, j, False, f"not tested: {obstacle}"))
            else:
                p = z_test(_mean(a), _mean(b))
                tests.append(
                    PairTest(
                        benchmark.task, i, j, MEANS, (a.value, b.value), p, n_shot=benchmark.n_shot,
                        higher_is_better=benchmark.higher_is_better,
                    )
                )  # fmt: skip
    return tests, caveats


def curve_tests(
    checkpoints: Sequence[Checkpoint],
    curves: Iterable[tuple[str, int | None, str]],
    tested: Collection[tuple[str, int | None, int, int, int | None]] = (),
) -> tuple[list[PairTest], list[Caveat]]:
    """Tests, not yet corrected, of all pairs at each context length at which both tell errors.

    curves: task, number of examples and metric; see `task_runs.TaskRun.by_length`.
    tested: task, number of examples, first and second, context length of those that are already.
    As of benchmarks, they are not paired.
    """
    tests, caveats = [], []
    for task, n_shot, metric in curves:
        there = [i for i, one in enumerate(checkpoints) if (task, n_shot) in one.tasks]
        for i, j in combinations(there, 2):
            runs = checkpoints[i].tasks[task, n_shot], checkpoints[j].tasks[task, n_shot]
            scores = [run.by_length.get(metric, {}) for run in runs]
            evaluated = sorted({*scores[0], *scores[1]})
            lengths = [
                n for n in evaluated
                if all(n in one and one[n].error is not None for one in scores)
                and (task, n_shot, i, j, n) not in tested
            ]  # fmt: skip
            if not lengths:
                continue
            if refused := differing(*runs, REFUSED):
                reason = f"not compared: another {_listed(refused)}"
                caveats.append(Caveat(task, i, j, True, reason))
                continue
            untested: dict[str, list[int]] = {}
            others = False
            for length in lengths:
                pair = scores[0][length], scores[1][length]
                documents = [_documents_of(*one) for one in zip(runs, pair, strict=True)]
                if obstacle := _untestable(pair, documents):
                    untested.setdefault(obstacle, []).append(length)
                    continue
                others |= documents[0] != documents[1]
                p = z_test(_mean(pair[0]), _mean(pair[1]))
                tests.append(
                    PairTest(
                        task, i, j, MEANS, (pair[0].value, pair[1].value), p, n_shot=n_shot,
                        context_lengths=(length,),
                        higher_is_better=higher_is_better(runs[0], metric),
                    )
                )  # fmt: skip
            reasons = [f"not tested {_at(n, evaluated)}: {why}" for why, n in untested.items()]
            reasons += ["not of the same documents"] * others
            caveats += [Caveat(task, i, j, False, reason) for reason in reasons]
    return tests, caveats


def _untestable(scores: Sequence[Score], documents: Sequence[int]) -> str | None:
    """Why two means cannot be tested; None if they can."""
    if any(score.cut_to is not None for score in scores):
        return _CUT
    if not all(score.error for score in scores):
        return _NO_ERROR
    if min(documents) < _FEWEST_DOCUMENTS:
        return _FEW_DOCUMENTS
    return None


def _mean(score: Score) -> tuple[float, float]:
    """With its standard error, which there is."""
    assert score.error is not None
    return score.value, score.error


def correct(tests: Sequence[PairTest]) -> list[PairTest]:
    """The tests with their p-values corrected for the number of all of them."""
    corrected = holm([test.p for test in tests])
    return [replace(test, corrected=p) for test, p in zip(tests, corrected, strict=True)]


def find(tests: Sequence[PairTest], checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """What the significant ones among corrected tests say, in their order."""
    groups: dict[tuple, list[PairTest]] = {}
    for test in tests:
        groups.setdefault((test.name, test.n_shot, test.first, test.second), []).append(test)
    findings = []
    for (task, _, first, second), group in groups.items():
        runs = [*checkpoints[first].tasks.values(), *checkpoints[second].tasks.values()]
        evaluated = {n for run in runs if run.task == task for n in run.context_lengths}
        evaluated |= {n for test in group for n in test.context_lengths}  # bins
        findings += _find_in(group, sorted(evaluated))
    return findings


def _find_in(tests: Sequence[PairTest], evaluated: Sequence[int]) -> list[Finding]:
    """The findings about one pair on one task.

    evaluated: the context lengths of either, tested or not.
    """
    telling: dict[tuple[int, tuple[float, float] | None], dict[int, list[PairTest]]] = {}
    for length in evaluated:
        here = [test for test in tests if test.context_length == length and test.significant]
        for better in sorted({test.better for test in here}):
            part, chosen = _most_specific([test for test in here if test.better == better])
            depths = chosen[0].depths if part else None
            telling.setdefault((better, depths), {})[length] = chosen
    findings = []
    for (better, depths), found in telling.items():
        chosen = [test for of_length in found.values() for test in of_length]
        where = _at(list(found), evaluated) + (_depth(depths) if depths else "")
        findings.append(_finding(better, where, chosen))
    if not findings:
        for test in tests:
            if len(test.context_lengths) != 1 and test.significant:
                findings.append(_finding(test.better, _over(test, evaluated), [test]))
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
    return Finding(one.name, better, worse, where, scores, p, tuple(tests))


def on_which(test: PairTest) -> str:
    """On which of the task's prompts: "at 16K, depth 50 to 100 %"; empty in benchmarks."""
    lengths = test.context_lengths
    told = _at(lengths, lengths) if len(lengths) == 1 else _over(test, lengths)
    return told + (_depth(test.depths) if test.part and test.depths else "")


def _over(test: PairTest, evaluated: Sequence[int]) -> str:
    lengths = _spans(test.context_lengths, evaluated)
    return f"over {lengths} together" if lengths else ""


def _at(lengths: Sequence[int], evaluated: Sequence[int]) -> str:
    """Where that is: "at 4K and 16K", "from 4K to 16K"."""
    spans = _spans(lengths, evaluated)
    return f"at {spans}" if " to " not in spans or " and " in spans else f"from {spans}"


def _spans(lengths: Sequence[int], evaluated: Sequence[int]) -> str:
    """The context lengths, no others: "4K", "4K and 16K", "1K, 4K to 32K and 128K".

    A span has no evaluated length in it but those.
    """
    spans: list[list[int]] = []
    for length in lengths:
        if spans and evaluated.index(length) == evaluated.index(spans[-1][-1]) + 1:
            spans[-1].append(length)
        else:
            spans.append([length])
    told = []
    for span in spans:
        names = [format_length(length) for length in span]
        told += names if len(names) < 3 else [f"{names[0]} to {names[-1]}"]
    return _listed(told)


def _depth(depths: tuple[float, float]) -> str:
    return f", depth {' to '.join(dict.fromkeys(format_depths(list(depths))))} %"


@dataclass(frozen=True)
class Region:
    """Cells that are tested together.

    part: which half of the depths: "shallow" or "deep"; None for all of them.
    """

    part: str | None
    cells: tuple[Cell, ...]

    @property
    def context_lengths(self) -> tuple[int, ...]:
        return tuple(sorted({length for length, _ in self.cells}))

    @property
    def depths(self) -> tuple[float, float]:
        depths = [depth for _, depth in self.cells]
        return min(depths), max(depths)


def regions(cells: Sequence[Cell]) -> list[Region]:
    """The parts of a grid that are tested; they depend on the grid alone, not on the answers."""
    found = []
    lengths = sorted({length for length, _ in cells})
    for length in lengths:
        here = tuple(cell for cell in cells if cell[0] == length)
        shallow = tuple(cell for cell in here if cell[1] <= 0.5)
        deep = tuple(cell for cell in here if cell[1] > 0.5)
        found.append(Region(None, here))
        if shallow and deep:
            found += [Region("shallow", shallow), Region("deep", deep)]
    if len(lengths) > 1:
        found.append(Region(None, tuple(cells)))
    return found


Grids = tuple[dict[Cell, NeedleCell], dict[Cell, NeedleCell]]


def _test(
    cells: Sequence[Cell],
    grids: Grids,
    answers: tuple[Answers, Answers],
    obstacles: Mapping[Cell, str | None],
) -> tuple[str, dict] | None:
    """The method, and scores, p-value and prompts, of these cells together.

    None if the prompts are so few that no answers to them could be significant.
    """
    if not any(obstacles[cell] for cell in cells):
        counted = _paired(cells, answers)
        return (PAIRED, counted) if counted else None
    right = [sum(grid[cell].correct for cell in cells) for grid in grids]
    total = [sum(grid[cell].samples for cell in cells) for grid in grids]
    if fisher((total[0], total[0]), (0, total[1])) >= LEVEL:
        return None
    first, second = (clusters(told[cell] for cell in cells) for told in answers)
    if first is None or second is None:
        method, p = INDEPENDENT, fisher((right[0], total[0]), (right[1], total[1]))
    else:
        method, p = UNPAIRED, unpaired_test(first, second)
    scores = right[0] / total[0], right[1] / total[1]
    return method, {"scores": scores, "p": p, "prompts": tuple(total)}


def _paired(cells: Iterable[Cell], answers: tuple[Answers, Answers]) -> dict | None:
    first, second = answers
    pairs: dict[int, list[tuple[bool, bool]]] = {}  # by sample
    for cell in cells:
        one, other = first[cell] or {}, second[cell] or {}
        for sample in one.keys() & other.keys():
            pairs.setdefault(sample, []).append((one[sample].right, other[sample].right))
    every = [pair for of_sample in pairs.values() for pair in of_sample]
    if mcnemar(len(every), 0) >= LEVEL:
        return None
    p = paired_test(
        [of_sample.count((True, False)) for of_sample in pairs.values()],
        [of_sample.count((False, True)) for of_sample in pairs.values()],
    )
    scores = tuple(sum(right) / len(every) for right in zip(*every, strict=True))
    return {"scores": scores, "p": p, "prompts": (len(every), len(every))}


def _every_needle(task: str) -> str:
    return f"{task} (every needle)"


Shares = Mapping[tuple[Cell, int], float]  # by cell and sample


def _shares(samples: Iterable[NeedleSample]) -> Shares:
    return {
        ((one.context_length, one.depth), one.sample): one.every
        for one in samples
        if one.every is not None
    }


def _test_every_needle(
    runs: tuple[TaskRun, TaskRun],
    grids: Grids,
    answers: tuple[Answers, Answers],
    obstacles: Mapping[Cell, str | None],
    shares: Sequence[Shares],
) -> tuple[str, dict] | str | None:
    """As `_test`, of the scores of every needle; else why not. None where one has no such score.

    They are paired where both logged the share of every text that they have in common.
    """
    first, second = (run.scores.get(f"{EVERY},none") for run in runs)
    if not first or not second:
        return None
    if not obstacles:
        return _CUT
    if reason := next(filter(None, obstacles.values()), None):
        return reason
    told = [{(c, n) for c in obstacles for n in one[c] or {}} for one in answers]
    common = sorted(told[0] & told[1])
    if all(text in one for text in common for one in shares):
        return _paired_shares([(text[1], shares[0][text], shares[1][text]) for text in common])
    if any(grid.keys() != obstacles.keys() for grid in grids):
        return "the standard errors are of other context lengths or depths"
    scores = first.value, second.value
    if first.error is None or second.error is None:
        return _NO_ERROR
    if not (first.error or second.error or scores[0] != scores[1]):
        return _NO_ERROR
    if (documents := min(map(_documents, runs))) < _FEWEST_DOCUMENTS:
        return _FEW_DOCUMENTS
    p = z_test(_mean(first), _mean(second)) if first.error or second.error else 0.0
    if not (first.error and second.error):
        # That all of its answers are right does not tell that the next would be. But the other one
        # is behind in so many texts or more, since a text adds 1 to the difference at most.
        p = max(p, mcnemar(round(documents * abs(scores[0] - scores[1])), 0))
    return MEANS, {"scores": scores, "p": p}


def _paired_shares(texts: Sequence[tuple[int, float, float]]) -> tuple[str, dict] | str:
    """Of the texts' samples, and shares of the first and the second one.

    What is counted is in which texts either answers more: needles of one text depend on each other.
    """
    if mcnemar(len(texts), 0) >= LEVEL:
        return "too few prompts"
    ahead: dict[int, list[int]] = {}  # by sample: in how many texts the first, the second one is
    for sample, one, other in texts:
        counts = ahead.setdefault(sample, [0, 0])
        counts[0] += one > other
        counts[1] += one < other
    p = paired_test(*zip(*ahead.values(), strict=True))
    a, b = (sum(text[k] for text in texts) / len(texts) for k in (1, 2))
    if (a - b) * sum(one - other for one, other in ahead.values()) <= 0:
        p = 1.0  # more in most texts, but not more in all together
    return TEXTS, {"scores": (a, b), "p": p, "prompts": (len(texts), len(texts))}


def _restrictions(
    grids: Grids,
    common: Sequence[Cell],
    obstacles: Mapping[Cell, str | None],
    tests: Sequence[PairTest],
) -> Iterable[str]:
    """What the tests of a pair on a task leave out, or cannot take into account.

    obstacles: to pairing, by cell; those whose prompts were cut are not among them.
    """
    evaluated = sorted({length for grid in grids for length, _ in grid})
    lengths = sorted({length for length, _ in obstacles})
    if cut := sorted({length for length, _ in common}.difference(lengths)):
        yield f"not tested {_at(cut, evaluated)}: {_CUT}"
    for reason in dict.fromkeys(filter(None, obstacles.values())):
        where = sorted({length for (length, _), why in obstacles.items() if why == reason})
        yield f"not paired{'' if where == lengths else f' {_at(where, evaluated)}'}: {reason}"
    if grids[0].keys() != grids[1].keys():
        yield "compared at the context lengths and depths that both have"
    tested = {test.context_length for test in tests}
    if few := [length for length in lengths if length not in tested]:
        yield f"not tested {_at(few, evaluated)}: too few prompts"


def _refusal(runs: tuple[TaskRun, TaskRun], common: Sequence[Cell]) -> str | None:
    if refused := differing(*runs, REFUSED):
        return f"not compared: another {_listed(refused)}"
    return None if common else "not compared: no context length and depth in common"


def _other_prompts(runs: tuple[TaskRun, TaskRun]) -> str:
    """How prompts are called that are not the same: by what may have made them so."""
    changed = [*differing(*runs, MARKED), *differing(*runs, STATED)]
    causes = dict.fromkeys(PROMPTS[name] for name in changed if name in PROMPTS)
    return f"other prompts (another {_listed([*causes])})" if causes else "other prompts"


def _obstacle(
    first: Mapping[int, Answer] | None, second: Mapping[int, Answer] | None, others: str
) -> str | None:
    """Why the answers in a cell cannot be compared prompt by prompt; None if they can."""
    if first is None or second is None:
        return "an older results file does not tell which prompts were right"
    pairs = [(first[sample].prompt, second[sample].prompt) for sample in first if sample in second]
    if any(a != b for a, b in pairs if a and b):
        return others
    if not all(a and b for a, b in pairs):
        return "an older results file does not tell its prompts"
    return None if pairs else "no prompts in common"


def _cells(run: NeedleRun) -> dict[Cell, NeedleCell]:
    return {(cell.context_length, cell.depth): cell for cell in run.cells}


def _documents_of(run: TaskRun, score: Score) -> int:
    """How many documents a value at a context length is of, in the file that it is from."""
    files = tuple(file for file in run.files if file.path == score.source)
    return _documents(replace(run, files=files))


def _documents(run: TaskRun) -> int:
    """How many documents a score is of; of a group, of all its tasks."""
    counts = mapping(run.file.data.get("n-samples"))
    told = [mapping(counts.get(task)).get("effective") for task in run.members or (run.task,)]
    return sum(count for count in told if isinstance(count, int))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [*names[-1:]])
