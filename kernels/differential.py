"""What follows the two attentions of differential attention: difference, norm, weight.

    out = RMSNorm(first - factor * second) * weight

of each pair of neighbouring heads (Differential Transformer, arXiv:2410.05258, section 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton
from .norm import rms_norm_reference


def differential_norm(x: Tensor, factor: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Pairs of heads to one each, in float32, or in float64 for float64 inputs; rounded once.

    Args:
        x: [T, H, D], H even: heads 0, 2, ... are the firsts, those beside them the seconds.
        factor: [1], weight: [D], both float32 (float64 for float64 inputs).
        eps: added to the mean square.

    Returns:
        [T, H / 2, D] in x's dtype, contiguous.
    """
    if use_triton(x, factor, weight):
        from .differential_triton import differential_norm as fast

        return run_triton(fast, x, factor, weight, eps)
    return differential_norm_reference(x, factor, weight, eps)


def differential_norm_reference(x: Tensor, factor: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`differential_norm` in PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    difference = wide[:, ::2] - factor * wide[:, 1::2]
    return (rms_norm_reference(difference, eps=eps) * weight).to(x.dtype)
