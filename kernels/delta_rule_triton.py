"""The gated delta rule in Triton: prefill of packed sequences, and the one-token step of decoding.

Prefill works in chunks of C = 64 tokens (the equations are those of
`delta_rule.delta_rule_chunkwise`), and cuts each sequence into segments where the heads alone do
not fill the card:
 1. `_prepare`, all chunks at once: the inverse of each chunk's triangular system, its scores q k^T,
    and per token the factors that lengths and decays amount to;
 2. `_sum_segments`: of each segment but a sequence's last, the state that it adds, from zero, and
    its transition, the [Dk, Dk] matrix that it applies to the state before it;
 3. `_scan_segments`: from these, the state after each of these segments;
 4. `_apply`: each segment from its starting state, chunk by chunk, with the state in registers;
 5. `_norm_gate`: norm, weight and gate, in place.

Per token and head, 4 takes 6 Dk Dv + 6 C Dv operations and 1 takes 4 C Dk + 20 C^2; 2 takes
4 Dk Dv + 4 C Dv for the sums, and 4 Dk^2 + 4 C Dk for the transitions. A sequence's first segment
has no transition, and a segment whose decays let through less than float32 holds has none either,
and sums only what they leave. For 32768 tokens and 9 heads of 256 / 512, 1 and 4 take 3.4e11
operations, 0.42 ms at 790 TFLOP/s; 2 takes up to 3.0e11 more. But 4 works on 128 columns of v at a
time: one sequence would keep 36 of 132 multiprocessors at work, and cut into 7 segments it keeps
all of them. 6 heads: 2.2e11 and up to 2.1e11 operations, and 24 multiprocessors.

The fewest bytes are q, k, v, gate and output, 1.13 GiB there in bfloat16, 0.28 ms at 4.3 TB/s
(0.75 GiB for 6 heads). 1 reads q and k once more and writes 3 C numbers per token and head, 108
MiB, and 5 reads the output and writes it again, 0.56 GiB. What 4 reads once per tile of v, q and k
and those 3 C numbers, mostly comes from the L2 cache: 4 x 0.39 GiB. No state but those after
segments leaves the registers; per segment and head these are Dk (Dk + Dv) float32 numbers, 0.75
MiB.

The step reads and writes a float32 state once, 8 Dk Dv bytes per sequence and head, 9 MiB for 9
heads of 256 / 512, with 7 operations for each number of it.

The state is kept TRANSPOSED, [Dv, Dk], so that it enters the products with k and q from the
registers in which it is accumulated, and so does what the chunk writes; of Dk > 128 in two parts,
of which one at a time is rounded for the product. The inverse is kept as the sum of two numbers of
q's dtype: rounded to one bfloat16, it would be the largest error where states are reflected (beta
near 2). Log-decays are in units of log(2), so that exp2 takes them as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common_triton import load_head, sigmoid, silu, softplus
from .dispatch import on_hopper
from .launch import dense_rows, in_units, packed_heads, padded, programs
from .norm import LENGTH_EPS
from .segments import blocks, segments, whole_segments
from .sequences import Sequences

MIN_SEGMENT = 1024  # tokens; shorter ones cost more operations than they save time
_SCAN_BLOCK = 32  # columns of v
_STEP = 64  # channels of q and k that a product sums at a time
_NORM_NUMBERS = 2048  # of the output that a program of `_norm_gate` holds
_STEP_NUMBERS, _STEP_WARPS = 4096, 4  # of the state that a program of `_step` holds


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    states: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    negative: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule.gated_delta_rule` on the GPU.

    States and what is written to them are rounded to q's dtype where they are multiplied, and the
    output before the norm is: they must be in its range.
    """
    length, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[1:]
    q, k, v = packed_heads(q), packed_heads(k), packed_heads(v)
    a, b = dense_rows(a), dense_rows(b)
    if states is not None:
        states = states.contiguous()
    config = _config(key_dim, value_dim, q.dtype, q.device)
    tiles = triton.cdiv(value_dim, config.block)
    rows = heads * tiles
    inner, scanned, table = sequences.table(
        ("delta rule", rows, config.chunk),
        lambda: segments(
            # Rounded down: a few programs more would take a turn of their own.
            sequences, rows, config.chunk, MIN_SEGMENT, max(1, programs(q.device) - rows // 2)
        ),
    )  # fmt: skip
    out = torch.empty(length, heads, value_dim, dtype=q.dtype, device=q.device)
    factors = torch.empty(heads, length, 4, dtype=torch.float32, device=q.device)
    starts = factors.new_empty(inner, heads, key_dim, value_dim)
    last = None
    if keep:
        last = starts.new_empty(len(sequences.lengths), heads, key_dim, value_dim)

    inverse = torch.empty(2, heads, length, config.chunk, dtype=q.dtype, device=q.device)
    scores = torch.empty_like(inverse[0])
    chunks = blocks(sequences, config.chunk)
    unit, (q_row, k_row, v_row) = in_units(q.stride(0), k.stride(0), v.stride(0))
    shared = {
        "HEADS": heads,
        "SHARING": heads // key_heads,
        "DIM": key_dim,
        "UNIT": unit,
        "CHUNK": config.chunk,
    }
    _prepare[(heads * len(chunks),)](
        q, k, a, b, a_log, dt_bias, chunks, inverse, scores, factors,
        q_row, k_row, a.stride(0), b.stride(0), length,
        **shared, STEP=min(_STEP, padded(key_dim)), EPS=LENGTH_EPS,
        STRENGTH=2.0 if negative else 1.0,
        # With loads under way, Triton 3.6 overwrites tiles that a product still reads. So many
        # registers let three programs run at a time.
        num_warps=4, num_stages=1, maxnreg=168,
    )  # fmt: skip
    shared |= {"PADDED": padded(key_dim), "VALUE_DIM": value_dim, "BLOCK": config.block}
    columns = tiles + triton.cdiv(key_dim, config.block)

    def sum_up(table: Tensor, count: int, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Sets what each of the first segments of a table adds, and returns their transitions, and
        where they have one."""
        transitions = starts.new_empty(count, heads, key_dim, key_dim)
        whole = torch.empty(count, heads, dtype=torch.int32, device=q.device)
        _sum_segments[(columns * heads * count,)](
            k, v, inverse, factors, table, states, sums, transitions, whole,
            k_row, v_row, length,
            **shared, num_warps=config.warps, num_stages=2,
        )  # fmt: skip
        return transitions, whole

    if sequences.relay is not None:
        state = starts.new_zeros(heads, key_dim, value_dim) if states is None else states[0]

        def effect() -> tuple[Tensor, Tensor]:
            count, table = sequences.table(
                ("delta rule, its effect", rows, config.chunk),
                lambda: whole_segments(
                    sequences, rows, config.chunk, MIN_SEGMENT, programs(q.device)
                ),
            )
            sums = starts.new_empty(count, heads, key_dim, value_dim)
            return _united(*sum_up(table, count, sums), sums)

        states = sequences.relay.transformed(state, effect)[None]
    if inner:
        transitions, whole = sum_up(table, inner, starts)
        scan_tiles = triton.cdiv(value_dim, _SCAN_BLOCK)
        _scan_segments[(scan_tiles * heads * scanned,)](
            table, starts, transitions, whole, inner + len(sequences.lengths),
            HEADS=heads, DIM=key_dim, PADDED=padded(key_dim), VALUE_DIM=value_dim,
            BLOCK=_SCAN_BLOCK, TILES=scan_tiles, STEP=min(_STEP // 2, padded(key_dim)),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=8 if key_dim > 128 else 4, num_stages=3,
        )  # fmt: skip
    _apply[(tiles * heads * (inner + len(sequences.lengths)),)](
        q, k, v, inverse, scores, factors, table, states, starts, out, last,
        q_row, k_row, v_row, length, inner,
        **shared, num_warps=config.warps, num_stages=2,
    )  # fmt: skip
    if weight is not None:
        _normalise(out, out, gate, weight, eps)
    return out, last


def _united(transitions: Tensor, whole: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The transition [HV, Dk, Dk] of segments one behind the other, and what they add,
    [HV, Dk, Dv].

    Args:
        transitions: [n, HV, Dk, Dk], of each segment, and
        whole: [n, HV], whether it has one: else nothing that was before it is left.
        sums: [n, HV, Dk, Dv], what it adds.
    """
    transition, added = sums.new_zeros(transitions.shape[1:]), torch.zeros_like(sums[0])
    transition.diagonal(dim1=1, dim2=2).fill_(1)
    for change, keeps, more in zip(transitions, whole[..., None, None] != 0, sums, strict=True):
        transition = torch.where(keeps, change @ transition, 0)
        added = torch.where(keeps, change @ added, 0) + more
    return transition, added


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    negative: bool,
) -> Tensor:
    """`delta_rule.gated_delta_rule_step` on the GPU."""
    batch, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[1:]
    q, k, v = packed_heads(q), packed_heads(k), packed_heads(v)
    a, b = dense_rows(a), dense_rows(b)
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    # Before the norm the sums may exceed float16's range.
    read = out if weight is None else torch.empty_like(out, dtype=torch.float32)
    rows = triton.next_power_of_2(key_dim)
    columns = triton.next_power_of_2(value_dim)
    block = min(columns, max(16, _STEP_NUMBERS // rows))
    tiles = triton.cdiv(value_dim, block)
    _step[(tiles * heads * batch,)](
        q, k, v, a, b, a_log, dt_bias, state, read,
        q.stride(0), k.stride(0), v.stride(0), a.stride(0), b.stride(0),
        HEADS=heads, SHARING=heads // key_heads, DIM=key_dim, PADDED=rows,
        VALUE_DIM=value_dim, BLOCK=block, TILES=tiles,
        EPS=LENGTH_EPS, STRENGTH=2.0 if negative else 1.0, num_warps=_STEP_WARPS,
    )  # fmt: skip
    if weight is not None:
        _normalise(read, out, gate, weight, eps)
    return out


def _normalise(x: Tensor, out: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> None:
    """out = RMSNorm(x) * weight * silu(gate) of each head of x [T, HV, Dv]; out may be x."""
    length, heads, dim = x.shape
    gate = None if gate is None else packed_heads(gate)
    unit, (gate_row,) = in_units(0 if gate is None else gate.stride(0))
    columns = triton.next_power_of_2(dim)
    rows = max(1, _NORM_NUMBERS // columns)
    _norm_gate[(triton.cdiv(length * heads, rows),)](
        x, out, gate, weight.contiguous(), length * heads, gate_row, eps,
        UNIT=unit, HEADS=heads, DIM=dim, PADDED=columns, ROWS=rows,
    )  # fmt: skip


class _Config(NamedTuple):
    """How prefill is cut, and `_sum_segments` and `_apply` compiled."""

    chunk: int  # tokens
    block: int  # columns of v in a program's tile
    warps: int


def _config(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> _Config:
    """In float32, which has no tensor cores here, small tiles keep the products compilable.

    Hopper's matrix units take operands from shared memory; other cards' take all from registers,
    which only half the columns fit.
    """
    if dtype == torch.float32:
        return _Config(16, 16 if key_dim > 128 else min(32, padded(value_dim)), 4)
    if not on_hopper(device):
        return _Config(64, 64, 8) if key_dim > 64 else _Config(64, 32, 4)
    return _Config(64, 128, 8) if key_dim > 64 and value_dim > 64 else _Config(64, 64, 4)


@triton.jit(do_not_specialize=["q_row", "k_row", "a_row", "b_row", "length"])
def _prepare(
    q_ptr,  # [T, KEY_HEADS, DIM]
    k_ptr,
    a_ptr,  # [T, HEADS]
    b_ptr,
    a_log_ptr,  # [HEADS]
    dt_bias_ptr,
    table_ptr,  # of blocks of CHUNK tokens
    inverse_ptr,  # [2, HEADS, T, CHUNK]
    scores_ptr,  # [HEADS, T, CHUNK]
    factors_ptr,  # float32 [HEADS, T, 4]
    q_row,
    k_row,
    a_row,
    b_row,
    length,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    EPS: tl.constexpr,
    STRENGTH: tl.constexpr,
):
    """What a chunk's tokens are to each other, and to the state, in one head.

    With G the decays from the chunk's start, inclusive, and |k| as the norm divides, the factors of
    token i are exp(G_i) / |k_i|, by which it recalls from the state before the chunk,
    Dk^(-1/2) exp(G_i) / |q_i|, by which it reads from it, exp(G_C - G_i) / |k_i|, by which what it
    writes reaches the state after the chunk, and G_i itself.

    The inverse is that of 1 + L, L_ij = beta_i exp(G_i - G_j) k_i k_j^T / |k_i| |k_j| below the
    diagonal, its columns times beta. It grows from the inverses X_1 and X_2 of blocks on the
    diagonal to those of blocks twice as large, of which the lower left is -X_2 L_21 X_1. No number
    of it exceeds 2: half precision holds it.
    """
    PRECISION: tl.constexpr = "ieee" if q_ptr.dtype.element_ty == tl.float32 else "tf32"
    # Of the numbers of the inverse: finer than bfloat16.
    FINE: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    head = tl.program_id(0) % HEADS
    table_ptr += tl.program_id(0) // HEADS * 5
    start = tl.load(table_ptr)
    end = tl.load(table_ptr + 2)

    rows = tl.arange(0, CHUNK)
    present = start + rows < end
    system = tl.zeros((CHUNK, CHUNK), tl.float32)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    of_k = tl.zeros((CHUNK,), tl.float32)
    of_q = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, DIM, STEP):
        mask = present[:, None] & (first + tl.arange(0, STEP) < DIM)[None, :]
        k = load_head(k_ptr + first, start, k_row * UNIT, head // SHARING, rows, mask, DIM, STEP)
        q = load_head(q_ptr + first, start, q_row * UNIT, head // SHARING, rows, mask, DIM, STEP)
        wide_k, wide_q = k.to(tl.float32), q.to(tl.float32)
        of_k += tl.sum(wide_k * wide_k, axis=1)
        of_q += tl.sum(wide_q * wide_q, axis=1)
        system = tl.dot(k, tl.trans(k), system, input_precision=PRECISION)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    of_k = tl.rsqrt(of_k + EPS)
    of_q = tl.rsqrt(of_q + EPS) * DIM**-0.5

    a_ptr += start * tl.cast(a_row, tl.int64) + head
    b_ptr += start * tl.cast(b_row, tl.int64) + head
    a = tl.load(a_ptr + rows * a_row, mask=present, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + rows * b_row, mask=present, other=0.0).to(tl.float32)
    rate = tl.exp2(tl.load(a_log_ptr + head).to(tl.float32) * 1.4426950408889634)
    log_decay = softplus(a + tl.load(dt_bias_ptr + head).to(tl.float32))
    log_decay = tl.where(present, log_decay * rate * -1.4426950408889634, 0.0)
    beta = sigmoid(b) * STRENGTH
    inside = tl.cumsum(log_decay, axis=0)
    whole = tl.sum(log_decay, axis=0)
    reach = tl.exp2(inside)
    at = head.to(tl.int64) * length + start + rows
    tl.store(factors_ptr + at * 4, reach * of_k, mask=present)
    tl.store(factors_ptr + at * 4 + 1, reach * of_q, mask=present)
    tl.store(factors_ptr + at * 4 + 2, tl.exp2(whole - inside) * of_k, mask=present)
    tl.store(factors_ptr + at * 4 + 3, inside, mask=present)

    row, column = rows[:, None], rows[None, :]
    distance = inside[:, None] - inside[None, :]
    decay = tl.exp2(tl.where(column <= row, distance, float("-inf"))) * of_k[None, :]
    tile = at[:, None] * CHUNK + column
    scores *= decay * of_q[:, None]
    tl.store(scores_ptr + tile, scores.to(scores_ptr.dtype.element_ty), mask=present[:, None])

    system *= decay * (beta * of_k)[:, None]
    system = tl.where(column < row, system, 0.0)
    inverse = tl.where(column == row, 1.0, 0.0)
    inverse -= tl.where(row // 2 == column // 2, system, 0.0)
    size: tl.constexpr = 2
    for _ in tl.static_range(10):
        if size < CHUNK:
            lower = (row // (2 * size) == column // (2 * size)) & (row // size != column // size)
            lower = tl.where(lower, system, 0.0).to(FINE)
            known = inverse.to(FINE)
            step = tl.dot(known, lower, input_precision=PRECISION).to(FINE)
            inverse -= tl.dot(step, known, input_precision=PRECISION)
        size = size * 2
    inverse *= beta[None, :]
    upper = inverse.to(inverse_ptr.dtype.element_ty)
    tl.store(inverse_ptr + tile, upper, mask=present[:, None])
    if FINE != tl.float32:
        lower = (inverse - upper.to(tl.float32)).to(inverse_ptr.dtype.element_ty)
        tl.store(
            inverse_ptr + tl.cast(length, tl.int64) * (HEADS * CHUNK) + tile,
            lower,
            mask=present[:, None],
        )


@triton.jit
def _at(column, first, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where PART rows of a state [ROWS, COLUMNS] lie, transposed, and what of them there is."""
    channel = first + tl.arange(0, PART)
    at = column[:, None] + channel[None, :] * COLUMNS
    return at, (column < COLUMNS)[:, None] & (channel < ROWS)[None, :]


@triton.jit
def _load_state(
    ptr,  # float32 [ROWS, COLUMNS]
    column,
    SPLIT: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of a state, transposed; of one that is split, its two parts."""
    at, mask = _at(column, 0, PART, ROWS, COLUMNS)
    state = tl.load(ptr + at, mask=mask, other=0.0)
    rest = tl.zeros_like(state)
    if SPLIT:
        at, mask = _at(column, PART, PART, ROWS, COLUMNS)
        rest = tl.load(ptr + at, mask=mask, other=0.0)
    return state, rest


@triton.jit
def _store_state(
    ptr,
    state,
    rest,
    column,
    SPLIT: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What `_load_state` loads."""
    at, mask = _at(column, 0, PART, ROWS, COLUMNS)
    tl.store(ptr + at, state, mask=mask)
    if SPLIT:
        at, mask = _at(column, PART, PART, ROWS, COLUMNS)
        tl.store(ptr + at, rest, mask=mask)


@triton.jit
def _factor(factors, index):
    """One of the factors [CHUNK, 4] of a chunk's tokens.

    Loaded together they lie in as many threads as there are tokens; each by itself would be loaded
    by all threads, in the layout of the product that it scales.
    """
    return tl.sum(tl.where(tl.arange(0, 4)[None, :] == index, factors, 0.0), axis=1)


@triton.jit
def _write(recalled, v, upper, lower, recall):
    """What a chunk's tokens write, transposed, [BLOCK, CHUNK], from what they recall."""
    right = (tl.trans(v).to(tl.float32) - recalled * recall[None, :]).to(v.dtype)
    PRECISION: tl.constexpr = "ieee" if v.dtype == tl.float32 else "tf32"
    written = tl.dot(right, tl.trans(upper), input_precision=PRECISION)
    if v.dtype != tl.float32:
        written = tl.dot(right, tl.trans(lower), written, input_precision=PRECISION)
    return written


@triton.jit(do_not_specialize=["k_row", "v_row", "length"])
def _sum_segments(
    k_ptr,  # [T, KEY_HEADS, DIM]
    v_ptr,  # [T, HEADS, VALUE_DIM]
    inverse_ptr,  # [2, HEADS, T, CHUNK]
    factors_ptr,  # float32 [HEADS, T, 4]
    table_ptr,
    states_ptr,  # float32 [.., HEADS, DIM, VALUE_DIM] or None: zeros
    sums_ptr,  # float32 [segments, HEADS, DIM, VALUE_DIM]
    transitions_ptr,  # float32 [segments, HEADS, DIM, DIM]
    whole_ptr,  # int32 [segments, HEADS]
    k_row,
    v_row,
    length,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a segment of whole chunks adds to the state, and what it does to the state before it.

    Of a sequence's first segment, the state after it instead. The transition's columns are states
    that start from the identity's, with no values to write. Chunks of which the decays after them
    let through less than float32 holds are left out; then there is no transition, and `whole` is 0.
    """
    VALUE_TILES: tl.constexpr = (VALUE_DIM + BLOCK - 1) // BLOCK
    TILES: tl.constexpr = VALUE_TILES + (DIM + BLOCK - 1) // BLOCK
    SPLIT: tl.constexpr = PADDED > 128 and k_ptr.dtype.element_ty != tl.float32
    PART: tl.constexpr = PADDED // 2 if SPLIT else PADDED
    PRECISION: tl.constexpr = "ieee" if k_ptr.dtype.element_ty == tl.float32 else "tf32"
    BATCH: tl.constexpr = 64  # chunks, whose decays are looked at together
    SMALLEST: tl.constexpr = -126.0  # log2 of float32's smallest normal number
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    segment = tl.program_id(0) // (TILES * HEADS)
    first = tl.load(table_ptr + segment * 4)
    end = tl.load(table_ptr + segment * 4 + 1)
    before = tl.load(table_ptr + segment * 4 + 2)
    writes = tile < VALUE_TILES
    tile = tl.where(writes, tile, tile - VALUE_TILES)

    of_head = head.to(tl.int64) * length
    factors_ptr += of_head * 4
    chunks = (end - first) // CHUNK
    left_out = chunks
    after = 0.0  # log-decay from the chunks looked at to the segment's end
    for i in range(0, tl.cdiv(chunks, BATCH)):
        index = chunks - (i + 1) * BATCH + tl.arange(0, BATCH)
        at = first + (index + 1) * CHUNK - 1
        decay = tl.load(factors_ptr + at * 4 + 3, mask=index >= 0, other=0.0)
        later = after + tl.cumsum(decay, axis=0, reverse=True) - decay
        left_out -= tl.sum(((index >= 0) & (later >= SMALLEST)).to(tl.int32), axis=0)
        after += tl.sum(decay, axis=0)
    is_whole = left_out == 0

    rows = tl.arange(0, CHUNK)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, PART)
    every = (rows < CHUNK)[:, None]
    v_mask = every & (writes & (column < VALUE_DIM))[None, :]
    state = tl.zeros((BLOCK, PART), tl.float32)
    rest = tl.zeros((BLOCK, PART), tl.float32)
    begin = first + left_out * CHUNK
    if not writes:
        state = tl.where(column[:, None] == channel[None, :], 1.0, 0.0)
        rest = tl.where(column[:, None] == PART + channel[None, :], 1.0, 0.0)
        if (before < 0) | (left_out > 0):
            begin = end
    elif states_ptr is not None:
        if (before < 0) & is_whole:
            index = tl.load(table_ptr + segment * 4 + 3).to(tl.int64) * HEADS + head
            at = states_ptr + index * (DIM * VALUE_DIM)
            state, rest = _load_state(at, column, SPLIT, PART, DIM, VALUE_DIM)

    for start in range(begin, end, CHUNK):
        k_mask = every & (channel < DIM)[None, :]
        k = load_head(k_ptr, start, k_row * UNIT, head // SHARING, rows, k_mask, DIM, PART)
        recalled = tl.dot(state.to(k.dtype), tl.trans(k), input_precision=PRECISION)
        if SPLIT:
            k_mask = every & (PART + channel < DIM)[None, :]
            more_k = load_head(
                k_ptr + PART, start, k_row * UNIT, head // SHARING, rows, k_mask, DIM, PART
            )
            recalled = tl.dot(rest.to(k.dtype), tl.trans(more_k), recalled)
        v = load_head(
            v_ptr + tile * BLOCK, start, v_row * UNIT, head, rows, v_mask, VALUE_DIM, BLOCK
        )
        square = (of_head + start + rows)[:, None] * CHUNK + rows[None, :]
        upper = tl.load(inverse_ptr + square)
        lower = upper
        if k.dtype != tl.float32:
            lower = tl.load(inverse_ptr + tl.cast(length, tl.int64) * (HEADS * CHUNK) + square)
        factors = tl.load(factors_ptr + (start + rows)[:, None] * 4 + tl.arange(0, 4)[None, :])
        whole = tl.exp2(tl.load(factors_ptr + (start + CHUNK - 1) * 4 + 3))
        written = _write(recalled, v, upper, lower, _factor(factors, 0))
        written = (written * _factor(factors, 2)[None, :]).to(k.dtype)
        state = tl.dot(written, k, state * whole, input_precision=PRECISION)
        if SPLIT:
            rest = tl.dot(written, more_k, rest * whole)

    index = segment.to(tl.int64) * HEADS + head
    if writes:
        at = sums_ptr + index * (DIM * VALUE_DIM)
        _store_state(at, state, rest, column, SPLIT, PART, DIM, VALUE_DIM)
        if tile == 0:
            tl.store(whole_ptr + index, is_whole.to(tl.int32))
    elif begin < end:
        at = transitions_ptr + index * (DIM * DIM)
        _store_state(at, state, rest, column, SPLIT, PART, DIM, DIM)


@triton.jit(do_not_specialize=["scans"])
def _scan_segments(
    table_ptr,
    sums_ptr,  # float32 [segments, HEADS, DIM, VALUE_DIM]
    transitions_ptr,  # float32 [segments, HEADS, DIM, DIM]
    whole_ptr,  # int32 [segments, HEADS]
    scans,  # row of the table where the sequences of several segments begin
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Replaces each segment's sum by the state after that segment, in some columns."""
    column = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // TILES % HEADS
    row = table_ptr + (scans + tl.program_id(0) // (TILES * HEADS)) * 4
    channel = tl.arange(0, PADDED)
    step = tl.arange(0, STEP)
    here = (column < VALUE_DIM)[None, :]
    at = channel[:, None] * VALUE_DIM + column[None, :]
    mask = (channel < DIM)[:, None] & here
    for segment in range(tl.load(row) + 1, tl.load(row + 1)):
        index = segment * tl.cast(HEADS, tl.int64) + head
        if tl.load(whole_ptr + index) != 0:
            previous = sums_ptr + (index - HEADS) * (DIM * VALUE_DIM)
            transition = transitions_ptr + index * (DIM * DIM)
            state = tl.load(sums_ptr + index * (DIM * VALUE_DIM) + at, mask=mask, other=0.0)
            for first in range(0, DIM, STEP):
                source = first + step
                left = tl.load(
                    transition + channel[:, None] * DIM + source[None, :],
                    mask=(channel < DIM)[:, None] & (source < DIM)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    previous + source[:, None] * VALUE_DIM + column[None, :],
                    mask=(source < DIM)[:, None] & here,
                    other=0.0,
                )
                state = tl.dot(left, right, state, input_precision=PRECISION)
            tl.store(sums_ptr + index * (DIM * VALUE_DIM) + at, state, mask=mask)
            tl.debug_barrier()  # the next segment reads what other threads stored


@triton.jit(do_not_specialize=["q_row", "k_row", "v_row", "length", "inner"])
def _apply(
    q_ptr,  # [T, KEY_HEADS, DIM]
    k_ptr,
    v_ptr,  # [T, HEADS, VALUE_DIM]
    inverse_ptr,  # [2, HEADS, T, CHUNK]
    scores_ptr,  # [HEADS, T, CHUNK]
    factors_ptr,  # float32 [HEADS, T, 4]
    table_ptr,
    states_ptr,  # float32 [.., HEADS, DIM, VALUE_DIM] or None: zeros
    starts_ptr,  # float32 [segments, HEADS, DIM, VALUE_DIM], state after each
    out_ptr,  # [T, HEADS, VALUE_DIM], contiguous
    last_ptr,  # float32 [sequences, HEADS, DIM, VALUE_DIM] or None: not asked for
    q_row,
    k_row,
    v_row,
    length,
    inner,  # segments that are not the last of their sequence
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The output of a segment, and the state after it where it ends a sequence."""
    TILES: tl.constexpr = (VALUE_DIM + BLOCK - 1) // BLOCK
    SPLIT: tl.constexpr = PADDED > 128 and q_ptr.dtype.element_ty != tl.float32
    PART: tl.constexpr = PADDED // 2 if SPLIT else PADDED
    PRECISION: tl.constexpr = "ieee" if q_ptr.dtype.element_ty == tl.float32 else "tf32"
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    segment = tl.program_id(0) // (TILES * HEADS)
    first = tl.load(table_ptr + segment * 4)
    end = tl.load(table_ptr + segment * 4 + 1)
    before = tl.load(table_ptr + segment * 4 + 2)

    rows = tl.arange(0, CHUNK)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, PART)
    state = tl.zeros((BLOCK, PART), tl.float32)
    rest = tl.zeros((BLOCK, PART), tl.float32)
    if before >= 0:
        index = before.to(tl.int64) * HEADS + head
        at = starts_ptr + index * (DIM * VALUE_DIM)
        state, rest = _load_state(at, column, SPLIT, PART, DIM, VALUE_DIM)
    elif states_ptr is not None:
        index = tl.load(table_ptr + segment * 4 + 3).to(tl.int64) * HEADS + head
        at = states_ptr + index * (DIM * VALUE_DIM)
        state, rest = _load_state(at, column, SPLIT, PART, DIM, VALUE_DIM)

    of_head = head.to(tl.int64) * length
    plane = tl.cast(length, tl.int64) * HEADS
    factors_ptr += of_head * 4
    for start in range(first, end, CHUNK):
        present = start + rows < end
        part = present[:, None] & (channel < DIM)[None, :]
        k = load_head(k_ptr, start, k_row * UNIT, head // SHARING, rows, part, DIM, PART)
        q = load_head(q_ptr, start, q_row * UNIT, head // SHARING, rows, part, DIM, PART)
        recalled = tl.dot(state.to(k.dtype), tl.trans(k), input_precision=PRECISION)
        if SPLIT:
            part = present[:, None] & (PART + channel < DIM)[None, :]
            more_k = load_head(
                k_ptr + PART, start, k_row * UNIT, head // SHARING, rows, part, DIM, PART
            )
            more_q = load_head(
                q_ptr + PART, start, q_row * UNIT, head // SHARING, rows, part, DIM, PART
            )
            recalled = tl.dot(rest.to(k.dtype), tl.trans(more_k), recalled)
        v_mask = present[:, None] & (column < VALUE_DIM)[None, :]
        v = load_head(
            v_ptr + tile * BLOCK, start, v_row * UNIT, head, rows, v_mask, VALUE_DIM, BLOCK
        )
        square = (of_head + start + rows)[:, None] * CHUNK + rows[None, :]
        upper = tl.load(inverse_ptr + square, mask=present[:, None], other=0.0)
        lower = upper
        if k.dtype != tl.float32:
            lower = tl.load(inverse_ptr + plane * CHUNK + square, mask=present[:, None], other=0.0)
        scores = tl.load(scores_ptr + square, mask=present[:, None], other=0.0)
        factors = tl.load(
            factors_ptr + (start + rows)[:, None] * 4 + tl.arange(0, 4)[None, :],
            mask=present[:, None],
            other=0.0,
        )
        whole = tl.load(factors_ptr + tl.minimum(start + CHUNK, end) * 4 - 1)

        # Transposed: out and what is written, [Dv, token].
        written = _write(recalled, v, upper, lower, _factor(factors, 0))
        out = tl.dot(state.to(q.dtype), tl.trans(q), input_precision=PRECISION)
        if SPLIT:
            out = tl.dot(rest.to(q.dtype), tl.trans(more_q), out)
        out *= _factor(factors, 1)[None, :]
        out = tl.dot(written.to(q.dtype), tl.trans(scores), out, input_precision=PRECISION)
        rows_ptr = out_ptr + start * tl.cast(HEADS * VALUE_DIM, tl.int64) + head * VALUE_DIM
        out_at = rows[:, None] * (HEADS * VALUE_DIM) + column[None, :]
        tl.store(rows_ptr + out_at, tl.trans(out.to(q.dtype)), mask=v_mask)
        written = (written * _factor(factors, 2)[None, :]).to(k.dtype)
        whole = tl.exp2(whole)
        state = tl.dot(written, k, state * whole, input_precision=PRECISION)
        if SPLIT:
            rest = tl.dot(written, more_k, rest * whole)

    if last_ptr is not None:
        if segment >= inner:
            index = (segment - inner).to(tl.int64) * HEADS + head
            at = last_ptr + index * (DIM * VALUE_DIM)
            _store_state(at, state, rest, column, SPLIT, PART, DIM, VALUE_DIM)


@triton.jit(do_not_specialize=["count", "gate_row"])
def _norm_gate(
    x_ptr,  # [T, HEADS, DIM], contiguous
    out_ptr,  # likewise, or x_ptr
    gate_ptr,  # [T, HEADS, DIM] or None
    weight_ptr,  # [DIM]
    count,  # T * HEADS
    gate_row,
    eps,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """RMSNorm(x) * weight * silu(gate) of each head."""
    index = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    mask = (index < count) & (column < DIM)
    out = tl.load(x_ptr + index * DIM + column, mask=mask, other=0.0).to(tl.float32)
    out *= tl.rsqrt(tl.sum(out * out, axis=1) / DIM + eps)[:, None]
    out *= tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate_ptr += index // HEADS * gate_row * UNIT + index % HEADS * DIM
        out *= silu(tl.load(gate_ptr + column, mask=mask, other=0.0).to(tl.float32))
    tl.store(out_ptr + index * DIM + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _step(
    q_ptr,  # [B, KEY_HEADS, DIM]
    k_ptr,
    v_ptr,  # [B, HEADS, VALUE_DIM]
    a_ptr,  # [B, HEADS]
    b_ptr,
    a_log_ptr,  # [HEADS]
    dt_bias_ptr,
    state_ptr,  # float32 [B, HEADS, DIM, VALUE_DIM], changed in place
    out_ptr,  # [B, HEADS, VALUE_DIM], contiguous
    q_row,
    k_row,
    v_row,
    a_row,
    b_row,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    EPS: tl.constexpr,
    STRENGTH: tl.constexpr,
):
    """Some columns of one head's state of one sequence, [PADDED, BLOCK]."""
    column = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // TILES % HEADS
    sequence = (tl.program_id(0) // (TILES * HEADS)).to(tl.int64)
    channel = tl.arange(0, PADDED)
    state_ptr += (sequence * HEADS + head) * (DIM * VALUE_DIM)
    state_ptr += channel[:, None] * VALUE_DIM + column[None, :]
    mask = (channel < DIM)[:, None] & (column < VALUE_DIM)[None, :]
    state = tl.load(state_ptr, mask=mask, other=0.0)

    of_key = head // SHARING * DIM + channel
    q = tl.load(q_ptr + sequence * q_row + of_key, mask=channel < DIM, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + sequence * k_row + of_key, mask=channel < DIM, other=0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, axis=0) + EPS) * DIM**-0.5
    k *= tl.rsqrt(tl.sum(k * k, axis=0) + EPS)
    v_ptr += sequence * v_row + head * VALUE_DIM + column
    v = tl.load(v_ptr, mask=column < VALUE_DIM, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + sequence * a_row + head).to(tl.float32)
    beta = sigmoid(tl.load(b_ptr + sequence * b_row + head).to(tl.float32)) * STRENGTH
    rate = tl.exp2(tl.load(a_log_ptr + head).to(tl.float32) * 1.4426950408889634)
    log_decay = softplus(a + tl.load(dt_bias_ptr + head).to(tl.float32)) * rate

    state *= tl.exp2(log_decay * -1.4426950408889634)
    recalled = tl.sum(state * k[:, None], axis=0)
    state += k[:, None] * (beta * (v - recalled))[None, :]
    tl.store(state_ptr, state, mask=mask)
    out = tl.sum(state * q[:, None], axis=0).to(out_ptr.dtype.element_ty)
    out_ptr += (sequence * HEADS + head) * VALUE_DIM + column
    tl.store(out_ptr, out, mask=column < VALUE_DIM)
