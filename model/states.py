"""What models remember of texts: states, and keys and values in a cache."""

from __future__ import annotations

from typing import Protocol, TypeVar


class State(Protocol):
    """What a model remembers of n texts after `lengths` tokens, beside the cache."""

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def length(self) -> int:
        """Tokens of the only text."""


S = TypeVar("S", bound=State)


# Slots of a cache: first .. end - 1 of each pair (first, end).
Stretches = tuple[tuple[int, int], ...]


class Cache(Protocol[S]):
    """Slots for the keys and values of `capacity` tokens, and the state of one text.

    Attributes:
        room: the slots of the tokens that are fed next, in this order. At first it is the whole
            cache; whoever keeps account of the slots may set it.
        state: of the text that is fed by `Model.prefill`.
    """

    room: Stretches
    state: S

    @property
    def capacity(self) -> int: ...

    @property
    def filled(self) -> int:
        """The slot of the token that is fed next."""

    def fill_with_noise(self) -> None:
        """Writes random numbers to all slots, for measurements that feed nothing."""

    def restore(self, snapshot: S) -> None:
        """Goes back to a state that this cache had when it was filled from the front; the tokens
        since are forgotten."""
