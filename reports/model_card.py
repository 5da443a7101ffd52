"""A block for model cards: Hugging Face's `model-index` of the results, and tables to read.

The block stands at the top of a card's README.md; of several checkpoints the index has an entry for
each. Its format: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from yoco_eval import __version__
from yoco_eval.lengths import format_length
from yoco_eval.printable import VALUE, one_line

from .benchmarks_section import BENCHMARKS
from .comparison import Comparison
from .comparison_text import escaped, markdown_table
from .curves_section import CURVES
from .datasets import Dataset
from .needles_section import NEEDLES
from .section_notes import METRICS
from .sections import sections

_TASK = {"task_type": "text-generation", "task_name": "Text Generation"}
_HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
_EFFECTIVE = "effective_context_length"
_LONGEST = "effective context length in tokens"
_DIGITS = 6
_SECTIONS = (NEEDLES, BENCHMARKS, CURVES)  # that a card has
_NAMES = {"acc": "accuracy", "acc_norm": "normalized accuracy", "loss": "nats per token"}


def model_card(comparison: Comparison) -> str:
    """The block, as Markdown with YAML in front."""
    metadata = yaml_dump({"model-index": model_index(comparison)}, sort_keys=False)
    lines = ["---", metadata.rstrip(), "---", "", "## Evaluation results", ""]
    for section in sections(comparison):
        for table in section.tables if section.title in _SECTIONS else ():
            if not table.folded:
                lines += [*markdown_table(table), ""]
    for name, source in zip(comparison.names, comparison.checkpoints, strict=True):
        days = sorted({f"{date:%Y-%m-%d}" for date in source.dates or ()})
        told = [f"--model {backend}" for backend in source.backends]
        told += [*source.cache, " to ".join(days)]
        lines.append(f"- {escaped(name)}: lm_eval {escaped(', '.join(filter(None, told)))}")
    lines += [f"- {escaped(item)}" for item in comparison.setup]
    made = f"Made by yoco-eval {__version__} of results of lm-evaluation-harness"
    return "\n".join([*lines, "", f"{made} {escaped(_version(comparison))}.", ""])


def model_index(comparison: Comparison) -> list[dict[str, Any]]:
    """The value of `model-index`: of each checkpoint its name, and a result for every task."""
    index = []
    for place, name in enumerate(comparison.names):
        results: list[dict[str, Any]] = []
        for found in _results(comparison, place):
            [entry] = eval_results_to_model_index(one_line(name, VALUE), found)
            results += entry["results"]
        index.append({"name": one_line(name, VALUE), "results": results})
    return index


def _results(comparison: Comparison, place: int) -> Iterator[list[EvalResult]]:
    """The results of one checkpoint, those of a task together."""
    for task in comparison.needles:
        if result := task.results[place]:
            metrics = [("acc", "accuracy", result.run.accuracy)]
            metrics += [
                ("acc", f"accuracy at {format_length(one.context_length)} tokens", one.accuracy)
                for one in result.by_length
            ]
            if result.told_length is not None:
                name = f"{_LONGEST}, above {comparison.threshold:g} with 95 % confidence"
                metrics.append((_EFFECTIVE, name, result.told_length))
            yield _task(comparison, place, task.task, None, metrics)
    for benchmark in comparison.benchmarks:
        if score := benchmark.scores[place]:
            metric = benchmark.metric.removesuffix(",none")
            metrics = [(metric.partition(",")[0], _NAMES.get(metric, metric), score.value)]
            yield _task(comparison, place, benchmark.task, benchmark.n_shot, metrics)
    for curves in comparison.curves:
        if values := curves.values[place]:
            named = METRICS.get(curves.metric, curves.metric)
            metrics = [
                (curves.metric, f"{named} at {format_length(length)} tokens", value)
                for length, value in sorted(values.items())
            ]
            effective = curves.effective_lengths[place] if curves.effective_lengths else None
            if effective is not None:
                metrics.append((_EFFECTIVE, f"{_LONGEST}, by RULER's rule", effective))
            yield _task(comparison, place, curves.task, curves.n_shot, metrics)


def _task(
    comparison: Comparison,
    place: int,
    task: str,
    n_shot: int | None,
    metrics: list[tuple[str, str, float]],
) -> list[EvalResult]:
    """metrics: type, name and value of each."""
    data = comparison.checkpoints[place].datasets.get(task, Dataset(None, None, None, {}))
    args = {
        name: int(value) if value.isdecimal() and len(value) < 16 else one_line(value, VALUE)
        for name, value in data.settings.items()
    }
    shots = {} if n_shot is None else {"num_few_shot": n_shot}
    return [
        EvalResult(
            **_TASK,
            dataset_type=one_line(data.path or task, VALUE),
            dataset_name=one_line(task, VALUE),
            dataset_config=data.config and one_line(data.config, VALUE),
            dataset_split=data.split and one_line(data.split, VALUE),
            dataset_args=args | shots or None,
            metric_type=one_line(kind, VALUE),
            metric_name=one_line(name, VALUE),
            metric_value=float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value,
            source_name=f"lm-evaluation-harness {_version(comparison)}",
            source_url=_HARNESS,
        )
        for kind, name, value in metrics
    ]


def _version(comparison: Comparison) -> str:
    told = dict.fromkeys(v for source in comparison.checkpoints for v in source.versions)
    return one_line(", ".join(told), VALUE) or "of an unknown version"
