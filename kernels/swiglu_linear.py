"""A matrix product followed by SwiGLU, in one kernel where that is faster than the library is.

The two halves that SwiGLU multiplies are twice as wide as its output, and the widest thing that a
layer holds. Fused, they never exist outside of a multiprocessor.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, triton_takes, use_triton
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
    hidden, width = len(weight) // 2, x.shape[1]
    if use_triton(x, weight) and fused(len(x), width, hidden, x.dtype, x.device):
        from .swiglu_linear_triton import swiglu_linear as fast

        return run_triton(fast, x, weight)
    return swiglu(F.linear(x, weight))


def fused(tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `swiglu_linear` is one kernel for x [tokens, width] and `hidden` columns of output.

    The kernel needs tensor descriptors, whose rows lie multiples of 16 bytes apart, and is cut for
    Hopper's matrix units; float32 has none that are exact.
    """
    return (
        tokens >= _MIN_TOKENS
        and triton_takes(device, dtype)
        and dtype != torch.float32
        and width % 8 == 0
        and hidden % 8 == 0
        and _on_hopper(device)
    )


@cache
def _on_hopper(device: torch.device) -> bool:
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) == (9, 0)
        and find_spec("triton.tools.tensor_descriptor") is not None  # Triton 3.4 has it
    )
