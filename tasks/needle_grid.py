"""What the needle tasks share: a grid of context lengths and depths, something hidden at each.

lm-eval hands the settings over in the task's metadata, where --metadata and --model_args meet. The
documents say what was asked; the prompts, up to megabytes each, stay beside them on the task.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import datasets

from .answers import after_thinking, first_number
from .building import build
from .by_length import BY_LENGTH, digest, metric_list, values_at
from .evaluated_model import check_positions, token_counter
from .generated import GeneratedTask, context_text
from .haystack import sentence_starts
from .prompts import Notes, Prompt
from .settings import (
    counts,
    depths,
    evenly_spaced,
    lengths,
    read_settings,
    samples_at,
    setting,
    told,
    whole,
)
from .wording import NUMBER_DIGITS

logger = logging.getLogger(__name__)

_MOST_PROMPTS = 1_000_000
_EXCERPT = 200  # characters shown on each side of the needle
_WORST_CELL = "acc_worst_cell"
# Chat models write sentences, one token a letter perhaps, and lines without an answer.
_IN_CHATS = {"max_gen_toks": 128, "until": []}


@dataclass(frozen=True)
class GridSettings:
    """What a user can set of every needle task.

    Attributes:
        context_lengths: tokens of a prompt and its answer, counted with the model's own tokenizer;
            numbers, or texts such as "64k" (65536) and "1m". Given also as `max_seq_lengths`.
        depths: shares of the haystack before the needle, 0 to 1; or how many, evenly spaced.
        samples: prompts per context length and depth; one number, or one by context length.
        seed: of all that is drawn.
    """

    context_lengths: list[int] = setting(lengths, [1024, 2048, 4096, 8192, 16384])
    depths: list[float] = setting(depths, evenly_spaced(11))
    samples: int | dict[int, int] = setting(counts, 2)
    seed: int = setting(whole, 0)


@dataclass(frozen=True)
class Hidden:
    """A needle, and how it is asked for.

    Attributes:
        depth: share of the haystack's tokens before it, 0 to 1.
        facts: what a document tells of it; the `number` among them is the right answer, whatever
            it is.
        sentence: the needle itself, which has the number in it.
        question: the end of a prompt that asks for it.
    """

    depth: float
    facts: dict[str, str]
    sentence: str
    question: str

    def __post_init__(self) -> None:
        if "number" not in self.facts:
            told = ", ".join(self.facts) or "nothing"
            raise ValueError(f"facts: a needle tells {told}; name its right answer `number`")


class Haystack(Protocol):
    name: str

    def text(self, sample: int, size: int) -> str:
        """The first `size` characters of a sample's text, fewer if there are no more."""


class NeedleGrid(GeneratedTask):
    """lm-eval's task with documents, prompts and metrics of its own.

    Attributes:
        Settings: what a user can set, `GridSettings` or more.
        introduction: the text before the haystack; it ends in whitespace.
        answer_start: what every question ends with, a format of a document's fields; in a chat,
            the assistant's turn begins with it where the backend can leave that open.
        starts, own_lines: where needles may stand, and how: see `Notes`.
    """

    Settings: type[GridSettings] = GridSettings
    introduction: str
    answer_start: str
    starts = staticmethod(sentence_starts)
    own_lines = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self.settings = read_settings(self.Settings, metadata)
        metadata = {**told(metadata, self.settings), BY_LENGTH: ["acc"]}
        self._answer_begun = False  # whether the answer's beginning is the assistant's
        own = {
            "metadata": metadata,
            "metric_list": metric_list(
                "acc",
                self.settings.context_lengths,
                acc="mean",
                **{_WORST_CELL: _worst_cell_noting_all(metadata)},
                **self.own_metrics(),
            ),
            # Says no more than that the metrics above are not to be looked up: see process_results.
            "process_results": "process_results",
        }
        super().__init__(config={k: v for k, v in config.items() if k != "class"} | own)
        self._outside_chats = dict(self.config.generation_kwargs)

    @abstractmethod
    def haystack(self) -> Haystack:
        """The text to hide needles in."""

    @abstractmethod
    def hidden(self, length: int, depth: float, sample: int) -> list[Hidden]:
        """The needles of a prompt, the one that is asked for first, at `depth`.

        They depend on nothing but the seed and these arguments.
        """

    @abstractmethod
    def possible(self) -> Iterable[Hidden]:
        """Needles and questions of all lengths there are, to tell the longest."""

    def own_metrics(self) -> dict[str, str]:
        """Metrics besides those of every needle task, with their aggregations."""
        return {}

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Makes the documents and their prompts: nothing is downloaded.

        Raises:
            ValueError: the settings do not fit the model, its tokenizer or the haystack.
        """
        settings, metadata = self.settings, self.config.metadata
        longest = max(settings.context_lengths)
        grid = [len(settings.context_lengths), len(settings.depths), self._most_samples()]
        if (prompts := prod(grid)) > _MOST_PROMPTS:
            raise ValueError(
                f"samples: {' x '.join(map(str, grid))} context lengths, depths and samples are "
                f"{prompts} prompts, more than {_MOST_PROMPTS}; give fewer"
            )
        check_positions(settings.context_lengths, metadata)
        self._haystack = self.haystack()
        self._counter = token_counter(metadata)
        self._notes: dict[int, Notes] = {}
        self._build_documents()
        logger.info(
            "%s: %d prompts, %d context lengths up to %d x %d depths x %d samples",
            self.config.task,
            len(self._prompts),
            len(settings.context_lengths),
            longest,
            len(settings.depths),
            self._most_samples(),
        )

    def whole_prompt(self, doc: Mapping[str, Any]) -> str:
        """The whole prompt of a document, from the introduction to the answer's beginning."""
        return self._prompts[doc["context_length"], doc["depth"], doc["sample"]]

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: None = None) -> str:
        prompt, start = self.whole_prompt(doc), self.doc_to_prefix(doc)
        return prompt.removesuffix(start).rstrip() if start else prompt

    def doc_to_prefix(self, doc: Mapping[str, Any]) -> str | None:
        """What the assistant's turn begins with, if it does: lm-eval's `gen_prefix`."""
        return self.answer_start.format(**doc) if self._answer_begun else None

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

        In chats, answers have more room, and newlines do not end them, unless --gen_kwargs say so.
        Requests are never cached: lm-eval's cache does not tell one grid from another.
        """
        # Some models come after their tasks.
        check_positions(self.settings.context_lengths, self.config.metadata)
        self._wrapping = {
            "system_instruction": system_instruction,
            "apply_chat_template": apply_chat_template,
            "chat_template": chat_template,
            "fewshot_as_multiturn": fewshot_as_multiturn,
        }
        self._set_generation(_IN_CHATS if apply_chat_template else self._outside_chats)
        self._answer_begun = apply_chat_template and self._can_begin_answers(chat_template)
        around, shortest = 0, self.eval_docs[0]
        if system_instruction or apply_chat_template:
            whole = context_text(self._context(shortest))
            around = self._counter.count(whole) - self._counter.count(self.whole_prompt(shortest))
        if around or self._answer_tokens() != self._answer:  # --gen_kwargs come after loading
            self._build_documents(around)
        super().build_all_requests(**{**options, **self._wrapping, "cache_requests": False})

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """Whether the first number in the answer is the needle's, under every metric's name.

        Documents of other context lengths than a metric's have None there.
        """
        if "bypass" in self._metric_fn_list:  # --predict_only
            return super().process_results(doc, results)
        correct = self.is_right(results[0], doc["number"])
        length, prompt = doc["context_length"], self.whole_prompt(doc)
        return {
            "acc": float(correct),
            **values_at("acc", self.settings.context_lengths, length, float(correct)),
            _WORST_CELL: (length, doc["depth"], doc["sample"], correct, digest(prompt)),
        }

    def is_right(self, answer: str | None, number: str) -> bool:
        """Whether an answer, its thinking left out, gives the number first."""
        return first_number(after_thinking(answer)) == number

    def _set_generation(self, defaults: Mapping[str, Any]) -> None:
        """Sets what ends answers, where the user has not."""
        own = {key: defaults[key] for key in _IN_CHATS.keys() - self.generation_given}
        if self.budget_given:
            own.pop("max_gen_toks", None)
        self.config.generation_kwargs = {**self.config.generation_kwargs, **own}

    def _can_begin_answers(self, chat_template: Callable | None) -> bool:
        """Whether, in chats with this model, the answer's beginning can stand in its turn."""
        if self._thinks(chat_template):
            return False
        shortest = self.eval_docs[0]
        self._answer_begun = True
        try:
            context = self._context(shortest)
        except Exception:  # templates raise whatever they do where a turn stays open
            return False
        # Servers get a chat as JSON, and take each turn in it for a finished one.
        return isinstance(context, str) and context.endswith(self.answer_start.format(**shortest))

    def _context(self, doc: Mapping[str, Any]) -> Any:
        """What the model gets, system instruction and chat template included."""
        prefix = self.doc_to_prefix(doc)
        return self.fewshot_context(doc, num_fewshot=0, gen_prefix=prefix, **self._wrapping)

    def _build_documents(self, wrapping: int = 0) -> None:
        """Makes prompts that leave `wrapping` tokens to a system instruction or chat template."""
        settings = self.settings
        answer = self._answer = self._answer_tokens()
        # As many needles as in any other prompt.
        number = len(self.hidden(settings.context_lengths[0], settings.depths[0], 0))
        reserve, shortest = self._most_tokens(number)
        least = shortest + answer + wrapping
        if (length := min(settings.context_lengths)) < least:
            needles = "needle" if number == 1 else f"{number} needles"
            raise ValueError(
                f"context_lengths: {length} is too short for introduction, {needles}, question "
                f"and answer; give at least {least}"
            )
        make = partial(self._build_sample, wrapping=wrapping, reserve=reserve)
        bar = f"{self.config.task}: tokenising"
        by_sample, self._prompts = build(range(self._most_samples()), make, bar)
        documents = [
            doc for samples in zip(*by_sample, strict=True) for docs in samples for doc in docs
        ]
        self.dataset = {"test": datasets.Dataset.from_list(documents)}

    def _build_sample(
        self, sample: int, wrapping: int, reserve: int
    ) -> tuple[list[list[dict[str, Any]]], dict[tuple[int, float, int], str]]:
        """A sample's documents by context length, and its prompts."""
        settings = self.settings
        there = [n for n in settings.context_lengths if sample < samples_at(settings.samples, n)]
        if sample not in self._notes:
            self._notes[sample] = Notes(
                self._counter,
                self.introduction,
                partial(self._haystack.text, sample),
                max(there),
                self.starts,
                self.own_lines,
            )
        notes = self._notes[sample]
        prompts: dict[tuple[int, float, int], str] = {}
        documents: list[list[dict[str, Any]]] = []
        for length in settings.context_lengths:
            documents.append([])
            if length not in there:
                continue
            size = length - self._answer - wrapping
            if notes.tokens < size:
                raise ValueError(
                    f"haystack: {self._haystack.name} has {notes.tokens} tokens, too few for the "
                    f"context length {length}; give more text, or shorter context_lengths"
                )
            for depth in settings.depths:
                hidden = asked, *others = self.hidden(length, depth, sample)
                prompt = notes.prompt(
                    size,
                    [(needle.depth, needle.sentence) for needle in hidden],
                    [needle.question for needle in hidden],
                    reserve,
                )
                prompts[length, depth, sample] = prompt.text
                documents[-1].append(
                    {
                        "context_length": length,
                        "depth": depth,
                        "sample": sample,
                        **asked.facts,
                        "question": asked.question.strip(),
                        "needle": asked.sentence,
                        "needle_position": prompt.needle_position,
                        "prompt_tokens": prompt.tokens + wrapping,
                        "excerpt": _excerpt(prompt, asked.sentence),
                    }
                    | self.tell_of_others(others)
                )
        return documents, prompts

    def _most_samples(self) -> int:
        """Of any context length."""
        settings = self.settings
        return max(samples_at(settings.samples, length) for length in settings.context_lengths)

    def tell_of_others(self, others: Sequence[Hidden]) -> dict[str, Any]:
        """What a document says of the needles that it does not ask for."""
        return {}

    def _most_tokens(self, needles: int) -> tuple[int, int]:
        """The tokens that needles and question take at most, and a prompt without any notes."""
        count, possible = self._counter.count, list(self.possible())
        sentences = [count(f" {one.sentence}") for one in possible]
        questions = [count(one.question) for one in possible]
        whole = [count(self.introduction + one.sentence + one.question) for one in possible]
        # Another number may take more tokens, up to one per digit.
        digits = NUMBER_DIGITS * possible[0].sentence.count(possible[0].facts["number"])
        others = (needles - 1) * max(sentences)
        reserve = others + max(map(sum, zip(sentences, questions, strict=True)))
        return reserve, self._counter.special + max(whole) + others + needles * digits


def _excerpt(prompt: Prompt, needle: str) -> str:
    begin = prompt.text.index(needle)
    return prompt.text[max(0, begin - _EXCERPT) : begin + len(needle) + _EXCERPT]


def _worst_cell_noting_all(metadata: dict[str, Any]) -> Callable[[Iterable[tuple]], float]:
    """An aggregation that gives the lowest accuracy of a cell and leaves all in `metadata`.

    Cells say which samples were answered right, and what digests their prompts have, so that runs
    can be compared prompt by prompt.
    """

    # Not a method: lm-eval copies its configuration deeply, and with a method the whole task.
    def worst_cell(answers: Iterable[tuple[int, float, int, bool, str]]) -> float:
        cells: dict[tuple[int, float], dict[str, Any]] = {}
        for length, depth, sample, correct, prompt in sorted(answers):
            cell = cells.setdefault(
                (length, depth),
                {
                    "context_length": length, "depth": depth, "samples": 0, "correct": 0,
                    "right": [], "wrong": [], "prompts": [],
                },
            )  # fmt: skip
            cell["samples"] += 1
            cell["correct"] += int(correct)
            cell["right" if correct else "wrong"].append(sample)
            cell["prompts"].append(prompt)
        metadata["cells"] = list(cells.values())
        return min(cell["correct"] / cell["samples"] for cell in cells.values())

    return worst_cell
