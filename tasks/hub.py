"""Data sets from the Hugging Face hub, or from local files of the same fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask


def local_files(folder: str, name: str) -> dict[str, str]:
    """The files of a data set by split: FOLDER/NAME/SPLIT.jsonl (or .json, .parquet, .txt).

    Raises:
        ValueError: there are none.
    """
    files = sorted(
        file
        for file in Path(folder, name).expanduser().glob("*")
        if file.suffix in {".jsonl", ".json", ".parquet", ".txt"}
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
        options: for `load_dataset`.

    Raises:
        ValueError: neither the hub nor the folder has it; the error says what to do.
    """
    if data is not None:
        files = local_files(data, local)
        split = options.get("split")
        if split is not None and split not in files:
            raise ValueError(
                f"data: {Path(data, local)} has no split {split!r} (it has {', '.join(files)})"
            )
        kind = Path(next(iter(files.values()))).suffix.removeprefix(".")
        kind = {"jsonl": "json", "txt": "text"}.get(kind, kind)
        return datasets.load_dataset(kind, data_files=files, split=split)
    try:
        return datasets.load_dataset(path, name, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the libraries raise whatever their transports do
        raise ValueError(
            f"{path} could not be loaded from the Hugging Face hub: connect once, or give local "
            f"files of the same fields with --metadata data=FOLDER (FOLDER/{local}/SPLIT.jsonl)"
        ) from error


class HubTask(ConfigurableTask):
    """One of lm-eval's tasks, whose data set may also be local: see `load`."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        options = {k: v for k, v in (dataset_kwargs or {}).items() if k != "trust_remote_code"}
        self.dataset = load(
            self.DATASET_PATH,
            self.DATASET_NAME,
            self.config.task,
            (self.config.metadata or {}).get("data"),
            **options,
        )
