"""What the wrappers of several Triton kernels share: tile widths, strides, numbers of programs."""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
from torch import Tensor


def padded(dim: int) -> int:
    """Columns of a tile that holds a head: a power of two, and 16 at least, as `tl.dot` needs."""
    return max(16, triton.next_power_of_2(dim))


def dense_rows(x: Tensor) -> Tensor:
    """x, copied unless the numbers of its last dimension lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def packed_heads(x: Tensor) -> Tensor:
    """x [T, H, D], copied unless its heads lie side by side in each row."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def in_units(*strides: int) -> tuple[int, list[int]]:
    """A power of two that divides all the strides, and the strides in units of it.

    Triton learns of an integer argument only whether 16 divides it; a projection's rows are often
    a multiple of 8 numbers apart, and need to be read 8 at a time.
    """
    unit = math.gcd(16, *strides)
    return unit, [stride // unit for stride in strides]


def programs(device: torch.device) -> int:
    """How many programs to cut work for: two per multiprocessor."""
    return 2 * multiprocessors(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a few for the interpreter, which has none."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
