"""What differs between runs besides their checkpoints, and what that means for comparing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from yoco_eval.lengths import format_length
from yoco_eval.tasks.settings import MARKED, REFUSED, SETTINGS, STATED

from .heatmap import format_depths
from .models import CACHE, model_args
from .results import ResultsFile, mapping
from .task_runs import TaskRun

OF_TASKS = {name.replace("_", " "): effect for name, effect in SETTINGS.items()}
_EFFECTS = {**OF_TASKS, "task version": REFUSED, "limit": MARKED, "documents": MARKED}
# Where one of these differs, so may prompts, because of what it tells of.
PROMPTS = {
    "seed": "seed", "tokenizer": "tokenizer", "special tokens": "tokenizer",
    "chat template": "chat template", "system instruction": "system instruction",
}  # fmt: skip
# Where a file lacks one of these, it is not known; where it lacks another, it was not set.
_ALWAYS = frozenset(
    {"task version", "documents", "backend", "dtype", "lm-eval", "max_length", "special tokens"}
)
_NOT_SET = {
    "tokenizer": "the model's",
    "chat template": "none",
    "system instruction": "none",
    "sparse": "off",
    "cache_dtype": "the model's",
}
_DIGITS = 12  # of a fingerprint
_OF_THE_RUN = ("limit", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


@dataclass(frozen=True)
class SetupDifference:
    """A setting that was not the same for all checkpoints.

    tasks: those it concerns.
    values: of each checkpoint, in their order; None for one that was not evaluated on the tasks.
    effect: `STATED`, `MARKED` or `REFUSED`, see `tasks.settings`.
    """

    setting: str
    tasks: tuple[str, ...]
    values: tuple[str | None, ...]
    effect: str


def find_differences(
    checkpoints: Sequence[Mapping[tuple[str, int | None], TaskRun]],
    tasks: Sequence[tuple[str, int | None]],
) -> list[SetupDifference]:
    """Settings that differ between the checkpoints evaluated on the same of these tasks.

    checkpoints: of each, its run of every task that it was evaluated on.

    Tasks in which a setting differs alike stand together. Refusals come first.
    """
    found: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for key in tasks:
        runs = [checkpoint.get(key) for checkpoint in checkpoints]
        settings = [setup(run) if run else None for run in runs]
        names = dict.fromkeys(name for one in settings if one for name in one)
        for name in names:
            missing = "not told" if name in _ALWAYS else _NOT_SET.get(name, "default")
            values = tuple(one.get(name, missing) if one else None for one in settings)
            if len({value for value in values if value is not None}) < 2:
                continue
            there = combinations([run for run in runs if run], 2)
            if name != "samples" or any(other_samples(*pair) != ({}, {}) for pair in there):
                found.setdefault((name, values), []).append(key[0])
    differences = [
        SetupDifference(name, tuple(dict.fromkeys(members)), values, effect(name))
        for (name, values), members in found.items()
    ]
    order = (REFUSED, MARKED, STATED)
    return sorted(differences, key=lambda difference: order.index(difference.effect))


def differing(first: TaskRun, second: TaskRun, kind: str) -> list[str]:
    """The settings of that effect in which two runs of a task differ."""
    one, other = setup(first), setup(second)
    names = dict.fromkeys([*one, *other])
    if other_samples(first, second) == ({}, {}):
        names.pop("samples", None)
    return [name for name in names if one.get(name) != other.get(name) and effect(name) == kind]


def other_samples(first: TaskRun, second: TaskRun) -> tuple[dict[int, int], dict[int, int]] | None:
    """The samples of either at those context lengths of both at which they are not as many; None
    where the files do not tell."""
    one, other = samples_by_length(first), samples_by_length(second)
    if one is None or other is None:
        return None
    lengths = [n for n in one if n in other and one[n] != other[n]]
    return {n: one[n] for n in lengths}, {n: other[n] for n in lengths}


def effect(setting: str) -> str:
    """What it means for a comparison that a setting differs."""
    return _EFFECTS.get(setting, STATED)


def setup(run: TaskRun) -> dict[str, str]:
    """How a task was evaluated: settings by name, without those that its files do not tell."""
    of_files = [_of_file(run, file) for file in run.files]
    settings = {name: common([one[name] for one in of_files]) for name in of_files[0]}
    if run.context_lengths:  # of how many there are, the number of documents is no news
        settings |= {"context lengths": run.context_lengths, "documents": None}
    if counts := samples_by_length(run):
        alike = len(set(counts.values())) == 1
        settings["samples"] = next(iter(counts.values())) if alike else counts
    if run.cells:
        settings["depths"] = sorted({cell.depth for cell in run.cells})
    # Tasks have many settings of generation, of which mostly one differs.
    if isinstance(generation := settings["generation"], dict):
        settings |= {"generation": None, **{f"generation {k}": v for k, v in generation.items()}}
    return {
        name: setting_text(name, value) for name, value in settings.items() if value is not None
    }


def samples_by_length(run: TaskRun) -> dict[int, int] | None:
    """How many samples its files set for each context length at which they have results; None where
    one does not tell."""
    found: dict[int, int] = {}
    for file in run.files[::-1]:  # the newest, of which more counts, last
        told = common([file.metadata(task).get("samples") for task in run.leaves(file)])
        scores = [score for values in run.by_length.values() for score in values.items()]
        lengths = {cell.context_length for cell in run.cells if cell.source == file.path}
        lengths |= {length for length, score in scores if score.source == file.path}
        for length in sorted(lengths):
            count = told.get(str(length)) if isinstance(told, dict) else told
            if isinstance(count, bool) or not isinstance(count, int):
                return None
            found[length] = count
    return dict(sorted(found.items())) or None


def _of_file(run: TaskRun, file: ResultsFile) -> dict[str, Any]:
    """The settings in one of its files; None for what it does not tell."""
    data, leaves = file.data, run.leaves(file)
    config = mapping(data.get("config"))
    metadata = [file.metadata(task) for task in leaves]
    documents = [
        mapping(mapping(data.get("n-samples")).get(task)).get("effective") for task in leaves
    ]
    return {
        "task version": common([mapping(data.get("versions")).get(task) for task in leaves]),
        **{name.replace("_", " "): common([m.get(name) for m in metadata])
           for name in SETTINGS},
        "documents": common(documents),
        **{name.replace("_", " "): config.get(name) for name in _OF_THE_RUN},
        "generation": common([mapping(data["configs"].get(task)).get("generation_kwargs")
                              for task in leaves]) or config.get("gen_kwargs") or None,
        "max_length": config.get("max_length") or data.get("max_length"),
        "tokenizer": model_args(data).get("tokenizer"),
        "special tokens": _special_tokens(data),
        "chat template": data.get("chat_template_sha"),
        "system instruction": data.get("system_instruction"),
        "backend": config.get("model"),
        "dtype": config.get("model_dtype"),
        **{name: config.get(name) for name in CACHE},
        "lm-eval": data.get("lm_eval_version"),
    }  # fmt: skip


def _special_tokens(data: dict[str, Any]) -> str | None:
    """Those that lm-eval tells of the tokenizer, with their ids."""
    found = {name: data.get(f"tokenizer_{name}_token") for name in ("bos", "eos", "pad")}
    told = [f"{name} {' '.join(map(str, token))}" for name, token in found.items()
            if isinstance(token, list)]  # fmt: skip
    return ", ".join(told) or None


def common(values: Sequence[Any]) -> Any:
    """The value that all tasks or files have; else each of them once, in their order."""
    told = [value for value in values if value is not None]
    if all(value == told[0] for value in told):
        return told[0] if told else None
    return ", ".join(dict.fromkeys(map(str, told)))


def setting_text(name: str, value: Any) -> str:
    """How a setting's value is told."""
    try:
        if name == "context lengths":
            return ", ".join(format_length(length) for length in value)
        if name == "depths":
            return ", ".join(format_depths(value)) + " %"
        if name == "samples" and isinstance(value, dict):
            return ", ".join(f"{count} at {format_length(int(n))}" for n, count in value.items())
        if name == "max_length":
            return format_length(value)
    except (TypeError, ValueError):  # a file may hold anything
        pass
    if name == "chat template":
        return str(value)[:_DIGITS]
    return str(value).removeprefix("torch.")
