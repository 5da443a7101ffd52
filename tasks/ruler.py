"""The group yoco_ruler: lm-eval's RULER tasks at any context lengths, and the effective length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

from .building import build
from .by_length import effective_length, metric_at
from .evaluated_model import token_counter
from .long_context import LongContextGroup, LongContextTask
from .members import Member, load_members
from .ruler_prompts import generate
from .settings import count, lengths, setting, text, whole

logger = logging.getLogger(__name__)

# Tasks that differ from lm-eval's in prompts or scores: what to add to their versions there.
_REVISIONS = {"ruler_cwe": 1, "ruler_qa_squad": 1, "ruler_qa_hotpot": 1}
_Place: TypeAlias = tuple[str, int, int]  # of a text: its task, context length and number
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


class _Made(NamedTuple):
    """What a task's generator made, without the long texts, and what the user should know."""

    documents: list[dict[str, Any]]
    warnings: list[str]


class Ruler(LongContextTask):
    """A configuration may have a key `given`: `made` and `inputs` of another process's task.

    Attributes:
        made: what the task's generator made.
        inputs: the long texts, by task, context length and number; perhaps those of other tasks.
        group: the tasks that are evaluated with this one, itself among them.
    """

    Settings = Settings
    made: _Made
    inputs: Mapping[_Place, str]

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        self.group = [self]
        self._given: tuple[_Made, Mapping[_Place, str]] | None = config.pop("given", None)
        metadata = dict(config["metadata"])
        metadata["version"] += _REVISIONS.get(config["task"], 0)
        super().__init__({**config, "metadata": metadata})

    def documents(self) -> list[dict[str, Any]]:
        """Runs lm-eval's generator of the task.

        Raises:
            ValueError: a context length is too short, or texts are missing; the error tells which.
        """
        self._answer = self._answer_tokens()
        if self._given is None:
            self.made, self.inputs = self._generate()
        else:
            self.made, self.inputs = self._given
            self._given = None
        for warning in self.made.warnings:
            logger.warning(warning)
        return self.made.documents

    def _generate(self) -> tuple[_Made, dict[_Place, str]]:
        config, settings = self.config, self.settings
        warnings: list[str] = []
        documents = generate(
            config.task,
            config.custom_dataset,
            token_counter(config.metadata),
            settings.context_lengths,
            samples=settings.samples,
            seed=settings.seed,
            answer=self._answer,
            delimiter=config.target_delimiter,
            data=settings.data,
            warn=warnings.append,
        )
        inputs = {}
        for sample in documents:
            sample.pop("input_example", None)
            sample["context_length"] = sample["max_length"]
            inputs[self._place(sample)] = sample.pop("input")
        for length in settings.context_lengths:
            longest = max(doc["length"] for doc in documents if doc["context_length"] == length)
            if longest < _FAR * length:
                warnings.append(
                    f"{config.task}: the prompts of context length {length} have {longest} tokens "
                    "at most, as the words or texts that they are made of end there"
                )
        return _Made(documents, warnings), inputs

    def handed_over(self) -> tuple[_Made, Mapping[_Place, str]]:
        """What was made, for all processes. The texts are not kept here: they may be gigabytes, and
        are read from files if several processes make them."""
        inputs, self.inputs = self.inputs, {}
        return self.made, inputs

    def _place(self, doc: Mapping[str, Any]) -> _Place:
        return self.config.task, doc["context_length"], doc["index"]

    def build_all_requests(self, **options: Any) -> None:
        if self._answer_tokens() != self._answer:  # --gen_kwargs come after loading
            self._make_again()
        super().build_all_requests(**options)

    def _make_again(self) -> None:
        """Makes the prompts of all tasks of the group whose budget is another one now."""
        tasks = [task for task in self.group if task._answer_tokens() != task._answer]
        own = []

        def make(index: int) -> tuple[_Made, Mapping[_Place, str]]:
            own.append(index)
            tasks[index].download()
            return tasks[index].handed_over()

        everything, inputs = build(range(len(tasks)), make)
        for index, made in enumerate(everything):
            if index in own:
                tasks[index].inputs = inputs
            else:
                tasks[index]._given = made, inputs
                tasks[index].download()

    def input(self, doc: Mapping[str, Any]) -> str:
        return self.inputs[self._place(doc)]

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
        tasks = [task for task in self if isinstance(task, Ruler)]
        for task in tasks:
            task.group = tasks

    def tasks(self, config: Mapping[str, Any]) -> Iterable[Member]:
        """The members, each made with its texts by one process of a machine."""
        own: dict[str, Ruler] = {}

        def load(name: str, **given: Any) -> Ruler:
            member = {"name": name, "class": self.Task, **given}
            [task] = load_members([config["folder"]], [member], config["metadata"])
            assert isinstance(task, Ruler)
            return task

        def make(name: str) -> tuple[_Made, Mapping[_Place, str]]:
            own[name] = load(name)
            return own[name].handed_over()

        names = config["members"]
        everything, inputs = build(names, make)
        for name, made in zip(names, everything, strict=True):
            task = own[name] if name in own else load(name, given=(made, inputs))
            task.inputs = inputs
            yield task

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
