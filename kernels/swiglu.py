"""The gated activations of the feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, use_triton


def swiglu(h: Tensor) -> Tensor:
    """silu(a) * b, where a is the first half of each row of h and b the second.

    Args:
        h: [T, 2 * F], both halves from one matrix product.

    Returns:
        [T, F], of h's dtype.
    """
    if use_triton(h):
        from .swiglu_triton import swiglu as fast

        return run_triton(fast, h)
    return swiglu_reference(h)


def swiglu_reference(h: Tensor) -> Tensor:
    """`swiglu` in PyTorch."""
    a, b = h.chunk(2, dim=-1)
    return F.silu(a) * b


def geglu(h: Tensor) -> Tensor:
    """gelu(a) * b, with the approximation of GELU by tanh (arXiv:1606.08415); else as `swiglu`."""
    if use_triton(h):
        from .swiglu_triton import geglu as fast

        return run_triton(fast, h)
    return geglu_reference(h)


def geglu_reference(h: Tensor) -> Tensor:
    """`geglu` in PyTorch."""
    a, b = h.chunk(2, dim=-1)
    return F.gelu(a, approximate="tanh") * b
