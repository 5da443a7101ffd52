"""A task that is added as docs/architecture.md tells: how often a bell rings in a long text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from yoco_eval.tasks.answers import first_number
from yoco_eval.tasks.evaluated_model import token_counter
from yoco_eval.tasks.haystack import SyntheticHaystack
from yoco_eval.tasks.long_context import LongContextTask
from yoco_eval.tasks.settings import count, lengths, setting, whole

BELL = "The bell of Oslo rings."
MOST = 9
_ROOM = 64  # tokens for the question, the answer and a chat template
_LETTERS = 12  # of a token at most, in the haystack


@dataclass(frozen=True)
class Settings:
    """What a user can set of the task.

    Attributes:
        context_lengths: tokens of a prompt and its answer, counted with the model's own tokenizer.
        samples: prompts per context length.
        seed: of all that is drawn.
    """

    context_lengths: list[int] = setting(lengths, [1024, 4096])
    samples: int = setting(count, 4)
    seed: int = setting(whole, 0)


class Counting(LongContextTask):
    Settings = Settings

    def documents(self) -> list[dict[str, Any]]:
        self._texts: dict[tuple[int, int], str] = {}
        documents = []
        for length in self.settings.context_lengths:
            for sample in range(self.settings.samples):
                draw = Random(f"counting/{self.settings.seed}/{length}/{sample}").random
                bells = 1 + int(MOST * draw())
                self._texts[length, sample] = self._text(length, sample, draw, bells)
                documents.append({"context_length": length, "sample": sample, "answer": f"{bells}"})
        return documents

    def _text(self, length: int, sample: int, draw: Any, bells: int) -> str:
        """As many sentences as there is room for, and the bells among them."""
        counter = token_counter(self.config.metadata)
        text = SyntheticHaystack(self.settings.seed).text(sample, _LETTERS * length)
        size = length - _ROOM - bells * (counter.count(BELL) + 1)
        if size < 1:
            raise ValueError(f"context_lengths: {length} is too short for {bells} bells")
        sentences = text[: counter.ends(text)[size - 1]].split(". ")[:-1]
        for _ in range(bells):
            sentences.insert(int(draw() * (len(sentences) + 1)), BELL.rstrip("."))
        return ". ".join(sentences) + "."

    def input(self, doc: Mapping[str, Any]) -> str:
        return self._texts[doc["context_length"], doc["sample"]]

    def score(self, doc: Mapping[str, Any], results: Sequence[str]) -> float:
        return float(first_number(results[0]) == doc["answer"])
