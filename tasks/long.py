"""The group yoco_long: what a user evaluates first, in the time that there is.

Needles, a pass key, MRCR and losses, at lengths that double up to the model's. Before it starts,
the model is asked short samples of each, and by the time that they took, lengths and numbers of
samples are chosen and told. A sample is the same whatever the time allows besides it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.model import LM

from yoco_eval.lengths import format_length

from . import documents
from .budget import FEWEST, Plan, choose, fitted
from .evaluated_model import evaluated, max_positions, token_counter
from .members import Member, load_members
from .settings import NAMES, count, lengths, number, read_settings, setting, text, whole
from .speed import Clock, agreed, answer, work_of

logger = logging.getLogger(__name__)

_SHORTEST, _OF_SHORT_MODELS = 4096, 1024  # tokens of the shortest context by default
_UNKNOWN = 2**14  # of the longest, where nothing tells the model's positions
_DEPTHS = [0, 0.25, 0.5, 0.75, 1]
# Of each task, what all runs have alike; a sample of a length is a prompt at each depth, or one.
_TASKS: dict[str, dict[str, Any]] = {
    "yoco_needle": {"depths": _DEPTHS},
    "yoco_multi_needle_4": {"depths": _DEPTHS, "ask_all": False},
    "yoco_passkey": {"depths": _DEPTHS},
    "yoco_mrcr_synthetic_4": {"needles": 4},
}
_IN_HAYSTACKS = ("yoco_needle", "yoco_multi_needle_4")
_LOSS = "yoco_long_loss_local"
_PROMPTS = sum(len(fixed.get("depths", [0])) for fixed in _TASKS.values())  # of a sample
_PROBED = 0.12  # of the time, at most, goes into measuring
_GROWTH = 2.5  # by which the next sweep, to twice the length, is expected to take longer
_BEYOND = 2  # times as long as those that were timed, at most, are texts whose losses are asked for
_LEAST = 0.05  # of a sweep, at least, is taken for what its longest prompts take
_AFTER = 4  # seconds from the last answer to the end


def _minutes(name: str, value: Any) -> float:
    given = number(name, value)
    if not 0 < given < 1e6:
        raise ValueError(f"{name}: {given:g} is no time to evaluate in; give minutes, such as 30")
    return given


@dataclass(frozen=True)
class Settings:
    """What a user can set of the group.

    Attributes:
        minutes: that the run may take from its beginning, with loading and measuring.
        context_lengths: those to choose from, in tokens; default: 4096 and its doubles up to the
            model's positions, 16K where nothing tells how many the model has.
        samples: of every context length, in place of what the minutes allow.
        haystack: of the needle tasks.
        seed: of all that is drawn.
        data: folder of texts, or one, whose losses are asked for; see `documents.local`.
    """

    minutes: float = setting(_minutes, 30)
    context_lengths: list[int] | None = setting(lengths, None)
    samples: int | None = setting(count, None)
    haystack: str = setting(text, "synthetic")
    seed: int = setting(whole, 0)
    data: str | None = setting(text, None)


class LongGroup(Group):
    """lm-eval's group, without metrics of its own.

    Raises:
        ValueError: there is no model to be timed, or the time is too short.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = config["metadata"]
        super().__init__(config["task"], metadata=metadata)
        self._settings = read_settings(Settings, metadata)
        # What is set of the members is chosen here.
        self._metadata = {key: value for key, value in metadata.items() if key not in NAMES}
        model: Any = evaluated()
        positions = self._positions()
        candidates = self._settings.context_lengths or _doubling(positions)
        beyond: list[int] = []
        if hasattr(model, "longest_context") and self._settings.context_lengths is None:
            most = agreed(model, model.longest_context())
            beyond = [length for length in candidates if length > most]
            candidates = [length for length in candidates if length <= most] or candidates[:1]
        if self._settings.samples is None:
            plan = self._planned(model, candidates)
        else:
            samples, ends = self._settings.samples, self._loss_lengths(candidates)
            given = dict.fromkeys(candidates, samples)
            plan = Plan(given, {}, samples if ends else 0, ends, 0.0)
        passed = Clock(model).now() / 60
        if model is None or model.rank == 0:
            _tell(config["task"], plan, self._settings, candidates, beyond, passed)
        for member in self._members(plan.samples, plan.documents, plan.loss_lengths):
            member.config.metadata["minutes"] = self._settings.minutes  # for the results file
            self.add(member)

    def _positions(self) -> int | None:
        kept = (max_positions(self._metadata, scored) for scored in (False, True))
        return min((one for one in kept if one is not None), default=None)

    def _loss_lengths(self, candidates: list[int]) -> list[int]:
        """The context lengths that the local text has tokens for."""
        _, whole_text = documents.local_text(self._settings.data)
        part = whole_text[: 1 << 18]
        tokens = len(whole_text) / len(part) * token_counter(self._metadata).count(part)
        return [length for length in candidates if length < 0.9 * tokens]

    def _members(
        self, samples: Mapping[int, int], document_count: int, loss_lengths: list[int]
    ) -> Iterable[Any]:
        """The tasks with so many samples by context length."""
        settings = self._settings
        own: dict[str, dict[str, Any]] = {}
        if samples:
            shared = {"context_lengths": [*samples], "samples": {**samples}, "seed": settings.seed}
            own = {name: {**fixed, **shared} for name, fixed in _TASKS.items()}
            for name in _IN_HAYSTACKS:
                own[name]["haystack"] = settings.haystack
        if document_count:
            own[_LOSS] = {"context_lengths": loss_lengths, "samples": document_count}
            if settings.data is not None:
                own[_LOSS]["data"] = settings.data
        for name, given in own.items():
            members: Iterable[Member] = load_members(
                [Path(__file__).parent], [{"name": name}], {**self._metadata, **given}
            )
            yield from members

    def _planned(self, model: LM | None, candidates: list[int]) -> Plan:
        """Measures how long short samples take, and chooses."""
        if model is None:
            raise ValueError(
                "minutes: yoco_long times the evaluated model, which is not known where tasks are "
                "loaded before lm-eval evaluates; give context_lengths and samples"
            )
        if model.world_size > 1 and not hasattr(model, "agree"):
            raise ValueError(
                "minutes: several processes of this backend would not come to the same samples; "
                "run one, or give context_lengths and samples"
            )
        clock = Clock(model)
        minutes = self._settings.minutes
        begun = clock.now()
        ends = self._loss_lengths(candidates)
        sweeps: dict[int, float] = {}
        losses: dict[int, float] = {}
        logger.info("yoco_long: timing short samples, to choose what %g minutes allow", minutes)
        # The first answers take longer than those that follow, on GPUs above all.
        self._timed(clock, model, {candidates[0]: 1}, [])
        before = 0.0
        for reached in accumulate([length] for length in candidates):
            started, longest = clock.now(), reached[-1]
            sweep = self._timed(clock, model, dict.fromkeys(reached, 1), [])
            sweeps[longest] = max(sweep - before, _LEAST * sweep)
            before = sweep
            if longest in ends:
                losses[longest] = self._timed(clock, model, {}, ends[: len(reached)])
            now = clock.now()
            if now - begun + _GROWTH * (now - started) > _PROBED * (60 * minutes - begun):
                break
        sweep_seconds = fitted(sweeps, lambda length: 1, work_of(model, self._metadata))
        loss_seconds = fitted(losses, lambda length: length, lambda length: length**2)
        left = 60 * minutes - clock.now() - _AFTER
        try:
            return choose(
                {length: sweeps.get(length, sweep_seconds(length)) for length in candidates},
                {
                    n: losses.get(n, loss_seconds(n))
                    for n in ends
                    if losses and n <= _BEYOND * max(losses)
                },
                left,
            )
        except ValueError as error:
            raise ValueError(
                f"minutes: {minutes:g} are too few: {clock.now() / 60:.1f} have passed, and "
                f"{FEWEST} samples of {format_length(candidates[0])} take about {error}; give more"
            ) from None

    def _timed(
        self, clock: Clock, model: LM, samples: Mapping[int, int], loss_lengths: list[int]
    ) -> float:
        """Seconds of making and answering so many samples by context length, and the losses of a
        document at so many lengths."""
        started = clock.now()
        answer(self._members(samples, 1 if loss_lengths else 0, loss_lengths), model)
        return clock.now() - started


def _doubling(positions: int | None) -> list[int]:
    """The context lengths of a model of so many positions, unless the user gives others."""
    longest = positions or _UNKNOWN
    first = _SHORTEST if longest >= 2 * _SHORTEST else _OF_SHORT_MODELS
    return [first << i for i in range(longest.bit_length()) if first << i <= longest] or [longest]


def _tell(
    name: str,
    plan: Plan,
    settings: Settings,
    candidates: Sequence[int],
    beyond: Sequence[int],
    passed: float,
) -> None:
    """Says on stderr what is going to be evaluated, after so many minutes."""
    timed = bool(plan.seconds)
    lines = [
        f"\n{name} asks for a needle, one of 4, a pass key, an answer of 4 (MRCR), and losses.\n",
        "  context   samples   prompts" + "   minutes" * timed,
    ]
    for length, samples in plan.samples.items():
        cells = [format_length(length), f"{samples}", f"{samples * _PROMPTS}"]
        if timed:
            cells.append(f"{samples * plan.seconds[length] / 60:.2f}")
        lines.append("".join(f"{cell:>9} " for cell in cells).rstrip())
    if plan.documents:
        longest = format_length(plan.loss_lengths[-1])
        losses = f"   losses   {plan.documents} documents, to {longest}"
        lines.append(
            f"{losses:30}{plan.documents * plan.loss_seconds / 60:9.2f}" if timed else losses
        )
    else:
        lines.append("   losses   none: " + ("they take too long" if timed else "too little text"))
    left_out = [length for length in candidates if length not in plan.samples]
    if left_out:
        lines.append(f"\nLeft out, as they take too long: {_listed(left_out)}.")
    if beyond:
        lines.append(f"\nLeft out, as they do not fit into memory: {_listed(beyond)}.")
    if timed:
        lines.append(
            f"\nOf {settings.minutes:g} minutes {passed:.1f} have passed; this should take "
            f"{plan.total / 60:.1f} more."
        )
    print("\n".join(lines), file=sys.stderr, flush=True)


def _listed(context_lengths: Sequence[int]) -> str:
    return ", ".join(map(format_length, context_lengths))
