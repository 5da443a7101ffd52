"""The task yoco_needle: a grid of context lengths and depths, a city's number hidden at each.

lm-eval hands the settings over in the task's metadata, where --metadata and --model_args meet. The
documents say what was asked; the prompts, up to megabytes each, stay beside them on the task.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from .by_length import metric_list, values_at
from .evaluated_model import load_tokenizer, max_positions
from .haystack import load_haystack
from .prompts import Notes, Prompt, TokenCounter
from .settings import (
    count,
    depths,
    evenly_spaced,
    lengths,
    read_settings,
    setting,
    text,
    whole,
)
from .wording import CITIES, INTRODUCTION, NEEDLE, NUMBER_DIGITS, QUESTION

logger = logging.getLogger(__name__)

_EXCERPT = 200  # characters shown on each side of the needle
_WORST_CELL = "acc_worst_cell"


@dataclass(frozen=True)
class Settings:
    """What a user can set of the task.

    Attributes:
        context_lengths: tokens of a prompt and its answer, counted with the model's own tokenizer;
            numbers, or texts such as "64k" (65536) and "1m". Given also as `max_seq_lengths`.
        depths: shares of the haystack before the needle, 0 to 1; or how many, evenly spaced.
        samples: prompts per context length and depth, each with a haystack of its own.
        haystack: "synthetic", "essays", or a path to a text file or to a folder of them.
        seed: of the synthetic haystack, the cities and the numbers.
    """

    context_lengths: list[int] = setting(lengths, [1024, 2048, 4096, 8192, 16384])
    depths: list[float] = setting(depths, evenly_spaced(11))
    samples: int = setting(count, 2)
    haystack: str = setting(text, "synthetic")
    seed: int = setting(whole, 0)


class Needle(ConfigurableTask):
    """lm-eval's task with documents, prompts and metrics of its own."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self.settings = read_settings(Settings, metadata)
        metadata |= asdict(self.settings)  # for the results file
        own = {
            "metadata": metadata,
            "metric_list": metric_list(
                "acc",
                self.settings.context_lengths,
                acc="mean",
                **{_WORST_CELL: _worst_cell_noting_all(metadata)},
            ),
            # Says no more than that the metrics above are not to be looked up: see process_results.
            "process_results": "process_results",
        }
        super().__init__(config={k: v for k, v in config.items() if k != "class"} | own)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Makes the documents and their prompts: nothing is downloaded.

        Raises:
            ValueError: the settings do not fit the model, its tokenizer or the haystack.
        """
        settings, metadata = self.settings, self.config.metadata
        longest, positions = max(settings.context_lengths), max_positions(metadata)
        if positions is not None and longest > positions:
            raise ValueError(
                f"context_lengths: {longest} exceeds the model's {positions} positions; give "
                f"shorter ones, or allow it with --model_args max_length={longest}"
            )
        haystack = load_haystack(settings.haystack, settings.seed)
        self._counter = TokenCounter(load_tokenizer(metadata), bool(metadata.get("add_bos_token")))
        samples = tqdm(range(settings.samples), "yoco_needle: tokenising", leave=False, delay=1)
        self._notes = [
            Notes(self._counter, INTRODUCTION, partial(haystack.text, sample), longest)
            for sample in samples
        ]
        self._build_documents()
        logger.info(
            "%s: %d prompts, %d context lengths up to %d x %d depths x %d samples",
            self.config.task, len(self._prompts), len(settings.context_lengths), longest,
            len(settings.depths), settings.samples,
        )

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: None = None) -> str:
        return self._prompts[doc["context_length"], doc["depth"], doc["sample"]]

    def build_all_requests(
        self,
        *,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        chat_template: Callable | None = None,
        fewshot_as_multiturn: bool = False,
        **options: Any,
    ) -> None:
        """As lm-eval's; a system instruction and a chat template take their tokens from the notes.

        Requests are never cached: lm-eval's cache does not tell one grid from another.
        """
        wrapping = {
            "system_instruction": system_instruction,
            "apply_chat_template": apply_chat_template,
            "chat_template": chat_template,
            "fewshot_as_multiturn": fewshot_as_multiturn,
        }
        around = 0
        if system_instruction or apply_chat_template:
            shortest = self.eval_docs[0]
            whole = self.fewshot_context(shortest, num_fewshot=0, **wrapping)
            bare = self.doc_to_text(shortest)
            around = self._counter.count(whole) - self._counter.count(bare)
        if around or self._answer_tokens() != self._answer:  # --gen_kwargs come after loading
            self._build_documents(around)
        super().build_all_requests(**{**options, **wrapping, "cache_requests": False})

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """Whether the first number in the answer is the needle's, under every metric's name.

        Documents of other context lengths than a metric's have None there.
        """
        if "bypass" in self._metric_fn_list:  # --predict_only
            return super().process_results(doc, results)
        correct = first_number(results[0]) == doc["number"]
        length = doc["context_length"]
        return {
            "acc": float(correct),
            **values_at("acc", self.settings.context_lengths, length, float(correct)),
            _WORST_CELL: (length, doc["depth"], correct),
        }

    def _answer_tokens(self) -> int:
        """The generation budget, under whichever of its names lm-eval knows."""
        return normalize_gen_kwargs(self.config.generation_kwargs)["max_gen_toks"]

    def _build_documents(self, wrapping: int = 0) -> None:
        """Makes prompts that leave `wrapping` tokens to a system instruction or chat template."""
        settings = self.settings
        answer = self._answer = self._answer_tokens()
        reserve, shortest = _longest_needle_and_question(self._counter)
        self._prompts: dict[tuple[int, float, int], str] = {}
        documents = []
        for length in settings.context_lengths:
            size = length - answer - wrapping
            if size < shortest:
                raise ValueError(
                    f"context_lengths: {length} is too short for introduction, needle, question "
                    f"and answer; give at least {shortest + answer + wrapping}"
                )
            for sample, notes in enumerate(self._notes):
                if notes.tokens < size:
                    raise ValueError(
                        f"haystack: {settings.haystack} has {notes.tokens} tokens, too few for the "
                        f"context length {length}; give more text, or shorter context_lengths"
                    )
                for depth in settings.depths:
                    city, number = _draw(settings.seed, length, depth, sample)
                    needle = NEEDLE.format(city=city, number=number)
                    question = QUESTION.format(city=city)
                    prompt = notes.prompt(size, depth, needle, question, reserve)
                    self._prompts[length, depth, sample] = prompt.text
                    documents.append(
                        {
                            "context_length": length,
                            "depth": depth,
                            "sample": sample,
                            "city": city,
                            "number": number,
                            "question": question.strip(),
                            "needle": needle,
                            "needle_position": prompt.needle_position,
                            "prompt_tokens": prompt.tokens + wrapping,
                            "excerpt": _excerpt(prompt, needle),
                        }
                    )
        self.dataset = {"test": datasets.Dataset.from_list(documents)}


def first_number(text: str) -> str | None:
    """The first number in a text, without the commas between its digits; None if there is none."""
    match = re.search(r"\d+(?:,\d+)*", text)
    return match and match[0].replace(",", "")


def _draw(seed: int, length: int, depth: float, sample: int) -> tuple[str, str]:
    """The city and the number of a prompt; they do not depend on the rest of the grid."""
    # Of Random, the sequence of `random` alone is the same in every Python.
    draw = Random(f"needle/{seed}/{length}/{depth}/{sample}").random
    smallest = 10 ** (NUMBER_DIGITS - 1)
    return CITIES[int(draw() * len(CITIES))], str(smallest + int(draw() * 9 * smallest))


def _longest_needle_and_question(counter: TokenCounter) -> tuple[int, int]:
    """The tokens that needle and question take at most, and a prompt without any notes."""
    number = "7" * NUMBER_DIGITS
    added, whole = [], []
    for city in CITIES:
        needle, question = NEEDLE.format(city=city, number=number), QUESTION.format(city=city)
        added.append(counter.count(f" {needle}") + counter.count(question))
        whole.append(counter.count(INTRODUCTION + needle + question))
    # Another number may take more tokens, up to one per digit.
    return max(added), counter.special + max(whole) + NUMBER_DIGITS


def _excerpt(prompt: Prompt, needle: str) -> str:
    begin = prompt.text.index(needle)
    return prompt.text[max(0, begin - _EXCERPT) : begin + len(needle) + _EXCERPT]


def _worst_cell_noting_all(metadata: dict[str, Any]) -> Callable[[Iterable[tuple]], float]:
    """An aggregation that gives the lowest accuracy of a cell and leaves all in `metadata`."""

    # Not a method: lm-eval copies its configuration deeply, and with a method the whole task.
    def worst_cell(answers: Iterable[tuple[int, float, bool]]) -> float:
        cells: dict[tuple[int, float], dict[str, Any]] = {}
        for length, depth, correct in sorted(answers):
            cell = cells.setdefault(
                (length, depth),
                {"context_length": length, "depth": depth, "samples": 0, "correct": 0},
            )
            cell["samples"] += 1
            cell["correct"] += int(correct)
        metadata["cells"] = list(cells.values())
        return min(cell["correct"] / cell["samples"] for cell in cells.values())

    return worst_cell
