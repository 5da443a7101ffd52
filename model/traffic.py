"""What processes that hold texts together tell each other, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Of some work that all of them do.

    Attributes:
        received: bytes that a process gets from others, if it is neither the first nor the last.
        calls: of all processes together, each of which ends before the next begins.
    """

    received: int = 0
    calls: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.received + other.received, self.calls + other.calls)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.received * times, self.calls * times)


def gathered(size: int, parts: int) -> Traffic:
    """Of `size` bytes that each of `parts` processes has for all others."""
    return Traffic((parts - 1) * size, 1)


def handed_on(size: int) -> Traffic:
    """Of `size` bytes that come from one process, or from some that have a part of them each."""
    return Traffic(size, 1)
