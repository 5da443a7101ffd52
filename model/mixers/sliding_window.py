"""Sliding-window attention: each token sees itself and the window's tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from yoco_eval.kernels.attention import rings_from_past, sliding_window_attention, window_step
from yoco_eval.kernels.matvec import linear_add, norm_linear
from yoco_eval.kernels.sequences import Sequences, Step

from ..checks import check_count, check_flag, check_multiple, check_number
from ..linear import Stack, linear
from ..rotary import Rotary
from ..traffic import Traffic, handed_on
from .contract import Mixer, Settings, set_rows

Rings = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SlidingWindowSettings(Settings):
    """Heads of dim / n_self_heads channels; `sliding_window` is in tokens, its own one included.

    `n_self_kv_heads` are the heads of keys and values, as many as queries where it is None;
    `self_qkv_bias` says whether the projections to all three add one.
    """

    kind: ClassVar[str] = "sliding_window"
    moves: ClassVar[int] = 1
    relays: ClassVar[bool] = True

    n_self_heads: int
    sliding_window: int
    self_rope_theta: float = 10000.0
    self_rope_endpoint: bool = True
    n_self_kv_heads: int | None = None
    self_qkv_bias: bool = False

    def __post_init__(self) -> None:
        check_count("n_self_heads", self.n_self_heads, 2**16)
        check_count("sliding_window", self.sliding_window, 2**32)
        check_number("self_rope_theta", self.self_rope_theta, 1, 1e30)
        check_flag("self_rope_endpoint", self.self_rope_endpoint)
        check_flag("self_qkv_bias", self.self_qkv_bias)
        if self.n_self_kv_heads is not None:
            check_count("n_self_kv_heads", self.n_self_kv_heads, 2**16)
            check_multiple("n_self_heads", self.n_self_heads, self.n_self_kv_heads)

    def check(self, dim: int) -> None:
        check_multiple("dim", dim, 2 * self.n_self_heads)

    def kv_dim(self, dim: int) -> int:
        """Channels of the keys, and of the values."""
        return (self.n_self_kv_heads or self.n_self_heads) * self.head_dim(dim)

    def head_dim(self, dim: int) -> int:
        return dim // self.n_self_heads

    def build(self, dim: int, eps: float) -> SlidingWindowAttention:
        return SlidingWindowAttention(self, dim, eps)

    def state_bytes(self, dim: int, dtype: torch.dtype) -> int:
        return 2 * (self.sliding_window - 1) * self.kv_dim(dim) * dtype.itemsize

    def activations(self, dim: int, dtype: torch.dtype, fast: bool) -> int:
        numbers = 3 * dim + dim
        if not fast:
            # Rotated, widened and padded copies.
            wide = max(dtype.itemsize, 4) // dtype.itemsize
            numbers += (11 * dim + dim * self.head_dim(dim) // 32) * wide
        else:
            numbers += 3 * dim  # keys and values packed behind those before them; rotated queries
        return numbers

    def shared(self, dim: int) -> int:
        return self.head_dim(dim)

    def relayed(self, dim: int, dtype: torch.dtype, parts: int) -> Traffic:
        # The window before a part, and that after the last one.
        return handed_on(self.state_bytes(dim, dtype)) * 2


class SlidingWindowAttention(Mixer[Tensor]):
    def __init__(self, settings: SlidingWindowSettings, dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = settings.n_self_heads, settings.head_dim(dim), eps
        self.window = settings.sliding_window
        self.rotary = Rotary(self.head_dim, settings.self_rope_theta, settings.self_rope_endpoint)
        self.kv_heads, width = settings.kv_dim(dim) // self.head_dim, settings.kv_dim(dim)
        self.q_proj = linear(dim, dim, settings.self_qkv_bias)
        self.k_proj = linear(dim, width, settings.self_qkv_bias)
        self.v_proj = linear(dim, width, settings.self_qkv_bias)
        self.out_proj = linear(dim, dim)
        self.stack = Stack(self, "q_proj", "k_proj", "v_proj")

    def project(self, x: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim], not rotated."""
        parts = self.stack.split(norm_linear(x, norm, self.stack.weight, self.eps))
        if self.q_proj.bias is not None:
            biases = (self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)
            parts = tuple(map(torch.add, parts, biases))
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)

    def forward(
        self, x: Tensor, norm: Tensor, sequences: Sequences, state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(x, norm)
        angles = self.rotary.of(sequences, x.dtype)
        out, state = sliding_window_attention(q, k, v, self.window, sequences, state, angles, keep)
        return linear_add(out.flatten(-2), self.out_proj.weight, x), state

    def memory(self, size: int, device: torch.device, dtype: torch.dtype) -> Rings:
        shape = (size, self.kv_heads, self.window, self.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return keys, values

    def begin(
        self, memory: Rings, rows: Tensor, state: Tensor | None, lengths: Sequence[int]
    ) -> None:
        if state is not None:  # else no slot is read before it is written
            for part, content in zip(
                memory, rings_from_past(state, lengths).unbind(1), strict=True
            ):
                set_rows(part, rows, content)

    def step(self, x: Tensor, norm: Tensor, step: Step, memory: Rings) -> Tensor:
        q, k, v = self.project(x, norm)
        angles = self.rotary.of(step, x.dtype)
        out = window_step(q, k, v, *memory, step.positions, angles)
        return linear_add(out.flatten(-2), self.out_proj.weight, x)
