"""The order of checkpoints in training: as they are given, or by the step that their names tell.

A name tells its step by the number behind "step", "checkpoint", "iter" or the like, else by its
last number: `step-4000`, `checkpoint_12000`, `demo-64k`. Where there is none, the revision that was
evaluated may tell it, as Pythia's `step3000`, or the model's own name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .results import ResultsError
from .runs import Checkpoint

GIVEN, STEP = ORDERS = ("given", "step")
_NUMBER = r"(\d+(?:\.\d+)?)([kmbt]?)(?![a-z\d])"
_NAMED = re.compile(
    rf"(?:step|checkpoint|ckpt|iter|iteration|update|epoch)s?[-_=. ]*{_NUMBER}", re.I
)
_ANY = re.compile(rf"(?<![\d.]){_NUMBER}", re.I)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Stages:
    """Where checkpoints stand in training.

    order: `GIVEN` or `STEP`.
    steps: of each checkpoint, ascending; of an order that is given its place, from 1.
    """

    order: str
    steps: tuple[float, ...]

    @property
    def told(self) -> bool:
        """Whether the steps are those of training, not mere places."""
        return self.order == STEP


def in_order(checkpoints: Sequence[Checkpoint], order: str) -> tuple[list[Checkpoint], Stages]:
    """The checkpoints in an order of `ORDERS`, and their stages.

    Raises ResultsError: of a checkpoint no step is told, or two have the same.
    """
    if order == GIVEN:
        return list(checkpoints), Stages(order, tuple(range(1, len(checkpoints) + 1)))
    steps: dict[float, Checkpoint] = {}
    for checkpoint in checkpoints:
        step = _step(checkpoint)
        if step is None:
            raise ResultsError(
                f"--order step: no number in {checkpoint.name}; give names that have one, such as "
                "--names step-1000,step-2000"
            )
        other = steps.setdefault(step, checkpoint)
        if other is not checkpoint:
            raise ResultsError(
                f"--order step: {other.name} and {checkpoint.name} are both of step {step:g}; give "
                "--names that tell them apart"
            )
    ascending = sorted(steps)
    return [steps[step] for step in ascending], Stages(order, tuple(ascending))


def _step(checkpoint: Checkpoint) -> float | None:
    models = [run.file.model_id for run in checkpoint.tasks.values()][:1]
    revisions = [value for model in models for name, value in model.args if name == "revision"]
    texts = [checkpoint.name, *revisions, *(model.shown for model in models)]
    return next((step for text in texts if (step := step_in(text)) is not None), None)


def step_in(text: str) -> float | None:
    """The training step that a name tells; None if there is no number in it."""
    found = _NAMED.findall(text) or _ANY.findall(text)
    if not found:
        return None
    number, unit = found[-1]
    return float(number) * _UNITS[unit.lower()]
