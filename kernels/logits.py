"""What is done to logits, which a large vocabulary makes the largest of all tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in place: of logits [T, V], contiguous, which it returns."""
    if use_triton(logits):
        from .logits_triton import soft_cap as fast

        return run_triton(fast, logits, cap)
    return soft_cap_reference(logits, cap)


def soft_cap_reference(logits: Tensor, cap: float) -> Tensor:
    """`soft_cap` in PyTorch."""
    return logits.div_(cap).tanh_().mul_(cap)


def normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What logits are less than by the logarithms of their probabilities, and the likeliest token.

    Args:
        logits: [T, V], contiguous.

    Returns:
        Their log-sum-exp [T], in float32 (float64 for float64 logits): not finite, if a logit is
        infinity or no number; and int64 [T], the first of the largest.
    """
    if use_triton(logits):
        from .logits_triton import normaliser as fast

        return run_triton(fast, logits)
    return normaliser_reference(logits)


def normaliser_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`normaliser` in PyTorch."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1), logits.argmax(-1)
