"""The task yoco_needle: a grid of context lengths and depths, a city's number hidden at each.

lm-eval hands the settings over in the task's metadata, where --metadata and --model_args meet. The
documents say what was asked; the prompts, up to megabytes each, stay beside them on the task.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from random import Random
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from yoco_eval.lengths import parse_length

from .evaluated_model import load_tokenizer, max_positions
from .haystack import load_haystack
from .prompts import Notes, Prompt, TokenCounter
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

    context_lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192, 16384])
    depths: list[float] = field(default_factory=lambda: _evenly_spaced(11))
    samples: int = 2
    haystack: str = "synthetic"
    seed: int = 0

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Settings:
        """Reads the settings among the metadata's other keys.

        Raises:
            ValueError: one is not what it should be.
        """
        known = [*(f.name for f in fields(cls)), "max_seq_lengths"]
        for key in metadata.keys() - set(known):
            # Arguments of the model are among them, so only what looks like a slip is one.
            if close := get_close_matches(key, known, n=1, cutoff=0.85):
                raise ValueError(f"metadata {key!r} is unknown; did you mean {close[0]!r}?")
        given = {f.name: metadata[f.name] for f in fields(cls) if metadata.get(f.name) is not None}
        lengths = "context_lengths"
        if metadata.get("max_seq_lengths") is not None:
            if lengths in given:
                raise ValueError(
                    "context_lengths and max_seq_lengths are both given; they are two names of one "
                    "setting, leave one out"
                )
            lengths, given["context_lengths"] = "max_seq_lengths", metadata["max_seq_lengths"]
        if "context_lengths" in given:
            given["context_lengths"] = _parse_lengths(lengths, given["context_lengths"])
        if "depths" in given:
            given["depths"] = _parse_depths(given["depths"])
        if "samples" in given:
            given["samples"] = _parse_whole("samples", given["samples"])
            if given["samples"] < 1:
                raise ValueError(f"samples: {given['samples']} is below 1; give 1 or more")
        if "haystack" in given:
            given["haystack"] = str(given["haystack"])
        if "seed" in given:
            given["seed"] = _parse_whole("seed", given["seed"])
        return cls(**given)


class Needle(ConfigurableTask):
    """lm-eval's task with documents, prompts and metrics of its own."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self.settings = Settings.from_metadata(metadata)
        metadata |= asdict(self.settings)  # for the results file
        metrics = {
            "acc": "mean",
            **{_length_metric(c): _mean_of_present for c in self.settings.context_lengths},
            _WORST_CELL: _worst_cell_noting_all(metadata),
        }
        own = {
            "metadata": metadata,
            "metric_list": [
                {"metric": name, "aggregation": aggregation, "higher_is_better": True}
                for name, aggregation in metrics.items()
            ],
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
            **{
                _length_metric(c): float(correct) if c == length else None
                for c in self.settings.context_lengths
            },
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


def _length_metric(context_length: int) -> str:
    # With leading zeros, because lm-eval sorts its table by name.
    return f"acc@{context_length:07d}"


def _mean_of_present(values: Iterable[float | None]) -> float | str:
    """The mean of what is not None; "N/A", as lm-eval has it, if nothing is (under --limit)."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else "N/A"


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


def _parse_lengths(name: str, value: Any) -> list[int]:
    items = _as_list(name, value)
    try:
        return sorted({parse_length(item) for item in items})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _parse_depths(value: Any) -> list[float]:
    if not isinstance(value, list | tuple):
        number = _parse_number("depths", value)
        if isinstance(number, int):
            if number < 1:
                raise ValueError(f"depths: a count of {number} is below 1; give 1 or more")
            return _evenly_spaced(number)
        value = [number]
    depths = {float(_parse_number("depths", depth)) for depth in _as_list("depths", value)}
    for depth in sorted(depths):
        if not 0 <= depth <= 1:
            raise ValueError(
                f"depths: {depth:g} is not within 0 and 1; give a count, such as 5, or shares of "
                "the haystack, such as [0, 0.5, 1]"
            )
    return sorted(depths)


def _parse_whole(name: str, value: Any) -> int:
    number = _parse_number(name, value)
    if not isinstance(number, int):
        raise ValueError(f"{name}: {value!r} is not a whole number; give one, such as 3")
    return number


def _parse_number(name: str, value: Any) -> int | float:
    if not isinstance(value, bool):
        for kind in (int, float):
            try:
                number = kind(str(value))
            except ValueError:
                continue
            return number
    raise ValueError(f"{name}: {value!r} is not a number; give one, such as 1")


def _as_list(name: str, value: Any) -> Sequence[Any]:
    """A setting's values: of a list, of a text such as "[4k,64k]", or the one value itself."""
    if isinstance(value, str):
        value = [item.strip(" '\"") for item in value.strip("[] ").split(",")]
    elif not isinstance(value, list | tuple):
        value = [value]
    if not value:
        raise ValueError(f"{name}: the list is empty; give one value or more")
    return value


def _evenly_spaced(count: int) -> list[float]:
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
