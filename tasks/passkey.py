"""The task yoco_passkey: a number on a line of its own in one text repeated over and over.

The prompt is the one of "Landmark Attention: Random-Access Infinite Context Length for
Transformers" (arXiv:2305.16300) to the letter; papers since have kept it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from .needle import draw_number
from .needle_grid import Hidden, NeedleGrid
from .wording import (
    NUMBER_DIGITS,
    PASSKEY_ANSWER,
    PASSKEY_FILLER,
    PASSKEY_INTRODUCTION,
    PASSKEY_NEEDLE,
    PASSKEY_QUESTION,
)


class Filler:
    """`PASSKEY_FILLER` without end, the same for every sample."""

    name = "passkey"

    def text(self, sample: int, size: int) -> str:
        return f"{PASSKEY_FILLER} " * (size // len(PASSKEY_FILLER) + 1)


class Passkey(NeedleGrid):
    introduction = PASSKEY_INTRODUCTION
    answer_start = PASSKEY_ANSWER
    own_lines = True

    @staticmethod
    def starts(text: str) -> Sequence[int]:
        """Where the filler begins anew, as it does behind the needle."""
        return range(0, len(text), len(PASSKEY_FILLER) + 1)

    def haystack(self) -> Filler:
        return Filler()

    def hidden(self, length: int, depth: float, sample: int) -> list[Hidden]:
        draw = Random(f"passkey/{self.settings.seed}/{length}/{depth}/{sample}").random
        return [_hide(depth, draw_number(draw))]

    def possible(self) -> Iterable[Hidden]:
        return [_hide(0, "7" * NUMBER_DIGITS)]


def _hide(depth: float, number: str) -> Hidden:
    sentence = PASSKEY_NEEDLE.format(number=number)
    return Hidden(depth, {"number": number}, sentence, PASSKEY_QUESTION)
