"""What is asked of the engine, and how it tells of its progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .sampling import Sampling

TokenIds = Sequence[int] | np.ndarray


class Progress(Protocol):
    def __call__(self, done: int, spared: int = 0) -> object:
        """Is told how many tokens have been fed or generated since it was last told, and how many
        of those that were announced will not come."""


@dataclass(frozen=True)
class ScoreRequest:
    """Asks for the log-probability of `continuation` after `context` (at least one token)."""

    context: TokenIds
    continuation: TokenIds

    def __post_init__(self) -> None:
        _check_context(self.context)


@dataclass(frozen=True)
class Score:
    """Sum of the log-probabilities (natural), and whether greedy decoding would give the same."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class GenerateRequest:
    """Asks for up to `max_tokens` tokens after `context` (at least one token).

    An answer ends before a token of `end_tokens`, or where `stop` says so. That one is given the
    tokens so far, and the number of those that it has seen without finding an end; it returns how
    many of them are the answer, or None if it goes on.
    """

    context: TokenIds
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()
    stop: Callable[[list[int], int], int | None] | None = None
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        _check_context(self.context)
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens {self.max_tokens} is below 0")


def _check_context(context: TokenIds) -> None:
    if len(context) == 0:
        raise ValueError("a context is empty: its last token makes the first prediction")


def check_number(number: float, dtype: torch.dtype) -> None:
    """Refuses a prediction that is NaN or infinite, which would count as a wrong answer.

    The logarithm of a probability may be minus infinity.
    """
    if not number < math.inf:
        raise ValueError(
            f"the model's predictions are {number}: its numbers overflow in "
            f"{str(dtype).removeprefix('torch.')}; choose a wider dtype, or another checkpoint"
        )
