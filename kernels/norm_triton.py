"""RMSNorm as one Triton kernel: reads and writes each number once.

[T, d] takes 2 * T * d numbers of traffic and about 4 operations for each: at d = 3072 in bfloat16,
12 KiB per token, so that memory alone limits it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense_rows, packed_heads


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    """`norm.rms_norm` for x [..., d] on the GPU, plus `residual`; rows that are not evenly apart,
    be it in heads [T, H, d] that lie side by side, are copied."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, heads = (packed_heads(x), x.shape[1]) if x.dim() == 3 else (x.reshape(-1, width), 1)
    x = dense_rows(x)
    rows = len(x) * heads
    block, block_rows, warps = _config(width)
    _rms_norm[(triton.cdiv(rows, block_rows),)](
        x,
        weight,
        None if residual is None else residual.contiguous(),
        out,
        rows,
        x.stride(0),
        eps,
        HEADS=heads,
        WIDTH=width,
        BLOCK=block,
        BLOCK_ROWS=block_rows,
        num_warps=warps,
    )
    return out


def _config(width: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile, and its warps.

    Wide rows go one to a program; narrow ones, such as heads, go many, so that there are about
    32 numbers, 64 bytes of bfloat16, in flight for each thread.
    """
    block = triton.next_power_of_2(width)
    block_rows = max(1, 4096 // block)
    return block, block_rows, min(16, max(4, block // 1024))


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    rows,
    row_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)
    row = row.to(tl.int64)[:, None]

    at = row // HEADS * row_stride + row % HEADS * WIDTH + column
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
    out = (wide * scale[:, None]).to(x.dtype)
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + row * WIDTH + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, out, mask=mask)
