"""Gated DeltaNet: a decaying state that unlearns what a key stood for before it learns a new value.

Gated Delta Networks, arXiv:2412.06464. Queries, keys and values pass a short convolution first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_eval.kernels.delta_rule import gated_delta_rule, gated_delta_rule_step
from yoco_eval.kernels.matvec import linear_add, norm_linear
from yoco_eval.kernels.sequences import Sequences, Step
from yoco_eval.kernels.short_convolution import short_convolution, short_convolution_step

from ..checks import check_count, check_flag, check_multiple
from ..layers import RMSNorm
from ..linear import Stack, linear
from ..traffic import Traffic, gathered, handed_on
from .contract import Mixer, Settings

State = tuple[Tensor, Tensor]  # of the delta rule, and the convolution's tail
# Programs that the kernels are cut into, two for each multiprocessor of the largest cards, with so
# many channels of the values each.
_PROGRAMS, _TILE = 300, 128


@dataclass(frozen=True)
class GatedDeltaNetSettings(Settings):
    """Sizes of a layer's heads, and its options.

    Attributes:
        n_self_heads: of queries and keys, with `self_key_dim` channels each.
        n_self_value_heads: of values, states and outputs, with `self_value_dim` channels each; a
            multiple of the former.
        convolution: tokens that the short convolution weighs, its own one included; None: there is
            none.
        output_gate: whether the output is gated.
        negative_eigenvalues: whether the state's transition may have some (arXiv:2411.12537).
    """

    kind: ClassVar[str] = "gated_deltanet"
    relays: ClassVar[bool] = True

    n_self_heads: int
    n_self_value_heads: int
    self_key_dim: int
    self_value_dim: int
    convolution: int | None = 4
    output_gate: bool = True
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        for name in ("n_self_heads", "n_self_value_heads", "self_key_dim", "self_value_dim"):
            check_count(name, getattr(self, name), 2**16)
        if self.convolution is not None:
            check_count("convolution", self.convolution, 64)
            if self.convolution == 1:
                raise ValueError("convolution must be at least 2, not 1")
        for name in ("output_gate", "negative_eigenvalues"):
            check_flag(name, getattr(self, name))
        check_multiple("n_self_value_heads", self.n_self_value_heads, self.n_self_heads)

    @property
    def keys(self) -> int:
        """Channels of all heads' keys, and of the queries."""
        return self.n_self_heads * self.self_key_dim

    @property
    def values(self) -> int:
        """Channels of all heads' values."""
        return self.n_self_value_heads * self.self_value_dim

    def build(self, dim: int, eps: float) -> GatedDeltaNet:
        return GatedDeltaNet(self, dim, eps)

    def state_bytes(self, dim: int, dtype: torch.dtype) -> int:
        return self._rule_bytes(dtype) + self._tail_bytes(dtype)

    def _rule_bytes(self, dtype: torch.dtype) -> int:
        return self.values * self.self_key_dim * max(dtype.itemsize, 4)

    def _tail_bytes(self, dtype: torch.dtype) -> int:
        return (2 * self.keys + self.values) * ((self.convolution or 1) - 1) * dtype.itemsize

    def activations(self, dim: int, dtype: torch.dtype, fast: bool) -> int:
        wide, heads = max(dtype.itemsize, 4) // dtype.itemsize, self.n_self_value_heads
        mixed = 2 * self.keys + self.values
        # The norm's output, the projections, what the convolution makes of them, the output.
        numbers = dim + 2 * mixed + (2 if self.output_gate else 1) * self.values
        # Of each chunk of 64 tokens the scores, the inverse in two parts, factors of the tokens.
        numbers += heads * (192 + 16 // dtype.itemsize)
        if fast and dtype == torch.float16:
            numbers += 2 * (mixed + 2 * self.values)  # the rule runs in float32
        if not fast:
            # Widened, normalised and repeated copies, the chunks' systems of equations, and the
            # states between chunks.
            numbers += (8 * heads * self.self_key_dim + 8 * self.values + 256 * heads) * wide
            numbers += 3 * self.values * self.self_key_dim // 64 * wide
        return numbers

    def relayed(self, dim: int, dtype: torch.dtype, parts: int) -> Traffic:
        # Each part's transition of the state and what it adds, and the state after the last one.
        state = self._rule_bytes(dtype)
        transitions = state // self.self_value_dim * self.self_key_dim
        rule = gathered(transitions + state, parts) + handed_on(state)
        return rule + handed_on(self._tail_bytes(dtype)) * (0 if self.convolution is None else 2)

    def workspace_bytes(self, dim: int, fast: bool) -> int:
        """Of segments that fill the card, the states after them and their transitions."""
        tiles = -(-self.self_value_dim // _TILE)
        segments = -(-_PROGRAMS // tiles) if fast else 0
        return segments * 4 * self.self_key_dim * (self.self_key_dim + self.self_value_dim)


class GatedDeltaNet(Mixer[State]):
    def __init__(self, settings: GatedDeltaNetSettings, dim: int, eps: float) -> None:
        super().__init__()
        self.settings, self.eps = settings, eps
        keys, values, heads = settings.keys, settings.values, settings.n_self_value_heads
        self.q_proj = linear(dim, keys)
        self.k_proj = linear(dim, keys)
        self.v_proj = linear(dim, values)
        names = ["q_proj", "k_proj", "v_proj"]
        if settings.output_gate:
            self.g_proj = linear(dim, values)
            names.append("g_proj")
        self.a_proj = linear(dim, heads)
        self.b_proj = linear(dim, heads)
        self.out_proj = linear(values, dim)
        self.stack = Stack(self, *names, "a_proj", "b_proj")
        self.a_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.out_norm = RMSNorm(settings.self_value_dim)
        if settings.convolution:
            # [taps, channels of queries, keys and values], as the kernel reads them; made so that
            # nothing is convolved.
            taps = torch.zeros(settings.convolution, 2 * keys + values)
            taps[-1] = 1
            self.convolution = nn.Parameter(taps)

    def draw(self, generator: torch.Generator) -> None:
        """As flash-linear-attention does: per token, exp(a_log) is uniform in 0 to 16, and softplus
        of dt_bias log-uniform in 0.001 to 0.1. States last for a few up to thousands of tokens."""
        self.a_log.uniform_(1e-3, 16, generator=generator).log_()
        low, high = math.log(1e-3), math.log(0.1)
        steps = self.dt_bias.float().uniform_(low, high, generator=generator).exp()
        self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus undone

    def forward(
        self, x: Tensor, norm: Tensor, sequences: Sequences, state: State | None, keep: bool
    ) -> tuple[Tensor, State | None]:
        before, tails = state or (None, None)
        mixed, gate, a, b = self._project(x, norm)
        if self.settings.convolution:
            mixed, tails = short_convolution(mixed, self.convolution.T, sequences, tails, keep)
        else:
            mixed = F.silu(mixed)
            tails = mixed.new_empty(len(sequences.lengths), 0, mixed.shape[1])
        q, k, v, a, b, gate = self._heads(mixed, gate, a, b)
        out, after = gated_delta_rule(
            q, k, v, a, b, self.a_log, self.dt_bias, sequences, before, gate,
            self.out_norm.weight, self.eps, self.settings.negative_eigenvalues, keep,
        )  # fmt: skip
        x = linear_add(out.flatten(-2), self.out_proj.weight, x)
        return x, None if after is None or tails is None else (after, tails)

    def memory(self, size: int, device: torch.device, dtype: torch.dtype) -> State:
        settings = self.settings
        wide = torch.promote_types(dtype, torch.float32)
        shape = (size, settings.n_self_value_heads, settings.self_key_dim, settings.self_value_dim)
        tail = (size, (settings.convolution or 1) - 1, 2 * settings.keys + settings.values)
        return (
            torch.zeros(shape, dtype=wide, device=device),
            torch.zeros(tail, dtype=dtype, device=device),
        )

    def step(self, x: Tensor, norm: Tensor, step: Step, memory: State) -> Tensor:
        state, tail = memory
        mixed, gate, a, b = self._project(x, norm)
        if self.settings.convolution:
            mixed = short_convolution_step(mixed, self.convolution.T, tail)
        else:
            mixed = F.silu(mixed)
        q, k, v, a, b, gate = self._heads(mixed, gate, a, b)
        out = gated_delta_rule_step(
            q, k, v, a, b, self.a_log, self.dt_bias, state, gate,
            self.out_norm.weight, self.eps, self.settings.negative_eigenvalues,
        )  # fmt: skip
        return linear_add(out.flatten(-2), self.out_proj.weight, x)

    def _project(self, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Queries, keys and values [T, channels] side by side; gate, a and b."""
        y = norm_linear(x, norm, self.stack.weight, self.eps)
        *_, a, b = parts = self.stack.split(y)
        gate = parts[3] if self.settings.output_gate else None
        return y[:, : 2 * self.settings.keys + self.settings.values], gate, a, b

    def _heads(
        self, mixed: Tensor, gate: Tensor | None, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [T, heads, channels], a, b [T, value heads], and the gate, shaped as v."""
        settings = self.settings
        q, k, v = mixed.split((settings.keys, settings.keys, settings.values), dim=1)
        q, k = (part.unflatten(1, (-1, settings.self_key_dim)) for part in (q, k))
        shape = (-1, settings.self_value_dim)
        return q, k, v.unflatten(1, shape), a, b, gate if gate is None else gate.unflatten(1, shape)
