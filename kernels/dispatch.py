"""The one rule by which an operation runs as a Triton kernel or as its PyTorch reference.

A function that has both asks `use_triton`, and calls the Triton version through `run_triton`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from .eight_bits import EightBits, Held, numbers_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Result = TypeVar("Result")


def triton_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton versions take tensors of this dtype there: on a GPU, and not float64."""
    return device.type == "cuda" and dtype in _DTYPES and _has_triton()


def use_triton(*tensors: Held) -> bool:
    """Whether the Triton version takes these tensors; of eight bits, where it takes their scales.

    It does where `triton_takes` says so, but not where gradients are asked for, since the kernels
    have no backward pass.
    """
    plain = [x.scales if isinstance(x, EightBits) else x for x in tensors]
    if not all(triton_takes(x.device, x.dtype) for x in plain):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in plain))


def run_triton(fast: Callable[..., Result], x: Held, *args: Any) -> Result:
    """fast(x, *args) while x's GPU is the current one, on which Triton launches wherever x is."""
    with torch.cuda.device_of(numbers_of(x)):
        return fast(x, *args)


def on_hopper(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU, for whose matrix units some kernels are cut."""
    # ROCm gives some AMD GPUs the same number.
    nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return nvidia and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
