"""Matrix products of many tokens with what follows them, in one kernel where that is faster.

What follows a product is limited by memory: it reads what the product has just written. Fused, it
is done while the numbers are still in registers. That asks for a product of our own, which keeps up
with the library's on Hopper only; elsewhere the two run one after the other.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, triton_takes, use_triton
from .rotary import rotate
from .swiglu import swiglu

_MIN_TOKENS = 2048  # of fewer, the library often cuts the product better


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """swiglu(x times the transpose of `weight`).

    Fused, the product is rounded once, after SwiGLU; otherwise before it, too.

    Args:
        x: [T, K], contiguous.
        weight: [2 * F, K], contiguous, the rows of the activated half first.

    Returns:
        [T, F], of x's dtype.
    """
    if use_triton(x, weight) and fuses_swiglu(*x.shape, len(weight) // 2, x.dtype, x.device):
        from .fused_linear_triton import swiglu_linear as fast

        return run_triton(fast, x, weight)
    return swiglu(F.linear(x, weight))


def rotary_linear(
    x: Tensor, weight: Tensor, angles: tuple[Tensor, Tensor], columns: int
) -> tuple[Tensor, Tensor]:
    """x times the transpose of `weight`, the first columns cut into heads and rotated.

    Fused, these are rounded once, after the rotation; otherwise before it, too.

    Args:
        x: [T, K], contiguous.
        weight: [N, K], contiguous.
        angles: cos and sin [T, D / 2] of `rotary_angles`, in x's dtype.
        columns: how many of the N are rotated, a multiple of D.

    Returns:
        [T, columns / D, D] and [T, N - columns], of x's dtype.
    """
    dim = 2 * angles[0].shape[1]
    if use_triton(x, weight, *angles) and _fuses_rotation(*x.shape, dim, x.dtype, x.device):
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
    """Whether the kernel takes heads of `dim` channels: some must fill its tile."""
    return dim in (16, 32, 64, 128, 256) and _fuses(tokens, width, dtype, device)


def _fuses(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for that, and enough tokens for them.

    They need tensor descriptors, of rows that lie a multiple of 16 bytes apart, and the matrix
    units, which are not exact in float32.
    """
    return (
        tokens >= _MIN_TOKENS
        and width % 8 == 0
        and triton_takes(device, dtype)
        and dtype != torch.float32
        and _on_hopper(device)
    )


@cache
def _on_hopper(device: torch.device) -> bool:
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) == (9, 0)
        and find_spec("triton.tools.tensor_descriptor") is not None  # Triton 3.4 has it
    )
