"""Triton kernel of `cache_writes`: rotation and the transposition to heads, in one pass.

Reads and writes 2 * Hkv * D elements per token once, 8 KiB for 8 heads of 128 in bfloat16, 22 us
for 8192 tokens at 3 TB/s; some ten operations per pair of channels are nothing beside that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_triton import load_rotated
from .launch import packed_heads, padded
from .rotary import Angles

_BLOCK = 16  # tokens per program


def store_keys_values(
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    keys: Tensor,
    values: Tensor,
    slots: int | Tensor,
) -> None:
    """As `cache.store_keys_values`."""
    length, heads, dim = k.shape
    k, v = packed_heads(k), packed_heads(v)
    _store_kernel[triton.cdiv(length, _BLOCK), heads](
        k, v, *(angles or (k, k)), keys, values, slots, length, keys.stride(0) // dim,
        K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), D=dim, D_PAD=padded(dim),
        ROTATE=angles is not None, BLOCK=_BLOCK, TABLE=isinstance(slots, torch.Tensor), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=("slots", "length", "capacity"))
def _store_kernel(
    k, v, cos, sin, keys, values, slots, length, capacity, K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROTATE: tl.constexpr,
    BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK tokens."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < length
    column = token * 0 + head * D
    key = load_rotated(k, cos, sin, token, column, valid, K_STRIDE, D, D_PAD, ROTATE, BLOCK)
    value = load_rotated(v, cos, sin, token, column, valid, V_STRIDE, D, D_PAD, False, BLOCK)
    if TABLE:
        slot = tl.load(slots + token, mask=valid, other=0).to(tl.int64)
    else:
        slot = slots + token.to(tl.int64)
    dims = tl.arange(0, D_PAD)
    at = (head.to(tl.int64) * capacity + slot)[:, None] * D + dims[None, :]
    inside = valid[:, None] & (dims < D)[None, :]
    tl.store(keys + at, key, mask=inside)
    tl.store(values + at, value, mask=inside)
