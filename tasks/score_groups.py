"""Groups of lm-eval's own tasks with one score: the mean over the group's members.

A group of lm-eval's averages one metric over all tasks below it. Here each member has a metric of
its own, and a member that is itself a group counts as one, however many tasks it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import AggMetricConfig

from .hub_data import HubTask
from .members import load_members

# A value and its standard error, which lm-eval leaves out ("N/A") of a single document.
Estimate = tuple[float, float | str]


class Benchmarks(Group):
    """lm-eval's group, made of a YAML file that has these keys besides a task's:

    members: names of lm-eval's tasks and groups, each with what differs from its file, and with
        `score`, the metric that counts and its filter, as in lm-eval's results: "acc_norm,none".
    folders: where in lm-eval's `tasks` folder the members' files are.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = config["metadata"]
        super().__init__(
            config["task"], aggregate_metric_list=[AggMetricConfig("score")], metadata=metadata
        )
        members = [{**member, "class": HubTask} for member in config["members"]]
        self._scores = {member["name"]: member.pop("score") for member in members}
        for member in load_members(config["folders"], members, metadata):
            self.add(member)

    def aggregate(self, task_metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """As lm-eval's, with the score."""
        summary = super().aggregate(task_metrics)
        try:
            score = _mean(self._estimate(member, task_metrics) for member in self)
        except KeyError:  # --predict_only leaves the metrics out
            return summary
        summary["score,none"], summary["score_stderr,none"] = score
        return summary

    def _estimate(self, member: Task | Group, task_metrics: Mapping) -> Estimate:
        """A member's value of the metric that counts: of a group, the mean over its tasks."""
        if isinstance(member, Group):
            name, tasks = member.name, member.get_all_tasks()
        else:
            name, tasks = member.task_name, [member]
        value = self._scores[name]
        error = value.replace(",", "_stderr,")
        found = (task_metrics[task.task_name] for task in tasks)
        return _mean((metrics[value], metrics[error]) for metrics in found)


def _mean(estimates: Iterable[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    values, errors = zip(*estimates, strict=True)
    error = "N/A" if "N/A" in errors else math.hypot(*errors) / len(errors)
    return sum(values) / len(values), error
