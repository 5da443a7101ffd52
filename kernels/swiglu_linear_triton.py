"""A matrix product with SwiGLU as its end, in Triton, for Hopper.

The product does 4 * K * F operations per token; apart, it also writes 2 * F numbers per token,
which SwiGLU reads again. At K = 3072 and F = 8192 in bfloat16 that is 64 KiB, or a seventh of the
product's time at 700 TFLOP/s and 3 TB/s. What it costs is that the product is not the library's.

It keeps up with that by three things. Tiles come through tensor descriptors, Hopper's copy engine,
which take no registers. One tile of x meets both halves of the weights in one instruction of 256
columns, after which each thread has both numbers that it multiplies. And the loops over tiles and
over K are one pipeline, so that the first loads of a tile are under way while the one before is
finished and stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import programs

_TOKENS, _COLUMNS, _DEPTH = 128, 128, 64  # of a tile: of the output, and along K
_GROUP = 16  # tiles of tokens that meet the same weights one after the other


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`swiglu_linear.swiglu_linear` for 16-bit x [T, K] on the GPU: in float32, rounded once."""
    tokens, width = x.shape
    halves = weight.unflatten(0, (2, -1))
    hidden = halves.shape[1]
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(tokens, _TOKENS) * triton.cdiv(hidden, _COLUMNS)
    _swiglu_linear[(min(tiles, programs(x.device) // 2),)](
        TensorDescriptor.from_tensor(x, [_TOKENS, _DEPTH]),
        TensorDescriptor.from_tensor(halves, [2, _COLUMNS, _DEPTH]),
        TensorDescriptor.from_tensor(out, [_TOKENS, _COLUMNS]),
        tokens,
        WIDTH=width,
        HIDDEN=hidden,
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        GROUP=_GROUP,
        num_warps=8,
        num_stages=3,
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _swiglu_linear(
    x,  # [T, WIDTH]
    weight,  # [2, HIDDEN, WIDTH]
    out,  # [T, HIDDEN]
    tokens,  # T
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Descriptors read zeros beyond the ends of a tensor and write nothing there."""
    down = tl.cdiv(tokens, TOKENS)
    across: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        # Down the rows of a group first, so that programs side by side share tiles in the L2 cache.
        first = tile // (GROUP * across) * GROUP
        rows = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % rows) * TOKENS
        column = tile % (GROUP * across) // rows * COLUMNS

        sums = tl.zeros((TOKENS, 2 * COLUMNS), tl.float32)
        for k in range(0, WIDTH, DEPTH):
            both = tl.reshape(weight.load([0, column, k]), (2 * COLUMNS, DEPTH))
            sums = tl.dot(x.load([row, k]), tl.trans(both), sums)
        a, b = tl.split(tl.permute(tl.reshape(sums, (TOKENS, 2, COLUMNS)), (0, 2, 1)))
        out.store([row, column], (a * tl.sigmoid(a) * b).to(out.dtype))
