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
    """State of the self-decoder after `length` tokens, and with it a snapshot of a `Cache`.

    `layers` holds, per layer: None before the first token; the state [B, H, Dk, Dv] of gated
    retention; or keys and values [B, H, <= window - 1, D] of sliding-window attention.
    """

    length: int
    layers: tuple[Tensor | tuple[Tensor, Tensor] | None, ...]

    def expand(self, batch: int) -> SelfState:
        """The same state for each of `batch` sequences, without copying."""

        def widen(state):
            if state is None:
                return None
            if isinstance(state, tuple):
                return tuple(part.expand(batch, -1, -1, -1) for part in state)
            return state.expand(batch, -1, -1, -1)

        return SelfState(self.length, tuple(widen(state) for state in self.layers))


class Cache:
    """Self-decoder state, and shared keys and values for up to `capacity` tokens of one sequence.

    It takes 2 * n_attn_kv_heads * head_dim numbers per token, whatever the number of layers.
    """

    def __init__(
        self, config: YocoConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (1, config.n_attn_kv_heads, capacity, config.attn_head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._filled = 0
        self.state = SelfState(0, (None,) * (config.n_layers // 2))

    @property
    def capacity(self) -> int:
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """[1, n_attn_kv_heads, tokens, head_dim], rotated; a view."""
        return self._keys[:, :, : self._filled]

    @property
    def values(self) -> Tensor:
        """[1, n_attn_kv_heads, tokens, head_dim]; a view."""
        return self._values[:, :, : self._filled]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds keys and values [1, n_attn_kv_heads, T, head_dim] at the end."""
        end = self._filled + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, not for {end}")
        self._keys[:, :, self._filled : end] = keys
        self._values[:, :, self._filled : end] = values
        self._filled = end

    def restore(self, snapshot: SelfState) -> None:
        """Goes back to a state that this cache had; the tokens since are forgotten."""
        self.state = snapshot
        self._filled = snapshot.length
