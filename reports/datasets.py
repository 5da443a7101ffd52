"""What a task was evaluated on, as its results file tells: a data set, and settings of prompts.

Also what of its cache the model read, without which a score would pass for the plain model's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .models import CACHE
from .results import mapping
from .setups import setup
from .task_runs import TaskRun

_SETTINGS = (
    *CACHE, "haystack", "needles", "protocol", "data", "depths", "samples", "seed", "limit",
)  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """path: on the hub; None for prompts that are made, and groups. config, split: of it, likewise.

    settings: that decide about the cache and the prompts, by name.
    """

    path: str | None
    config: str | None
    split: str | None
    settings: dict[str, str]


def dataset(run: TaskRun) -> Dataset:
    """That of a task; of a group without the data sets of its tasks."""
    config = mapping(run.file.data["configs"].get(run.task))
    path, name = (_text(config.get(key)) for key in ("dataset_path", "dataset_name"))
    split = _text(config.get("test_split")) or _text(config.get("validation_split"))
    told = setup(run)
    settings = {name: told[name] for name in _SETTINGS if name in told}
    return Dataset(path, name if path else None, split if path else None, settings)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
