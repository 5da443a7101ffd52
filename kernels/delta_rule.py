"""The gated delta rule of gated DeltaNet: recurrent and chunkwise forms of one function.

Per head, with a log-decay g_p <= 0 and a writing strength beta_p in [0, 2] for every token, and
keys of length 1 (Gated Delta Networks, arXiv:2412.06464):

    S_p = exp(g_p) (I - beta_p k_p^T k_p) S_(p-1) + beta_p k_p^T v_p        o_p = q_p S_p

Both forms take a starting state and return the state after the last token, so that a text may be
cut anywhere. They compute in float32, or in float64 for float64 inputs.

Shapes of the forms: q, k [B, H, T, Dk]; v [B, H, T, Dv]; log_decay, beta [B, H, T];
state [B, H, Dk, Dv] (None stands for zeros); outputs [B, H, T, Dv] in v's dtype.

What a layer calls is `gated_delta_rule`, over sequences packed on one token axis, and, for one
token of each, `gated_delta_rule_step`: they also bring q and k to length 1, scale q, take decay and
beta from their logits, normalise and apply the gate. On a GPU both are Triton kernels
(`delta_rule_triton`).

Where beta is near 2 and nothing decays, states are reflected for as long as the text goes on, and
the rounding of half precision's products stays: bfloat16's error grows with the square root of the
length, beyond 1e-2 within a few hundred tokens.

Several heads of v may share one head of q and k: with HV = r H heads of v, head h of v reads head
h // r of q and k.

Float16 inputs are multiplied as float32 ones, as those of gated retention, and for its reasons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, use_triton
from .norm import LENGTH_EPS, rms_norm_reference
from .sequences import Sequences, in_batches


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    states: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    negative: bool = False,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over packed sequences, each with its own starting state.

    Args:
        q, k: [T, H, Dk], v: [T, HV, Dv], views with any row stride. q and k are divided here by
            sqrt(sum of squares + 1e-6) of each head, and q is scaled by Dk^(-1/2).
        a: [T, HV]: g = -exp(a_log) softplus(a + dt_bias), in float32.
        b: [T, HV], the logits of beta.
        a_log, dt_bias: [HV], any floating dtype.
        sequences: which tokens form a sequence, and which state it continues.
        states: [m, HV, Dk, Dv] float32 (float64 for float64 inputs), of which `sequences.sources`
            picks each sequence's; None stands for zeros. Not changed.
        gate: [T, HV, Dv], only with `weight`: the output is also multiplied by silu(gate).
        weight: [Dv]: the output is RMSNorm(o) over each head, times the weight; None: o itself.
        eps: of that RMSNorm.
        negative: beta is 2 sigmoid(b) instead of sigmoid(b), so that the transition may have
            negative eigenvalues (arXiv:2411.12537).
        keep: whether the states after the sequences are asked for.

    Returns:
        The output [T, HV, Dv] in q's dtype, contiguous; and the state after each of the n
        sequences, [n, HV, Dk, Dv] in float32 (float64 for float64 inputs), or None unless `keep`.
    """
    args = (a, b, a_log, dt_bias, sequences, states, gate, weight, eps, negative, keep)
    if use_triton(q, k, v, a, b, a_log, dt_bias):
        from .delta_rule_triton import gated_delta_rule as fast

        dtype = q.dtype
        if dtype == torch.float16:
            q, k, v = (x.float() for x in (q, k, v))
        out, last = run_triton(fast, q, k, v, *args)
        out = out.to(dtype)
    else:
        out, last = gated_delta_rule_reference(q, k, v, *args)
    relay = sequences.relay
    return out, last if relay is None or last is None else relay.after(last)


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    states: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    negative: bool = False,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` in PyTorch, on any device and differentiable."""
    inputs = (*_unit(q, k, v.shape[1]), _wide(v), *_gates(a, b, a_log, dt_bias, negative))
    if sequences.relay is not None:
        _, wide_k, wide_v, *_ = inputs
        state = wide_k.new_zeros(*wide_v.shape[1:2], wide_k.shape[2], wide_v.shape[2])
        state = state if states is None else states[0]
        states = sequences.relay.transformed(state, lambda: _effect(*inputs[1:]))[None]
    out, last = in_batches(_batch, sequences, states, inputs)
    return _norm_gate(out, gate, weight, eps).to(q.dtype), last if keep else None


def _effect(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens do to the state before them, of k, v [T, HV, ..] and log_decay, beta [T, HV]: the
    transition [HV, Dk, Dk], and what is added, [HV, Dk, Dv].

    Columns of a state do not mix. Those of the unit matrix, to which nothing is written, become the
    transition.
    """
    heads, key_dim, value_dim = *k.shape[1:], v.shape[2]
    state = k.new_zeros(heads, key_dim, key_dim + value_dim)
    state[:, :, :key_dim] = torch.eye(key_dim, dtype=k.dtype, device=k.device)
    v = torch.cat((v.new_zeros(k.shape), v), 2)
    k, v, log_decay, beta = (x.transpose(0, 1)[None] for x in (k, v, log_decay, beta))
    _, last = delta_rule_chunkwise(k, k, v, log_decay, beta, state[None])
    return last[0, :, :, :key_dim], last[0, :, :, key_dim:]


def _batch(
    states: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """[n, T, HV, ..] each -> [n, T, HV, Dv] and the states after them."""
    form = delta_rule_recurrent if q.shape[1] == 1 else delta_rule_chunkwise
    q, k, v, log_decay, beta = (x.transpose(1, 2) for x in (q, k, v, log_decay, beta))
    out, states = form(q, k, v, log_decay, beta, states)
    return out.transpose(1, 2).contiguous(), states


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    negative: bool = False,
) -> Tensor:
    """The gated delta rule for one token of each of B sequences, as decoding asks for it.

    Args:
        q, k: [B, H, Dk], v, gate: [B, HV, Dv], a, b: [B, HV], and the others: as in
            `gated_delta_rule`.
        state: [B, HV, Dk, Dv] float32 (float64 for float64 inputs), contiguous, CHANGED IN PLACE
            to the states after the tokens.

    Returns:
        The output, [B, HV, Dv] in q's dtype.
    """
    args = (a, b, a_log, dt_bias, state, gate, weight, eps, negative)
    if use_triton(q, k, v, a, b, a_log, dt_bias):
        from .delta_rule_triton import gated_delta_rule_step as fast

        return run_triton(fast, q, k, v, *args)
    return gated_delta_rule_step_reference(q, k, v, *args)


def gated_delta_rule_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    negative: bool = False,
) -> Tensor:
    """`gated_delta_rule_step` in PyTorch."""
    dtype = q.dtype
    q, k = _unit(q, k, v.shape[1])
    log_decay, beta = _gates(a, b, a_log, dt_bias, negative)
    state.copy_(_advance(state, k, _wide(v), log_decay, beta))
    out = (q[..., None, :] @ state).squeeze(-2)
    return _norm_gate(out, gate, weight, eps).to(dtype)


def _unit(q: Tensor, k: Tensor, value_heads: int) -> tuple[Tensor, Tensor]:
    """q and k of length 1, q scaled, repeated for the heads of v, in float32 or float64."""
    repeats = value_heads // q.shape[-2]
    q, k = (
        x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS) for x in (_wide(q), _wide(k))
    )
    q = q * q.shape[-1] ** -0.5
    return q.repeat_interleave(repeats, -2), k.repeat_interleave(repeats, -2)


def _gates(
    a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, negative: bool
) -> tuple[Tensor, Tensor]:
    """Log-decay and beta, of a's shape, in float32 (float64 stays float64)."""
    a = _wide(a)
    log_decay = -a_log.to(a.dtype).exp() * F.softplus(a + dt_bias.to(a.dtype))
    beta = torch.sigmoid(_wide(b))
    return log_decay, 2 * beta if negative else beta


def _norm_gate(out: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm(out) * weight * silu(gate), as far as they are given; not rounded in between."""
    if weight is not None:
        out = rms_norm_reference(out, weight.to(out.dtype), eps)
    return out if gate is None else out * F.silu(gate.to(out.dtype))


def delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written above, token by token; what a decoding step runs."""
    dtype = v.dtype
    q, k, v, log_decay, beta = (_wide(x) for x in (q, k, v, log_decay, beta))
    state = _initial(state, k, v)
    outputs = []
    for p in range(q.shape[-2]):
        state = _advance(state, k[:, :, p], v[:, :, p], log_decay[:, :, p], beta[:, :, p])
        outputs.append((q[:, :, p, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=-2).to(dtype), state


def _advance(state: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The state after one more token; the state is asked for what k recalls before it is told v."""
    state = state * log_decay.exp()[..., None, None]
    recalled = (k[..., None, :] @ state).squeeze(-2)
    return state + k[..., :, None] * (beta[..., None] * (v - recalled))[..., None, :]


def delta_rule_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Triangular systems inside each chunk, the state from chunk to chunk.

    With G the sum of the log-decays from the chunk's start, inclusive, the state after token i of a
    chunk is exp(G_i) S + sum over j <= i of exp(G_i - G_j) k_j^T d_j, S the state before the chunk.
    What the delta rule writes, d, solves

        d_i + beta_i sum over j < i of exp(G_i - G_j) (k_i k_j^T) d_j
            = beta_i v_i - beta_i exp(G_i) k_i S

    a unit lower triangular system, which all chunks solve at once for both terms on the right; only
    the products with S go from chunk to chunk.
    """
    dtype, length = v.dtype, q.shape[-2]
    q, k, v, log_decay, beta = (_wide(x) for x in (q, k, v, log_decay, beta))
    state = _initial(state, k, v)
    chunk_size = min(chunk_size, length)
    padding = -length % chunk_size
    if padding:  # a token with k = v = 0 and g = 0 leaves the state as it is
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        log_decay, beta = (F.pad(x, (0, padding)) for x in (log_decay, beta))
    q, k, v, log_decay, beta = (
        x.unflatten(2, (-1, chunk_size)) for x in (q, k, v, log_decay, beta)
    )

    inside = log_decay.cumsum(-1)  # [B, H, C, T']
    reach = inside.exp()[..., None]
    beta = beta[..., None]
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).triu(1)
    decay = (inside[..., :, None] - inside[..., None, :]).masked_fill(later, float("-inf")).exp()
    system = (beta * (k @ k.transpose(-1, -2)) * decay).tril(-1)
    right = torch.cat([beta * v, beta * reach * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, recalls = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.transpose(-1, -2)) * decay
    from_state = q * reach
    to_state = (k * (inside[..., -1:] - inside).exp()[..., None]).transpose(-1, -2)
    whole = inside[..., -1, None, None].exp()

    outputs = []
    for c in range(q.shape[2]):
        written = values[:, :, c] - recalls[:, :, c] @ state
        outputs.append(from_state[:, :, c] @ state + scores[:, :, c] @ written)
        state = whole[:, :, c] * state + to_state[:, :, c] @ written
    return torch.cat(outputs, dim=2)[:, :, :length].to(dtype), state


def _initial(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else _wide(state)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
