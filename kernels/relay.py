"""A text's tokens in parts, one with each process of a group, and what goes from part to part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .group import Group

# Of a part's tokens on the state before them: what it is multiplied by, and what is added.
Effect = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Relay:
    """Consecutive parts of some of a text's tokens.

    Attributes:
        group: whose process i has part i.
        lengths: of the parts, at least 1 each.
    """

    group: Group
    lengths: tuple[int, ...]

    @property
    def own(self) -> slice:
        """This process's part, in the tokens of all parts."""
        first = sum(self.lengths[: self.group.rank])
        return slice(first, first + self.lengths[self.group.rank])

    @property
    def ends(self) -> bool:
        """Whether it is the last one."""
        return self.group.rank == self.group.size - 1

    def after(self, state: Tensor) -> Tensor:
        """The last part's state, of one shape with all; this part's may be overwritten."""
        return self.group.share(state.contiguous(), self.group.size - 1)

    def before(self, rows: Tensor, reach: int, past: Tensor | None) -> Tensor:
        """What lies before this part, of something that has a row for each token.

        Args:
            rows: [n, ...], of this part's last tokens, `reach` of them or all.
            reach: how many rows are asked for.
            past: [reach, ...], before the first part; None: zeros.

        Returns:
            [reach, ...], in new memory.
        """
        group, lengths = self.group, self.lengths
        out = rows.new_zeros(reach, *rows.shape[1:])
        received, room = {}, reach
        for source in range(group.rank - 1, -1, -1):
            count = min(room, lengths[source])
            if count:
                received[source] = out[room - count : room]
            room -= count
        if past is not None:
            out[:room] = past[reach - room :]
        sent, room = {}, reach
        for target in range(group.rank + 1, group.size):
            count = min(room, lengths[group.rank])
            if count:
                sent[target] = rows[len(rows) - count :]
            room -= min(room, lengths[target])
        group.hand_over(sent, received)
        return out

    def decayed(self, state: Tensor, effect: Effect) -> Tensor:
        """The state before this part, of states that each part takes to
        exp(decay) * state + added.

        Args:
            state: [H, K, V], before the first part.
            effect: gives decay [H] and added [H, K, V] of this part, if it is asked for.
        """
        decay, added = (state[:, 0, 0], state) if self.ends else effect()
        every = self.group.gather(torch.cat((decay[:, None], added.flatten(1)), 1))
        for part in every[: self.group.rank]:
            more = part[:, 1:].view(state.shape)
            state = part[:, 0].exp()[:, None, None] * state + more
        return state

    def transformed(self, state: Tensor, effect: Effect) -> Tensor:
        """The state before this part, of states that each part takes to
        transition @ state + added.

        Args:
            state: [H, K, V], before the first part.
            effect: gives transition [H, K, K] and added [H, K, V] of this part, if it is asked for.
        """
        keys = state.shape[1]
        none = state.new_zeros(state.shape[0], keys, keys), state
        every = self.group.gather(torch.cat(none if self.ends else effect(), 2))
        for part in every[: self.group.rank]:
            state = part[:, :, :keys] @ state + part[:, :, keys:]
        return state
