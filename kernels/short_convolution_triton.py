"""The short convolution as one Triton kernel, and its step as another.

[T, C] is read and written once, 4 C bytes per token in bfloat16 (36 KiB for the 9216 channels of q,
k and v together at 9 heads of 256 / 512), with 2 W operations and a silu for each number: memory
alone limits it. The W - 1 inputs before a token are read again, from the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common_triton import silu
from .launch import dense_rows, in_units
from .segments import blocks
from .sequences import Sequences

_TOKENS, _CHANNELS = 16, 128  # a program's tile


def short_convolution(
    x: Tensor,
    weight: Tensor,
    sequences: Sequences,
    tails: Tensor | None,
    keep: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`short_convolution.short_convolution` on the GPU."""
    length, channels = x.shape
    width = weight.shape[1]
    x = dense_rows(x)
    taps = dense_rows(weight.T)  # a tile's channels side by side
    tails = None if tails is None else tails.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = None
    if keep:
        last = x.new_empty(len(sequences.lengths), width - 1, channels)
    before = triton.next_power_of_2(width - 1)
    tokens = max(before, _TOKENS)  # only a sequence's first tile reaches back into its tail
    table = blocks(sequences, tokens)
    tiles = triton.cdiv(channels, _CHANNELS)
    unit, (x_row,) = in_units(x.stride(0))
    _convolve[(tiles * len(table),)](
        x, taps, bias, table, tails, out, last, x_row, taps.stride(0), channels, tiles,
        UNIT=unit, WIDTH=width, BEFORE=before, TOKENS=tokens, CHANNELS=_CHANNELS, num_warps=4,
    )  # fmt: skip
    return out, last


def short_convolution_step(x: Tensor, weight: Tensor, tail: Tensor, bias: Tensor | None) -> Tensor:
    """`short_convolution.short_convolution_step` on the GPU."""
    x = dense_rows(x)
    batch, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(channels, _CHANNELS)
    _step[(tiles * batch,)](
        x, weight, bias, tail, out, x.stride(0), *weight.stride(), channels, tiles,
        WIDTH=weight.shape[1], CHANNELS=_CHANNELS, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["x_row", "tiles"])
def _convolve(
    x_ptr,  # [T, C]
    taps_ptr,  # [WIDTH, C]
    bias_ptr,  # [C] or None
    table_ptr,  # of blocks of TOKENS tokens
    tails_ptr,  # [.., WIDTH - 1, C], contiguous, or None: zeros
    out_ptr,  # [T, C], contiguous
    last_ptr,  # [sequences, WIDTH - 1, C] or None: not asked for
    x_row,
    taps_row,
    channels,
    tiles,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BEFORE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A block of tokens of one sequence, in some channels."""
    x_row *= UNIT
    table_ptr += tl.program_id(0) // tiles * 5
    first = tl.load(table_ptr)
    begin = tl.load(table_ptr + 1)
    end = tl.load(table_ptr + 2)
    source = tl.load(table_ptr + 4).to(tl.int64)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    here = channel < channels
    rows = tl.arange(0, TOKENS)
    token = first + rows
    present = token < end

    x_first = x_ptr + first * tl.cast(x_row, tl.int64)
    y = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32)
    for j in tl.static_range(WIDTH):
        back = WIDTH - 1 - j
        x = tl.load(
            x_first + (rows - back)[:, None] * x_row + channel,
            mask=(present & (token >= begin + back))[:, None] & here,
            other=0.0,
        ).to(tl.float32)
        if tails_ptr is not None and back > 0:
            if first == begin:
                row = rows + j  # of the tail
                x += tl.load(
                    tails_ptr + (source * (WIDTH - 1) + row)[:, None] * channels + channel,
                    mask=(present & (row < WIDTH - 1))[:, None] & here,
                    other=0.0,
                ).to(tl.float32)
        y += x * tl.load(taps_ptr + j * taps_row + channel, mask=here, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + (first.to(tl.int64) + rows)[:, None] * channels + channel,
        silu(y).to(out_ptr.dtype.element_ty),
        mask=present[:, None] & here,
    )

    if last_ptr is not None:
        if first + TOKENS >= end:  # the last block of its sequence
            tail = tl.arange(0, BEFORE)
            at = end - (WIDTH - 1) + tail
            kept = tail < WIDTH - 1
            last = tl.load(
                x_ptr + at.to(tl.int64)[:, None] * x_row + channel,
                mask=(kept & (at >= begin))[:, None] & here,
                other=0.0,
            )
            if tails_ptr is not None:
                if end - (WIDTH - 1) < begin:
                    before = source * (WIDTH - 1) + at - begin + WIDTH - 1
                    last += tl.load(
                        tails_ptr + before[:, None] * channels + channel,
                        mask=(kept & (at < begin))[:, None] & here,
                        other=0.0,
                    )
            index = tl.load(table_ptr + 3).to(tl.int64) * (WIDTH - 1) + tail
            tl.store(
                last_ptr + index[:, None] * channels + channel,
                last,
                mask=kept[:, None] & here,
            )


@triton.jit(do_not_specialize=["tiles"])
def _step(
    x_ptr,  # [B, C]
    weight_ptr,  # [C, WIDTH]
    bias_ptr,  # [C] or None
    tail_ptr,  # [B, WIDTH - 1, C], changed in place
    out_ptr,  # [B, C], contiguous
    x_row,
    weight_row,
    weight_column,
    channels,
    tiles,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some channels of one sequence."""
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < channels
    tail_ptr += sequence * (WIDTH - 1) * channels + channel
    newest = tl.load(x_ptr + sequence * x_row + channel, mask=here, other=0.0)
    y = tl.zeros((CHANNELS,), tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        x = tl.load(tail_ptr + j * channels, mask=here, other=0.0)
        tap = tl.load(
            weight_ptr + channel * weight_row + j * weight_column, mask=here, other=0.0
        ).to(tl.float32)
        y += x.to(tl.float32) * tap
        if j > 0:
            tl.store(tail_ptr + (j - 1) * channels, x, mask=here)
    tl.store(tail_ptr + (WIDTH - 2) * channels, newest, mask=here)
    tap = tl.load(
        weight_ptr + channel * weight_row + (WIDTH - 1) * weight_column, mask=here, other=0.0
    ).to(tl.float32)
    y += newest.to(tl.float32) * tap
    out = silu(y).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + sequence * channels + channel, out, mask=here)
