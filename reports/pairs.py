"""Many checkpoints in pairs: a matrix of who is better, over which lengths, and in words the rest.

Sentences are of each checkpoint against the one before and against the first; all pairs stand in
matrices, of each task and of all tasks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from yoco_eval.lengths import format_length
from yoco_eval.printable import listed

from .cells import CHECKPOINT, NOTHING, Cell, Table
from .comparison import Comparison, p_text
from .differences import Finding

_EQUAL, _BETTER, _WORSE = "=", "+", "−"
_TOGETHER = "all"
_NAMED = 4  # tasks in a sentence, and pairs
_Task = tuple[str, int | None]
_Pair = tuple[int, int]  # the earlier and the later checkpoint


@dataclass(frozen=True)
class Pairs:
    """What is significant about pairs of checkpoints.

    found: by pair and task. tested: the pairs that have tests of a task.
    lengths: those that were tested.
    """

    found: dict[_Pair, dict[_Task, list[Finding]]]
    tested: dict[_Task, set[_Pair]]
    lengths: dict[_Task, list[int]]


def sort_pairs(comparison: Comparison) -> Pairs:
    """The findings of a comparison by pair and task."""
    pairs = Pairs({}, {}, {})
    for test in comparison.tests:
        task = test.name, test.n_shot
        pairs.tested.setdefault(task, set()).add((test.first, test.second))
        lengths = pairs.lengths.setdefault(task, [])
        lengths += [n for n in test.context_lengths if n not in lengths]
    for finding in comparison.findings:
        pair = min(finding.better, finding.worse), max(finding.better, finding.worse)
        task = finding.task, finding.tests[0].n_shot
        pairs.found.setdefault(pair, {}).setdefault(task, []).append(finding)
    for lengths in pairs.lengths.values():
        lengths.sort()
    return pairs


def task_name(task: _Task, tasks: Iterable[_Task]) -> str:
    """The task, with its number of examples where it was run with several."""
    name, shots = task
    return name if sum(other == name for other, _ in tasks) < 2 else f"{name} ({shots}-shot)"


def regressions(comparison: Comparison, pairs: Pairs) -> Iterator[str]:
    """Where a checkpoint is worse than the one before or the first, and how many more pairs."""
    near = list(_near(len(comparison.names)))
    for pair, relation in near:
        yield from _sentence(comparison, pairs, pair, relation, worse=True)
    told = {pair for pair, _ in near}
    more = []
    for (i, j), by_task in pairs.found.items():
        tasks = [
            task_name(task, pairs.tested)
            for task, found in by_task.items()
            if any(finding.regression for finding in found)
        ]
        if tasks and (i, j) not in told:
            of = listed(tasks, _NAMED)
            more.append(f"{comparison.names[j]} than {comparison.names[i]} ({of})")
    if more:
        count = "one more pair" if len(more) == 1 else f"{len(more)} more pairs"
        yield f"the later one of {count} is worse: {listed(more, _NAMED, '; ')}"


def advances(comparison: Comparison, pairs: Pairs) -> Iterator[str]:
    """Where one is better than the one before or the first, and which are not told apart."""
    alike: dict[str, list[str]] = {}
    tested = set().union(*pairs.tested.values())
    for pair, relation in _near(len(comparison.names)):
        yield from _sentence(comparison, pairs, pair, relation, worse=False)
        if pair not in pairs.found:
            told = "not told apart from" if pair in tested else "not compared with"
            alike.setdefault(f"{told} {relation}", []).append(comparison.names[pair[1]])
    for claim, names in alike.items():
        yield f"{claim}: {', '.join(names)}"


def _near(checkpoints: int) -> Iterator[tuple[_Pair, str]]:
    """The pairs that are told in words."""
    for later in range(1, checkpoints):
        yield (later - 1, later), "the one before"
    for later in range(2, checkpoints):
        yield (0, later), "the first"


def _sentence(
    comparison: Comparison, pairs: Pairs, pair: _Pair, relation: str, worse: bool
) -> Iterator[str]:
    told, p = [], 0.0
    for task, found in pairs.found.get(pair, {}).items():
        chosen = [finding for finding in found if finding.regression == worse]
        if chosen:
            extent = _extent(chosen, pairs.lengths[task])
            told.append(f"{task_name(task, pairs.tested)} {_by(chosen, extent)}")
            p = max([p, *(finding.p for finding in chosen)])
    if told:
        earlier, later = (comparison.names[k] for k in pair)
        claim = f"{later} is {'worse' if worse else 'better'} than {relation}, {earlier}"
        yield f"{claim}: {listed(told, _NAMED)} ({p_text(p)})"


def _by(findings: Sequence[Finding], extent: str) -> str:
    if not findings[0].tests[0].context_lengths:
        return f"by {extent}"
    return "over all lengths together" if extent == _TOGETHER else f"at {extent}"


def matrices(comparison: Comparison, pairs: Pairs) -> list[Table]:
    """The matrix of all tasks, if there are several, and that of each in which there is a finding.

    A row is the later checkpoint of each pair, a column the earlier one.
    """
    names = comparison.names
    with_findings = [
        task for task in pairs.tested if any(task in found for found in pairs.found.values())
    ]
    tables = []
    if len(pairs.tested) > 1 and with_findings:
        tables.append(
            Table(
                "Later checkpoints (rows) against earlier ones: in how many tasks",
                (CHECKPOINT, *names[:-1]),
                tuple(_matrix(names, partial(_count, pairs))),
                notes=(
                    f"{_BETTER}: tasks in which the row is better somewhere; {_WORSE}: in which it "
                    f"is worse somewhere; {_EQUAL}: none; {NOTHING}: not tested.",
                ),
            )
        )
    for task in with_findings:
        by_length = bool(pairs.lengths[task])
        where = "at which context lengths" if by_length else "by how much"
        together = f" {_TOGETHER}: over all lengths together;" if by_length else ""
        tables.append(
            Table(
                f"{task_name(task, pairs.tested)}: pairs",
                (CHECKPOINT, *names[:-1]),
                tuple(_matrix(names, partial(_of_task, pairs, task))),
                notes=(
                    f"{_BETTER}: {where} the row is better; {_WORSE}: worse;{together} "
                    f"{_EQUAL}: not told apart; {NOTHING}: not tested.",
                ),
                folded=bool(tables),
            )
        )
    return tables


def _matrix(names: Sequence[str], cell: Callable[[_Pair], Cell]) -> Iterator[tuple[Cell, ...]]:
    cells = {(i, j): cell((i, j)) for i, j in combinations(range(len(names)), 2)}
    for later in range(1, len(names)):
        row = [cells.get((earlier, later), Cell("")) for earlier in range(len(names) - 1)]
        yield Cell(names[later]), *row


def _count(pairs: Pairs, pair: _Pair) -> Cell:
    if not any(pair in tested for tested in pairs.tested.values()):
        return Cell(NOTHING)
    signs: list[bool] = []
    for found in pairs.found.get(pair, {}).values():
        signs += {finding.regression for finding in found}
    better, worse = signs.count(False), signs.count(True)
    parts = [f"{_BETTER}{better}"] * bool(better) + [f"{_WORSE}{worse}"] * bool(worse)
    return Cell(" ".join(parts) or _EQUAL, tone=_tone(better, worse), value=better - worse)


def _of_task(pairs: Pairs, task: _Task, pair: _Pair) -> Cell:
    if pair not in pairs.tested[task]:
        return Cell(NOTHING)
    found = pairs.found.get(pair, {}).get(task, [])
    better = [finding for finding in found if not finding.regression]
    worse = [finding for finding in found if finding.regression]
    parts = [
        sign + _extent(chosen, pairs.lengths[task])
        for sign, chosen in ((_BETTER, better), (_WORSE, worse))
        if chosen
    ]
    return Cell(" ".join(parts) or _EQUAL, tone=_tone(len(better), len(worse)))


def _extent(findings: Sequence[Finding], evaluated: Sequence[int]) -> str:
    """At which lengths: "8K–32K,1M"; of a benchmark by how much the scores differ."""
    if not evaluated:
        a, b = findings[0].scores
        return f"{abs(a - b):.2g}"
    tests = [test for finding in findings for test in finding.tests]
    lengths = {test.context_length for test in tests if test.context_length is not None}
    if not lengths:
        return _TOGETHER
    spans: list[list[int]] = []
    for place, length in enumerate(evaluated):
        if length in lengths:
            if spans and evaluated[place - 1] == spans[-1][-1]:
                spans[-1].append(length)
            else:
                spans.append([length])
    return ",".join("–".join(map(format_length, dict.fromkeys((s[0], s[-1])))) for s in spans)


def _tone(better: int, worse: int) -> str:
    return "worse" if worse else "better" if better else ""
