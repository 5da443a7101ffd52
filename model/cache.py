"""Keys and values of tokens, in buffers that are filled from the front unless told otherwise.

States are never changed in place, so holding on to one is a snapshot of it; going back to one
merely gives the slots behind it away again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from yoco_eval.kernels.sequences import to_device

from .mixers import MixerState
from .states import S, Stretches


@dataclass(frozen=True)
class TextState:
    """Of n texts after `lengths` tokens."""

    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the only text."""
        (length,) = self.lengths
        return length


@dataclass(frozen=True)
class SelfState(TextState):
    """States of a self-decoder: `layers` holds those of the layers' mixers; None before the first
    token."""

    layers: tuple[MixerState | None, ...]


class SlotCache(Generic[S]):
    """Account of the slots of a cache, and the state of one text; what lies in them is a
    subclass's.

    Attributes:
        capacity, room, state: as `states.Cache` has them.
    """

    def __init__(self, capacity: int, state: S) -> None:
        self.capacity = capacity
        self.room: Stretches = ((0, capacity),)
        self.state = state

    @property
    def filled(self) -> int:
        """The slot of the token that is fed next."""
        return self.room[0][0] if self.room else self.capacity

    def extend(self, count: int) -> Stretches:
        """Claims slots for the next `count` tokens.

        Raises:
            ValueError: there are fewer.
        """
        have = sum(end - first for first, end in self.room)
        if count > have:
            end = self.capacity - have + count
            raise ValueError(f"the cache has room for {self.capacity} tokens, not for {end}")
        claimed, self.room = cut(self.room, count)
        return claimed

    def restore(self, snapshot: S) -> None:
        """Goes back to a state that this cache had when it was filled from the front; the tokens
        since are forgotten."""
        self.state = snapshot
        self.room = ((snapshot.length, self.capacity),)


class KeyValueCache(SlotCache[S]):
    """Room for the keys and values of tokens.

    Args:
        shape: of the keys and of the values, [..., capacity, head_dim].
        state: before the text's first token.

    Attributes:
        keys, values: of that shape, keys rotated.
    """

    def __init__(
        self, shape: tuple[int, ...], state: S, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape[-2], state)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def fill_with_noise(self) -> None:
        """Writes random numbers to all slots."""
        self.keys.normal_()
        self.values.normal_()


def cut(stretches: Stretches, count: int) -> tuple[Stretches, Stretches]:
    """The first `count` slots, and the others."""
    before: list[tuple[int, int]] = []
    after = list(stretches)
    while count:
        first, end = after.pop(0)
        stop = min(end, first + count)
        before.append((first, stop))
        count -= stop - first
        if stop < end:
            after.insert(0, (stop, end))
    return tuple(before), tuple(after)


def slots_of(stretches: Stretches, device: torch.device) -> int | Tensor:
    """As `store_keys_values` takes them: the first of slots in a row; else all, int64 on the
    device."""
    if len(stretches) == 1:
        return stretches[0][0]
    return to_device(torch.cat([torch.arange(*stretch) for stretch in stretches]), device)
