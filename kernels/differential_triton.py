"""Difference and norm of pairs of heads as one Triton kernel: reads and writes each number once.

[T, H, D] takes 1.5 * T * H * D numbers of traffic and about 4 operations for each that is read: 15
KiB per token for 40 heads of 128 in bfloat16, so that memory alone limits it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048  # that a program writes


def differential_norm(x: Tensor, factor: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`differential.differential_norm` on the GPU."""
    x = x.contiguous()
    tokens, heads, dim = x.shape
    out = torch.empty(tokens, heads // 2, dim, dtype=x.dtype, device=x.device)
    count = tokens * heads // 2
    padded = triton.next_power_of_2(dim)
    rows = max(1, _NUMBERS // padded)
    _differential_norm[(triton.cdiv(count, rows),)](
        x, factor, weight, out, count, eps, DIM=dim, PADDED=padded, ROWS=rows, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["count"])
def _differential_norm(
    x_ptr,  # [count, 2, DIM], contiguous
    factor_ptr,  # float32 [1]
    weight_ptr,  # float32 [DIM]
    out_ptr,  # [count, DIM], contiguous
    count,
    eps,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some pairs."""
    index = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, PADDED)[None, :]
    mask = (index < count) & (column < DIM)
    x_ptr += index * (2 * DIM) + column
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + DIM, mask=mask, other=0.0).to(tl.float32)
    out = first - tl.load(factor_ptr) * second
    out *= tl.rsqrt(tl.sum(out * out, axis=1) / DIM + eps)[:, None]
    out *= tl.load(weight_ptr + column, mask=column < DIM, other=0.0)
    tl.store(out_ptr + index * DIM + column, out.to(out_ptr.dtype.element_ty), mask=mask)
