"""Matrix products with what stands before or after them, fused where there is one token.

Decoding one token reads every weight once and computes next to nothing with it, so its time is the
weights' bytes over the memory's bandwidth, and launches: each function here is one launch, then.
For more rows they are the library's matrix product with the other operations beside it, but SwiGLU
may be fused (`fused_linear`). Rows of all matrices are contiguous.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, use_triton
from .fused_linear import swiglu_linear
from .norm import rms_norm


def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """rms_norm(x, norm_weight, eps) times the transpose of `weight`.

    Args:
        x: [T, K].
        norm_weight: [K].
        weight: [N, K].

    Returns:
        [T, N], of x's dtype.
    """
    if len(x) == 1 and use_triton(x, norm_weight, weight):
        from .matvec_triton import norm_linear as fast

        return run_triton(fast, x, norm_weight, weight, eps)
    return F.linear(rms_norm(x, norm_weight, eps), weight)


def norm_swiglu_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """swiglu(norm_linear(x, norm_weight, weight, eps)).

    Args:
        x: [T, K].
        norm_weight: [K].
        weight: [2 * F, K], the rows of the activated half first.

    Returns:
        [T, F], of x's dtype.
    """
    if len(x) == 1 and use_triton(x, norm_weight, weight):
        from .matvec_triton import norm_swiglu_linear as fast

        return run_triton(fast, x, norm_weight, weight, eps)
    return swiglu_linear(rms_norm(x, norm_weight, eps), weight)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual + x times the transpose of `weight`.

    `residual` is overwritten with the result, and returned, where no gradient is asked for: the
    product is not written and read once more, then. Do not use it afterwards.

    Args:
        x: [T, K].
        weight: [N, K].
        residual: [T, N].

    Returns:
        [T, N].
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, residual)):
        return residual + F.linear(x, weight)
    if len(x) == 1 and use_triton(x, weight, residual):
        from .matvec_triton import linear_add_ as fast

        return run_triton(fast, x, weight, residual)
    return residual.addmm_(x, weight.t())
