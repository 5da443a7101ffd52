"""Triton kernels of `logits`: each reads them once, which is what it costs.

For 262144 tokens in bfloat16 that is 512 KiB a row. PyTorch's own operations widen them first and
take the largest, the exponentials, their sum and the index apart: some eight times as many bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # columns at a time
LOG2_E = tl.constexpr(math.log2(math.e))


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """As `logits.soft_cap`; in float32, rounded once."""
    count = logits.numel()
    _cap[(triton.cdiv(count, _BLOCK),)](logits, count, CAP=float(cap), BLOCK=_BLOCK, num_warps=8)
    return logits


def normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `logits.normaliser`."""
    rows, columns = logits.shape
    norms = torch.empty(rows, dtype=torch.float32, device=logits.device)
    likeliest = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _normalise[(rows,)](logits, norms, likeliest, COLUMNS=columns, BLOCK=_BLOCK, num_warps=8)
    return norms, likeliest


@triton.jit(do_not_specialize=["count"])
def _cap(logits_ptr, count, CAP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    capped = CAP * (2 * tl.sigmoid(x * (2 / CAP)) - 1)  # tanh z is 2 sigmoid(2 z) - 1
    tl.store(logits_ptr + at, capped.to(logits_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _normalise(
    logits_ptr,  # [rows, COLUMNS]
    norms_ptr,  # float32 [rows]
    likeliest_ptr,  # int64 [rows]
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, of which each of BLOCK lanes takes every BLOCK-th column, with a sum, its largest
    and the first place of that of its own."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    logits_ptr += row.to(tl.int64) * COLUMNS
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    place = lane
    for start in range(0, COLUMNS, BLOCK):
        column = start + lane
        x = tl.load(logits_ptr + column, mask=column < COLUMNS, other=float("-inf"))
        x = x.to(tl.float32)
        place = tl.where(x > top, column, place)
        new_top = tl.maximum(top, x)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        # No number, and infinity less itself, stay no number from here on.
        total = total * tl.exp2((top - shift) * LOG2_E) + tl.exp2((x - shift) * LOG2_E)
        top = new_top
    peak = tl.max(top, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(total * tl.exp2((top - shift) * LOG2_E), 0)
    tl.store(norms_ptr + row, shift + tl.log(total))
    first = tl.min(tl.where(top == peak, place, COLUMNS - 1), 0)
    tl.store(likeliest_ptr + row, first.to(tl.int64))
