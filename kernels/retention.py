"""Gated retention: parallel, recurrent and chunkwise forms of one function.

Per head, with a scalar log-gate a_p <= 0 for every token (YOCO, arXiv:2405.05254, section 3.1):

    S_p = exp(a_p) S_(p-1) + k_p^T v_p        o_p = q_p S_p

All three forms take a starting state and return the state after the last token, so that a text
may be cut anywhere. They compute in float32, or in float64 for float64 inputs.

Shapes, here and below: q, k [B, H, T, Dk]; v [B, H, T, Dv]; log_gate [B, H, T];
state [B, H, Dk, Dv] (None stands for zeros); outputs [B, H, T, Dv] in v's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GATE_TEMPERATURE = 16.0


def retention_log_gate(gate: Tensor) -> Tensor:
    """a = logsigmoid(gate) / 16, of the same shape, in float32 (float64 stays float64)."""
    return F.logsigmoid(_wide(gate)) / GATE_TEMPERATURE


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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Decay matrix inside each chunk, states between chunks as one more matrix product.

    The states before all C = T / chunk_size chunks come from the chunks' own sums through a
    [C + 1, C] decay matrix, so nothing loops over tokens or chunks.
    """
    dtype, length = v.dtype, q.shape[-2]
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
