"""Long-context tasks, lm-eval's own and like ones, at any context lengths, each reported.

The documents say what is asked; the long texts, up to tens of megabytes each, stay beside them, so
that they are neither copied with each document nor logged twice.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.utils import maybe_delimit
from lm_eval.config.group import AggMetricConfig

from .answers import after_thinking
from .building import dealt
from .by_length import (
    BY_LENGTH,
    digest,
    digests_by_length,
    metric_at,
    metric_list,
    values_at,
)
from .evaluated_model import check_positions
from .generated import GeneratedTask
from .members import Member, load_members
from .settings import read_settings, told


class LongContextTask(GeneratedTask):
    """One of lm-eval's tasks, prompts and scores as they are, or a like one of ours, with settings.

    Attributes:
        Settings: a dataclass of `settings.setting` fields, `context_lengths` among them.
        settings: one of these.
    """

    Settings: type[Any]

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self._thinking = False  # whether the assistant's turn begins with thoughts
        self.settings = read_settings(self.Settings, metadata)
        own = {
            "metadata": {**told(metadata, self.settings), BY_LENGTH: ["acc"]},
            "metric_list": metric_list("acc", self.settings.context_lengths, acc="mean"),
        }
        super().__init__(config={k: v for k, v in config.items() if k != "class"} | own)

    @abstractmethod
    def documents(self) -> list[dict[str, Any]]:
        """A document per prompt, its `context_length` in it, but not its `input`."""

    @abstractmethod
    def input(self, doc: Mapping[str, Any]) -> str:
        """The long text of a document."""

    @abstractmethod
    def score(self, doc: Mapping[str, Any], results: Sequence[str]) -> float:
        """What lm-eval's task gives for an answer, 0 to 1."""

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Makes or loads the documents.

        Raises:
            ValueError: a context length exceeds the model's positions, or there are no documents.
        """
        check_positions(self.settings.context_lengths, self.config.metadata)
        self.dataset = {self.config.test_split: datasets.Dataset.from_list(self.documents())}

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: Any = None) -> str:
        if "input" in doc:  # the examples of a task have theirs
            return super().doc_to_text(doc, doc_to_text)
        text = super().doc_to_text({**doc, "input": self.input(doc)}, doc_to_text)
        if self._thinking:
            begun = super().doc_to_prefix(doc)
            return maybe_delimit(text, begun, self.config.target_delimiter)
        return text

    def doc_to_prefix(self, doc: Mapping[str, Any]) -> str | None:
        """As lm-eval's, what the assistant's turn begins with; of a model that thinks the user's
        turn ends with it."""
        return None if self._thinking else super().doc_to_prefix(doc)

    def build_all_requests(self, **options: Any) -> None:
        """As lm-eval's, never cached: its cache does not tell one list of lengths from another.

        The results file gets digests of the prompts, before any chat template.
        """
        check_positions(self.settings.context_lengths, self.config.metadata)
        in_chats = options.get("apply_chat_template", False)
        self._thinking = in_chats and self._thinks(options.get("chat_template"))
        super().build_all_requests(**{**options, "cache_requests": False})
        asked = {name: options.get(name) for name in ("limit", "samples")}
        shots = self.config.num_fewshot or 0

        def digests(rank: int, size: int) -> dict[int, tuple[int, str]]:
            return {
                number: (
                    doc["context_length"],
                    digest(self.fewshot_context(doc, shots, gen_prefix=self.doc_to_prefix(doc))),
                )
                for number, doc in self.doc_iterator(rank=rank, world_size=size, **asked)
            }

        # Of the whole run, of which this process may have a share only.
        found = dealt(options.get("rank", 0), options.get("world_size", 1), digests)
        self.config.metadata["prompts"] = digests_by_length(found.values())

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        if "bypass" in self._metric_fn_list:  # --predict_only
            return super().process_results(doc, results)
        score = self.score(doc, [after_thinking(answer) for answer in results])
        lengths = self.settings.context_lengths
        return {"acc": score, **values_at("acc", lengths, doc["context_length"], score)}


class LongContextGroup(Group):
    """The mean over such tasks at each context length.

    A group that a YAML file describes by lm-eval's keys has metrics that are known beforehand. This
    one is made of a file that has these keys besides a task's, unless `tasks` needs others:

    members: names of lm-eval's tasks, which become objects of `Task`.
    folder: where in lm-eval's `tasks` folder their files are.

    Attributes:
        Task: the class of the members.
        lengths: the context lengths, in tokens.
    """

    Task: type[LongContextTask]
    aggregate_metric_list: list[AggMetricConfig]

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = config["metadata"]
        self.lengths: list[int] = read_settings(self.Task.Settings, metadata).context_lengths
        metrics = ["acc", *(metric_at("acc", length) for length in self.lengths)]
        means = [AggMetricConfig(metric, ["none"], weight_by_size=False) for metric in metrics]
        super().__init__(config["task"], aggregate_metric_list=means, metadata=metadata)
        for member in self.tasks(config):
            self.add(member)

    def tasks(self, config: Mapping[str, Any]) -> Iterable[Member]:
        """The members."""
        members = [{"name": name, "class": self.Task} for name in config["members"]]
        return load_members([config["folder"]], members, config["metadata"])

    def aggregate(self, task_metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """As lm-eval's, without the metrics that a task has no value of, as under --limit."""
        results = [task_metrics[task.task_name] for task in self.get_all_tasks()]
        listed = self.aggregate_metric_list
        self.aggregate_metric_list = [
            mean
            for mean in listed
            if all(isinstance(result.get(f"{mean.metric},none"), float) for result in results)
        ]
        try:
            return super().aggregate(task_metrics)
        finally:
            self.aggregate_metric_list = listed
