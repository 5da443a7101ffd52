"""Writing keys and values into the shared cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton
from .rotary import rotate


def store_keys_values(
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    first: int | Tensor,
) -> None:
    """Rotates k and writes it and v to slots `first` .. `first` + T - 1 of the cache.

    Args:
        k, v: [T, Hkv, D], not rotated.
        angles: cos and sin [T, D / 2].
        keys, values: [Hkv, N, D], contiguous; changed in place. `first` + T <= N.
        first: on the host; or an integer [1] on the device, so that each of a CUDA graph's replays
            may write elsewhere.
    """
    if use_triton(k, v, keys, values):
        from .cache_triton import store_keys_values as fast

        run_triton(fast, k, v, angles, keys, values, first)
    else:
        store_keys_values_reference(k, v, angles, keys, values, first)


def store_keys_values_reference(
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    first: int | Tensor,
) -> None:
    """`store_keys_values`, in three passes."""
    slots = torch.arange(k.shape[0], device=k.device) + first
    keys.index_copy_(1, slots, rotate(k, angles).transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
