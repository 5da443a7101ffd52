"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton

LENGTH_EPS = 1e-6  # added to the squared length of vectors that are brought to length 1


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, cast back to `x.dtype`, times `weight`.

    Args:
        x: [..., d], any floating dtype; the arithmetic is in float32, or float64 for float64 input.
        weight: [d] of x's dtype, or None for no weight.
        eps: added to the mean square.

    Returns:
        Like x.
    """
    if use_triton(x) if weight is None else use_triton(x, weight):
        from .norm_triton import rms_norm as fast

        return run_triton(fast, x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """residual + rms_norm(x, weight, eps), all of x's shape and dtype, in new memory."""
    if use_triton(x, weight, residual):
        from .norm_triton import rms_norm as fast

        return run_triton(fast, x, weight, eps, residual)
    return residual + rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`rms_norm` in PyTorch."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight
