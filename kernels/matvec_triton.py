"""One row times a matrix, with norm, SwiGLU or residual in the same launch, in Triton.

Each of the N * K weights is read once for 2 operations; input, norm weight and output are a few
KiB, which every program finds in the caches. So memory alone limits these kernels: a program takes
a few whole rows, with all their loads in flight together, before it waits for anything else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`matvec.norm_linear` for x [1, K] on the GPU; every program norms x for itself."""
    rows, width = weight.shape
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    block, block_rows, warps = _config(rows, width, 1, 64)
    _norm_linear[(triton.cdiv(rows, block_rows),)](
        x.contiguous(),
        norm_weight,
        weight,
        out,
        rows,
        weight.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        BLOCK_ROWS=block_rows,
        num_warps=warps,
    )
    return out


def norm_swiglu_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`matvec.norm_swiglu_linear` for x [1, K] on the GPU; a program takes rows of both halves."""
    rows, width = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    block, block_rows, warps = _config(rows, width, 2, 64)
    _norm_swiglu_linear[(triton.cdiv(rows, block_rows),)](
        x.contiguous(),
        norm_weight,
        weight,
        out,
        rows,
        weight.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        BLOCK_ROWS=block_rows,
        num_warps=warps,
    )
    return out


def linear_add_(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """`matvec.linear_add` for x [1, K] on the GPU; overwrites `residual` and returns it."""
    rows, width = weight.shape
    block, block_rows, warps = _config(rows, width, 1, 16)
    _linear_add[(triton.cdiv(rows, block_rows),)](
        x.contiguous(),
        weight,
        residual,
        rows,
        weight.stride(0),
        WIDTH=width,
        BLOCK=block,
        BLOCK_ROWS=block_rows,
        num_warps=warps,
    )
    return residual


def _config(rows: int, width: int, matrices: int, each: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile, and its warps.

    About 8192 weights to a program; but fewer rows where there would not be 512 programs, 4 for
    each of 128 multiprocessors.

    Args:
        rows: of each matrix.
        width: of a row.
        matrices: of which a program reads the same rows.
        each: weights of a thread. Norms want few warps, which must wait for each other.
    """
    block = triton.next_power_of_2(width)
    block_rows = max(1, 8192 // (block * matrices))
    while block_rows > 1 and rows < 512 * block_rows:
        block_rows //= 2
    return block, block_rows, min(16, max(1, block * block_rows * matrices // (32 * each)))


@triton.jit
def _load_weights(weight_ptr, row, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows, in float32."""
    column = tl.arange(0, BLOCK)[None, :]
    weights = tl.load(
        weight_ptr + row.to(tl.int64)[:, None] * row_stride + column,
        mask=column < WIDTH,
        other=0.0,
        eviction_policy="evict_first",  # read once; the caches are for what is read again
    )
    return weights.to(tl.float32)


@triton.jit
def _load_input(x_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    return tl.load(x_ptr + column, mask=column < WIDTH, other=0.0)


@triton.jit
def _normed_input(x_ptr, norm_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The input as `rms_norm` rounds it, in float32."""
    x = _load_input(x_ptr, WIDTH, BLOCK)
    norm_weight = _load_input(norm_ptr, WIDTH, BLOCK)
    wide = x.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    return (wide.to(x.dtype) * norm_weight).to(tl.float32)


# In the kernels below, rows past the end read the last row again, so that the loads need no mask
# for them. The compiler may not move a load behind a barrier, and a barrier does not wait for
# loads: so all loads of weights are under way before the input is normed. Without it, the compiler
# lets some or all of them wait, to save registers.


@triton.jit
def _norm_linear(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    rows,
    row_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(out_row, rows - 1)
    weights = _load_weights(weight_ptr, row, row_stride, WIDTH, BLOCK)
    tl.debug_barrier()
    x = _normed_input(x_ptr, norm_ptr, eps, WIDTH, BLOCK)
    out = tl.sum(weights * x[None, :], axis=1)
    tl.store(out_ptr + out_row, out.to(out_ptr.dtype.element_ty), mask=out_row < rows)


@triton.jit
def _norm_swiglu_linear(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    rows,
    row_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(out_row, rows - 1)
    weights = _load_weights(weight_ptr, row, row_stride, WIDTH, BLOCK)
    gates = _load_weights(weight_ptr, rows + row, row_stride, WIDTH, BLOCK)
    tl.debug_barrier()
    x = _normed_input(x_ptr, norm_ptr, eps, WIDTH, BLOCK)
    a = tl.sum(weights * x[None, :], axis=1)
    out = a * tl.sigmoid(a) * tl.sum(gates * x[None, :], axis=1)
    tl.store(out_ptr + out_row, out.to(out_ptr.dtype.element_ty), mask=out_row < rows)


@triton.jit
def _linear_add(
    x_ptr,
    weight_ptr,
    residual_ptr,
    rows,
    row_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(out_row, rows - 1)
    weights = _load_weights(weight_ptr, row, row_stride, WIDTH, BLOCK)
    tl.debug_barrier()
    residual = tl.load(residual_ptr + out_row, mask=out_row < rows, other=0.0).to(tl.float32)
    x = _load_input(x_ptr, WIDTH, BLOCK).to(tl.float32)
    out = residual + tl.sum(weights * x[None, :], axis=1)
    tl.store(residual_ptr + out_row, out.to(residual_ptr.dtype.element_ty), mask=out_row < rows)
