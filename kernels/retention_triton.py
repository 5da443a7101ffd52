"""Gated retention in Triton: prefill of packed sequences, and the one-token step of decoding.

Prefill cuts each sequence into segments, so that a single one fills the card, and runs
 1. `_sum_segments`: the state that each segment but a sequence's last adds, from zero;
 2. `_scan_segments`: from these sums and their decays, the state after each of these segments;
 3. `_retain`: each segment from its starting state, chunk by chunk, with the state in registers;
 4. `_norm_swish`: norm and gate, in place.
With s segments to a sequence, 1 and 3 read k and v up to 2 - 1 / s times (less where the gates
forget) and q once, write the output once, and move D^2 float32 numbers of state four times per
segment and head. For 32768 tokens, 24 heads of 128 and s = 11 that is up to 5.8 x 192 MiB in
bfloat16, or 0.39 ms at 3 TB/s, and 4 x 16.5 MiB of states, which mostly stay in the L2 cache.
Operations: per token and head 2 D (3 D + 2 C) for chunks of C = 64, 1.0e11 in that example, 0.10 ms
at 1 PFLOP/s.

4 moves 3 x 192 MiB more. In `_retain` norm and gate cost more than that: its state fills the
registers, so that one program runs at a time on a multiprocessor, and nothing hides what they wait
for.

The step reads and writes a float32 state once, 8 D^2 bytes per sequence and head, 3 MiB for 24
heads of 128, with 5 operations for each number of it.

The state is kept TRANSPOSED, [Dv, D], so that it can enter the product with q from the registers in
which it is accumulated; scores and outputs of a chunk are transposed accordingly. Log-gates are in
units of log(2), so that exp2 takes them as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .common_triton import load_head, silu, softplus
from .launch import dense_rows, in_units, packed_heads, padded, programs
from .segments import segments
from .sequences import Sequences

MIN_SEGMENT = 256  # tokens; shorter ones cost more traffic for states than they save time
_SCAN_BLOCK = 1024
_NORM_ROWS = 16  # rows, one per token and head, to a program of `_norm_swish`
_STEP_NUMBERS = 16384  # of the state that a program of `_step` holds at a time


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    sequences: Sequences,
    states: Tensor | None,
    swish: Tensor | None,
    eps: float,
    keep: bool,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """`retention.gated_retention` on the GPU.

    Scores, states as operands and the sums before the norm are rounded to q's dtype, in whose range
    they must be.
    """
    length, heads, dim = q.shape
    q, k, v = packed_heads(q), packed_heads(k), packed_heads(v)
    swish = None if swish is None else packed_heads(swish)
    gate = dense_rows(gate)
    config = _config(dim, q.dtype)
    tiles = triton.cdiv(dim, config.block)
    inner, scanned, table = sequences.table(
        ("retention", heads * tiles, config.chunk),
        lambda: segments(sequences, heads * tiles, config.chunk, MIN_SEGMENT, programs(q.device)),
    )
    relay = sequences.relay
    # Of a part, whole chunks, that others follow, all segments are summed: what it does to the
    # state before it is made of them.
    summed = inner + (relay is not None and not relay.ends)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = torch.empty(summed, heads, dim, dim, dtype=torch.float32, device=q.device)
    decays = starts.new_empty(summed, heads)
    last = None
    if keep:
        last = starts.new_empty(len(sequences.lengths), heads, dim, dim)
    if states is not None:
        states = states.contiguous()

    unit, (q_row, k_row, v_row) = in_units(q.stride(0), k.stride(0), v.stride(0))
    shared = {
        "HEADS": heads,
        "DIM": dim,
        "PADDED": padded(dim),
        "UNIT": unit,
        "CHUNK": config.chunk,
        "BLOCK": config.block,
        "TEMPERATURE": temperature,
    }
    if summed:
        _sum_segments[(tiles * heads * summed,)](
            k, v, gate, table, starts, decays, k_row, v_row, gate.stride(0),
            **shared, num_warps=config.sum_warps, num_stages=config.sum_stages,
        )  # fmt: skip
    if relay is not None:
        state = starts.new_zeros(heads, dim, dim) if states is None else states[0]
        states = relay.decayed(state, lambda: _effect(starts, decays))[None]
    total = inner + len(sequences.lengths)
    if inner:
        blocks = triton.cdiv(dim * dim, _SCAN_BLOCK)
        _scan_segments[(blocks * heads * scanned,)](
            table, states, starts, decays, total,
            HEADS=heads, SIZE=dim * dim, BLOCK=_SCAN_BLOCK, BLOCKS=blocks,
        )  # fmt: skip
    _retain[(tiles * heads * total,)](
        q, k, v, gate, table, states, starts, out, last,
        q_row, k_row, v_row, gate.stride(0), inner,
        **shared, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if swish is not None:
        _norm_swish[(triton.cdiv(length * heads, _NORM_ROWS),)](
            out, swish, length * heads, swish.stride(0), eps,
            HEADS=heads, DIM=dim, PADDED=triton.next_power_of_2(dim), ROWS=_NORM_ROWS,
        )  # fmt: skip
    return out, last


def _effect(sums: Tensor, decays: Tensor) -> tuple[Tensor, Tensor]:
    """What segments in a row do to the state before them, by what each adds, [s, H, D, D], and the
    binary logarithm of what it multiplies by, [s, H]: the natural logarithm of what they multiply
    by, [H], and what they add, [H, D, D]."""
    # Summed from the end, and without a segment's own: what is left of a difference of large sums
    # would be wrong just for the last segments, which count most.
    onwards = F.pad(decays, (0, 0, 0, 1)).flip(0).cumsum(0).flip(0)
    after = onwards[1:].exp2()
    added = after.T[:, None] @ sums.flatten(2).transpose(0, 1)
    return onwards[0] * math.log(2), added.view(sums.shape[1:])


def gated_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    state: Tensor,
    angles: tuple[Tensor, Tensor],
    swish: Tensor,
    eps: float,
    temperature: float,
) -> Tensor:
    """`retention.gated_retention_step` on the GPU."""
    batch, heads, dim = q.shape
    q, k, v, swish = (packed_heads(x) for x in (q, k, v, swish))
    gate = dense_rows(gate)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    columns = triton.next_power_of_2(dim)
    _step[(heads * batch,)](
        q, k, v, gate, *angles, swish, state, out,
        q.stride(0), k.stride(0), v.stride(0), swish.stride(0), gate.stride(0), eps,
        HEADS=heads, DIM=dim, PADDED=columns,
        PAIRS=max(1, min(columns // 2, _STEP_NUMBERS // 2 // columns)), TEMPERATURE=temperature,
        num_warps=8 if columns >= 128 else 4,
    )  # fmt: skip
    return out


class _Config(NamedTuple):
    """How `_sum_segments` and `_retain` are cut and compiled."""

    chunk: int  # tokens
    block: int  # columns of v in a program's tile
    warps: int
    stages: int  # of loads under way
    sum_warps: int
    sum_stages: int


def _config(dim: int, dtype: torch.dtype) -> _Config:
    """A tile is a whole head up to 128 columns, so that q and k are read once.

    In float32, which has no tensor cores here, small tiles keep the unrolled products compilable.
    """
    if dtype == torch.float32:
        return _Config(16, 16 if dim > 128 else 32, 4, 2, 4, 2)
    if dim > 128:
        return _Config(64, 64, 8, 2, 8, 2)
    return _Config(64, padded(dim), 8 if dim > 64 else 4, 3, 4, 2)


@triton.jit
def _log_gate(gate, TEMPERATURE: tl.constexpr):
    """log2(sigmoid(gate)) / TEMPERATURE, to full relative precision."""
    return softplus(-gate) * (-1.4426950408889634 / TEMPERATURE)


@triton.jit(do_not_specialize=["k_row", "v_row", "gate_row"])
def _sum_segments(
    k_ptr,  # [T, HEADS, DIM]
    v_ptr,  # [T, HEADS, DIM]
    gate_ptr,  # [T, HEADS]
    table_ptr,
    sums_ptr,  # float32 [segments, HEADS, DIM, DIM]
    decays_ptr,  # float32 [segments, HEADS]
    k_row,
    v_row,
    gate_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """What a segment of whole chunks adds to the state.

    It walks from the last chunk to the first, so that the sum needs no decay, and leaves in the L2
    cache what `_retain` reads first. It stops where the gates let through less than float32 holds.
    """
    TILES: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    PRECISION: tl.constexpr = "ieee" if k_ptr.dtype.element_ty == tl.float32 else "tf32"
    BATCH: tl.constexpr = 16  # chunks, after which the gates are asked
    SMALLEST: tl.constexpr = -126.0  # log2 of float32's smallest normal number
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    segment = tl.program_id(0) // (TILES * HEADS)
    first = tl.load(table_ptr + segment * 4)
    end = tl.load(table_ptr + segment * 4 + 1)

    rows = tl.arange(0, CHUNK)
    present = rows < CHUNK  # all of them
    channel = tl.arange(0, PADDED)[None, :]
    value = tile * BLOCK + tl.arange(0, BLOCK)
    k_mask = present[:, None] & (channel < DIM)
    v_mask = present[:, None] & (value < DIM)[None, :]
    scale = DIM**-0.5
    sums = tl.zeros((BLOCK, PADDED), tl.float32)
    after = 0.0  # log-decay from the end of the chunk to the end of the segment
    gates = gate_ptr + head + rows * gate_row
    gate = tl.load(gates + (end - CHUNK) * tl.cast(gate_row, tl.int64))
    chunks = (end - first) // CHUNK
    for batch in range(0, chunks, BATCH):
        stop = tl.minimum(batch + BATCH, chunks)
        if after < SMALLEST:
            stop = batch  # what is older adds nothing
        for i in range(batch, stop):
            start = end - (i + 1) * CHUNK
            k = load_head(k_ptr, start, k_row * UNIT, head, rows, k_mask, DIM, PADDED)
            v = load_head(v_ptr + tile * BLOCK, start, v_row * UNIT, head, rows, v_mask, DIM, BLOCK)
            log_gate = _log_gate(gate.to(tl.float32), TEMPERATURE)
            # Loaded one chunk ahead; at the last one, that chunk's own again.
            ahead = tl.maximum(start - CHUNK, first)
            gate = tl.load(gates + ahead * tl.cast(gate_row, tl.int64))
            weight = tl.exp2(after + tl.cumsum(log_gate, axis=0, reverse=True) - log_gate) * scale
            after += tl.sum(log_gate, axis=0)
            k = (k * weight[:, None]).to(v.dtype)
            sums = tl.dot(tl.trans(v), k, sums, input_precision=PRECISION)

    state = segment.to(tl.int64) * HEADS + head
    at = value[:, None] + channel * DIM
    mask = (value < DIM)[:, None] & (channel < DIM)
    tl.store(sums_ptr + state * (DIM * DIM) + at, sums, mask=mask)
    if tile == 0:
        tl.store(decays_ptr + state, after)


@triton.jit(do_not_specialize=["scans"])
def _scan_segments(
    table_ptr,
    states_ptr,  # float32 [.., HEADS, DIM, DIM] or None
    sums_ptr,  # float32 [segments, HEADS, DIM, DIM]
    decays_ptr,  # float32 [segments, HEADS]
    scans,  # row of the table where the sequences of several segments begin
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,  # DIM * DIM
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a state
):
    """Replaces each segment's sum by the state after that segment."""
    head = tl.program_id(0) % HEADS
    at = tl.program_id(0) // HEADS % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    row = table_ptr + (scans + tl.program_id(0) // (HEADS * BLOCKS)) * 4
    if states_ptr is not None:
        source = tl.load(row + 2).to(tl.int64)
        state = tl.load(states_ptr + (source * HEADS + head) * SIZE + at, mask=mask, other=0.0)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    for segment in tl.range(tl.load(row), tl.load(row + 1), num_stages=4):
        index = segment * tl.cast(HEADS, tl.int64) + head
        decay = tl.exp2(tl.load(decays_ptr + index))
        state = state * decay + tl.load(sums_ptr + index * SIZE + at, mask=mask, other=0.0)
        tl.store(sums_ptr + index * SIZE + at, state, mask=mask)


@triton.jit(do_not_specialize=["q_row", "k_row", "v_row", "gate_row", "inner"])
def _retain(
    q_ptr,  # [T, HEADS, DIM]
    k_ptr,
    v_ptr,
    gate_ptr,  # [T, HEADS]
    table_ptr,
    states_ptr,  # float32 [.., HEADS, DIM, DIM] or None: zeros
    starts_ptr,  # float32 [segments, HEADS, DIM, DIM], state after each
    out_ptr,  # [T, HEADS, DIM], contiguous
    last_ptr,  # float32 [sequences, HEADS, DIM, DIM] or None: not asked for
    q_row,
    k_row,
    v_row,
    gate_row,
    inner,  # segments that are not the last of their sequence
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """The output of a segment, and the state after it where it ends a sequence."""
    TILES: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    PRECISION: tl.constexpr = "ieee" if q_ptr.dtype.element_ty == tl.float32 else "tf32"
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    segment = tl.program_id(0) // (TILES * HEADS)
    first = tl.load(table_ptr + segment * 4)
    end = tl.load(table_ptr + segment * 4 + 1)
    before = tl.load(table_ptr + segment * 4 + 2)

    rows = tl.arange(0, CHUNK)
    channel = tl.arange(0, PADDED)[None, :]
    value = tile * BLOCK + tl.arange(0, BLOCK)
    state_at = value[:, None] + channel * DIM
    state_mask = (value < DIM)[:, None] & (channel < DIM)
    state = tl.zeros((BLOCK, PADDED), tl.float32)
    if before >= 0:
        index = before.to(tl.int64) * HEADS + head
        state = tl.load(starts_ptr + index * (DIM * DIM) + state_at, mask=state_mask, other=0.0)
    elif states_ptr is not None:
        index = tl.load(table_ptr + segment * 4 + 3).to(tl.int64) * HEADS + head
        state = tl.load(states_ptr + index * (DIM * DIM) + state_at, mask=state_mask, other=0.0)

    scale = DIM**-0.5
    gates = gate_ptr + head + rows * gate_row
    gate = tl.load(gates + first * tl.cast(gate_row, tl.int64), mask=first + rows < end, other=0.0)
    for start in range(first, end, CHUNK):
        present = start + rows < end
        mask = present[:, None] & (channel < DIM)
        v_mask = present[:, None] & (value < DIM)[None, :]
        q = load_head(q_ptr, start, q_row * UNIT, head, rows, mask, DIM, PADDED)
        k = load_head(k_ptr, start, k_row * UNIT, head, rows, mask, DIM, PADDED)
        v = load_head(v_ptr + tile * BLOCK, start, v_row * UNIT, head, rows, v_mask, DIM, BLOCK)
        log_gate = tl.where(present, _log_gate(gate.to(tl.float32), TEMPERATURE), 0.0)
        gate = tl.load(  # of the next chunk, ahead of its use
            gates + (start + CHUNK) * tl.cast(gate_row, tl.int64),
            mask=start + CHUNK + rows < end,
            other=0.0,
        )
        inside = tl.cumsum(log_gate, axis=0)  # from the chunk's start, inclusive
        whole = tl.sum(log_gate, axis=0)

        # Transposed: scores [key, query], out [Dv, query].
        q = tl.trans(q)
        distance = inside[None, :] - inside[:, None]
        distance = tl.where(rows[:, None] <= rows[None, :], distance, float("-inf"))
        scores = tl.dot(k, q, input_precision=PRECISION) * (tl.exp2(distance) * scale)
        scores = scores.to(v.dtype)
        out = tl.dot(state.to(v.dtype), q, input_precision=PRECISION) * tl.exp2(inside)[None, :]
        v = tl.trans(v)
        out = tl.dot(v, scores, out, input_precision=PRECISION)
        rows_ptr = out_ptr + start * tl.cast(HEADS * DIM, tl.int64) + head * DIM
        out_at = rows[:, None] * (HEADS * DIM) + value[None, :]
        tl.store(rows_ptr + out_at, tl.trans(out.to(v.dtype)), mask=v_mask)

        # Weighted, v enters the product from registers; k would have to go back to shared memory.
        v = (v * (tl.exp2(whole - inside) * scale)[None, :]).to(v.dtype)
        state = tl.dot(v, k, state * tl.exp2(whole), input_precision=PRECISION)

    if last_ptr is not None:
        if segment >= inner:
            index = (segment - inner).to(tl.int64) * HEADS + head
            tl.store(last_ptr + index * (DIM * DIM) + state_at, state, mask=state_mask)


@triton.jit(do_not_specialize=["count"])
def _norm_swish(
    out_ptr,  # [T, HEADS, DIM], contiguous, changed in place
    swish_ptr,  # [T, HEADS, DIM]
    count,  # T * HEADS
    swish_row,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """silu(swish) * RMSNorm(out) of each head."""
    index = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    mask = (index < count) & (column < DIM)
    out = tl.load(out_ptr + index * DIM + column, mask=mask, other=0.0).to(tl.float32)
    swish_ptr += index // HEADS * swish_row + index % HEADS * DIM
    swish = tl.load(swish_ptr + column, mask=mask, other=0.0).to(tl.float32)
    out *= tl.rsqrt(tl.sum(out * out, axis=1) / DIM + eps)[:, None]
    out *= silu(swish)
    tl.store(out_ptr + index * DIM + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _step(
    q_ptr,  # [B, HEADS, DIM]
    k_ptr,
    v_ptr,
    gate_ptr,  # [B, HEADS]
    cos_ptr,  # [B, DIM / 2]
    sin_ptr,
    swish_ptr,  # [B, HEADS, DIM]
    state_ptr,  # float32 [B, HEADS, DIM, DIM], changed in place
    out_ptr,  # [B, HEADS, DIM], contiguous
    q_row,
    k_row,
    v_row,
    swish_row,
    gate_row,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """One head of one sequence; PAIRS pairs of channels, two rows of the state each, at a time."""
    head = tl.program_id(0) % HEADS
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    value = tl.arange(0, PADDED)
    here = value < DIM
    state_ptr += (sequence * HEADS + head) * (DIM * DIM)
    q_ptr += sequence * q_row + head * DIM
    k_ptr += sequence * k_row + head * DIM
    v = tl.load(v_ptr + sequence * v_row + head * DIM + value, mask=here, other=0.0)
    v = v.to(tl.float32)[None, :]
    swish = tl.load(swish_ptr + sequence * swish_row + head * DIM + value, mask=here, other=0.0)
    swish = swish.to(tl.float32)
    gate = tl.load(gate_ptr + sequence * gate_row + head).to(tl.float32)
    decay = tl.exp2(_log_gate(gate, TEMPERATURE))
    scale = DIM**-0.5

    out = tl.zeros((PADDED,), tl.float32)
    for block in tl.static_range((DIM // 2 + PAIRS - 1) // PAIRS):
        pair = block * PAIRS + tl.arange(0, PAIRS)
        inside = pair < DIM // 2
        rows = state_ptr + pair[:, None] * (2 * DIM) + value[None, :]
        mask = inside[:, None] & here[None, :]
        even = tl.load(rows, mask=mask, other=0.0)
        odd = tl.load(rows + DIM, mask=mask, other=0.0)

        cos = tl.load(cos_ptr + sequence * (DIM // 2) + pair, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + sequence * (DIM // 2) + pair, mask=inside, other=0.0).to(tl.float32)
        q_1 = tl.load(q_ptr + 2 * pair, mask=inside, other=0.0).to(tl.float32)
        q_2 = tl.load(q_ptr + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
        k_1 = tl.load(k_ptr + 2 * pair, mask=inside, other=0.0).to(tl.float32)
        k_2 = tl.load(k_ptr + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
        q_even = (q_1 * cos - q_2 * sin).to(dtype).to(tl.float32)
        q_odd = (q_1 * sin + q_2 * cos).to(dtype).to(tl.float32)
        k_even = (k_1 * cos - k_2 * sin).to(dtype).to(tl.float32) * scale
        k_odd = (k_1 * sin + k_2 * cos).to(dtype).to(tl.float32) * scale

        even = even * decay + k_even[:, None] * v
        odd = odd * decay + k_odd[:, None] * v
        tl.store(rows, even, mask=mask)
        tl.store(rows + DIM, odd, mask=mask)
        out += tl.sum(even * q_even[:, None] + odd * q_odd[:, None], axis=0)

    out *= tl.rsqrt(tl.sum(out * out, axis=0) / DIM + eps)
    out *= silu(swish)
    tl.store(out_ptr + (sequence * HEADS + head) * DIM + value, out.to(dtype), mask=here)
