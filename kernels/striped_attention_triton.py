"""Triton kernel of `striped_attention`: the merging of what processes add to an attention.

Reads all of it once, 4 * n * Hq * (D + 1) bytes for each query and n processes, and writes the
outputs. While one text is decoded that is some KiB: what counts is that it is one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import padded


def merged(every: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """As `striped_attention.merged`."""
    size, rows, width = every.shape
    dim = width // heads - 1
    out = torch.empty(rows, heads, dim, dtype=dtype, device=every.device)
    _merge[(rows * heads,)](
        every, out, rows, SIZE=size, SIZE_PAD=triton.next_power_of_2(size), HEADS=heads, DIM=dim,
        DIM_PAD=padded(dim), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _merge(
    every_ptr,  # float32 [SIZE, rows, HEADS * DIM + HEADS]
    out_ptr,  # [rows, HEADS, DIM]
    rows,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """One query's head: the mean of the outputs, weighted by exp of their log-sum-exp."""
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    process = tl.arange(0, SIZE_PAD)
    dims = tl.arange(0, DIM_PAD)
    part = every_ptr + (process * rows + row) * (HEADS * DIM + HEADS)
    there = process < SIZE
    norm = tl.load(part + HEADS * DIM + head, mask=there, other=float("-inf"))
    top = tl.max(norm, 0)
    weight = tl.exp(norm - tl.where(top == float("-inf"), 0.0, top))  # nobody has read a key
    at = part[:, None] + head * DIM + dims[None, :]
    x = tl.load(at, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(x * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (row * HEADS + head) * DIM + dims, out, mask=dims < DIM)
