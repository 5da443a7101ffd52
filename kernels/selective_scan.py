"""Mamba's selective scan: states whose decay each token chooses, channel by channel.

Each of E channels has N states. With a time step dt_p > 0 for every token and channel, rates a < 0
for every state, and weights b_p, c_p that all channels share (Mamba, arXiv:2312.00752, algorithm 2
with the discretisation of its code):

    s_p = exp(dt_p a) s_(p-1) + dt_p x_p b_p        y_p = sum over n of c_p s_p + d x_p

What a layer calls is `selective_scan`, over sequences packed on one token axis, and, for one token
of each, `selective_scan_step`: they also make the time steps of their logits, add the skip d x, and
multiply by the gate. They compute in float32, or in float64 for float64 inputs: in half precision a
decay near 1 would be 1. On a GPU both are Triton kernels (`selective_scan_triton`).

States are [N, E], the channels side by side, as the kernels read them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, use_triton
from .sequences import Sequences, in_batches


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    states: Tensor | None = None,
    gate: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The selective scan over packed sequences, each with its own starting state.

    Args:
        x: [T, E], a view with any row stride, as are dt, b, c and the gate.
        dt: [T, E], logits of the time steps, which are softplus(dt + dt_bias).
        a: [N, E], negative; it, d and dt_bias float32 (float64 for float64 inputs).
        b, c: [T, N].
        d, dt_bias: [E].
        sequences: which tokens form a sequence, and which state it continues.
        states: [m, N, E] float32 (float64 for float64 inputs), of which `sequences.sources` picks
            each sequence's; None stands for zeros. Not changed.
        gate: [T, E]: the output is y * silu(gate); None: y itself.
        keep: whether the states after the sequences are asked for.

    Returns:
        The output [T, E] in x's dtype, contiguous; and the state after each of the n sequences,
        [n, N, E] in float32 (float64 for float64 inputs), in new memory, or None unless `keep`.
    """
    if use_triton(x, dt, a, b, c, d, dt_bias):
        from .selective_scan_triton import selective_scan as fast

        return run_triton(fast, x, dt, a, b, c, d, dt_bias, sequences, states, gate, keep)
    return selective_scan_reference(x, dt, a, b, c, d, dt_bias, sequences, states, gate, keep)


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    states: Tensor | None = None,
    gate: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`selective_scan` in PyTorch, token by token, on any device and differentiable."""

    def scan(state: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if state is None:
            state = a.new_zeros(len(inputs[0]), *a.shape)
        outputs = []
        for token in zip(*(part.unbind(1) for part in inputs), strict=True):
            y, state = _advance(state, a, *token)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    wide = _wide(x)
    y, last = in_batches(scan, sequences, states, (wide, _steps(dt, dt_bias), _wide(b), _wide(c)))
    return _finished(y, wide, d, gate).to(x.dtype), last if keep else None


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
) -> Tensor:
    """The selective scan of one token of each of B sequences, as decoding asks for it.

    Args:
        x, dt, gate: [B, E], b, c: [B, N], and a, d, dt_bias: as in `selective_scan`.
        state: [B, N, E] float32 (float64 for float64 inputs), contiguous, CHANGED IN PLACE to the
            states after the tokens.

    Returns:
        y, or y * silu(gate), [B, E] in x's dtype, contiguous.
    """
    if use_triton(x, dt, a, b, c, d, dt_bias):
        from .selective_scan_triton import selective_scan_step as fast

        return run_triton(fast, x, dt, a, b, c, d, dt_bias, state, gate)
    return selective_scan_step_reference(x, dt, a, b, c, d, dt_bias, state, gate)


def selective_scan_step_reference(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
) -> Tensor:
    """`selective_scan_step` in PyTorch."""
    wide = _wide(x)
    y, after = _advance(state, a, wide, _steps(dt, dt_bias), _wide(b), _wide(c))
    state.copy_(after)
    return _finished(y, wide, d, gate).to(x.dtype)


def _advance(
    state: Tensor, a: Tensor, x: Tensor, step: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of each of n sequences: y [n, E] without the skip, and their states [n, N, E]."""
    state = (step[:, None] * a).exp() * state + (step * x)[:, None] * b[..., None]
    return (c[:, None] @ state)[:, 0], state


def _steps(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """log(1 + exp(dt + dt_bias)), to full relative precision however small or large."""
    return torch.logaddexp(_wide(dt) + dt_bias, dt_bias.new_zeros(()))


def _finished(y: Tensor, x: Tensor, d: Tensor, gate: Tensor | None) -> Tensor:
    y = y + d * x
    return y if gate is None else y * F.silu(_wide(gate))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
