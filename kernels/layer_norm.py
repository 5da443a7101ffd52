"""LayerNorm of a stream that is wider than what it feeds, and an addition to the stream before."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, use_triton


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None = None
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var the biased one.

    x is rounded to the weight's dtype first; the arithmetic is in float32, or float64 for float64
    weights.

    Args:
        x: [T, d], with any row stride, of the weight's dtype or a wider one; with `add`, CHANGED IN
            PLACE.
        weight, bias: [d].
        eps: added to the variance.
        add: [T, d] of the weight's dtype, which is added to x before; None: nothing is.

    Returns:
        [T, d] in the weight's dtype.
    """
    others = () if add is None else (add,)
    if use_triton(x, weight, bias, *others):
        from .layer_norm_triton import layer_norm as fast

        return run_triton(fast, x, weight, bias, eps, add)
    return layer_norm_reference(x, weight, bias, eps, add)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None = None
) -> Tensor:
    """`layer_norm` in PyTorch."""
    if add is not None:
        x += add
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps)
