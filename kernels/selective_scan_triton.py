"""The selective scan in Triton: prefill of packed sequences, and the one-token step of decoding.

Prefill cuts sequences into segments where there are too few to fill the card, and runs
 1. `_scan` with SUM: what each segment but a sequence's last adds to the state, from zero, and the
    sum of its time steps;
 2. `_hand_on`: from these, the state after each of these segments;
 3. `_scan`: each segment from its starting state, token by token, with the output.
Per token and channel 3 reads x, dt and the gate and writes the output, 8 bytes in bfloat16, and 1
reads x and dt once more, 4; b and c are few. For 32768 tokens and 5120 channels these are 1.25 and
0.63 GiB, 0.45 and 0.22 ms at 3 TB/s; a segment's state is moved four times, 1.3 MiB for 16 states,
and mostly stays in the L2 cache.
Operations: an exponential and four more for each state of each token and channel, and no product of
matrices to do them, since each decays at its own rate. The exponentials limit: with those of
softplus and silu they are 80 for 4 channels of 16 states in 3, and 72 in 1, at 16 per cycle and
multiprocessor: in that example 0.9 and 0.8 ms on 132 of them at 1.75 GHz. All other instructions
take nearly as long, beside it, so that polynomials in their place would gain nothing.

Hence segments, though 1 does most of the work twice: 5120 channels of one sequence are 40 programs
for 528 schedulers, 12 ms. A channel's states divided among threads until most schedulers have a
program would need none, but sums between threads, and every time step computed by several, with
nothing to hide what a token waits for: 1.8 ms at least. Sequences that fill the card are not cut.

A thread has 4 channels and all their states in registers, so that nothing is exchanged between
threads, rows are read 8 bytes at a time in bfloat16, and a token's softplus is computed once. This
follows from the shape of the tile, [states, channels], if the channels of whatever is read lie side
by side: also of a and of the states, which are [N, E] therefore. A token is read one token ahead.

The step reads and writes a float32 state once, 8 N E bytes for each sequence, 640 KiB in that
example, and a once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common_triton import silu, softplus
from .launch import dense_rows, in_units, multiprocessors
from .segments import segments
from .sequences import Sequences

MIN_SEGMENT = 64  # tokens; shorter ones cost more traffic for states than they save time
# Of 1 warp each, to a multiprocessor: as many as its registers hold of those with an output.
_PROGRAMS = 8
_NUMBERS = 2048  # of the state that a program holds: 64 in each thread
_BLOCK = 512  # of the state, to a program of `_hand_on`


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    states: Tensor | None,
    gate: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """`selective_scan.selective_scan` on the GPU."""
    count, channels = a.shape
    x, dt, b, c = (dense_rows(part) for part in (x, dt, b, c))
    gate = None if gate is None else dense_rows(gate)
    a, d, dt_bias = a.contiguous(), d.contiguous(), dt_bias.contiguous()
    states = None if states is None else states.contiguous()
    block, padded = _tile(count, channels)
    tiles = triton.cdiv(channels, block)
    inner, scanned, table = sequences.table(
        ("selective_scan", tiles),
        lambda: segments(sequences, tiles, 1, MIN_SEGMENT, _PROGRAMS * multiprocessors(x.device)),
    )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    starts = torch.empty(inner, count, channels, dtype=torch.float32, device=x.device)
    times = starts.new_empty(inner, channels)
    last = starts.new_empty(len(sequences.lengths), count, channels) if keep else None

    rows = [part.stride(0) for part in (x, dt, b, c, x if gate is None else gate)]
    unit, rows = in_units(*rows)
    total = inner + len(sequences.lengths)

    def scan(number: int, of_sums: bool) -> None:
        _scan[(tiles * number,)](
            x, dt, a, b, c, d, dt_bias, gate, table, states, starts, times, out, last, *rows, inner,
            CHANNELS=channels, STATES=count, PADDED=padded, UNIT=unit, BLOCK=block, SUM=of_sums,
            num_warps=1,
        )  # fmt: skip

    if inner:
        scan(inner, True)
        blocks = triton.cdiv(count * channels, _BLOCK)
        _hand_on[(blocks * scanned,)](
            table, a, states, starts, times, total,
            CHANNELS=channels, SIZE=count * channels, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    scan(total, False)
    return out, last


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """`selective_scan.selective_scan_step` on the GPU."""
    count, channels = a.shape
    x, dt, b, c = (dense_rows(part) for part in (x, dt, b, c))
    gate = None if gate is None else dense_rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, padded = _tile(count, channels)
    _step[(triton.cdiv(channels, block) * len(x),)](
        x, dt, a.contiguous(), b, c, d.contiguous(), dt_bias.contiguous(), gate, state, out,
        x.stride(0), dt.stride(0), b.stride(0), c.stride(0), 0 if gate is None else gate.stride(0),
        CHANNELS=channels, STATES=count, PADDED=padded, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return out


def _tile(count: int, channels: int) -> tuple[int, int]:
    """Channels of a program's tile, and its states, padded to a power of two."""
    padded = triton.next_power_of_2(count)
    return min(triton.next_power_of_2(channels), max(1, _NUMBERS // padded)), padded


@triton.jit(do_not_specialize=["x_row", "dt_row", "b_row", "c_row", "gate_row", "inner"])
def _scan(
    x_ptr,  # [T, CHANNELS]
    dt_ptr,
    a_ptr,  # float32 [STATES, CHANNELS]
    b_ptr,  # [T, STATES]
    c_ptr,
    d_ptr,  # float32 [CHANNELS]
    bias_ptr,
    gate_ptr,  # [T, CHANNELS] or None
    table_ptr,
    states_ptr,  # float32 [.., STATES, CHANNELS] or None: zeros
    starts_ptr,  # float32 [segments, STATES, CHANNELS], state after each, or what it adds
    times_ptr,  # float32 [segments, CHANNELS]
    out_ptr,  # [T, CHANNELS], contiguous
    last_ptr,  # float32 [sequences, STATES, CHANNELS] or None: not asked for
    x_row,
    dt_row,
    b_row,
    c_row,
    gate_row,
    inner,  # segments that are not the last of their sequence
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    """A segment in some channels: its output, and the state after it where it ends a sequence; or,
    with SUM, what it adds to the state and the sum of its time steps."""
    TILES: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) % TILES
    segment = tl.program_id(0) // TILES
    first = tl.load(table_ptr + segment * 4)
    end = tl.load(table_ptr + segment * 4 + 1)

    channel = tile * BLOCK + tl.arange(0, BLOCK)
    here = channel < CHANNELS
    number = tl.arange(0, PADDED)
    exists = number < STATES
    at = number[:, None] * CHANNELS + channel[None, :]
    mask = exists[:, None] & here[None, :]
    a = tl.load(a_ptr + at, mask=mask, other=0.0) * 1.4426950408889634  # as exp2 takes it
    bias = tl.load(bias_ptr + channel, mask=here, other=0.0)
    state = tl.zeros((PADDED, BLOCK), tl.float32)
    if SUM:
        time = tl.zeros((BLOCK,), tl.float32)
    else:
        d = tl.load(d_ptr + channel, mask=here, other=0.0)
        before = tl.load(table_ptr + segment * 4 + 2)
        if before >= 0:
            start_at = before.to(tl.int64) * (STATES * CHANNELS) + at
            state = tl.load(starts_ptr + start_at, mask=mask, other=0.0)
        elif states_ptr is not None:
            source = tl.load(table_ptr + segment * 4 + 3).to(tl.int64)
            state = tl.load(states_ptr + source * (STATES * CHANNELS) + at, mask=mask, other=0.0)

    row = first.to(tl.int64)
    x_ptr += row * (x_row * UNIT) + channel
    dt_ptr += row * (dt_row * UNIT) + channel
    b_ptr += row * (b_row * UNIT) + number
    next_x = tl.load(x_ptr, mask=here, other=0.0)
    next_dt = tl.load(dt_ptr, mask=here, other=0.0)
    next_b = tl.load(b_ptr, mask=exists, other=0.0)
    if not SUM:
        c_ptr += row * (c_row * UNIT) + number
        out_ptr += row * CHANNELS + channel
        next_c = tl.load(c_ptr, mask=exists, other=0.0)
        if gate_ptr is not None:
            gate_ptr += row * (gate_row * UNIT) + channel
            next_gate = tl.load(gate_ptr, mask=here, other=0.0)

    for token in range(first, end):
        x = next_x.to(tl.float32)
        step = softplus(next_dt.to(tl.float32) + bias)
        b = next_b.to(tl.float32)
        # Loaded one token ahead; at the last one, that token's own again.
        ahead = tl.where(token + 1 < end, UNIT, 0)
        x_ptr += ahead * x_row
        dt_ptr += ahead * dt_row
        b_ptr += ahead * b_row
        next_x = tl.load(x_ptr, mask=here, other=0.0)
        next_dt = tl.load(dt_ptr, mask=here, other=0.0)
        next_b = tl.load(b_ptr, mask=exists, other=0.0)
        state = state * tl.exp2(a * step[None, :]) + b[:, None] * (step * x)[None, :]
        if SUM:
            time += step
        else:
            out = tl.sum(state * next_c.to(tl.float32)[:, None], axis=0) + d * x
            c_ptr += ahead * c_row
            next_c = tl.load(c_ptr, mask=exists, other=0.0)
            if gate_ptr is not None:
                out *= silu(next_gate.to(tl.float32))
                gate_ptr += ahead * gate_row
                next_gate = tl.load(gate_ptr, mask=here, other=0.0)
            tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=here)
            out_ptr += CHANNELS

    index = segment.to(tl.int64)
    if SUM:
        tl.store(starts_ptr + index * (STATES * CHANNELS) + at, state, mask=mask)
        tl.store(times_ptr + index * CHANNELS + channel, time, mask=here)
    elif last_ptr is not None:
        if segment >= inner:
            tl.store(last_ptr + (index - inner) * (STATES * CHANNELS) + at, state, mask=mask)


@triton.jit(do_not_specialize=["scans"])
def _hand_on(
    table_ptr,
    a_ptr,  # float32 [STATES, CHANNELS]
    states_ptr,  # float32 [.., STATES, CHANNELS] or None: zeros
    sums_ptr,  # float32 [segments, STATES, CHANNELS]
    times_ptr,  # float32 [segments, CHANNELS]
    scans,  # row of the table where the sequences of several segments begin
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,  # STATES * CHANNELS
    BLOCK: tl.constexpr,
):
    """Replaces what each segment adds to the state by the state after that segment."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    channel = at % CHANNELS
    row = table_ptr + (scans + tl.program_id(0) // BLOCKS) * 4
    a = tl.load(a_ptr + at, mask=mask, other=0.0) * 1.4426950408889634
    if states_ptr is not None:
        source = tl.load(row + 2).to(tl.int64)
        state = tl.load(states_ptr + source * SIZE + at, mask=mask, other=0.0)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    for segment in tl.range(tl.load(row), tl.load(row + 1), num_stages=4):
        time_at = segment * tl.cast(CHANNELS, tl.int64) + channel
        sum_at = segment * tl.cast(SIZE, tl.int64) + at
        time = tl.load(times_ptr + time_at, mask=mask, other=0.0)
        state = state * tl.exp2(a * time) + tl.load(sums_ptr + sum_at, mask=mask, other=0.0)
        tl.store(sums_ptr + sum_at, state, mask=mask)


@triton.jit
def _step(
    x_ptr,  # [B, CHANNELS]
    dt_ptr,
    a_ptr,  # float32 [STATES, CHANNELS]
    b_ptr,  # [B, STATES]
    c_ptr,
    d_ptr,  # float32 [CHANNELS]
    bias_ptr,
    gate_ptr,  # [B, CHANNELS] or None
    state_ptr,  # float32 [B, STATES, CHANNELS], changed in place
    out_ptr,  # [B, CHANNELS], contiguous
    x_row,
    dt_row,
    b_row,
    c_row,
    gate_row,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some channels of one sequence."""
    TILES: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    sequence = (tl.program_id(0) // TILES).to(tl.int64)
    channel = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    here = channel < CHANNELS
    number = tl.arange(0, PADDED)
    exists = number < STATES
    at = number[:, None] * CHANNELS + channel[None, :]
    mask = exists[:, None] & here[None, :]
    state_ptr += sequence * (STATES * CHANNELS)
    state = tl.load(state_ptr + at, mask=mask, other=0.0)
    a = tl.load(a_ptr + at, mask=mask, other=0.0) * 1.4426950408889634
    x = tl.load(x_ptr + sequence * x_row + channel, mask=here, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + sequence * dt_row + channel, mask=here, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + sequence * b_row + number, mask=exists, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + sequence * c_row + number, mask=exists, other=0.0).to(tl.float32)
    step = softplus(dt + tl.load(bias_ptr + channel, mask=here, other=0.0))
    state = state * tl.exp2(a * step[None, :]) + b[:, None] * (step * x)[None, :]
    tl.store(state_ptr + at, state, mask=mask)
    out = tl.sum(state * c[:, None], axis=0)
    out += tl.load(d_ptr + channel, mask=here, other=0.0) * x
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sequence * gate_row + channel, mask=here, other=0.0)
        out *= silu(gate.to(tl.float32))
    out_at = sequence * CHANNELS + channel
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=here)
