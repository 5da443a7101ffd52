"""The tasks yoco_multi_needle_*: numbers of several cities hidden, one of them or all asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance

from .needle import Needle, Settings, draw_cities
from .needle_grid import Hidden
from .settings import count, depths, flag, lengths, setting
from .wording import CITIES, QUESTION


@dataclass(frozen=True)
class MultiSettings(Settings):
    """What a user can set of the tasks, besides what yoco_needle has, and other defaults of that.

    Attributes:
        needles: how many cities' numbers are hidden; a task with a number in its name has that.
        ask_all: whether the same text is also asked for every other needle.
    """

    context_lengths: list[int] = setting(lengths, [1 << 17])
    depths: list[float] = setting(depths, [i / 11 for i in range(1, 11)])  # as the paper's code
    samples: int = setting(count, 5)
    needles: int = setting(count, 16)
    ask_all: bool = setting(flag, True)


class MultiNeedle(Needle):
    """A task whose YAML has a key `needles` of its own hides so many, and refuses other numbers."""

    settings_class = MultiSettings

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        self._named = config.pop("needles", None)
        metadata = {"needles": self._named, **(config.get("metadata") or {})}
        super().__init__(config | {"metadata": metadata})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        needles = self.settings.needles
        if needles > len(CITIES):
            raise ValueError(
                f"needles: {needles} exceeds the {len(CITIES)} cities there are; give fewer"
            )
        if self._named not in (None, needles):
            raise ValueError(
                f"needles: {self.config.task} has {self._named}, not {needles}; evaluate "
                "yoco_multi_needle_n for another number"
            )
        super().download(dataset_kwargs)

    def own_metrics(self) -> dict[str, str]:
        return {"acc_all": "mean"} if self.settings.ask_all else {}

    def hidden(self, length: int, depth: float, sample: int) -> list[Hidden]:
        settings = self.settings
        return draw_cities(settings.seed, length, depth, sample, settings.needles)

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
