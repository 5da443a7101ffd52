"""Matrix products of many tokens with what follows them, in the same kernel where that is faster.

What follows a product is limited by memory: it reads what the product has just written. Fused, it
is done while the numbers are still in registers. That asks for a product of our own, which keeps up
with the library's on Hopper only; elsewhere the two run one after the other.

Fused, a number is rounded once, at the end; otherwise after the product, too. So a half of SwiGLU's
beyond float16's range is infinite only there.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import on_hopper, run_triton, triton_takes, use_triton
from .rotary import rotate
from .swiglu import swiglu

MIN_TOKENS = 2048  # for fewer, launching may take longer than the fusion saves


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """swiglu(x times the transpose of `weight`).

    Args:
        x: [T, K].
        weight: [2 * F, K], the rows of the activated half first.

    Returns:
        [T, F], of x's dtype.
    """
    takes = _described(x, weight) and use_triton(x, weight)
    if takes and fuses_swiglu(len(x), x.shape[1], len(weight) // 2, x.dtype, x.device):
        from .fused_linear_triton import swiglu_linear as fast

        return run_triton(fast, x, weight)
    return swiglu(F.linear(x, weight))


def rotary_linear(
    x: Tensor, weight: Tensor, angles: tuple[Tensor, Tensor], columns: int
) -> tuple[Tensor, Tensor]:
    """x times the transpose of `weight`, the first columns cut into heads and rotated.

    The product of the other columns is the library's in any case.

    Args:
        x: [T, K].
        weight: [N, K].
        angles: cos and sin [T, D / 2] of `rotary_angles`, in x's dtype.
        columns: how many of the N are rotated, a multiple of D.

    Returns:
        [T, columns / D, D] and [T, N - columns], of x's dtype; they may be views of one matrix.
    """
    dim = 2 * angles[0].shape[1]
    takes = _described(x, weight, *angles) and use_triton(x, weight, *angles)
    if takes and columns and _fuses_rotation(len(x), x.shape[1], dim, x.dtype, x.device):
        from .fused_linear_triton import rotary_linear as fast

        heads = run_triton(fast, x, weight[:columns], angles)
        return heads, F.linear(x, weight[columns:])
    y = F.linear(x, weight)
    return rotate(y[:, :columns].unflatten(1, (-1, dim)), angles, in_place=True), y[:, columns:]


def fuses_swiglu(
    tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether `swiglu_linear` is one kernel, from x [tokens, width] to [tokens, hidden]."""
    return hidden % 8 == 0 and _fuses(tokens, width, dtype, device)


def _fuses_rotation(
    tokens: int, width: int, dim: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether x [tokens, width] times heads of `dim` channels is rotated by the product's kernel.

    Whole heads fill its tile of 256 columns, and a row of angles takes 16 bytes at least.
    """
    return dim in (16, 32, 64, 128, 256) and _fuses(tokens, width, dtype, device)


def _fuses(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels take x [tokens, width], and pay.

    They need rows that lie a multiple of 16 bytes apart, and Hopper's matrix units, which are not
    exact in float32.
    """
    return (
        tokens >= MIN_TOKENS
        and width % 8 == 0
        and triton_takes(device, dtype)
        and dtype != torch.float32
        and on_hopper(device)
        and _has_descriptors()
    )


def _described(x: Tensor, weight: Tensor, *angles: Tensor) -> bool:
    """Whether tensor descriptors can tell where these lie. What does not fit together they would
    not notice: it is left to the library, which does."""
    return (
        x.shape[1] == weight.shape[1]
        and all(len(part) == len(x) for part in angles)
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, weight, *angles))
    )


@cache
def _has_descriptors() -> bool:
    """Triton 3.4 and later have them; 3.4 to 3.7 compile these kernels."""
    return find_spec("triton.tools.tensor_descriptor") is not None
