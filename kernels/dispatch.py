"""The one rule by which an operation runs as a Triton kernel or as its PyTorch reference."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def use_triton(*tensors: Tensor) -> bool:
    """Whether the Triton version takes these tensors.

    It does on a GPU, for bfloat16, float16 and float32; but not where gradients are asked for,
    since the kernels have no backward pass.
    """
    if not all(x.is_cuda and x.dtype in _DTYPES for x in tensors) or not _has_triton():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
