"""The group yoco_babilong: lm-eval's BABILong tasks at any list of the lengths that there are.

Up to 128K, documents are those that lm-eval's tasks load; longer ones come from another data set of
the same authors, which has fewer for each length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yoco_eval.lengths import parse_length

from .hub_data import load
from .long_context import LongContextGroup, LongContextTask
from .settings import count, listed, setting, text

# What the authors call the lengths, by tokens.
NAMES = {0: "0k"} | {
    parse_length(name): name for name in "1k 2k 4k 8k 16k 32k 64k 128k 256k 512k 1M 10M".split()
}
_MANY, _LONG = "RMT-team/babilong-1k-samples", "RMT-team/babilong"
_LONGEST_OF_MANY = parse_length("128k")


def _lengths(name: str, value: Any) -> list[int]:
    """The lengths that have documents, ascending, without repetitions; "0k" is without a book."""
    found = set()
    for item in listed(name, value):
        try:
            length = 0 if str(item).strip().lower() in {"0", "0k"} else parse_length(item)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if length not in NAMES:
            raise ValueError(f"{name}: BABILong has no {item}; it has {', '.join(NAMES.values())}")
        found.add(length)
    return sorted(found)


@dataclass(frozen=True)
class Settings:
    """What a user can set of the tasks.

    Attributes:
        context_lengths: of those in `NAMES`: tokens as the authors of the data counted them.
        samples: documents per task and context length, the first ones; None for all.
        data: folder of local data sets, FOLDER/babilong/4k/qa1.jsonl, instead of the hub's.
    """

    context_lengths: list[int] = setting(
        _lengths, [length for length in NAMES if length <= _LONGEST_OF_MANY]
    )
    samples: int | None = setting(count, None)
    data: str | None = setting(text, None)


class Babilong(LongContextTask):
    Settings = Settings

    def documents(self) -> list[dict[str, Any]]:
        """Loads the data sets, a long text only when it is asked for.

        Raises:
            ValueError: one cannot be loaded, or lacks a field.
        """
        self._texts = {length: self._load(length) for length in self.settings.context_lengths}
        return [
            {"context_length": length, "index": index, **row}
            for length, texts in self._texts.items()
            for index, row in enumerate(texts.select_columns(["question", "target"]))
        ]

    def input(self, doc: Mapping[str, Any]) -> str:
        return self._texts[doc["context_length"]][doc["index"]]["input"]

    def score(self, doc: Mapping[str, Any], results: Sequence[str]) -> float:
        return self.config.process_results(doc, results)["acc"]

    def _load(self, length: int) -> Any:
        name, split, settings = NAMES[length], self.config.test_split, self.settings
        options: dict[str, Any] = {"split": split}
        path = _MANY
        if length > _LONGEST_OF_MANY:
            # By file: a split of these is gigabytes, and loading one by name loads them all.
            path, options["data_files"] = _LONG, {split: f"data/{split}/{name}.json"}
        local = f"babilong/{name}"
        found = load(path, None if path == _LONG else name, local, settings.data, **options)
        missing = {"input", "question", "target"} - set(found.column_names)
        if missing:
            raise ValueError(f"data: {local}, split {split}: has no {', '.join(sorted(missing))}")
        return found.select(range(min(len(found), settings.samples or len(found))))


class BabilongGroup(LongContextGroup):
    Task = Babilong
