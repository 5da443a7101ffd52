"""Reads the result files that lm-eval writes, and the needle cells in them.

lm-eval writes one `results_<date>.json` per run under `--output_path`. A needle task leaves its
grid there, as `cells` in its config's metadata: one entry per context length and depth. Whatever
task and whatever backend left such cells, they are read alike.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval.utils import simple_parse_args_string

from yoco_eval.printable import listed, shown

logger = logging.getLogger(__name__)

_MOST_SAMPLES = 10**6  # of a cell; no test is exact and quick beyond
_CELL_NUMBERS = ("context_length", "depth", "samples", "correct")  # that every cell has


class ResultsError(ValueError):
    """Results that cannot be used; the message is one line, naming the culprit and the mend."""


@dataclass(frozen=True)
class ResultsFile:
    """One run of lm-eval.

    model: the name for titles.
    model_id: tells models apart that share a name, such as checkpoints in folders of equal name.
    path: the results_*.json file.
    date: when the run started, with its time zone.
    data: the whole file.
    """

    model: str
    model_id: tuple[str, ...]
    path: Path
    date: datetime
    data: dict[str, Any]

    def needle_cells(self) -> dict[str, list]:
        """The unchecked cells of every needle task in the file, by task name."""
        tasks = {}
        for task, config in self.data["configs"].items():
            metadata = config.get("metadata") if isinstance(config, dict) else None
            cells = metadata.get("cells") if isinstance(metadata, dict) else None
            if isinstance(cells, list):
                tasks[task] = cells
        return tasks


@dataclass(frozen=True, order=True)
class NeedleCell:
    """The prompts of one context length (tokens) and one needle depth (0 = start, 1 = end).

    right, wrong: the numbers of the samples that were answered so; None in files that lack them.
    prompts: a digest of each sample's prompt, in the order of their numbers; None likewise.
    """

    context_length: int
    depth: float
    samples: int
    correct: int
    right: tuple[int, ...] | None = None
    wrong: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None

    def __post_init__(self):
        for name in ("context_length", "samples", "correct"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ResultsError(f"{name} {shown(value)} is not a whole number")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int | float):
            raise ResultsError(f"depth {shown(self.depth)} is not a number")
        if not 0 <= self.depth <= 1:
            raise ResultsError(f"depth {self.depth} is outside 0..1")
        if self.context_length < 1:
            raise ResultsError(f"context_length {self.context_length} is below 1")
        if not 1 <= self.samples <= _MOST_SAMPLES:
            raise ResultsError(f"samples {self.samples} is outside 1..{_MOST_SAMPLES}")
        if not 0 <= self.correct <= self.samples:
            raise ResultsError(f"correct {self.correct} is outside 0..{self.samples} (its samples)")
        if (self.right is None) != (self.wrong is None):
            raise ResultsError("right and wrong must both be given, or neither")
        if self.right is not None:
            self._check_answers(self.right, self.wrong)
        if self.prompts is not None:
            if self.right is None or len(self.prompts) != self.samples:
                raise ResultsError("prompts do not agree with right and wrong")
            if not all(isinstance(prompt, str) for prompt in self.prompts):
                raise ResultsError("prompts hold something that is no digest")

    def _check_answers(self, right: tuple[int, ...], wrong: tuple[int, ...]) -> None:
        answers = [*right, *wrong]
        if any(isinstance(sample, bool) or not isinstance(sample, int) for sample in answers):
            raise ResultsError("right and wrong hold something that is no whole number")
        if len(set(answers)) < len(answers):
            raise ResultsError("a sample is twice in right and wrong")
        if (len(right), len(answers)) != (self.correct, self.samples):
            raise ResultsError("right and wrong do not agree with correct and samples")

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


@dataclass(frozen=True)
class NeedleRun:
    """The cells of one needle task of one run, shortest and shallowest first."""

    model: str
    task: str
    path: Path
    date: datetime
    cells: tuple[NeedleCell, ...]

    @property
    def context_lengths(self) -> list[int]:
        return sorted({cell.context_length for cell in self.cells})

    @property
    def depths(self) -> list[float]:
        return sorted({cell.depth for cell in self.cells})

    @property
    def prompts(self) -> int:
        return sum(cell.samples for cell in self.cells)

    @property
    def accuracy(self) -> float:
        """The share of all prompts answered right."""
        return sum(cell.correct for cell in self.cells) / self.prompts


def common_grid(runs: Iterable[NeedleRun]) -> tuple[list[int], list[float]]:
    """The context lengths and depths of any of the runs, ascending."""
    cells = [cell for run in runs for cell in run.cells]
    lengths = sorted({cell.context_length for cell in cells})
    return lengths, sorted({cell.depth for cell in cells})


def read_results(path: Path) -> ResultsFile:
    """Reads one results file; ResultsError if it is not a whole results file of lm-eval."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), dict) for key in ("config", "configs")
    ):
        raise ResultsError(f"{path}: not a results file of lm-eval")
    model, model_id = _name_model(data)
    return ResultsFile(model, model_id, path, _date(path, data), data)


def find_results(path: str | Path) -> list[ResultsFile]:
    """The results at `path`, oldest first.

    path: one results file, or a folder that is searched, subfolders too, for results_*.json. In a
        folder, files that are not results of lm-eval are skipped with a warning.
    """
    path = Path(path)
    if path.is_file():
        return [read_results(path)]
    if not path.is_dir():
        raise ResultsError(
            f"{path}: no such file or folder; give what lm_eval got as --output_path"
        )
    found = []
    for file in sorted(path.rglob("results_*.json")):
        try:
            found.append(read_results(file))
        except ResultsError as error:
            logger.warning("skipped %s", error)
    return sorted(found, key=lambda results: results.date)


def load_needle_run(path: str | Path, task: str | None = None) -> NeedleRun:
    """The newest needle results at `path`, which must be of one model.

    path: a folder or a file, as for `find_results`.
    task: the task to read; needed only where there are several needle tasks.
    Raises ResultsError: no needle results, several tasks or models to choose from, malformed cells.
    """
    found = find_results(path)
    runs = [run for run in found if run.needle_cells()]
    if not runs:
        folder = Path(path).parent if Path(path).is_file() else path
        raise ResultsError(
            f"{path}: no needle results; make some with "
            f"lm_eval ... --tasks yoco_needle --output_path {folder}"
        )
    tasks = sorted({name for run in runs for name in run.needle_cells()})
    if task is None:
        if len(tasks) > 1:
            raise ResultsError(
                f"{path}: several needle tasks; choose one with --task: {listed(tasks, 20)}"
            )
        task = tasks[0]
    runs = [run for run in runs if task in run.needle_cells()]
    if not runs:
        raise ResultsError(f"{path}: no needle task {task!r}; there is: {listed(tasks, 20)}")
    if len({run.model_id for run in runs}) > 1:
        raise ResultsError(f"{path}: several models; choose one of: {_choices(runs)}")
    newest = runs[-1]
    if len(runs) > 1:
        logger.warning(
            "reading %s, the newest of %d runs; %d older left out",
            newest.path,
            len(runs),
            len(runs) - 1,
        )
    try:
        cells = parse_cells(newest.needle_cells()[task])
    except ResultsError as error:
        raise ResultsError(
            f"{newest.path}: task {task}: {error}; run the evaluation again"
        ) from error
    return NeedleRun(newest.model, task, newest.path, newest.date, cells)


def parse_cells(raw: list) -> tuple[NeedleCell, ...]:
    """The cells that a needle task left, checked. Raises ResultsError, telling which is wrong."""
    if not raw:
        raise ResultsError("its list of cells is empty")
    cells: dict[tuple[int, float], NeedleCell] = {}
    for entry in raw:
        try:
            numbers = [entry[name] for name in _CELL_NUMBERS]
            cell = NeedleCell(*numbers, **_answers(entry))
        except (KeyError, TypeError) as error:
            raise ResultsError(
                f"cell {shown(entry)} needs context_length, depth, samples, correct"
            ) from error
        except ResultsError as error:
            raise ResultsError(f"cell {shown(entry)}: {error}") from error
        cell = replace(cell, depth=round(cell.depth, 9))  # 0.1 + 0.2 and 0.3 are one row
        key = cell.context_length, cell.depth
        if key in cells:
            raise ResultsError(f"two cells for context length {key[0]} at depth {key[1]}")
        cells[key] = cell
    return tuple(sorted(cells.values()))


def _answers(entry: dict) -> dict[str, tuple]:
    told = ("right", "wrong", "prompts")
    return {name: tuple(entry[name]) for name in told if entry.get(name) is not None}


def _name_model(data: dict) -> tuple[str, tuple[str, ...]]:
    """The model's name for titles, and what tells it apart from other models."""
    config = data["config"]
    args = config.get("model_args")
    if isinstance(args, str):
        args = simple_parse_args_string(args)
    elif not isinstance(args, dict):
        args = {}
    # The yoco backend puts its bundled checkpoint, which nobody names in the arguments, in config.
    pretrained = str(args.get("pretrained") or config.get("pretrained") or "")
    if pretrained:
        name = Path(pretrained).name or pretrained
        origin = os.path.normpath(pretrained)
    else:
        name = str(args.get("model") or data.get("model_name") or config.get("model") or "model")
        origin = name
    adapters = (str(args.get(key) or "") for key in ("peft", "delta", "revision"))
    return name, (origin, *adapters)


def _date(path: Path, data: dict) -> datetime:
    """When the run started, from the file's `date` (seconds), else from the file's name."""
    try:
        return datetime.fromtimestamp(data["date"]).astimezone()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        pass
    day, _, time = path.stem.rpartition("_")[2].partition("T")
    try:
        return datetime.fromisoformat(f"{day}T{time.replace('-', ':')}").astimezone()
    except ValueError:
        raise ResultsError(f"{path}: no date, neither in the file nor in its name") from None


def _choices(runs: list[ResultsFile]) -> str:
    """Each model's newest folder; its file where the folder holds another model's results too."""
    choices = []
    for model_id in dict.fromkeys(run.model_id for run in runs):
        newest = [run for run in runs if run.model_id == model_id][-1]
        folder = newest.path.parent
        shared = any(run.model_id != model_id and folder in run.path.parents for run in runs)
        choices.append(f"{newest.path if shared else folder} ({newest.model})")
    return listed(sorted(choices), 20)
