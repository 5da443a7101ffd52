"""Rotary embedding as one Triton kernel: reads and writes each number once.

[T, H, D] takes 2 * T * H * D numbers of traffic and 3 operations for each: memory alone limits it.
A program reads the angles of its tokens once for several heads. The last tokens come first: of what
the matrix product before has written, they are still in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense_rows, in_units

_ROWS, _HEADS = 8, 8  # tokens, and at most so many heads, to a program


def rotate(x: Tensor, angles: tuple[Tensor, Tensor], in_place: bool) -> Tensor:
    """`rotary.rotate` on the GPU."""
    tokens, heads, dim = x.shape
    x = dense_rows(x)
    out = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit, strides = in_units(x.stride(0), x.stride(1), out.stride(0), out.stride(1))
    group = max(n for n in range(1, _HEADS + 1) if heads % n == 0)
    groups = heads // group
    _rotate_heads[(triton.cdiv(tokens, _ROWS) * groups,)](
        x, *angles, out, tokens, *strides,
        DIM=dim, PADDED=triton.next_power_of_2(dim), UNIT=unit, ROWS=_ROWS, GROUP=group,
        GROUPS=groups,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "x_row", "x_head", "out_row", "out_head"])
def _rotate_heads(
    x_ptr,
    cos_ptr,  # [T, DIM / 2]
    sin_ptr,
    out_ptr,
    tokens,
    x_row,
    x_head,
    out_row,
    out_head,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,  # heads of a program
    GROUPS: tl.constexpr,
):
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // GROUPS
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    pair = tl.arange(0, PADDED // 2)[None, :]
    mask = (row < tokens) & (channel < DIM)
    pair_mask = (row < tokens) & (pair < DIM // 2)
    cos = tl.load(cos_ptr + row * (DIM // 2) + pair, mask=pair_mask).to(tl.float32)
    sin = tl.load(sin_ptr + row * (DIM // 2) + pair, mask=pair_mask).to(tl.float32)
    x_ptr += row * (x_row * UNIT) + channel
    out_ptr += row * (out_row * UNIT) + channel
    for i in tl.static_range(GROUP):
        head = tl.program_id(0) % GROUPS * GROUP + i
        x = tl.load(x_ptr + head * (x_head * UNIT), mask=mask)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), ROWS, PADDED // 2, 2))
        out = tl.interleave(even * cos - odd * sin, even * sin + odd * cos).to(x.dtype)
        tl.store(out_ptr + head * (out_head * UNIT), out, mask=mask)
