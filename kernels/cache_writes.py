"""Writing keys and values into the shared cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton
from .eight_bits import EightBits, Held, quantise
from .rotary import Angles, rotate


def store_keys_values(
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    keys: Held,
    values: Held,
    slots: int | Tensor,
) -> None:
    """Writes k, rotated, and v to slots of the cache.

    Args:
        k, v: [T, Hkv, D].
        angles: cos and sin [T, D / 2] by which k is rotated; None: it is already.
        keys, values: [Hkv, N, D], each head's slots one behind the other, or an `EightBits.pair`,
            to which they are rounded at once; changed in place.
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
    keys: Held,
    values: Held,
    slots: int | Tensor,
) -> None:
    """`store_keys_values`, in three passes."""
    if isinstance(slots, int):
        slots = torch.arange(slots, slots + k.shape[0], device=k.device)
    if isinstance(keys, EightBits):  # a rotated key is not rounded before
        wide = torch.promote_types(k.dtype, torch.float32)
        k, angles = k.to(wide), angles and (angles[0].to(wide), angles[1].to(wide))
    k = k if angles is None else rotate(k, angles)
    for held, x in ((keys, k), (values, v)):
        if isinstance(held, EightBits):
            own = quantise(x.transpose(0, 1))
            held.scales.index_copy_(1, slots, own.scales)
            # PyTorch has no copy of float8 by index.
            to, own_numbers = (n.view(torch.uint8) for n in (held.numbers, own.numbers))
            to.index_copy_(1, slots, own_numbers)
        else:
            held.index_copy_(1, slots, x.transpose(0, 1))
