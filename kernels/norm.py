"""Root-mean-square normalisation."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, cast back to `x.dtype`, times `weight`.

    Args:
        x: [..., d], any floating dtype; the arithmetic is in float32, or float64 for float64 input.
        weight: [d], or None for no weight.
        eps: added to the mean square.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight
