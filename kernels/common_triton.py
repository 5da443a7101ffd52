"""What several Triton kernels compute alike: functions of a number, and loads of a head's rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in float32, to full relative precision.

    log(1 + y) = 2 artanh(z), z = y / (2 + y) <= 1/3: the logarithm itself would lose the small
    values, and with them the gates nearest to 1, which decide how far a state reaches.
    """
    y = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    z = y / (2.0 + y)
    s = z * z
    series = 1.0 / 13.0 + s * (1.0 / 15.0 + s * (1.0 / 17.0))
    series = 1.0 / 7.0 + s * (1.0 / 9.0 + s * (1.0 / 11.0 + s * series))
    series = 1.0 + s * (1.0 / 3.0 + s * (1.0 / 5.0 + s * series))
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def load_head(x_ptr, start, row_stride, head, rows, mask, DIM: tl.constexpr, PADDED: tl.constexpr):
    """One head's channels of a chunk of x [T, H, DIM], [CHUNK, PADDED]."""
    x_ptr += start * tl.cast(row_stride, tl.int64) + head * DIM
    at = rows[:, None] * row_stride + tl.arange(0, PADDED)[None, :]
    return tl.load(x_ptr + at, mask=mask, other=0.0)
