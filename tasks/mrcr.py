"""The group yoco_mrcr: OpenAI's MRCR, its samples sorted into bins by the model's own tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
from tqdm import tqdm

from .building import build, count_builders
from .conversations import (
    DOUBLED,
    NEEDLES,
    ConversationGroup,
    ConversationTask,
    Message,
    needle_counts,
)
from .hub_data import load, load_files
from .settings import count, lengths, setting, text

logger = logging.getLogger(__name__)

DATA = "openai/mrcr"
_FIELDS = ("prompt", "answer", "random_string_to_prepend", "n_needles")
_ROLES = {"system", "user", "assistant"}
# A sample's tokens are first estimated from so many characters in its middle. It is taken for bins
# alone that so many times as many, or as few, could be in.
_EXCERPT, _SPREAD = 1 << 12, 2.0


@dataclass(frozen=True)
class Settings:
    """What a user can set of the tasks.

    Attributes:
        context_lengths: upper ends of bins, in the model's tokens. A sample is of the shortest
            length L such that prompt and right answer have more than L / 2 tokens and at most L.
        needles: of 2, 4 and 8, those that are evaluated.
        samples: per bin and number of needles, the first ones; None for all.
        data: folder of local files, FOLDER/mrcr/*.parquet or *.jsonl, instead of the hub's.
    """

    context_lengths: list[int] = setting(lengths, [8192, 16384, 32768, 65536, 131072])
    needles: list[int] = setting(needle_counts, list(NEEDLES))
    samples: int | None = setting(count, None)
    data: str | None = setting(text, None)


class Mrcr(ConversationTask):
    Settings = Settings

    def documents(self) -> list[dict[str, Any]]:
        """Loads the data set and counts what may be in a bin.

        Raises:
            ValueError: it cannot be loaded or is damaged, or has nothing for any bin.
        """
        if not hasattr(self, "_rows"):
            self._rows = self._load()
        wanted, bins = self.settings.samples or len(self._rows), self.settings.context_lengths
        found: dict[int, list[dict[str, Any]]] = {length: [] for length in bins}
        rows, name = range(len(self._rows)), f"{self.config.task}: counting tokens"
        # Where some suffice, as many at a time as there are processes that count them.
        some = self.settings.samples is not None
        step = count_builders() if some else len(rows)
        for begin in tqdm(rows[::step], name, leave=False, delay=1, disable=not some):
            missing = [length for length in bins if len(found[length]) < wanted]
            if not missing:
                break
            make = partial(self._counted, bins=missing)
            counted, _ = build(rows[begin : begin + step], make, None if some else name)
            for doc, likely in filter(None, counted):
                tokens = doc["prompt_tokens"] + doc["answer_tokens"]
                length = next((length for length in likely if length / 2 < tokens <= length), None)
                if length is not None and len(found[length]) < wanted:
                    found[length].append({"context_length": length, **doc})
        documents = [doc for docs in found.values() for doc in docs]
        if not documents:
            raise ValueError(
                f"context_lengths: no sample with {self.needles} needles has more than half of "
                f"{', '.join(map(str, bins))} tokens and at most as many; give other lengths"
            )
        self._few = {length: len(docs) for length, docs in found.items() if len(docs) < wanted}
        if self.budget_given:
            most = self._answer_tokens()
        else:
            most = DOUBLED * max(doc["answer_tokens"] for doc in documents)
        return [{**doc, "max_gen_toks": self.room(doc["prompt_tokens"], most)} for doc in documents]

    def build_all_requests(self, **options: Any) -> None:
        super().build_all_requests(**options)
        asked = self.settings.samples
        few = {n: found for n, found in self._few.items() if asked is not None or not found}
        if few:
            logger.warning(
                "%s: fewer samples than asked for (%s) have so many tokens: %s",
                self.config.task, asked or "all there are",
                ", ".join(f"{found} up to {length}" for length, found in few.items()),
            )  # fmt: skip

    def messages(self, doc: Mapping[str, Any]) -> Sequence[Message]:
        return self._messages(doc["index"])

    def _load(self) -> datasets.Dataset:
        """The samples with the task's number of needles, in the order of their files."""
        if self.settings.data is None:
            files = f"{self.needles}needle/{self.needles}needle_*.parquet"
            found = [load(DATA, None, "mrcr", None, split="train", data_files=[files])]
        else:
            found = load_files(self.settings.data, "mrcr")
        for data in found:
            if missing := [field for field in _FIELDS if field not in data.column_names]:
                raise ValueError(f"data: mrcr: a file has no {', '.join(missing)}")
        own = [
            data.select([i for i, n in enumerate(data["n_needles"]) if n == self.needles])
            for data in found
        ]
        rows = datasets.concatenate_datasets([data.select_columns(list(_FIELDS)) for data in own])
        if not len(rows):
            raise ValueError(f"data: mrcr: no sample has {self.needles} needles")
        return rows

    def _counted(
        self, index: int, bins: Sequence[int]
    ) -> tuple[tuple[dict[str, Any], list[int]] | None, dict[Any, Any]]:
        """A sample's document and the bins that it may be in, if any; its text stays where it
        is."""
        messages = self._messages(index)
        likely = self._likely(messages, bins)
        return ((self._document(index, messages), likely) if likely else None), {}

    def _likely(self, messages: Sequence[Message], bins: Sequence[int]) -> list[int]:
        """Those bins that, by an estimate, a conversation may be in."""
        texts = [message["content"] for message in messages]
        middle = "\n".join(texts[len(texts) // 2 : len(texts) // 2 + _EXCERPT])[:_EXCERPT]
        estimate = self._counter.count(middle) * sum(map(len, texts)) / max(1, len(middle))
        return [n for n in bins if n / 2 / _SPREAD < estimate < n * _SPREAD]

    def _document(self, index: int, messages: Sequence[Message]) -> dict[str, Any]:
        """What is told of a sample, without its bin."""
        row = self._rows[index]
        answer, string = row["answer"], row["random_string_to_prepend"]
        if not (isinstance(answer, str) and string and answer.startswith(string)):
            raise ValueError(
                f"data: mrcr: sample {index} with {self.needles} needles has an answer that does "
                "not begin with its random_string_to_prepend"
            )
        return {
            "index": index,
            "needles": self.needles,
            "question": messages[-1]["content"],
            "random_string": string,
            "answer": answer,
            "prompt_tokens": self.tokens(messages),
            "answer_tokens": self._counter.count(answer),
        }

    def _messages(self, index: int) -> Sequence[Message]:
        try:
            messages = json.loads(self._rows[index]["prompt"])
            told = [{"role": one["role"], "content": one["content"]} for one in messages]
            right = all(one["role"] in _ROLES and isinstance(one["content"], str) for one in told)
        except (ValueError, TypeError, KeyError):
            right = False
        if not right or not told or told[-1]["role"] != "user":
            raise ValueError(
                f"data: mrcr: the prompt of sample {index} with {self.needles} needles is no JSON "
                "list of messages with role and content that ends with the user's"
            )
        return told


class MrcrGroup(ConversationGroup):
    Task = Mrcr
