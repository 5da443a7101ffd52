"""How the slots of a cache are dealt out to processes: in blocks of some slots, in turn.

So what a process holds of any stretch of slots lies in a row with it, in the same order, and nobody
has to keep account of who holds what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Slots = TypeVar("Slots", Tensor, np.ndarray)


@dataclass(frozen=True)
class Stripes:
    """The slots that process `rank` of `size` holds, `block` in a row at a time."""

    rank: int
    size: int
    block: int

    @property
    def cycle(self) -> int:
        """Slots after which it is the same process's turn again."""
        return self.size * self.block

    def capacity(self, slots: int) -> int:
        """How many of the first `slots` slots any process holds at most."""
        return -(-slots // self.cycle) * self.block

    def held(self, slot: int) -> int:
        """How many of the slots before `slot` it holds. What it holds of slots `first` .. `end` - 1
        lies at held(first) .. held(end) - 1 with it."""
        cycles, rest = divmod(slot, self.cycle)
        return cycles * self.block + min(max(rest - self.rank * self.block, 0), self.block)

    def held_before(self, slots: Tensor) -> Tensor:
        """`held` of each."""
        rest = slots % self.cycle - self.rank * self.block
        return slots // self.cycle * self.block + rest.clamp(0, self.block)

    def owners(self, slots: Slots) -> Slots:
        """The process that holds each."""
        return slots // self.block % self.size

    def places(self, slots: Slots) -> Slots:
        """Where each lies with the process that holds it."""
        return slots // self.cycle * self.block + slots % self.block

    def places_or(self, slots: Tensor, spare: int) -> Tensor:
        """Where each lies with this process; `spare` of those that others hold."""
        return torch.where(self.owners(slots) == self.rank, self.places(slots), spare)
