"""Gated retention: a decaying sum of outer products as the state, with a gate for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from yoco_eval.kernels.fused_linear import rotary_linear
from yoco_eval.kernels.matvec import linear_add, norm_linear
from yoco_eval.kernels.norm import rms_norm
from yoco_eval.kernels.retention import (
    GATE_TEMPERATURE,
    gated_retention,
    gated_retention_step,
)
from yoco_eval.kernels.sequences import Sequences, Step

from ..checks import check_count, check_flag, check_multiple, check_number
from ..linear import Stack, linear
from ..rotary import Rotary
from ..traffic import Traffic, gathered, handed_on
from .contract import Mixer, Settings


@dataclass(frozen=True)
class RetentionHeads(Settings):
    """What both kinds of retention state: heads of dim / n_self_heads channels, and their rotary
    embedding."""

    relays: ClassVar[bool] = True

    n_self_heads: int
    self_rope_theta: float = 10000.0
    self_rope_endpoint: bool = True

    def __post_init__(self) -> None:
        check_count("n_self_heads", self.n_self_heads, 2**16)
        check_number("self_rope_theta", self.self_rope_theta, 1, 1e30)
        check_flag("self_rope_endpoint", self.self_rope_endpoint)

    def check(self, dim: int) -> None:
        check_multiple("dim", dim, 2 * self.n_self_heads)

    def head_dim(self, dim: int) -> int:
        return dim // self.n_self_heads

    def state_bytes(self, dim: int, dtype: torch.dtype) -> int:
        return dim * self.head_dim(dim) * max(dtype.itemsize, 4)

    def activations(self, dim: int, dtype: torch.dtype, fast: bool) -> int:
        # The norm's output before, the projections, the mixer's output after them.
        numbers = 4 * dim + self.n_self_heads + dim
        if not fast:
            # Rotated, widened and padded copies, and the states between chunks of 64 tokens.
            wide = max(dtype.itemsize, 4) // dtype.itemsize
            numbers += (11 * dim + dim * self.head_dim(dim) // 32) * wide
        elif dtype == torch.float16:
            numbers += 8 * dim  # retention runs in float32
        return numbers

    def shared(self, dim: int) -> int:
        return self.head_dim(dim)

    def relayed(self, dim: int, dtype: torch.dtype, parts: int) -> Traffic:
        # What each part adds to the state and how it decays; and the state after the last one.
        state = self.state_bytes(dim, dtype)
        decays = self.n_self_heads * max(dtype.itemsize, 4)
        return gathered(state + decays, parts) + handed_on(state)


@dataclass(frozen=True)
class GatedRetentionSettings(RetentionHeads):
    """YOCO, arXiv:2405.05254, section 3.1. `gate_temperature` divides the gates' logarithms."""

    kind: ClassVar[str] = "gated_retention"

    gate_temperature: float = GATE_TEMPERATURE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gate_temperature", self.gate_temperature, 1e-3, 1e6)

    def build(self, dim: int, eps: float) -> GatedRetention:
        return GatedRetention(self, dim, eps, self.gate_temperature)


class GatedRetention(Mixer[Tensor]):
    def __init__(
        self,
        settings: RetentionHeads,
        dim: int,
        eps: float,
        temperature: float = GATE_TEMPERATURE,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = settings.n_self_heads, settings.head_dim(dim), eps
        self.temperature = temperature
        self.rotary = Rotary(self.head_dim, settings.self_rope_theta, settings.self_rope_endpoint)
        self.q_proj = linear(dim, dim)
        self.k_proj = linear(dim, dim)
        self.v_proj = linear(dim, dim)
        self.g_proj = linear(dim, dim)
        self.gt_proj = linear(dim, self.heads)
        self.out_proj = linear(dim, dim)
        # First what is rotated.
        self.stack = Stack(self, "q_proj", "k_proj", "v_proj", "g_proj", "gt_proj")

    def forward(
        self, x: Tensor, norm: Tensor, sequences: Sequences, state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        rotated, rest = rotary_linear(
            rms_norm(x, norm, self.eps),
            self.stack.weight,
            self.rotary.of(sequences, x.dtype),
            2 * self.heads * self.head_dim,
        )
        q, k = rotated.chunk(2, dim=1)
        (v, swish), gate = self._cut(rest, first=2)
        out, state = gated_retention(
            q, k, v, gate, sequences, state, swish, self.eps, keep, self.temperature
        )
        return linear_add(out.flatten(-2), self.out_proj.weight, x), state

    def memory(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (size, self.heads, self.head_dim, self.head_dim)
        return torch.zeros(shape, dtype=wide, device=device)

    def step(self, x: Tensor, norm: Tensor, step: Step, memory: Tensor) -> Tensor:
        (q, k, v, swish), gate = self._cut(norm_linear(x, norm, self.stack.weight, self.eps))
        angles = self.rotary.of(step, x.dtype)
        out = gated_retention_step(q, k, v, gate, memory, angles, swish, self.eps, self.temperature)
        return linear_add(out.flatten(-2), self.out_proj.weight, x)

    def _cut(self, y: Tensor, first: int = 0) -> tuple[list[Tensor], Tensor]:
        """Of the projections' output from the `first` one on, heads [T, H, D], and gates [T, H]."""
        *parts, gate = self.stack.split(y, first)
        return [self._heads(part) for part in parts], gate

    def _heads(self, part: Tensor) -> Tensor:
        return part.unflatten(-1, (self.heads, self.head_dim))
