"""Keys and values of a text's tokens, in buffers that are filled from the front.

States are never changed in place, so holding on to one is a snapshot of it; the buffers only grow
at their end, so going back to a snapshot merely shortens them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch

from .interface import S
from .mixers import MixerState


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


class KeyValueCache(Generic[S]):
    """Room for the keys and values of tokens, and the state of one text.

    Args:
        shape: of the keys and of the values, [..., capacity, head_dim].
        state: before the text's first token.

    Attributes:
        keys, values: of that shape, keys rotated.
        filled: number of tokens in them.
        state: of the text that the first `state.length` of them are.
    """

    def __init__(
        self, shape: tuple[int, ...], state: S, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.filled = 0
        self.state = state

    @property
    def capacity(self) -> int:
        return self.keys.shape[-2]

    def extend(self, count: int) -> int:
        """Claims the next `count` places and returns the first.

        Raises:
            ValueError: there are fewer.
        """
        first, end = self.filled, self.filled + count
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, not for {end}")
        self.filled = end
        return first

    def restore(self, snapshot: S) -> None:
        """Goes back to a state that this cache had; the tokens since are forgotten."""
        self.state = snapshot
        self.filled = snapshot.length
