"""Triton kernel of `cache_writes`: rotation and the transposition to heads, in one pass.

Reads and writes 2 * Hkv * D elements per token once, 8 KiB for 8 heads of 128 in bfloat16, 22 us
for 8192 tokens at 3 TB/s; some ten operations per pair of channels are nothing beside that. In
eight bits, which take ten more for each channel, it writes Hkv * (D + 2) bytes each of keys and
values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_triton import load_rotated
from .eight_bits import LEAST, Held, numbers_of, scale_words
from .launch import packed_heads, padded
from .rotary import Angles

_BLOCK = 16  # tokens per program
_LEAST = tl.constexpr(LEAST + 127)  # as float32 has it in its bits


def store_keys_values(
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    keys: Held,
    values: Held,
    slots: int | Tensor,
) -> None:
    """As `cache.store_keys_values`."""
    length, heads, dim = k.shape
    k, v, numbers = packed_heads(k), packed_heads(v), numbers_of(keys)
    _store_kernel[triton.cdiv(length, _BLOCK), heads](
        k, v, *(angles or (k, k)), numbers, numbers_of(values), scale_words(keys, values), slots,
        length, numbers.stride(0) // dim, K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), D=dim,
        D_PAD=padded(dim), ROTATE=angles is not None, BLOCK=_BLOCK,
        TABLE=isinstance(slots, torch.Tensor), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=("slots", "length", "capacity"))
def _store_kernel(
    k, v, cos, sin, keys, values, scales, slots, length, capacity,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTATE: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK tokens."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = token < length
    column = token * 0 + head * D
    EIGHT_BITS: tl.constexpr = scales is not None
    key = load_rotated(
        k, cos, sin, token, column, valid, K_STRIDE, D, D_PAD, ROTATE, BLOCK, EIGHT_BITS
    )
    value = load_rotated(
        v, cos, sin, token, column, valid, V_STRIDE, D, D_PAD, False, BLOCK, EIGHT_BITS
    )
    if TABLE:
        slot = tl.load(slots + token, mask=valid, other=0).to(tl.int64)
    else:
        slot = slots + token.to(tl.int64)
    dims = tl.arange(0, D_PAD)
    at = (head.to(tl.int64) * capacity + slot)[:, None] * D + dims[None, :]
    inside = valid[:, None] & (dims < D)[None, :]
    if EIGHT_BITS:
        key, key_scale = quantised(key)
        value, value_scale = quantised(value)
        word = value_scale | (key_scale >> 16)
        tl.store(scales + head.to(tl.int64) * capacity + slot, word, mask=valid)
    tl.store(keys + at, key, mask=inside)
    tl.store(values + at, value, mask=inside)


@triton.jit
def quantised(x):
    """`eight_bits.quantise` of float32 [T, D]: its numbers, and the bits of its scales [T]."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.max(bits, 1)  # in the order of numbers; infinity and NaN are above all
    # 448 = 1.75 * 2^8: of a number's 1.m * 2^e, m above 0.75 takes the next e.
    exponent = tl.maximum(((most + 0x1FFFFF) >> 23) - 8, _LEAST)
    x *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    # To the nearest of numbers that are 2^(e - 3) apart, e being -6 at least: float32 rounds so
    # beside 1.5 * 2^(e + 20).
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    beside = ((tl.maximum(bits, 121 << 23) + (20 << 23)) | 0x400000).to(tl.float32, bitcast=True)
    numbers = ((x + beside) - beside).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    finite = most < 0x7F800000
    numbers = tl.where(finite[:, None], numbers, 0x7F)  # NaN, of which the interpreter makes none
    scale = tl.where(finite, exponent << 23, 0x7FC00000)
    return numbers.to(tl.float8e4nv, bitcast=True), scale
