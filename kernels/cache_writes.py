"""Writing keys and values into the shared cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton
from .rotary import Angles, rotate


def store_keys_values(
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    keys: Tensor,
    values: Tensor,
    slots: int | Tensor,
) -> None:
    """Writes k, rotated, and v to slots of the cache.

    Args:
        k, v: [T, Hkv, D].
        angles: cos and sin [T, D / 2] by which k is rotated; None: it is already.
        keys, values: [Hkv, N, D], each head's slots one behind the other; changed in place.
        slots: the first of T slots in a row; or, on the device, integers [T].
    """
    if use_triton(k, v, keys, values):
        from .cache_writes_triton import store_keys_values as fast

        run_triton(fast, k, v, angles, keys, values, slots)
    else:
        store_keys_values_reference(k, v, angles, keys, values, slots)


def store_keys_values_reference(
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    keys: Tensor,
    values: Tensor,
    slots: int | Tensor,
) -> None:
    """`store_keys_values`, in three passes."""
    if isinstance(slots, int):
        slots = torch.arange(slots, slots + k.shape[0], device=k.device)
    k = k if angles is None else rotate(k, angles)
    keys.index_copy_(1, slots, k.transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
