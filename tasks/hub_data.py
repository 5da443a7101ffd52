"""Data sets from the Hugging Face hub, or from local files of the same fields."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from .settings import read_settings, setting, text

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Settings:
    """What a user can set of one of lm-eval's tasks.

    Attributes:
        data: folder of local data sets, FOLDER/TASK/SPLIT.jsonl, to read instead of the hub's.
    """

    data: str | None = setting(text, None)


def local_files(folder: str, name: str) -> dict[str, str]:
    """The files of a data set by split: FOLDER/NAME/SPLIT.jsonl (or .json, .parquet, .txt).

    Raises:
        ValueError: there are none.
    """
    if not Path(folder).expanduser().is_dir():
        raise ValueError(f"data: {folder} is no folder")
    files = sorted(
        file for file in Path(folder, name).expanduser().glob("*") if file.suffix in _READERS
    )
    if not files:
        raise ValueError(
            f"data: {Path(folder, name)} holds no data set; put its splits there as "
            "SPLIT.jsonl, with the fields of the one on the hub"
        )
    return {file.stem: str(file) for file in files}


def load(path: str, name: str | None, local: str, data: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`, or the files of the data set `local` in the folder `data`.

    Args:
        path, name: of the data set on the hub, and its configuration.
        local: name of its folder in `data`.
        data: the setting of that name, if it is given.
        options: for `load_dataset`; of local files, `split` alone counts.

    Raises:
        ValueError: neither the hub nor the folder has it; the error says what to do.
    """
    if data is not None:
        files = local_files(data, local)
        split = options.get("split")
        if split is None:
            return datasets.DatasetDict({name: _read(file) for name, file in files.items()})
        if split not in files:
            raise _no_split(Path(data, local), split, files)
        return _read(files[split])
    try:
        return datasets.load_dataset(path, name, **options)
    except Exception as error:  # the libraries raise whatever their transports do
        raise ValueError(
            f"{path} could not be loaded from the Hugging Face hub ({_first_line(error)}): connect "
            "once, or give local files of the same fields with --metadata data=FOLDER "
            f"(FOLDER/{local}/SPLIT.jsonl)"
        ) from None


def load_files(folder: str, name: str) -> list[datasets.Dataset]:
    """A data set of any number of files, at any depth in FOLDER/NAME, in the order of paths.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    whole = Path(folder, name).expanduser()
    files = sorted(file for file in whole.rglob("*") if file.suffix in (".jsonl", ".parquet"))
    if not files:
        raise ValueError(
            f"data: {whole} holds no data set; put .parquet or .jsonl files there with the fields "
            "of the one on the hub"
        )
    return [_read(str(file)) for file in files]


class HubTask(ConfigurableTask):
    """One of lm-eval's tasks, whose data set may also be local: see `load`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Loads the data set.

        Raises:
            ValueError: it cannot be loaded, or lacks a split, or examples to show.
        """
        config = self.config
        settings = read_settings(Settings, config.metadata or {})
        options = {k: v for k, v in (dataset_kwargs or {}).items() if k != "trust_remote_code"}
        self.dataset = load(
            self.DATASET_PATH, self.DATASET_NAME, config.task, settings.data, **options
        )
        source = self.DATASET_PATH if settings.data is None else Path(settings.data, config.task)
        evaluated = config.test_split or config.validation_split
        shown = self.fewshot_cfg.split or config.training_split or config.validation_split
        for split in [evaluated] if config.num_fewshot == 0 else [evaluated, shown]:
            if split is not None and split not in self.dataset:
                raise _no_split(source, split, self.dataset)
        if config.num_fewshot and shown and len(self.dataset[shown]) < config.num_fewshot:
            raise ValueError(
                f"{source}: {config.num_fewshot} examples are to be shown, but its split "
                f"{shown!r} has {len(self.dataset[shown])}"
            )

    def build_all_requests(self, **options: Any) -> None:
        """As lm-eval's, whose cache does not tell local data from the hub's: those pass it by."""
        if (self.config.metadata or {}).get("data") is not None:
            options["cache_requests"] = False
        super().build_all_requests(**options)

    def fewshot_docs(self) -> Any:
        """As lm-eval's; None without examples, so that a split which goes unused may be missing."""
        return None if self.config.num_fewshot == 0 else super().fewshot_docs()


def _read(file: str) -> datasets.Dataset:
    kind = _READERS[Path(file).suffix]
    try:
        return datasets.load_dataset(kind, data_files=glob.escape(file), split="train")
    except Exception as error:  # whatever the readers raise
        reason = _first_line(error.__cause__ or error)
        raise ValueError(f"data: {file} is empty or not valid {kind} ({reason})") from None


def _no_split(source: str | Path, split: str, splits: Mapping[str, Any]) -> ValueError:
    return ValueError(f"{source} has no split {split!r} (it has {', '.join(splits)})")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
