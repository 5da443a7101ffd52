"""Writes comparisons to files: HTML, figures, Markdown, LaTeX, CSV of all numbers, JSON.

A file whose name ends in `card.md` is a block for a model card, any other `.md` the whole report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .comparison import Comparison
from .comparison_figures import panels
from .comparison_page import html
from .comparison_tables import QUANTITIES
from .comparison_text import latex, markdown
from .files import FIGURES, check_path, to_csv, to_json, write_figure, write_text
from .model_card import model_card
from .panels import stack
from .results import ResultsError
from .statistics import CONFIDENCE, LEVEL
from .style import figure_style

KIND = "yoco-eval comparison"  # stands in the JSON
CARD = "card.md"  # how the name of a block for a model card ends
SUFFIXES = (".html", *FIGURES, ".md", ".csv", ".json", ".tex")
CSV_COLUMNS = (
    "kind", "checkpoint", "other", "task", "n_shot", "metric", "context_length", "depth",
    "deepest", "value", "other_value", "low", "high", "stderr", "samples", "other_samples", "p",
    "p_corrected", "source", "note",
)  # fmt: skip


def check_output(path: Path) -> None:
    """Raises ResultsError if `save_comparison` cannot write to such a path."""
    check_path(path, SUFFIXES)


def save_comparison(comparison: Comparison, path: str | Path) -> None:
    """Writes it to `path`, whose suffix says how: one of `SUFFIXES`.

    Figures stand one below the other in a .png or .svg, and on pages of their own in a .pdf.
    Raises ResultsError for another suffix, a folder that is not there, or no figure to draw.
    """
    path = Path(path)
    check_output(path)
    if path.suffix.lower() in FIGURES:
        with figure_style():
            _write_figures(comparison, path)
        return
    forms = {".html": html, ".md": markdown, ".csv": _csv, ".json": _json, ".tex": latex}
    form = model_card if path.name.lower().endswith(CARD) else forms[path.suffix.lower()]
    write_text(path, form(comparison))


def _write_figures(comparison: Comparison, path: Path) -> None:
    found = panels(comparison)
    if not found:
        raise ResultsError(
            f"{path}: nothing to draw: no needles, no figures by context length, no profiles; "
            "write the tables to a .md or .tex file"
        )
    if path.suffix.lower() == ".pdf":
        write_figure(path, *(panel.figure() for panel in found))
    else:
        write_figure(path, stack(found))


def _csv(comparison: Comparison) -> str:
    """One figure a row; columns that do not concern it are empty. An effective length 0 is none."""
    return to_csv(CSV_COLUMNS, _figures(comparison))


def _figures(comparison: Comparison) -> Iterator[dict[str, Any]]:
    names = comparison.names
    for benchmark in comparison.benchmarks:
        of = {"task": benchmark.task, "n_shot": benchmark.n_shot, "metric": benchmark.metric}
        for name, score in zip(names, benchmark.scores, strict=True):
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
    for task in comparison.needles:
        yield from _needle_figures(names, task)
    for curves in comparison.curves:
        of = {
            "kind": "by length", "task": curves.task, "n_shot": curves.n_shot,
            "metric": curves.metric,
        }  # fmt: skip
        for name, values, cut in zip(names, curves.values, curves.cut, strict=True):
            for length, value in (values or {}).items():
                yield {
                    **of, "checkpoint": name, "context_length": length, "value": value,
                    "note": _cut_note(cut.get(length)),
                }  # fmt: skip
        for name, value in zip(names, curves.effective_lengths or [None] * len(names), strict=True):
            if value is not None:
                yield of | {"kind": "effective length", "checkpoint": name, "value": value}
    for name, profile in zip(names, comparison.profiles, strict=True):
        for row in profile.rows if profile else ():
            for metric in QUANTITIES:
                if getattr(row, metric) is not None:
                    yield {
                        "kind": "profile", "checkpoint": name, "task": row.model,
                        "metric": metric, "context_length": row.length,
                        "value": getattr(row, metric),
                    }  # fmt: skip
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
        }  # fmt: skip


def _needle_figures(names: list[str], task: Any) -> Iterator[dict[str, Any]]:
    for row in task.published:
        yield {
            "kind": "published", "checkpoint": row.model, "task": task.task, "metric": "acc",
            "context_length": row.context_length, "value": row.accuracy, "source": row.source,
        }  # fmt: skip
    for name, result in zip(names, task.results, strict=True):
        if not result:
            continue
        of = {"checkpoint": name, "task": task.task, "metric": "acc"}
        for cell in result.run.cells:
            yield {
                **of, "kind": "cell", "context_length": cell.context_length, "depth": cell.depth,
                "deepest": cell.depth, "value": cell.accuracy, "samples": cell.samples,
                "note": _cut_note(cell.cut_to),
            }  # fmt: skip
        for one in result.by_length:
            yield {
                **of, "kind": "by length", "context_length": one.context_length,
                "value": one.accuracy, "low": one.interval.low, "high": one.interval.high,
                "samples": one.samples, "note": _cut_note(result.cut.get(one.context_length)),
            }  # fmt: skip
        notes = {"too few prompts": result.too_few_prompts, "shorter ones left out": result.gaps}
        yield {
            **of, "kind": "effective length", "value": result.effective_length or 0,
            "note": ", ".join(note for note, holds in notes.items() if holds),
        }  # fmt: skip


def _cut_note(tokens: int | None) -> str:
    return "" if tokens is None else f"prompts cut to {tokens} tokens"


def _json(comparison: Comparison) -> str:
    """All of it but the logged samples; lists by checkpoint have its order."""
    data = {
        "kind": KIND,
        "confidence": CONFIDENCE,
        "level": LEVEL,
        **asdict(comparison),
        "findings": [
            {"sentence": comparison.sentence(finding), "regression": finding.regression}
            | asdict(finding)
            for finding in comparison.findings
        ],
    }
    for task in data["needles"]:
        for result in filter(None, task["results"]):
            del result["samples"]
            for one in result["by_length"]:
                low, high = one.pop("interval")
                one |= {"accuracy": one["correct"] / one["samples"], "low": low, "high": high}
    return to_json(data, indent=2, default=str) + "\n"
