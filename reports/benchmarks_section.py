"""The section on benchmarks: scores of tasks that have one, beside published ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cells import CHECKPOINT, NOTHING, Cell, Section, Table
from .comparison import Comparison
from .part import Part
from .section_notes import figure_cell
from .single_model import downwards
from .task_scores import Benchmark

BENCHMARKS = "Benchmarks"


def _sections(comparison: Comparison) -> Iterator[Section]:
    yield Section(BENCHMARKS, tables=_benchmarks(comparison))


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
            *(Cell(NOTHING) if s is None else figure_cell(s) for s in model.scores),
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


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for benchmark in comparison.benchmarks:
        of = {"task": benchmark.task, "n_shot": benchmark.n_shot, "metric": benchmark.metric}
        for name, score in zip(comparison.names, benchmark.scores, strict=True):
            if score:
                yield {
                    "kind": "benchmark", "checkpoint": name, **of, "value": score.value,
                    "stderr": score.error,
                }  # fmt: skip
    for model in comparison.published:
        for benchmark, value in zip(comparison.benchmarks, model.scores, strict=True):
            if value is not None:
                yield {
                    "kind": "published", "checkpoint": model.model, "task": benchmark.task,
                    "n_shot": benchmark.n_shot, "metric": benchmark.metric, "value": value,
                    "source": model.source,
                }  # fmt: skip


PART = Part(_sections, rows=_rows)
