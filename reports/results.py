"""Reads the result files that lm-eval writes, and the needle cells in them.

lm-eval writes one `results_<date>.json` per run under `--output_path`. A needle task leaves its
grid there, as `cells` in its config's metadata: one entry per context length and depth. Whatever
task and whatever backend left such cells, they are read alike.
"""

import errno
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from yoco_eval.lengths import LONGEST
from yoco_eval.printable import shown

from .models import Model, identify, name_models

_LARGEST = 1 << 28  # bytes of a JSON file
_MOST_SAMPLES = 10**6  # of a cell; no test is exact and quick beyond
_CELL_NUMBERS = ("context_length", "depth", "samples", "correct")  # that every cell has


class ResultsError(ValueError):
    """Results that cannot be used; the message is one line, naming the culprit and the mend."""


@dataclass(frozen=True)
class ResultsFile:
    """One run of lm-eval.

    model: the name for titles; see `models.name_models`.
    model_id: tells models apart.
    path: the file.
    date: when the run started, with its time zone.
    data: the whole file.
    """

    model: str
    model_id: Model
    path: Path
    date: datetime
    data: dict[str, Any]

    def needle_cells(self) -> dict[str, list]:
        """The unchecked cells of every needle task in the file, by task name."""
        found = {task: self.metadata(task).get("cells") for task in self.data["configs"]}
        return {task: cells for task, cells in found.items() if isinstance(cells, list)}

    def cut(self, context_length: int) -> int | None:
        """To how many tokens the backend cut prompts of a context length.

        None if they are whole, or the file does not tell: lm-eval writes `max_length` of backends
        that have a tokenizer.
        """
        told = self.data.get("max_length")
        if isinstance(told, bool) or not isinstance(told, int) or told < 1:
            return None
        # lm-eval's API backends count one token of the answer apart.
        return told if context_length > told + 1 else None

    def metadata(self, task: str) -> dict[str, Any]:
        """What a task left in the file besides its results."""
        return mapping(mapping(self.data["configs"].get(task)).get("metadata"))


@dataclass(frozen=True, order=True)
class NeedleCell:
    """The prompts of one context length (tokens) and one needle depth (0 = start, 1 = end).

    right, wrong: the numbers of the samples that were answered so; None in files that lack them.
    prompts: a digest of each sample's prompt, in the order of their numbers; None likewise.
    source: the results file that it is from.
    cut_to: tokens that its prompts were cut to; None if they were not, as far as is known.
    """

    context_length: int
    depth: float
    samples: int
    correct: int
    right: tuple[int, ...] | None = None
    wrong: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None
    source: Path | None = field(default=None, compare=False)
    cut_to: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("context_length", "samples", "correct"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ResultsError(f"{name} {shown(value)} is not a whole number")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int | float):
            raise ResultsError(f"depth {shown(self.depth)} is not a number")
        if not 0 <= self.depth <= 1:
            raise ResultsError(f"depth {self.depth} is outside 0..1")
        if not 1 <= self.context_length <= LONGEST:
            raise ResultsError(
                f"context_length {shown(self.context_length)} is outside 1..{LONGEST}"
            )
        if not 1 <= self.samples <= _MOST_SAMPLES:
            raise ResultsError(f"samples {self.samples} is outside 1..{_MOST_SAMPLES}")
        if not 0 <= self.correct <= self.samples:
            raise ResultsError(f"correct {self.correct} is outside 0..{self.samples} (its samples)")
        if (self.right is None) != (self.wrong is None):
            raise ResultsError("right and wrong must both be given, or neither")
        if self.right is not None and self.wrong is not None:
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
    """The cells of one needle task, shortest and shallowest first; of one run, or several united.

    path, date: of the newest run.
    """

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
    def cut(self) -> dict[int, int]:
        """The context lengths at which prompts were cut, with the tokens that were left of them."""
        cut: dict[int, int] = {}
        for cell in self.cells:
            if cell.cut_to is not None:
                least = cut.get(cell.context_length, cell.cut_to)
                cut[cell.context_length] = min(least, cell.cut_to)
        return cut

    @property
    def sources(self) -> set[Path]:
        """The results files that the cells are from."""
        return {cell.source for cell in self.cells if cell.source}

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


def read_json(path: Path) -> Any:
    """What a JSON file holds. Pipes and devices, which may never end, are not read.

    Raises OSError, ValueError, RecursionError.
    """
    check_regular(path)
    if path.stat().st_size > _LARGEST:
        raise OSError(errno.EFBIG, "far larger than any such file")
    return json.loads(path.read_text(encoding="utf-8"))


def check_regular(path: Path) -> None:
    """Raises OSError if there is something that is no file with an end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not an ordinary file")


def read_results(path: Path) -> ResultsFile:
    """Reads one results file; ResultsError if it is not a whole results file of lm-eval."""
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), dict) for key in ("config", "configs")
    ):
        raise ResultsError(f"{path}: not a results file of lm-eval")
    model = identify(data)
    return ResultsFile(name_models([model])[model], model, path, _date(path, data), data)


def parse_cells(raw: list, file: ResultsFile | None = None) -> tuple[NeedleCell, ...]:
    """The cells that a needle task left in a results file, checked.

    Raises ResultsError, telling which is wrong.
    """
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
        if file:
            cell = replace(cell, source=file.path, cut_to=file.cut(cell.context_length))
        key = cell.context_length, cell.depth
        if key in cells:
            raise ResultsError(f"two cells for context length {key[0]} at depth {key[1]}")
        cells[key] = cell
    return tuple(sorted(cells.values()))


def _answers(entry: dict) -> dict[str, Any]:
    told = ("right", "wrong", "prompts")
    return {name: tuple(entry[name]) for name in told if entry.get(name) is not None}


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


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: a file may hold anything."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a results file is a figure: lm-eval writes "N/A" where there is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
