"""The group yoco_ruler: lm-eval's RULER tasks at any context lengths, and the effective length."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from .by_length import effective_length, metric_at
from .evaluated_model import token_counter
from .long_context import LongContextGroup, LongContextTask
from .ruler_prompts import generate
from .settings import count, lengths, setting, text, whole

logger = logging.getLogger(__name__)

# Tasks that differ from lm-eval's in prompts or scores: what to add to their versions there.
_REVISIONS = {"ruler_cwe": 1, "ruler_qa_squad": 1, "ruler_qa_hotpot": 1}
_FAR = 0.5  # share of a context length below which its prompts are said to be far shorter


@dataclass(frozen=True)
class Settings:
    """What a user can set of the tasks.

    Attributes:
        context_lengths: tokens of a prompt and its answer, counted with the model's own tokenizer.
        samples: prompts per task and context length.
        seed: of everything that is drawn.
        data: folder of the essays and questions, if they are not to be downloaded.
    """

    context_lengths: list[int] = setting(lengths, [4096, 8192, 16384, 32768, 65536, 131072])
    samples: int = setting(count, 500)
    seed: int = setting(whole, 42)
    data: str | None = setting(text, None)


class Ruler(LongContextTask):
    Settings = Settings

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = dict(config["metadata"])
        metadata["version"] += _REVISIONS.get(config["task"], 0)
        super().__init__({**config, "metadata": metadata})

    def documents(self) -> list[dict[str, Any]]:
        """Runs lm-eval's generator of the task.

        Raises:
            ValueError: a context length is too short, or texts are missing; the error tells which.
        """
        config, settings = self.config, self.settings
        self._answer = self._answer_tokens()
        counter = token_counter(config.metadata)
        self._inputs: dict[tuple[int, int], str] = {}
        documents = []
        for sample in generate(
            config.task,
            config.custom_dataset,
            counter,
            settings.context_lengths,
            samples=settings.samples,
            seed=settings.seed,
            answer=self._answer,
            delimiter=config.target_delimiter,
            data=settings.data,
        ):
            sample.pop("input_example", None)
            length = sample["context_length"] = sample["max_length"]
            self._inputs[length, sample["index"]] = sample.pop("input")
            documents.append(sample)
        for length in settings.context_lengths:
            longest = max(doc["length"] for doc in documents if doc["context_length"] == length)
            if longest < _FAR * length:
                logger.warning(
                    "%s: the prompts of context length %d have %d tokens at most, as the words or "
                    "texts that they are made of end there", config.task, length, longest,
                )  # fmt: skip
        return documents

    def build_all_requests(self, **options: Any) -> None:
        if self._answer_tokens() != self._answer:  # --gen_kwargs come after loading
            self.download()
        super().build_all_requests(**options)

    def input(self, doc: Mapping[str, Any]) -> str:
        return self._inputs[doc["context_length"], doc["index"]]

    def score(self, doc: Mapping[str, Any], results: Sequence[str]) -> float:
        """lm-eval's, but for questions with several answers: one suffices, as to RULER's authors.

        lm-eval gives such a question the share of its answers that the model's holds.
        """
        score = self.config.process_results(doc, results)[str(doc["context_length"])]
        return float(score > 0) if self.config.task.startswith("ruler_qa_") else score


class RulerGroup(LongContextGroup):
    """The tasks' mean at each context length, and the effective length."""

    Task = Ruler

    def __init__(self, config: Mapping[str, Any]) -> None:
        missing = [name for name in ("nltk", "wonderwords") if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"yoco_ruler needs {' and '.join(missing)}; install them with "
                "pip install 'yoco-eval[ruler]'"
            )
        super().__init__(config)

    def aggregate(self, task_metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        summary = super().aggregate(task_metrics)
        means = {
            length: summary[key]
            for length in self.lengths
            if (key := f"{metric_at('acc', length)},none") in summary
        }
        if means:  # there are none with --predict_only
            summary["effective_length,none"] = effective_length(means)
            summary["effective_length_stderr,none"] = "N/A"
        return summary
