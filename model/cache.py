"""What a YOCO model remembers of a text: the self-decoder's states and the shared cache.

The self-decoder's states are never changed in place, so holding on to one is a snapshot of it;
the shared cache only grows at its end, so going back to a snapshot merely shortens it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import YocoConfig


@dataclass(frozen=True)
class SelfState:
    """States of the self-decoder after `lengths` tokens of n texts.

    `layers` holds, per layer: None before the first token; states [n, H, D, D] of gated retention;
    or the rotated keys and values [n, 2, window - 1, H, D] of sliding-window attention, the newest
    last, of which as many are valid as there were tokens.
    """

    lengths: tuple[int, ...]
    layers: tuple[Tensor | None, ...]

    @classmethod
    def initial(cls, config: YocoConfig) -> SelfState:
        """Of one text, before its first token."""
        return cls((0,), (None,) * (config.n_layers // 2))

    @property
    def length(self) -> int:
        """Tokens of the only text."""
        (length,) = self.lengths
        return length


class Cache:
    """Shared keys and values of up to `capacity` tokens, and the self-decoder's state of one text.

    It takes 2 * n_attn_kv_heads * head_dim numbers per token, whatever the number of layers.

    Attributes:
        keys, values: [n_attn_kv_heads, capacity, head_dim], keys rotated; filled from the front.
        filled: number of tokens in them.
        state: of the text that the first `state.length` of them are.
    """

    def __init__(
        self, config: YocoConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_attn_kv_heads, capacity, config.attn_head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.filled = 0
        self.state = SelfState.initial(config)

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

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

    def restore(self, snapshot: SelfState) -> None:
        """Goes back to a state that this cache had; the tokens since are forgotten."""
        self.state = snapshot
        self.filled = snapshot.length
