"""Matrix products with SwiGLU or rotation as their end, in Triton, for Hopper.

A product takes 2 * K operations for each number that it writes, at K = 3072 and 700 TFLOP/s 8.8 ps.
What follows it, apart, has for each such number 3 bytes of traffic (SwiGLU, which writes half as
many) or 4 (rotation) in 16 bits, at 3 TB/s 1.0 or 1.3 ps. Fused, that is spared.

The price is that the product is not the library's. It keeps up by three things. Tiles come
through tensor descriptors, Hopper's copy engine, which take no registers. The matrix units run
instructions of 256 columns; for SwiGLU these are 128 of each half, so that a thread gets both
numbers that it multiplies. And the loops over tiles and over K are one pipeline: the first loads of
a tile are under way while the one before is finished and stored.

Descriptors read zeros beyond the ends of a tensor, and write nothing there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import multiprocessors

_ROWS, _COLUMNS, _DEPTH = 128, 256, 64  # of a tile: of the product, and along K
_GROUP = 16  # tiles, one below the other, that follow each other and read the same weights


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`fused_linear.swiglu_linear` for 16-bit numbers on the GPU."""
    halves = weight.unflatten(0, (2, -1))
    hidden = halves.shape[1]
    out = torch.empty(len(x), hidden, dtype=x.dtype, device=x.device)
    _launch(
        _swiglu_linear,
        x,
        TensorDescriptor.from_tensor(halves, [2, _COLUMNS // 2, _DEPTH]),
        TensorDescriptor.from_tensor(out, [_ROWS, _COLUMNS // 2]),
        across=triton.cdiv(hidden, _COLUMNS // 2),
    )
    return out


def rotary_linear(x: Tensor, weight: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [T, K] times the transpose of `weight` [H * D, K], rotated: [T, H, D]."""
    dim = 2 * angles[0].shape[1]
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    _launch(
        _rotary_linear,
        x,
        TensorDescriptor.from_tensor(weight, [_COLUMNS, _DEPTH]),
        TensorDescriptor.from_tensor(out, [_ROWS, _COLUMNS // 2]),
        *(TensorDescriptor.from_tensor(part, [_ROWS, dim // 2]) for part in angles),
        across=triton.cdiv(len(weight), _COLUMNS),
        DIM=dim,
    )
    return out.unflatten(1, (-1, dim))


def _launch(kernel, x: Tensor, *descriptors: TensorDescriptor, across: int, **constants) -> None:
    """One program for each multiprocessor, which takes every so many-th tile."""
    down = triton.cdiv(len(x), _ROWS)
    kernel[(min(down * across, multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x, [_ROWS, _DEPTH]), *descriptors, down,
        ACROSS=across, WIDTH=x.shape[1], ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, GROUP=_GROUP,
        num_warps=8, num_stages=3, **constants,
    )  # fmt: skip


@triton.jit
def _place(tile, down, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile in the grid of them: down the rows of a group first.

    So the programs that run side by side share tiles of x and of the weights in the L2 cache.
    """
    first = tile // (GROUP * ACROSS) * GROUP
    rows = tl.minimum(down - first, GROUP)
    return first + tile % (GROUP * ACROSS) % rows, tile % (GROUP * ACROSS) // rows


@triton.jit
def _product(
    x,
    weight,
    m,
    n,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HALVES: tl.constexpr,
):
    """A tile of the product, [ROWS, COLUMNS] in float32; HALVES: as many columns of each half."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, WIDTH, DEPTH):
        if HALVES:
            w = tl.reshape(weight.load([0, n * (COLUMNS // 2), k]), (COLUMNS, DEPTH))
        else:
            w = weight.load([n * COLUMNS, k])
        sums = tl.dot(x.load([m * ROWS, k]), tl.trans(w), sums)
    return sums


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["down"])
def _swiglu_linear(
    x,  # [T, WIDTH]
    weight,  # [2, F, WIDTH]
    out,  # [T, F]
    down,  # tiles that the T rows take
    ACROSS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    for tile in tl.range(tl.program_id(0), down * ACROSS, tl.num_programs(0), flatten=True):
        m, n = _place(tile, down, ACROSS, GROUP)
        sums = _product(x, weight, m, n, WIDTH, ROWS, COLUMNS, DEPTH, HALVES=True)
        a, b = _halves(sums, ROWS, COLUMNS)
        out.store([m * ROWS, n * (COLUMNS // 2)], (a * tl.sigmoid(a) * b).to(out.dtype))


@triton.jit(do_not_specialize=["down"])
def _rotary_linear(
    x,  # [T, WIDTH]
    weight,  # [H * DIM, WIDTH]
    out,  # [T, H * DIM]
    cos,  # [T, DIM / 2]
    sin,
    down,
    ACROSS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
):
    for tile in tl.range(tl.program_id(0), down * ACROSS, tl.num_programs(0), flatten=True):
        m, n = _place(tile, down, ACROSS, GROUP)
        sums = _product(x, weight, m, n, WIDTH, ROWS, COLUMNS, DEPTH, HALVES=False)
        c = cos.load([m * ROWS, 0]).to(tl.float32)[:, None, :]
        s = sin.load([m * ROWS, 0]).to(tl.float32)[:, None, :]
        even, odd = tl.split(tl.reshape(sums, (ROWS, COLUMNS // DIM, DIM // 2, 2)))
        rotated = tl.join(even * c - odd * s, even * s + odd * c).to(out.dtype)
        left, right = _halves(rotated, ROWS, COLUMNS)  # stored apart: less shared memory
        out.store([m * ROWS, n * COLUMNS], left)
        out.store([m * ROWS, n * COLUMNS + COLUMNS // 2], right)
