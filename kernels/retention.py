"""Gated retention: parallel, recurrent and chunkwise forms of one function.

Per head, with a scalar log-gate a_p <= 0, finite, for every token (YOCO, arXiv:2405.05254, section
3.1):

    S_p = exp(a_p) S_(p-1) + k_p^T v_p        o_p = q_p S_p

All three forms take a starting state and return the state after the last token, so that a text
may be cut anywhere. They compute in float32, or in float64 for float64 inputs.

Shapes of the three forms: q, k [B, H, T, Dk]; v [B, H, T, Dv]; log_gate [B, H, T];
state [B, H, Dk, Dv] (None stands for zeros); outputs [B, H, T, Dv] in v's dtype.

What a layer calls is `gated_retention`, over sequences packed on one token axis, and, for one token
of each, `gated_retention_step`: they also scale, take the gate's logarithm, normalise and apply the
swish gate, and the step rotates. On a GPU both are Triton kernels (`retention_triton`).

Scores, states and sums may exceed float16's range. Float16 inputs are therefore multiplied as
float32 ones, on a GPU without its tensor cores: their prefill is slower than bfloat16's. An output
asked for without the norm may still be infinite in float16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, use_triton
from .norm import rms_norm_reference
from .rotary import rotate
from .sequences import Sequences, in_batches

GATE_TEMPERATURE = 16.0  # YOCO's


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    sequences: Sequences,
    states: Tensor | None = None,
    swish: Tensor | None = None,
    eps: float = 1e-5,
    keep: bool = True,
    temperature: float = GATE_TEMPERATURE,
) -> tuple[Tensor, Tensor | None]:
    """Gated retention of packed sequences, each with its own starting state.

    Args:
        q, k, v: [T, H, D], views with any row stride. q and k come rotated; k is scaled by
            D^(-1/2) here.
        gate: [T, H], the gates' logits: a = logsigmoid(gate) / temperature, in float32. A view with
            any row stride, in q's dtype or float32: [H] expanded to [T, H] is one decay gamma for
            all tokens, gate = logit(gamma^temperature), as in RetNet's retention
            (arXiv:2307.08621).
        sequences: which tokens form a sequence, and which state it continues.
        states: [m, H, D, D] float32 (float64 for float64 inputs), of which `sequences.sources`
            picks each sequence's; None stands for zeros. Not changed.
        swish: [T, H, D]: the output is silu(swish) * RMSNorm(o) over each head; None: o itself.
        eps: of that RMSNorm, which has no weight.
        keep: whether the states after the sequences are asked for.
        temperature: of the gates, above 0.

    Returns:
        The output [T, H, D] in q's dtype, contiguous; and the state after each of the n sequences,
        [n, H, D, D] in float32 (float64 for float64 inputs), or None unless `keep`.
    """
    if use_triton(q, k, v, gate):
        from .retention_triton import gated_retention as fast

        dtype = q.dtype
        if dtype == torch.float16:
            q, k, v = q.float(), k.float(), v.float()
            swish = None if swish is None else swish.float()
        out, last = run_triton(
            fast, q, k, v, gate, sequences, states, swish, eps, keep, temperature
        )
        out = out.to(dtype)
    else:
        out, last = gated_retention_reference(
            q, k, v, gate, sequences, states, swish, eps, keep, temperature
        )
    relay = sequences.relay
    return out, last if relay is None or last is None else relay.after(last)


def gated_retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    sequences: Sequences,
    states: Tensor | None = None,
    swish: Tensor | None = None,
    eps: float = 1e-5,
    keep: bool = True,
    temperature: float = GATE_TEMPERATURE,
) -> tuple[Tensor, Tensor | None]:
    """`gated_retention` in PyTorch, on any device and differentiable."""
    k = _wide(k) * q.shape[-1] ** -0.5
    inputs = (q, k, _wide(v), _log_gate(gate, q.dtype, temperature))
    if sequences.relay is not None:
        state = k.new_zeros(*k.shape[1:], k.shape[2]) if states is None else states[0]
        states = sequences.relay.decayed(state, lambda: _effect(*inputs[1:]))[None]
    out, last = in_batches(_retain_batch, sequences, states, inputs)
    out = out.to(q.dtype) if swish is None else _norm_swish(out, swish, eps)
    return out, last if keep else None


def _effect(k: Tensor, v: Tensor, log_gate: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens do to the state before them, of k, v [T, H, D] and log_gate [T, H]: the logarithm
    of what it is multiplied by, [H], and what is added, [H, D, D]."""
    ends = log_gate.double().cumsum(0)
    kept = (ends[-1] - ends).exp().to(k.dtype)
    added = (k * kept[..., None]).permute(1, 2, 0) @ v.transpose(0, 1)
    return ends[-1].to(k.dtype), added


def _retain_batch(
    states: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """[n, T, H, D] each, log_gate [n, T, H] -> [n, T, H, D] and the states after them."""
    retention = retention_recurrent if q.shape[1] == 1 else retention_chunkwise
    q, k, v, log_gate = (x.transpose(1, 2) for x in (q, k, v, log_gate))
    out, states = retention(q, k, v, log_gate, states)
    return out.transpose(1, 2).contiguous(), states


def gated_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    state: Tensor,
    angles: tuple[Tensor, Tensor],
    swish: Tensor,
    eps: float = 1e-5,
    temperature: float = GATE_TEMPERATURE,
) -> Tensor:
    """Gated retention of one token of each of B sequences, as decoding asks for it.

    Args:
        q, k, v, swish: [B, H, D]; gate: [B, H]; as in `gated_retention`, but q and k are not
            rotated yet.
        state: [B, H, D, D] float32 (float64 for float64 inputs), contiguous, CHANGED IN PLACE to
            the states after the tokens.
        angles: cos and sin [B, D / 2] of `rotary_angles`, in q's dtype.
        eps: of the RMSNorm.
        temperature: of the gates.

    Returns:
        silu(swish) * RMSNorm(o), [B, H, D] in q's dtype.
    """
    if use_triton(q, k, v, gate):
        from .retention_triton import gated_retention_step as fast

        return run_triton(fast, q, k, v, gate, state, angles, swish, eps, temperature)
    return gated_retention_step_reference(q, k, v, gate, state, angles, swish, eps, temperature)


def gated_retention_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    state: Tensor,
    angles: tuple[Tensor, Tensor],
    swish: Tensor,
    eps: float = 1e-5,
    temperature: float = GATE_TEMPERATURE,
) -> Tensor:
    """`gated_retention_step` in PyTorch."""
    q, k = rotate(q, angles), rotate(k, angles)
    k = _wide(k) * q.shape[-1] ** -0.5
    state *= _log_gate(gate, q.dtype, temperature).exp()[..., None, None]
    state += k[..., :, None] * _wide(v)[..., None, :]
    out = (_wide(q)[..., None, :] @ state).squeeze(-2)
    return _norm_swish(out, swish, eps)


def _norm_swish(out: Tensor, swish: Tensor, eps: float) -> Tensor:
    """silu(swish) * RMSNorm(out), in swish's dtype; out is not rounded to it before the norm."""
    return F.silu(swish) * rms_norm_reference(out, eps=eps).to(swish.dtype)


def retention_log_gate(gate: Tensor, temperature: float = GATE_TEMPERATURE) -> Tensor:
    """a = logsigmoid(gate) / temperature, of the same shape, in float32 (float64 stays float64)."""
    return F.logsigmoid(_wide(gate)) / temperature


def _log_gate(gate: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """`retention_log_gate`, in float64 for inputs of that dtype, whatever the gate's is."""
    return retention_log_gate(gate.to(torch.promote_types(gate.dtype, dtype)), temperature)


def retention_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The decay-matrix form: O(T^2) work, no recurrence."""
    return retention_chunkwise(q, k, v, log_gate, state, chunk_size=q.shape[-2])


def retention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written above, token by token; what a decoding step runs."""
    dtype = v.dtype
    q, k, v, log_gate = _wide(q), _wide(k), _wide(v), _wide(log_gate)
    state = _initial(state, k, v)
    outputs = []
    for p in range(q.shape[-2]):
        update = k[..., p, :, None] * v[..., p, None, :]
        state = log_gate[..., p, None, None].exp() * state + update
        outputs.append((q[..., p, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=-2).to(dtype), state


def retention_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    state: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Decay matrix inside each chunk, states between chunks as one more matrix product.

    The states before all C = T / chunk_size chunks come from the chunks' own sums through a
    [C + 1, C] decay matrix, so nothing loops over tokens or chunks. Of T = 1M tokens, both kinds
    of matrices take the least memory together with chunks of 128, the default there.
    """
    dtype, length = v.dtype, q.shape[-2]
    chunk_size = chunk_size or (64 if length <= 1 << 18 else 128)
    q, k, v, log_gate = _wide(q), _wide(k), _wide(v), _wide(log_gate)
    state = _initial(state, k, v)
    chunk_size = min(chunk_size, length)
    padding = -length % chunk_size
    if padding:  # a token with k = v = 0 and a = 0 leaves the state as it is
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        log_gate = F.pad(log_gate, (0, padding))
    q, k, v, log_gate = (x.unflatten(2, (-1, chunk_size)) for x in (q, k, v, log_gate))

    inside = log_gate.cumsum(-1)  # [B, H, C, T'], decay from the chunk's start, inclusive
    whole = inside[..., -1]  # [B, H, C]
    scores = (q @ k.transpose(-1, -2)) * _decay(inside, inside, diagonal=0)
    out = scores @ v

    sums = (k * (whole[..., None] - inside).exp()[..., None]).transpose(-1, -2) @ v
    ends = whole.double().cumsum(-1)  # long sums, of which only differences matter
    starts = F.pad(ends, (1, 0))  # [B, H, C + 1]; the last one is the end of the text
    states = _decay(starts, ends, diagonal=-1).to(sums.dtype) @ sums.flatten(-2)
    states = states.unflatten(-1, state.shape[-2:])
    states = states + starts.exp().to(sums.dtype)[..., None, None] * state[:, :, None]
    out = out + (q * inside.exp()[..., None]) @ states[:, :, :-1]
    return out.flatten(2, 3)[:, :, :length].to(dtype), states[:, :, -1]


def _decay(to: Tensor, since: Tensor, diagonal: int) -> Tensor:
    """exp(to_i - since_j) where j <= i + diagonal, else 0; the exponents there are <= 0."""
    difference = to[..., :, None] - since[..., None, :]
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=to.device).triu(diagonal + 1)
    return difference.masked_fill(later, float("-inf")).exp()


def _initial(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else _wide(state)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
