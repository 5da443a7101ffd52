"""A comparison as headings, sentences and tables, for the forms that are made of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

from yoco_eval.lengths import format_length
from yoco_eval.printable import VALUE, listed, shortened
from yoco_eval.tasks.settings import REFUSED

from .cells import CHECKPOINT, NOTHING, Cell, Section, Table, transposed
from .comparison import Comparison, LengthCurves, NeedleResult, NeedleTask, p_text
from .differences import Finding
from .heatmap import CUT
from .pairs import advances, matrices, regressions, sort_pairs, task_name
from .profile import GIB
from .setups import SetupDifference
from .single_model import beside, downwards
from .statistics import prompts_needed
from .task_scores import Benchmark

NEEDLES, CURVES, COSTS = "Needles", "By context length", "Costs"  # sections that have figures
GAPS = "†: shorter context lengths, at which others were evaluated, were left out."
METRICS = {"acc": "accuracy", "loss": "loss, nats per token", "loss_to": "loss of all up to there"}
QUANTITIES = {  # of profiles: what a reader calls them, and the unit
    "peak_bytes": ("peak memory, GiB", GIB),
    "prefill_seconds": ("prefill, s", 1),
    "decode_tokens_per_second": ("decoding, tokens/s", 1),
}
_ENTRIES = 24  # that are shown of a list
_SKIPPED = 12  # files of a checkpoint that are named


def sections(comparison: Comparison) -> list[Section]:
    """All there is to say, the conclusions first."""
    found = [
        _differences(comparison),
        Section(NEEDLES, tables=tuple(_needle_tables(comparison))),
        Section("Benchmarks", tables=_benchmarks(comparison)),
        _by_length(comparison),
        Section(COSTS, tables=_profiles(comparison)),
        Section("How it was evaluated", items=comparison.setup),
        Section("What else differs", items=tuple(_setup_differences(comparison))),
        Section("Comparisons restricted", items=tuple(_caveats(comparison))),
        Section("Sources", items=tuple(_sources(comparison))),
        Section("Skipped files", items=tuple(_skipped(comparison))),
    ]
    if comparison.many:
        found = [replace(one, tables=tuple(_without_repetition(one.tables))) for one in found]
    return [one for one in found if one.text or one.alarms or one.items or one.tables]


def _without_repetition(tables: Iterable[Table]) -> Iterable[Table]:
    """The tables of a section, each note below the first that it is about."""
    told: set[str] = set()
    for table in tables:
        yield replace(table, notes=tuple(note for note in table.notes if note not in told))
        told.update(table.notes)


def _differences(comparison: Comparison) -> Section:
    tests = len(comparison.tests)
    if len(comparison.names) < 2:
        return Section("Differences")
    if not tests:
        there = comparison.caveats or comparison.curves
        why = "see below" if there else "there is too little in common"
        return Section("Differences", f"No tests were made: {why}.")
    plural = "test" if tests == 1 else "tests"
    if not comparison.findings:
        return Section(
            "Differences", f"None is significant at the 5 % level ({tests} {plural}, Holm)."
        )
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


def _told(comparison: Comparison, findings: Sequence[Finding]) -> Iterable[str]:
    """The findings as sentences, one for all benchmarks in which the same one is better."""
    yield from (comparison.sentence(finding) for finding in findings if finding.where)
    benchmarks: dict[str, list[Finding]] = {}
    for finding in findings:
        if not finding.where:
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


def effective_note(comparison: Comparison) -> str:
    """What an effective context length is."""
    return (
        "Effective: the longest evaluated context length at which, and at all shorter ones, the "
        f"95 % interval of the accuracy lies above {comparison.threshold:g}."
    )


def cut_note(comparison: Comparison, cut: Iterable[dict[int, int] | None]) -> Iterable[str]:
    """What the mark at figures means, where there are any. cut: of each checkpoint, by length."""
    told = [
        f"{name} {_span(lengths.values())} tokens"
        for name, lengths in zip(comparison.names, cut, strict=True)
        if lengths
    ]
    if told:
        mark = f"{CUT}: prompts cut to the backend's max_length"
        yield f"{mark} ({', '.join(told)}); effective lengths end before."


def _span(numbers: Iterable[int]) -> str:
    least, *more = sorted(set(numbers))
    return f"{least} to {more[-1]}" if more else f"{least}"


def _interval_notes(comparison: Comparison, task: NeedleTask) -> Iterable[str]:
    """What the intervals are, and where they do not tell of other haystacks."""
    yield (
        "Intervals: Wilson's, widened where samples, each of which has a haystack of its own, "
        "differ by more than chance."
    )
    found: dict[int | None, list[str]] = {}
    for name, result in zip(comparison.names, task.results, strict=True):
        for haystacks in {one.haystacks for one in result.by_length} if result else ():
            found.setdefault(haystacks, []).append(name)
    if None in found:
        yield f"Not told which prompts were right, taken for independent: {listed(found[None])}."
    if 1 in found:
        yield f"Of one sample, which tells nothing of other haystacks: {listed(found[1])}."


def incomparable(comparison: Comparison, task: str) -> Iterable[str]:
    """In what the checkpoints' prompts differ so much that a task's scores do not compare."""
    for difference in comparison.setup_differences:
        if difference.effect == REFUSED and task in difference.tasks:
            values = _values(comparison, difference)
            yield f"{task} does not compare: another {difference.setting} ({values})."


def _needle_tables(comparison: Comparison) -> Iterable[Table]:
    tables = {task.task: tuple(_needles(comparison, task)) for task in comparison.needles}
    if comparison.single and tables:
        whole = {task: found[0] for task, found in tables.items()}
        yield beside("accuracy, with 95 % intervals", whole)
    else:
        yield from (table for found in tables.values() for table in found)


def _needles(comparison: Comparison, task: NeedleTask) -> Iterable[Table]:
    """Of many checkpoints two: accuracies alone, a row for each, and all of it, folded."""
    rows = [
        (
            _length(length),
            *(_accuracy(result, length, comparison.threshold) for result in task.results),
        )
        for length in task.context_lengths
    ]
    foot = (Cell("effective"), *map(effective_cell, task.results))
    intervals = tuple(_interval_notes(comparison, task))
    notes = [*incomparable(comparison, task.task), effective_note(comparison)]
    notes += [] if comparison.many else intervals
    if any(result and result.too_few_prompts for result in task.results):
        notes.append(
            "*: all prompts of the next length were right, but they are too few to tell: it takes "
            f"{prompts_needed(comparison.threshold)} of each length."
        )
    if any(result and result.gaps for result in task.results):
        notes.append(GAPS)
    notes += cut_note(comparison, [result.cut if result else None for result in task.results])
    sources = dict.fromkeys((row.source, row.context_length) for row in task.published)
    for source, length in sources:
        models = ", ".join(
            f"{row.model} {row.accuracy:.2f}"
            for row in task.published
            if (row.source, row.context_length) == (source, length)
        )
        notes.append(
            f"Published, not measured here, at {format_length(length)} ({source}): {models}."
        )
    header = ("context", *comparison.names)
    title = f"{task.task}: accuracy, with 95 % intervals"
    whole = Table(title, header, tuple(rows), foot, notes=tuple(notes))
    if comparison.many:
        yield transposed(replace(whole, title=f"{task.task}: accuracy"), CHECKPOINT)
        yield replace(whole, notes=intervals, folded=True)
    else:
        yield whole


def _accuracy(result: NeedleResult | None, length: int, threshold: float) -> Cell:
    if not result or not (found := result.at(length)):
        return Cell(NOTHING)
    low, high = found.interval
    detail = f"{_apart(low, threshold)}–{high:.2f}"
    mark = CUT * (length in result.cut)
    return Cell(f"{found.accuracy:.2f}{mark}", detail, value=found.accuracy)


def _apart(value: float, threshold: float) -> str:
    """Two decimals, or as many as it takes to see on which side of the threshold the value is."""
    decimals = 2
    while round(value, decimals) == round(threshold, decimals) and decimals < 6:
        decimals += 1
    return f"{value:.{decimals}f}"


def _length(tokens: int) -> Cell:
    return Cell(format_length(tokens), value=tokens)


def effective_cell(result: NeedleResult | None) -> Cell:
    """The effective context length of one of the checkpoints, by which tables are sorted."""
    if result is None:
        return Cell(NOTHING)
    return Cell(effective_text(result), value=result.effective_length or 0)


def effective_text(result: NeedleResult) -> str:
    """The effective context length; with a star where more prompts might show a longer one.

    With a dagger where shorter ones were left out, a double one where prompts of longer ones were
    cut.
    """
    lengths = result.run.context_lengths
    length = _effective(result.effective_length, lengths, result.cut)
    return length + "*" * result.too_few_prompts + "†" * result.gaps


def _effective(effective: int | None, lengths: Iterable[int], cut: dict[int, int]) -> str:
    """With a mark where it would perhaps be longer, had longer prompts not been cut."""
    whole = [length for length in lengths if length < min(cut, default=inf)]
    ends = bool(cut) and (effective or 0) == max(whole, default=0)
    return (format_length(effective) if effective else "none") + CUT * ends


def _benchmarks(comparison: Comparison) -> tuple[Table, ...]:
    benchmarks = comparison.benchmarks
    if not benchmarks:
        return ()
    rows = tuple(
        (
            Cell(name),
            *(_score(benchmark, index) for benchmark in benchmarks),
        )
        for index, name in enumerate(comparison.names)
    )
    apart = tuple(
        (
            Cell(_published_name(model.model, model.training_tokens)),
            *(Cell(NOTHING) if s is None else _figure(s) for s in model.scores),
        )
        for model in comparison.published
    )
    notes = []
    sources = dict.fromkeys(model.source for model in comparison.published)
    if sources:
        notes.append(f"Published: {'; '.join(sources)}; 1T: 10^12 training tokens.")
    header = (CHECKPOINT, *map(benchmark_label, benchmarks))
    title = "benchmarks, with standard errors"
    apart_title = "published, not measured here"
    table = Table(title, header, rows, (), apart, apart_title, tuple(notes))
    return (downwards(table, "task") if comparison.single else table,)


def benchmark_label(benchmark: Benchmark) -> str:
    """The task and, in a second line, how it counts."""
    shots = "" if benchmark.n_shot is None else f"{benchmark.n_shot}-shot "
    return f"{benchmark.task}\n{shots}{benchmark.metric.removesuffix(',none')}"


def _score(benchmark: Benchmark, index: int) -> Cell:
    score = benchmark.scores[index]
    if score is None:
        return Cell(NOTHING)
    error = "" if score.error is None else f"±{score.error:.3f}"
    return Cell(f"{score.value:.3f}", error, index in benchmark.best, score.value)


def _published_name(model: str, training_tokens: int | None) -> str:
    return f"{model} ({training_tokens / 1e12:g}T)" if training_tokens else model


def _figure(value: float, mark: str = "") -> Cell:
    return Cell(f"{value:.3f}{mark}", value=value)


def _by_length(comparison: Comparison) -> Section:
    if comparison.single:
        return Section(CURVES, tables=tuple(_by_metric(comparison)))
    tables = tuple(_curves(comparison, c) for c in comparison.curves if not c.member)
    text = "Means alone; whether they differ significantly is not tested." if tables else ""
    shown = {curves.task for curves in comparison.curves}
    if any(test.task in shown for test in comparison.tests):
        text = "Means; whether they differ is tested where lm-eval tells standard errors."
    return Section(CURVES, text, tables=tables)


def _by_metric(comparison: Comparison) -> Iterable[Table]:
    """Of one model, tables with a column for each task."""
    metrics: dict[str, dict[str, Table]] = {}
    for one in comparison.curves:
        if not one.member:
            keys = {(other.task, other.n_shot) for other in comparison.curves}
            column = task_name((one.task, one.n_shot), keys)
            metrics.setdefault(one.metric, {})[column] = _curves(comparison, one)
    for metric, tables in metrics.items():
        yield beside(METRICS.get(metric, metric), tables)


def _curves(comparison: Comparison, curves: LengthCurves) -> Table:
    rows = [
        (
            _length(n),
            *(
                _figure(values[n], CUT * (n in cut)) if values and n in values else Cell(NOTHING)
                for values, cut in zip(curves.values, curves.cut, strict=True)
            ),
        )
        for n in curves.context_lengths
    ]
    foot: tuple[Cell, ...] = ()
    if curves.effective_lengths:
        shown = [
            NOTHING if n is None else _effective(n, values or (), cut)
            for n, values, cut in zip(
                curves.effective_lengths, curves.values, curves.cut, strict=True
            )
        ]
        foot = (Cell("effective"), *map(Cell, shown))
    title = f"{curves.task}: {METRICS.get(curves.metric, curves.metric)}"
    notes = [*incomparable(comparison, curves.task), *cut_note(comparison, curves.cut)]
    left_out = [
        f"{name} {listed(map(format_length, lengths))}"
        for name, lengths in zip(comparison.names, curves.left_out, strict=True)
        if lengths
    ]
    if left_out:
        told = ", ".join(left_out)
        notes.append(f"Left out, since their tokens begin at another length: {told}.")
    table = Table(title, ("context", *comparison.names), tuple(rows), foot, notes=tuple(notes))
    return transposed(table, CHECKPOINT) if comparison.many else table


def _profiles(comparison: Comparison) -> tuple[Table, ...]:
    profiles = comparison.profiles
    lengths = sorted({length for profile in profiles if profile for length in profile.lengths})
    devices = {(p.device, p.dtype) for p in profiles if p}
    notes = [f"{device}, {dtype}." for device, dtype in devices]
    if len(devices) > 1:
        where = ", ".join(
            f"{name} on {p.device} in {p.dtype}"
            for name, p in zip(comparison.names, profiles, strict=True)
            if p
        )
        notes = [f"Not comparable: {where}."]
    tables = []
    for quantity, (title, unit) in QUANTITIES.items():
        rows = []
        for length in lengths:
            cells = [_length(length)]
            for profile in profiles:
                row = profile and profile.row(profile.models[0], length)
                value = row and getattr(row, quantity)
                shown = f"{value / unit:.3g}" if value else NOTHING
                cells.append(Cell(shown, value=value or None))
            rows.append(tuple(cells))
        if any(cell.text != NOTHING for row in rows for cell in row[1:]):
            header = ("context", *comparison.names)
            table = Table(title, header, tuple(rows), notes=tuple(notes))
            tables.append(transposed(table, CHECKPOINT) if comparison.many else table)
    return tuple(tables)


def _setup_differences(comparison: Comparison) -> Iterable[str]:
    for difference in comparison.setup_differences:
        of = f"{difference.setting} ({listed(difference.tasks)})"
        yield f"{of}: {_values(comparison, difference)}"


def _values(comparison: Comparison, difference: SetupDifference) -> str:
    """Each checkpoint's value, of a long list its first entries."""
    there = [
        (name, value)
        for name, value in zip(comparison.names, difference.values, strict=True)
        if value is not None
    ]
    told = {value: shortened(listed(value.split(", "), _ENTRIES), VALUE) for _, value in there}
    alike = " (not the same further on)" if len(set(told.values())) < len(told) else ""
    return ", ".join(f"{name} {told[value]}" for name, value in there) + alike


def _caveats(comparison: Comparison) -> Iterable[str]:
    tasks: dict[tuple[str, int, int], list[str]] = {}
    for caveat in comparison.caveats:
        key = caveat.reason, caveat.first, caveat.second
        tasks.setdefault(key, []).append(caveat.task)
    pairs: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, first, second), concerned in tasks.items():
        pair = f"{comparison.names[first]} and {comparison.names[second]}"
        pairs.setdefault((reason, tuple(concerned)), []).append(pair)
    for (reason, of_tasks), alike in pairs.items():
        yield f"{listed(alike, between='; ')} ({listed(of_tasks)}): {reason}"


def _sources(comparison: Comparison) -> Iterable[str]:
    for one in comparison.checkpoints:
        days = sorted({f"{date:%Y-%m-%d}" for date in one.dates or ()})
        told = [str(one.path), "+".join(one.backends), " to ".join(days)]
        yield f"{one.name}: {', '.join(filter(None, told))}"


def _skipped(comparison: Comparison) -> Iterable[str]:
    for one in comparison.checkpoints:
        yield from (f"{skip.path}: {skip.reason}" for skip in one.skipped[:_SKIPPED])
        if len(one.skipped) > _SKIPPED:
            yield f"{one.path}: {len(one.skipped) - _SKIPPED} more; a .json report names them"
