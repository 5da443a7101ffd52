"""The tasks yoco_multi_needle_*: numbers of several cities hidden, one of them or all asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from lm_eval.api.instance import Instance

from .answers import after_thinking
from .needle import Needle, NeedleSettings, draw_cities, hide
from .needle_grid import Hidden
from .settings import count, counts, depths, flag, lengths, setting
from .wording import CITIES, QUESTION

_PROTOCOLS = ("default", "paper")
_PAPERS_LARGEST = 50000  # numbers are from 1 to this in the paper's code
_PAPERS_ROOM = 150  # tokens of a context length that its prompts leave free
_PAPERS_ANSWER = {"max_gen_toks": 20, "until": []}


def _protocol(name: str, value: Any) -> str:
    if value not in _PROTOCOLS:
        raise ValueError(f"{name}: {value!r} is unknown; give one of {', '.join(_PROTOCOLS)}")
    return value


@dataclass(frozen=True)
class MultiSettings(NeedleSettings):
    """What a user can set of the tasks, besides what yoco_needle has, and other defaults of that.

    Attributes:
        needles: how many cities' numbers are hidden; a task with a number in its name has that.
        ask_all: whether the same text is also asked for every other needle.
        protocol: "paper" hides needles, leaves room and scores as the code of the YOCO paper does.
    """

    context_lengths: list[int] = setting(lengths, [1 << 17])
    depths: list[float] = setting(depths, [i / 11 for i in range(1, 11)])  # as the paper's code
    samples: int | dict[int, int] = setting(counts, 5)
    needles: int = setting(count, 16)
    ask_all: bool = setting(flag, True)
    protocol: str = setting(_protocol, "default")


class MultiNeedle(Needle):
    """A task whose YAML has a key `needles` of its own hides so many, and refuses other numbers."""

    Settings = MultiSettings
    settings: MultiSettings

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        self._named = config.pop("needles", None)
        metadata = {"needles": self._named, **(config.get("metadata") or {})}
        super().__init__(config | {"metadata": metadata})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        settings = self.settings
        needles = settings.needles
        if needles > len(CITIES):
            raise ValueError(
                f"needles: {needles} exceeds the {len(CITIES)} cities there are; give fewer"
            )
        if self._named not in (None, needles):
            raise ValueError(
                f"needles: {self.config.task} has {self._named}, not {needles}; evaluate "
                "yoco_multi_needle_n for another number"
            )
        if self._as_paper:
            if needles > 1 and not 0 < min(settings.depths) <= max(settings.depths) < 1:
                raise ValueError(
                    "depths: with protocol=paper, needles stand before and behind the one that is "
                    "asked for; give depths above 0 and below 1"
                )
            self.own_lines = True
            self.config.generation_kwargs = self.config.generation_kwargs | _PAPERS_ANSWER
        super().download(dataset_kwargs)

    @property
    def _as_paper(self) -> bool:
        return self.settings.protocol == "paper"

    def own_metrics(self) -> dict[str, str]:
        return {"acc_all": "mean"} if self.settings.ask_all else {}

    def hidden(self, length: int, depth: float, sample: int) -> list[Hidden]:
        settings = self.settings
        cities = draw_cities(settings.seed, length, depth, sample, settings.needles)
        if not self._as_paper:
            return cities
        draw = Random(f"paper/{settings.seed}/{length}/{depth}/{sample}").random
        depths = [depth, *scatter(draw, depth, len(cities) - 1)]
        numbers: list[str] = []
        while len(numbers) < len(cities):
            number = str(1 + int(draw() * _PAPERS_LARGEST))
            if number not in numbers:
                numbers.append(number)
        return [
            hide(place, needle.facts["city"], number)
            for needle, place, number in zip(cities, depths, numbers, strict=True)
        ]

    def is_right(self, answer: str | None, number: str) -> bool:
        """As yoco_needle's; by the paper's protocol wherever the answer holds the number."""
        if self._as_paper:
            return number in after_thinking(answer)
        return super().is_right(answer, number)

    def _answer_tokens(self) -> int:
        return max(super()._answer_tokens(), _PAPERS_ROOM if self._as_paper else 0)

    def tell_of_others(self, others: Sequence[Hidden]) -> dict[str, Any]:
        return {"others": [{**other.facts, "depth": other.depth} for other in others]}

    def whole_prompt(self, doc: Mapping[str, Any]) -> str:
        """The prompt, with the question for the document's city at its end."""
        text, question = super().whole_prompt(doc), QUESTION.format(city=doc["city"])
        if text.endswith(question):
            return text
        return text.rpartition(QUESTION.partition("{")[0])[0] + question

    def construct_requests(
        self, doc: Mapping[str, Any], ctx: str, **options: Any
    ) -> list[Instance]:
        """lm-eval's request and, to `ask_all`, one for each other needle of the same text."""
        requests = [super().construct_requests(doc, ctx, **options)]
        if self.settings.ask_all:
            for index, other in enumerate(doc["others"], start=1):
                another = {**doc, "city": other["city"], "number": other["number"]}
                request = super().construct_requests(doc, self._context(another), **options)
                request.idx = index
                requests.append(request)
        return requests

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """As yoco_needle's; `acc_all` is the share of right answers of all questions."""
        metrics = super().process_results(doc, results)
        if "acc_all" in self._metric_fn_list:
            numbers = [doc["number"], *(other["number"] for other in doc["others"])]
            right = [
                self.is_right(answer, number)
                for answer, number in zip(results, numbers, strict=True)
            ]
            metrics["acc_all"] = sum(right) / len(right)
        return metrics


def scatter(draw: Callable[[], float], depth: float, others: int) -> list[float]:
    """Depths of the other needles of a prompt, as the paper's code has them.

    How many stand before the one at `depth`, from none to all but one, is as likely as any other
    number, wherever that one is. They are spread evenly over what is before it, and behind it.

    Args:
        draw: `random` of a `Random`.
    """
    before = int(draw() * others)
    return [
        depth * draw() if place < before else depth + (1 - depth) * draw()
        for place in range(others)
    ]
