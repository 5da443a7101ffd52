"""Triton kernels of `attention`: flash attention over lists of key ranges, cut to fill the GPU.

Bytes and operations, with R = T * Hq rows of queries, and element size e:
- Cache: reads 2 * Hkv * D * e bytes per key (4 KiB for 8 heads of 128 in bfloat16) for each block
  of rows that walks it, and 2 * R * D * e for queries and output; 4 * D operations per row and key.
  With few rows the keys' bytes are the limit: 4.3 GB, 1.4 ms at 3 TB/s, for 1M keys. With more than
  some 100 rows per key-value head the operations are. A walk cut into n pieces writes and reads
  again n * 4 * D bytes per row.
- Window: 4 * D operations per row and key in reach, R * (window + 1) of them at most, the limit;
  the pass that rotates and packs keys and values reads and writes each once, 4 * T * Hkv * D * e.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from .dispatch import on_hopper
from .eight_bits import EightBits, Held, numbers_of, scale_words
from .group import Group
from .launch import multiprocessors, packed_heads, padded, programs
from .rotary import Angles, rotate
from .sequences import (
    Readings,
    Sequences,
    Span,
    Spans,
    cells,
    query_runs,
    to_device,
    window_shifts,
)
from .stripes import Stripes

_UNLIMITED = 1 << 30  # shift of a key range that every query reads whole
_FEW_PIECES = 8  # of a row, up to which they are merged at once
_FEWEST = 8  # tasks, and rows of pieces, that tables for decoding have room for
_ROTATED_FIRST = 64  # rows from which on rotated queries take registers that are needed
_LONG_TEXT = 1024  # queries of a single causal span from which library kernels take over
LN_2 = tl.constexpr(math.log(2))


def _block_sizes(dtype: torch.dtype, dim: int) -> tuple[int, ...]:
    """Rows of queries that a program may take; float32 without TF32 compiles only if small."""
    if dtype == torch.float32:
        return (16, 32) if dim <= 256 else (16,)
    return (16, 32, 64, 128)


def _config(block_m: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Keys per step, warps and pipeline stages, within 228 KiB of shared memory."""
    if dtype == torch.float32:
        stages = 2 if dim <= 256 else 1
        return {"BLOCK_N": 16 if dim > 128 else 32, "num_warps": 8, "num_stages": stages}
    warps = 8 if block_m >= 128 else 4
    if dim > 256:
        return {"BLOCK_N": 32, "num_warps": warps, "num_stages": 3 if block_m == 64 else 2}
    if dim > 128:
        return {"BLOCK_N": 32, "num_warps": warps, "num_stages": 2}
    return {"BLOCK_N": 64, "num_warps": warps, "num_stages": 3}


def _cache_config(block_m: int, shape: _Shape) -> dict[str, int]:
    """`_config` of `_cache_kernel`. Few rows take twice as many keys of eight bits, which are as
    many bytes as others: that is fewer instructions for each."""
    _, _, dim, dtype, device, eight_bits = shape
    config = _config(block_m, dim, dtype)
    if _few(block_m, dim) and eight_bits and dtype != torch.float32 and on_hopper(device):
        config["BLOCK_N"] = 128
    return config


def _few(rows: int, dim: int) -> bool:
    """So few rows that instructions for keys and values in eight bits keep memory waiting; and
    columns for which that was measured."""
    return rows <= 16 and 64 < dim <= 128


def _fit(block_m: int, dim: int, eight_bits: bool) -> int:
    """Programs of `_cache_kernel` that a multiprocessor of Hopper's has room for, by the registers
    and shared memory that they are compiled to."""
    fit = {16: 3, 32: 2, 64: 2, 128: 1}
    if dim <= 64:
        fit |= {16: 4, 32: 3}
    elif eight_bits and _few(block_m, dim):
        fit |= {16: 2}
    elif dim > 256:
        fit |= {16: 2, 64: 1}
    return fit[block_m]


def _registers(block_m: int, shape: _Shape, striped: bool) -> dict[str, int]:
    """How many a thread may take, where the compiler's choice leaves room for fewer than `_fit`.

    For 16 rows of 128 columns over `striped` keys it takes 255. The loop over keys that all rows
    see has to spill none.
    """
    _, _, dim, dtype, device, eight_bits = shape
    if not (striped or eight_bits) or dtype == torch.float32 or not on_hopper(device):
        return {}
    warps = _config(block_m, dim, dtype)["num_warps"]
    limit = (1 << 16) // (32 * warps * _fit(block_m, dim, eight_bits)) // 8 * 8
    return {"maxnreg": limit} if limit < 256 else {}


# -- what the kernels share ------------------------------------------------------------------------


@triton.jit
def load_rotated(
    x, cos, sin, token, column, valid, STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTATE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr = False,
):  # fmt: skip
    """x[token, column : column + D] as [ROWS, D_PAD], zero beyond D, rotated by token's angles;
    WIDE: in float32, not rounded to x's dtype."""
    dims = tl.arange(0, D_PAD)
    at = token.to(tl.int64)[:, None] * STRIDE + column[:, None] + dims[None, :]
    out = tl.load(x + at, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
    if ROTATE:
        pairs = tl.arange(0, D_PAD // 2)
        at = token.to(tl.int64)[:, None] * (D // 2) + pairs[None, :]
        seen = valid[:, None] & (pairs < D // 2)[None, :]
        c = tl.load(cos + at, mask=seen, other=0.0).to(tl.float32)
        s = tl.load(sin + at, mask=seen, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(out.to(tl.float32), (ROWS, D_PAD // 2, 2)))
        turned = tl.join(even * c - odd * s, even * s + odd * c)
        turned = tl.reshape(turned, (ROWS, D_PAD))
        out = turned if WIDE else turned.to(out.dtype)
    elif WIDE:
        out = out.to(tl.float32)
    return out


@triton.jit
def _scaled(x, SCALE: tl.constexpr):
    """Queries [ROWS, D] as keys in eight bits are multiplied by, and factors [ROWS] of the scores,
    SCALE among them.

    Such keys become half precision in one instruction for two of them, bfloat16 in five. Its range
    is enough for queries whose greatest numbers are from 2^14 to 2^15; float32 stays what it is.
    """
    bits = tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    exponent = tl.maximum((bits >> 23) - 14, 1)
    if x.dtype == tl.float32:
        exponent = exponent * 0 + 127
    else:
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        x = (x.to(tl.float32) * inverse[:, None]).to(tl.float16)
    return x, (exponent << 23).to(tl.float32, bitcast=True) * SCALE


@triton.jit
def _zeros(ROWS: tl.constexpr, V_PAD: tl.constexpr, WORDS: tl.constexpr):
    """Outputs [ROWS, V_PAD] to begin with; in words, of each fourth column from the first, second,
    third and fourth on."""
    if WORDS:
        fourth = tl.zeros((ROWS, V_PAD // 4), tl.float32)
        acc = fourth, fourth, fourth, fourth
    else:
        acc = tl.zeros((ROWS, V_PAD), tl.float32)
    return acc


@triton.jit
def _whole(acc, ROWS: tl.constexpr, V_PAD: tl.constexpr, WORDS: tl.constexpr):
    """Outputs [ROWS, V_PAD] of what `_zeros` has begun."""
    if WORDS:
        a, b, c, d = acc
        acc = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, V_PAD))
    return acc


@triton.jit
def _byte(words, PLACE: tl.constexpr, dtype: tl.constexpr):
    """Numbers of eight bits at a place of words."""
    return (words >> 8 * PLACE).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def _bytes(words, dtype: tl.constexpr, WORDS: tl.constexpr):
    """Numbers of eight bits at each of four places of words."""
    if WORDS == 2 and dtype == tl.float16:
        # Six instructions for two words, whose bytes of a place become one register: the compiler
        # takes fifteen.
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 lower, upper;
            .reg .b16 a, b, c, d;
            prmt.b32 lower, $4, $5, 0x5140;
            prmt.b32 upper, $4, $5, 0x7362;
            mov.b32 {a, b}, lower;
            mov.b32 {c, d}, upper;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            cvt.rn.f16x2.e4m3x2 $2, c;
            cvt.rn.f16x2.e4m3x2 $3, d;
            }""",
            constraints="=r,=r,=r,=r,r,r",
            args=[words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b = _byte(words, 0, dtype), _byte(words, 1, dtype)
        c, d = _byte(words, 2, dtype), _byte(words, 3, dtype)
    return a, b, c, d


@triton.jit
def _step(
    acc, top, total, q, q_scales, keys, values, scales, start, end, limit, part,
    SCALE: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    V_PAD: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    WORDS: tl.constexpr = 0,
):  # fmt: skip
    """One block of keys, from `start`, of an online softmax in powers of two; SCALE is positive.

    Of the values, columns `part` * V_PAD and the following. The block's offset is 64-bit, those
    within it 32-bit: a head's keys may be over 2^31 numbers. Keys and values in eight bits have
    scales (`scale_words`): a key's multiplies scores, a value's, a power of two, is added to what
    is exponentiated. q has those of `_scaled`; else all are None.

    With WORDS (`words`), values of eight bits are read from shared memory four columns at a time:
    byte by byte, that would be a fifth of all instructions. So there are four products, of each
    fourth column.
    """
    block = tl.arange(0, BLOCK_N)
    slot = start + block
    dims, columns = tl.arange(0, D_PAD), part * V_PAD + tl.arange(0, V_PAD)
    at = block[:, None] * ROW + dims[None, :]
    v_at = block[:, None] * ROW + columns[None, :]
    keys += tl.cast(start, tl.int64) * ROW
    values += tl.cast(start, tl.int64) * ROW
    if WORDS:
        fourths = part * (V_PAD // 4) + tl.arange(0, V_PAD // 4)
        columns, v_at = 4 * fourths, block[:, None] * (ROW // 4) + fourths[None, :]
        values = values.to(tl.pointer_type(tl.int32), bitcast=True)
    if MASKED:  # what lies beyond `end` may be NaN and is not loaded
        loaded = (slot < end)[:, None]
        k = tl.load(keys + at, mask=loaded & (dims < D)[None, :], other=0.0)
        v = tl.load(values + v_at, mask=loaded & (columns < D)[None, :], other=0.0)
    elif D == D_PAD:
        k = tl.load(keys + at)
        v = tl.load(values + v_at)
    else:
        k = tl.load(keys + at, mask=(dims < D)[None, :], other=0.0)
        v = tl.load(values + v_at, mask=(columns < D)[None, :], other=0.0)
    if scales is not None:
        if MASKED:
            word = tl.load(scales + slot, mask=slot < end, other=0)
        else:
            word = tl.load(scales + slot)
        k = k.to(q.dtype)
        if not WORDS:
            v = v.to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if scales is not None:
        scores *= (word << 16).to(tl.float32, bitcast=True)[None, :]
    if MASKED:
        visible = slot[None, :] < tl.minimum(limit, end)[:, None]
        if WINDOW > 0:
            visible = visible & (slot[None, :] >= (limit - WINDOW)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    if scales is None:
        new_top = tl.maximum(top, tl.max(scores, 1) * SCALE)
    else:
        # First come weights times scales, 2^15 at most since float16 takes them down to 2^-24.
        exponent = (word >> 23) - 127
        scores = scores * q_scales[:, None] + exponent.to(tl.float32)[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1) - 15)
    shift = new_top
    if MASKED:  # a row may have seen no key yet
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    if scales is None:
        weights = tl.exp2(scores * SCALE - shift[:, None])  # one instruction for both
        masses = weights
    else:
        weights = tl.exp2(scores - shift[:, None])
        inverse = (0x7F000000 - (word & -0x10000)).to(tl.float32, bitcast=True)
        masses = weights * inverse[None, :]
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(masses, 1)
    if WORDS:
        weights = weights.to(q.dtype)
        v_a, v_b, v_c, v_d = _bytes(v, q.dtype, WORDS)
        a, b, c, d = acc
        a = tl.dot(weights, v_a, a * fade[:, None], input_precision="ieee")
        b = tl.dot(weights, v_b, b * fade[:, None], input_precision="ieee")
        c = tl.dot(weights, v_c, c * fade[:, None], input_precision="ieee")
        d = tl.dot(weights, v_d, d * fade[:, None], input_precision="ieee")
        acc = a, b, c, d
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _walk(
    acc, top, total, q, q_scales, keys, values, scales, first, seen_from, seen_to, end, limit, part,
    SCALE: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    V_PAD: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    WORDS: tl.constexpr = 0,
):  # fmt: skip
    """Online softmax over keys first .. end - 1: each row sees those from limit - WINDOW (from
    `first`, if WINDOW is 0) to limit - 1. Masks only the blocks outside seen_from .. seen_to - 1,
    the keys that all rows see.
    """
    begin = first
    if WINDOW > 0:
        begin += tl.cdiv(tl.maximum(seen_from - first, 0), BLOCK_N) * BLOCK_N
        for start in range(first, begin, BLOCK_N):
            acc, top, total = _step(
                acc, top, total, q, q_scales, keys, values, scales, start, end, limit, part, SCALE,
                ROW, D, D_PAD, V_PAD, BLOCK_N, WINDOW, True, WORDS,
            )  # fmt: skip
    rest = begin + tl.maximum(tl.minimum(seen_to, end) - begin, 0) // BLOCK_N * BLOCK_N
    for start in range(begin, rest, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, q, q_scales, keys, values, scales, start, end, limit, part, SCALE, ROW,
            D, D_PAD, V_PAD, BLOCK_N, WINDOW, False, WORDS,
        )  # fmt: skip
    for start in range(rest, end, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, q, q_scales, keys, values, scales, start, end, limit, part, SCALE, ROW,
            D, D_PAD, V_PAD, BLOCK_N, WINDOW, True, WORDS,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _store_output(
    out, token, column, acc, total, valid, part, STRIDE: tl.constexpr, D: tl.constexpr,
    V_PAD: tl.constexpr,
):  # fmt: skip
    """The weighted mean acc / total to the columns `part` * V_PAD and the following of
    out[token, column : column + D]."""
    dims = part * V_PAD + tl.arange(0, V_PAD)
    total = tl.where(total == 0.0, 1.0, total)  # a row that is not valid, or saw no key
    at = token.to(tl.int64)[:, None] * STRIDE + column[:, None] + dims[None, :]
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at, result, mask=valid[:, None] & (dims < D)[None, :])


@triton.jit
def _store_piece(
    partial, norms, place, acc, top, total, valid, part, D: tl.constexpr, V_PAD: tl.constexpr
):
    """A piece's output and log2-sum-exp2, -inf if it saw no key, at rows `place`."""
    _store_output(partial, place, place * 0, acc, total, valid, part, D, D, V_PAD)
    tl.store(norms + place, top + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=valid)


@triton.jit
def _merge_kernel(
    partial, norms, out, rows, entries, order, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr, BATCH: tl.constexpr,
    OUT: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One row of queries: the mean of its pieces' outputs, weighted by exp2 of their norms; with
    NORMS, its own norm behind the query's outputs."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows + 3 * index)
    begin = tl.load(rows + 3 * index + 1)
    end = tl.load(rows + 3 * index + 2)
    dims = tl.arange(0, D_PAD)
    acc = tl.zeros((D_PAD,), tl.float32)
    top = float("-inf")
    total = 0.0
    for start in range(begin, end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        valid = entry < end
        place = (tl.load(entries + entry, mask=valid, other=0) + row) * HEADS + head
        norm = tl.load(norms + place, mask=valid, other=float("-inf"))
        at = place.to(tl.int64)[:, None] * D + dims[None, :]
        x = tl.load(partial + at, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(norm, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(norm - shift)
        fade = tl.exp2(top - shift)
        acc = acc * fade + tl.sum(x * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
    query = row // GROUP
    if BATCH:
        query = tl.load(order + query)
    at = query.to(tl.int64) * OUT
    place = head * GROUP + row % GROUP
    total = tl.where(total == 0.0, 1.0, total)  # none of the pieces saw a key
    tl.store(out + at + place * D + dims, acc / total, mask=(dims < D) & (begin < end))
    if NORMS:
        norm = (top + tl.log2(total)) * LN_2
        tl.store(out + at + HEADS * GROUP * D + place, norm, mask=begin < end)


def _merge(
    partial: Tensor,
    norms: Tensor,
    out: Tensor,
    rows: Tensor,
    entries: Tensor,
    most: int,
    group: int,
    order: Tensor | None = None,
) -> None:
    """Into out [T, Hq, D], or [T, Hq * (D + 1)] with norms behind: rows of `partial` [., Hkv, D] of
    so many query heads a key-value head; about `most` entries for each."""
    _, heads, dim = partial.shape
    few = most <= _FEW_PIECES
    _merge_kernel[rows.shape[0], heads](
        partial, norms, out, rows, entries, rows if order is None else order,
        HEADS=heads, GROUP=group, D=dim, D_PAD=padded(dim),
        CHUNK=8 if few else 64, BATCH=order is not None, OUT=out.stride(0), NORMS=out.dim() == 2,
        num_warps=2 if few else 8,
    )  # fmt: skip


def _parts(dim: int) -> int:
    """In how many parts programs take the values' columns: outputs of 64 rows and 512 columns fill
    half of all registers, and to compute the scores twice is the cheaper way."""
    return 2 if dim > 256 else 1


def words(rows: int, keys: Held) -> int:
    """WORDS of `_step` for so many rows: 0, numbers one by one; 1, four in a word; 2, likewise, and
    NVIDIA's instructions take it apart."""
    dim = keys.shape[2]
    if not isinstance(keys, EightBits) or not _few(rows, dim) or dim % 4 or not _has_tuples():
        return 0
    return 2 if isinstance(_cache_kernel, triton.JITFunction) and torch.version.hip is None else 1


@cache
def _has_tuples() -> bool:
    """Triton's loops carry them from 3.3 on."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def _query_constants(q: Tensor, heads: int, angles: Angles | None, scale: float | None) -> dict:
    """What kernels must know at compile time of q [T, Hq, D] over so many key-value heads."""
    dim = q.shape[2]
    return {
        "SCALE": math.log2(math.e) * (dim**-0.5 if scale is None else scale),
        "STRIDE": q.stride(0),
        "HEADS": heads,
        "GROUP": q.shape[1] // heads,
        "D": dim,
        "D_PAD": padded(dim),
        "V_PAD": padded(dim) // _parts(dim),
        "ROTATE": angles is not None,
    }


def _head_slots(keys: Tensor) -> int:
    """Slots from one head's first to the next one's, also where keys are a part of a buffer."""
    return keys.stride(0) // keys.shape[2]


def _float32(q: Tensor, *shape: int) -> Tensor:
    """Uninitialised, on q's device."""
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _to_device(tables: list[Tensor], device: torch.device) -> list[Tensor]:
    """Integer tables as int32 on the device, in one copy that waits for nothing."""
    sizes = [-(-table.numel() // 4) * 4 for table in tables]  # each starts at 16 bytes
    padded = [F.pad(t.flatten(), (0, s - t.numel())) for t, s in zip(tables, sizes, strict=True)]
    parts = to_device(torch.cat(padded).int(), device).split(sizes)
    return [p[: t.numel()].view(t.shape) for p, t in zip(parts, tables, strict=True)]


# -- queries over a cache --------------------------------------------------------------------------


def cache_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Spans,
    angles: Angles | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """As `attention.cache_attention`."""
    span = spans.spans[0]
    alone = len(spans.spans) == 1 and span.causal and window is None
    if alone and len(q) >= _LONG_TEXT and _flash_takes(q):
        if isinstance(keys, Tensor) and isinstance(values, Tensor):  # not in eight bits
            return _long_text_attention(q, keys, values, span, angles, scale)
    shape = _Shape.of(q, keys)

    def on_device() -> _Plan:
        return _plan(spans.spans, query_runs(spans), shape, window).on_device(q.device)

    plan = spans.table(("cache_attention", shape, window), on_device)
    return _over_cache(q, keys, values, plan, angles, scale, window=window or 0)


def batch_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    positions: Tensor,
    readings: Readings,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `attention.batch_attention`; the launch depends on `readings.layout` alone."""
    shape = _Shape.of(q, keys)
    tables = readings.tables(lambda: _BatchTables(shape))
    batch = tables.order, positions.contiguous()
    return _over_cache(q, keys, values, tables.now, angles, scale, batch)


def cache_attention_part(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Spans,
    stripes: Stripes,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `striped_attention.cache_attention_part`."""
    shape = _Shape.of(q, keys)

    def on_device() -> _Plan:
        plan = _plan(spans.spans, query_runs(spans), shape, stripes=stripes)
        return plan.on_device(q.device)

    plan = spans.table(("cache_attention", shape, stripes), on_device)
    return _over_cache(q, keys, values, plan, angles, scale, stripes=stripes)


def batch_attention_part(
    q: Tensor,
    keys: Held,
    values: Held,
    positions: Tensor,
    readings: Readings,
    group: Group,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """What this process adds to `striped_attention.striped_batch_attention`.

    The launch depends on `readings.layout` alone, which is the same in all processes of the group:
    a CUDA graph with collectives has to be replayed by all or none.
    """
    shape = _Shape.of(q, keys)
    tables = readings.tables(lambda: _BatchTables(shape, group))
    batch = tables.order, positions.contiguous()
    return _over_cache(q, keys, values, tables.now, angles, scale, batch, stripes=group.stripes)


def _over_cache(
    q: Tensor,
    keys: Held,
    values: Held,
    plan: _Plan,
    angles: Angles | None,
    scale: float | None,
    batch: tuple[Tensor, Tensor] | None = None,
    window: int = 0,
    stripes: Stripes | None = None,
) -> Tensor:
    """Runs a plan's tasks and merges what are but pieces.

    Args:
        batch: where texts are decoded, the row of each query of the plan, and each row's position.
        stripes: of which the keys and values are; the output is that of `cache_attention_part`.
    """
    q, shape = packed_heads(q), _Shape.of(q, keys)
    numbers, scales = numbers_of(keys), scale_words(keys, values)
    heads, _, dim = numbers.shape
    if angles is not None and plan.block_m >= _ROTATED_FIRST:
        q, angles = rotate(q, angles), None
    if stripes is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        out = _float32(q, q.shape[0], q.shape[1] * (dim + 1))
    partial, norms = _float32(q, plan.pieces, heads, dim), _float32(q, plan.pieces, heads)
    cos, sin = angles or (q, q)
    order, positions = batch or (plan.tasks, plan.tasks)
    _cache_kernel[(plan.tasks.shape[0] * heads * _parts(dim),)](
        q, cos, sin, numbers, numbers_of(values), scales, out, partial, norms, plan.tasks,
        plan.ranges, order, positions, _head_slots(numbers), 0 if stripes is None else stripes.rank,
        BLOCK_M=plan.block_m, BATCH=batch is not None, WINDOW=window, OUT=out.stride(0),
        SHARES=0 if stripes is None else stripes.size,
        RUN=1 if stripes is None else stripes.block, WORDS=words(plan.block_m, keys),
        **_query_constants(q, heads, angles, scale),
        **_cache_config(plan.block_m, shape),
        **_registers(plan.block_m, shape, stripes is not None),
    )  # fmt: skip
    if plan.pieces:
        group = q.shape[1] // heads
        told = order if batch else None
        _merge(partial, norms, out, plan.rows, plan.entries, plan.most, group, told)
    return out


@triton.jit
def _held(slot, rank, SHARES: tl.constexpr, RUN: tl.constexpr):
    """`Stripes.held` of process `rank` of SHARES; 0 of them: there are no stripes."""
    if SHARES:
        slot = tl.maximum(slot, 0)
        rest = slot % (SHARES * RUN) - rank * RUN
        slot = slot // (SHARES * RUN) * RUN + tl.minimum(tl.maximum(rest, 0), RUN)
    return slot


@triton.jit(do_not_specialize=("capacity", "rank"))
def _cache_kernel(
    q, cos, sin, keys, values, scales, out, partial, norms, tasks, ranges, order, positions,
    capacity, rank, SCALE: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, V_PAD: tl.constexpr,
    ROTATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BATCH: tl.constexpr,
    WINDOW: tl.constexpr, OUT: tl.constexpr, SHARES: tl.constexpr, RUN: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """One task, key-value head and part of the values' columns: a block of rows over a list of key
    ranges.

    Row r is query r // GROUP and the head's query head r % GROUP. In a BATCH, query t is row
    order[t] of q, and reads keys before its position + shift in place of t + shift. With a WINDOW
    it reads no more than so many keys before t + shift. With SHARES, the keys are those that
    process `rank` holds; shifts count those of all processes.
    """
    # Programs begin in this order. With all heads of a task side by side, the longest tasks are
    # spread evenly, and those of no row, which end at once, come last.
    parts: tl.constexpr = D_PAD // V_PAD
    program = tl.program_id(0)
    part = program % parts
    head = program // parts % HEADS
    task = tasks + 5 * (program // (parts * HEADS))
    first_row = tl.load(task)
    end_row = tl.load(task + 1)
    first_range = tl.load(task + 2)
    end_range = tl.load(task + 3)
    piece = tl.load(task + 4)

    row = first_row + tl.arange(0, BLOCK_M)
    valid = row < end_row
    query = row // GROUP
    column = head * (GROUP * D) + row % GROUP * D
    seen_to = first_row // GROUP
    if BATCH:
        query = tl.load(order + query, mask=valid, other=0)
        seen = tl.load(positions + query, mask=valid, other=0).to(tl.int32)
        seen_to = tl.min(tl.where(valid, seen, 1 << 30), 0)
        last = tl.max(seen, 0)
    else:
        seen = query
    x = load_rotated(q, cos, sin, query, column, valid, STRIDE, D, D_PAD, ROTATE, BLOCK_M)
    keys += head.to(tl.int64) * capacity * D
    values += head.to(tl.int64) * capacity * D
    x_scales = None
    if scales is not None:
        scales += head.to(tl.int64) * capacity
        x, x_scales = _scaled(x, SCALE)
    acc = _zeros(BLOCK_M, V_PAD, WORDS)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(first_range, end_range):
        first = tl.load(ranges + 3 * i)
        end = tl.load(ranges + 3 * i + 1)
        shift = tl.load(ranges + 3 * i + 2)
        if BATCH:  # what no row reads yet may be NaN
            end = tl.minimum(end, _held(last + shift, rank, SHARES, RUN))
        limit = _held(seen + shift, rank, SHARES, RUN)
        seen_by_all = _held(seen_to + shift, rank, SHARES, RUN)
        seen_from = first
        if WINDOW > 0:
            last_query = (tl.minimum(end_row, first_row + BLOCK_M) - 1) // GROUP
            seen_from = tl.minimum(last_query + shift - WINDOW, end)
        acc, top, total = _walk(
            acc, top, total, x, x_scales, keys, values, scales, first, seen_from, seen_by_all, end,
            limit, part, SCALE, D, D, D_PAD, V_PAD, BLOCK_N, WINDOW, WORDS,
        )  # fmt: skip
    acc = _whole(acc, BLOCK_M, V_PAD, WORDS)
    if piece < 0:
        _store_output(out, query, column, acc, total, valid, part, OUT, D, V_PAD)
        if SHARES:
            norm = (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2
            place = HEADS * GROUP * D + head * GROUP + row % GROUP
            tl.store(out + query.to(tl.int64) * OUT + place, norm, mask=valid)
    else:
        place = (piece + tl.arange(0, BLOCK_M)) * HEADS + head
        _store_piece(partial, norms, place, acc, top, total, valid, part, D, V_PAD)


class _Shape(NamedTuple):
    """Of queries and of what they read."""

    query_heads: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    eight_bits: bool = False

    @classmethod
    def of(cls, q: Tensor, keys: Held) -> _Shape:
        heads, _, dim = keys.shape
        return cls(q.shape[1], heads, dim, q.dtype, q.device, isinstance(keys, EightBits))


class _Plan(NamedTuple):
    """How a launch of `_cache_kernel` is cut into tasks.

    The tables are made on the host, and read as int32 on the device.

    Attributes:
        block_m: rows of queries per task at most.
        tasks: [n, 5]: first row, end row, first range, end range, place (-1: the task is all that
            its rows read, and writes their output).
        ranges: [., 3]: first key, end key, shift; query t reads keys before t + shift.
        rows: [., 3], rows to merge: row, first entry, end entry.
        entries: [.], place of a task, less its first row.
        pieces: rows of all tasks that are but pieces; their outputs lie at places 0 .. pieces - 1.
        most: entries of one row at most.
    """

    block_m: int
    tasks: Tensor
    ranges: Tensor
    rows: Tensor
    entries: Tensor
    pieces: int
    most: int

    def on_device(self, device: torch.device) -> _Plan:
        """With its tables there."""
        tables = [self.tasks, self.ranges, self.rows, self.entries]
        tasks, ranges, rows, entries = _to_device(tables, device)
        return self._replace(tasks=tasks, ranges=ranges, rows=rows, entries=entries)


class _BatchTables:
    """`_Plan`s of `Readings`, in memory that stays where it is as long as they have room in it.

    Args:
        group: whose stripes of the cache are read, where they are; all of it have one layout.

    Attributes:
        now: the present plan, on the device, its tables with empty lines behind.
        order: int32 [B], the row of each query.
        layout: of `now`, all that is not on the device.
    """

    def __init__(self, shape: _Shape, group: Group | None = None) -> None:
        self._shape, self._group = shape, group
        self._made: dict[Hashable, tuple[Tensor, _Plan, Tensor]] = {}
        self.layout: Hashable = None
        self.now: _Plan
        self.order: Tensor

    def fill(self, order: Sequence[int], spans: Sequence[Span]) -> None:
        stripes = None if self._group is None else self._group.stripes
        plan = _plan(spans, cells(spans), self._shape, batch=True, stripes=stripes)
        group = self._shape.query_heads // self._shape.heads
        needs = [max(len(plan.tasks), -(-len(plan.ranges) // 2)), plan.pieces, len(plan.entries)]
        needs.append(plan.most)
        if self._group is not None:
            needs = self._group.most(needs)
        least, pieces, entries, most = needs
        plan = plan._replace(most=most)
        # Powers of two, so that few layouts, each of which takes a graph of its own, occur.
        tasks = _power(max(least, _FEWEST))
        pieces = _power(max(pieces, entries, _FEWEST)) if pieces else 0
        texts = _power(len(order))
        self.layout = plan.block_m, tasks, pieces, texts, plan.most <= _FEW_PIECES
        # Each table begins at 16 bytes.
        sizes = [-(-n // 4) * 4 for n in (5 * tasks, 6 * tasks, 3 * texts * group, pieces, texts)]
        contents = (plan.tasks, plan.ranges, plan.rows, plan.entries, torch.tensor(order))
        if self.layout not in self._made:
            memory = torch.zeros(sum(sizes), dtype=torch.int32, device=self._shape.device)
            table, ranges, rows, entries, self.order = memory.split(sizes)
            self.now = plan._replace(
                tasks=table[: 5 * tasks].view(-1, 5),
                ranges=ranges[: 6 * tasks].view(-1, 3),
                rows=rows[: 3 * texts * group].view(-1, 3),
                entries=entries,
                pieces=pieces,
            )
            self._made[self.layout] = memory, self.now, self.order
        memory, self.now, self.order = self._made[self.layout]
        on_gpu = memory.is_cuda
        filled = torch.zeros(memory.shape, dtype=torch.int32, pin_memory=on_gpu)
        for part, content in zip(filled.split(sizes), contents, strict=True):
            part[: content.numel()] = content.flatten()
        filled[5 * len(plan.tasks) + 4 : 5 * tasks : 5] = -1  # tasks of no row, which store nothing
        memory.copy_(filled, non_blocking=True)


def _power(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()


class _Task(NamedTuple):
    """Rows first .. end - 1 over key ranges (first key, end key, shift), so many keys in all."""

    first: int
    end: int
    ranges: list[tuple[int, int, int]]
    keys: int

    @classmethod
    def over(cls, first: int, end: int, ranges: list[tuple[int, int, int]]) -> _Task:
        return cls(first, end, ranges, sum([stop - start for start, stop, _ in ranges]))


def _plan(
    spans: Sequence[Span],
    runs: list[_Run],
    shape: _Shape,
    window: int | None = None,
    batch: bool = False,
    stripes: Stripes | None = None,
) -> _Plan:
    """Of a launch of `_cache_kernel`; `batch`: whether texts are decoded."""
    query_heads, heads, dim, dtype, *_ = shape
    group = query_heads // heads
    # Blocks that are larger than any span's rows walk what the next smaller ones do.
    rows = max(span.end_query - span.first_query for span in spans) * group
    sizes = _block_sizes(dtype, dim)
    sizes = sizes[: 1 + bisect_left(sizes, rows)]
    if window:
        block_m = sizes[-1]
        walks = [walk for run in runs for walk in _window_blocks(*run, group, block_m, window)]
    else:
        shares = 1 if stripes is None else stripes.size
        units, block_m = min(
            ((_units(runs, group, size, shares), size) for size in sizes),
            key=lambda choice: _cost(choice[0], choice[1], shares),
        )
        walks = [walk for unit in units for walk in _row_blocks(*unit, group, block_m, batch)]
        if stripes is not None:
            walks = [_held_by(stripes, walk) for walk in walks]
    block_n = _cache_config(block_m, shape)["BLOCK_N"]
    least = 4 * _config(block_m, dim, dtype)["BLOCK_N"]  # keys of a piece
    at_once = _at_once(block_m, shape)
    heads *= _parts(dim)
    # All pieces should take about as long as each other, and be as many as fit on the GPU at once;
    # rounding down, since one more would wait for all the others. Where that rounds too coarsely,
    # they are as many as fit four times, if merging a piece costs little beside walking it.
    share = max(1, sum([walk.keys for walk in walks])) * heads / at_once
    coarse = 4 * len(walks) * heads > at_once
    tasks = []
    for walk in walks:
        pieces = int(min(walk.keys / share + 0.01, walk.keys / least))
        if coarse:
            pieces = max(pieces, round(min(4 * walk.keys / share, walk.keys / (32 * block_m))))
        if pieces <= 1:
            tasks.append(walk)
            continue
        size = -(-walk.keys // (pieces * block_n)) * block_n
        cut = _cut(walk.ranges, size)
        tasks += [_Task.over(walk.first, walk.end, ranges) for ranges in cut]
    # The longest first, and neighbours read the same keys.
    tasks.sort(key=lambda task: (-task.keys, task.ranges[:1]))

    parts = cells((task.first, task.end, i) for i, task in enumerate(tasks))
    places: dict[int, int] = {}
    pieces = 0
    for _, _, shared in parts:
        for _, _, i in shared if len(shared) > 1 else ():
            if i not in places:
                places[i] = pieces
                pieces += tasks[i].end - tasks[i].first
    merged: list[tuple[int, int, int, int]] = []
    entries: list[int] = []
    for first, end, shared in parts:
        own = [places[i] - task_first for task_first, _, i in shared if i in places]
        if own:
            merged.append((first, end, len(entries), len(entries) + len(own)))
            entries += own
    ends = list(accumulate((len(task.ranges) for task in tasks), initial=0))
    table = [
        (task.first, task.end, ends[i], ends[i + 1], places.get(i, -1))
        for i, task in enumerate(tasks)
    ]
    ranges = [part for task in tasks for part in task.ranges]
    most = max((end - first for *_, first, end in merged), default=0)
    return _Plan(
        block_m, torch.tensor(table), torch.tensor(ranges).view(-1, 3), _rows(merged),
        torch.tensor(entries).long(), pieces, most,
    )  # fmt: skip


def _at_once(block_m: int, shape: _Shape) -> int:
    """Programs to cut work for.

    Where tables have tasks of no row behind, a GPU fills multiprocessor after multiprocessor: with
    fewer tasks than it has room for, some stay empty. So they are as many as fit on Hopper;
    elsewhere about as many.
    """
    _, _, dim, dtype, device, eight_bits = shape
    if dtype == torch.float32 or not on_hopper(device):
        return programs(device) // (2 if block_m >= 128 or dim > 256 else 1)
    return _fit(block_m, dim, eight_bits) * multiprocessors(device)


def _rows(merged: list[tuple[int, int, int, int]]) -> Tensor:
    """[., 3], row, first entry and end entry, of (first row, end row, first entry, end entry)."""
    table = torch.tensor(merged, dtype=torch.long).view(-1, 4)
    lengths = table[:, 1] - table[:, 0]
    shift = table[:, 0] - (lengths.cumsum(0) - lengths)
    rows = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
    return torch.cat((rows[:, None], table[:, 2:].repeat_interleave(lengths, 0)), 1)


_Run = tuple[int, int, list[Span]]  # queries first .. end - 1, which read the same spans
_Unit = tuple[int, int, list[Span]]  # rows first .. end - 1, which walk the same spans


def _units(runs: list[_Run], group: int, block_m: int, shares: int) -> list[_Unit]:
    """Which rows walk which spans together.

    Runs of queries that read the same, each over its list of spans; but a span that several runs
    share is walked once by the queries of all of them, where that saves more steps over its keys
    than it costs to write and merge the outputs of pieces. Each of `shares` processes has its share
    of the keys.
    """
    walked: Counter[Span] = Counter()  # blocks of rows that would read a span, run by run
    for first, end, members in runs:
        for span in members:
            walked[span] += -(-(end - first) * group // block_m)
    units, shared = [], set()
    for span, blocks in walked.items():
        rows = (span.end_query - span.first_query) * group
        if (blocks - -(-rows // block_m)) * (span.end_key - span.first_key) > 4 * rows * shares:
            shared.add(span)
            units.append((span.first_query * group, span.end_query * group, [span]))
    for first, end, members in runs:
        own = [span for span in members if span not in shared]
        if own:
            units.append((first * group, end * group, own))
    return units


def _cost(units: list[_Unit], block_m: int, shares: int) -> int:
    """Of walking the units in blocks of rows; one is the time of a row's operations on a key, times
    the number of processes that share the keys.

    A block must load the key, too, which takes about as long as the operations of 48 rows. A row
    that lies in several units has outputs to write and merge, which takes about 900 for each.
    """
    walking = sum(
        -(-(end - first) // block_m) * (48 + block_m) * (span.end_key - span.first_key)
        for first, end, spans in units
        for span in spans
    )
    rows = sum(end - first for first, end, _ in units)
    return walking + 900 * shares * (rows - max(end for _, end, _ in units))


def _row_blocks(
    first: int, end: int, spans: list[Span], group: int, block_m: int, batch: bool
) -> list[_Task]:
    """A unit's rows in blocks, with the keys that any of a block's queries reads.

    Args:
        batch: whether texts are decoded.
    """
    blocks = []
    for row in range(first, end, block_m):
        end_row = min(row + block_m, end)
        ranges = []
        for span in spans:
            shift, end_key = _UNLIMITED, span.end_key
            if batch and span.start is not None:
                shift = span.first_key + 1 - span.start
            elif span.causal:
                shift = span.end_key - span.end_query + 1
                end_key = min(span.end_key, (end_row - 1) // group + shift)
            ranges.append((span.first_key, end_key, shift))
        blocks.append(_Task.over(row, end_row, ranges))
    return blocks


def _held_by(stripes: Stripes, walk: _Task) -> _Task:
    """Over the keys that a process holds, where they lie with it; shifts count all."""
    ranges = [(stripes.held(first), stripes.held(end), shift) for first, end, shift in walk.ranges]
    ranges = [part for part in ranges if part[0] < part[1]]
    return _Task.over(walk.first, walk.end, ranges)


def _window_blocks(
    first: int, end: int, spans: list[Span], group: int, block_m: int, window: int
) -> list[_Task]:
    """A run's rows in blocks, with the keys that lie in the window of any of a block's queries."""
    shifts = window_shifts(spans)
    blocks = []
    for row in range(first * group, end * group, block_m):
        end_row = min(row + block_m, end * group)
        queries = row // group, (end_row - 1) // group
        ranges = []
        for span, shift in zip(spans, shifts, strict=True):
            first_key = max(span.first_key, queries[0] + shift - window)
            end_key = min(span.end_key, queries[1] + shift)
            if first_key < end_key:
                ranges.append((first_key, end_key, shift))
        blocks.append(_Task.over(row, end_row, ranges))
    return blocks


def _cut(ranges: list[tuple[int, int, int]], size: int) -> list[list[tuple[int, int, int]]]:
    """A list of key ranges cut into lists of `size` keys each, and the rest."""
    pieces, piece, room = [], [], size
    for first, end, shift in ranges:
        while first < end:
            stop = min(end, first + room)
            piece.append((first, stop, shift))
            room -= stop - first
            first = stop
            if not room:
                pieces.append(piece)
                piece, room = [], size
    return [*pieces, piece] if piece or not pieces else pieces


def _flash_takes(q: Tensor) -> bool:
    """Whether flash-attn's kernels, its own or the copies in PyTorch, take such queries."""
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


@cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


def _long_text_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    span: Span,
    angles: Angles | None,
    scale: float | None,
) -> Tensor:
    """Many queries of one causal span, by the flash-attn package or by PyTorch's copy of it."""
    if angles is not None:
        q = rotate(q, angles)
    keys, values = (x[:, span.first_key : span.end_key] for x in (keys, values))
    if _has_flash_attn():
        from flash_attn import flash_attn_func

        k, v = (x.transpose(0, 1)[None] for x in (keys, values))
        return flash_attn_func(q[None], k, v, softmax_scale=scale, causal=True)[0]
    bias = causal_lower_right(q.shape[0], keys.shape[1])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=bias,
            scale=scale,
            enable_gqa=True,
        )
    return out[0].transpose(0, 1).contiguous()


# -- a sliding window ------------------------------------------------------------------------------


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sequences: Sequences,
    past: Tensor | None = None,
    angles: Angles | None = None,
    keep: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `attention.sliding_window_attention`."""
    _, heads, dim = k.shape
    q, k, v = packed_heads(q), packed_heads(k), packed_heads(v)
    flash = _flash_takes(q) and _has_flash_attn()
    block_m = max(_block_sizes(q.dtype, dim)) if max(sequences.lengths) > 64 else 32
    plan = sequences.table(
        ("sliding_window", window, past is not None, block_m),
        lambda: _window_plan(sequences, window, past is not None, block_m),
    )
    # Keys and values [2, P, Hkv, D] of each sequence, those before it and its own, rotated.
    packed = torch.empty(2, plan.sources.shape[0], heads, dim, dtype=q.dtype, device=q.device)
    cos, sin = angles or (k, k)
    _pack_kernel[packed.shape[1],](
        k, v, cos, sin, k if past is None else past.contiguous(), plan.sources, packed[0],
        packed[1], WINDOW=window, K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), HEADS=heads,
        HEADS_PAD=triton.next_power_of_2(heads), D=dim, D_PAD=padded(dim),
        ROTATE=angles is not None, num_warps=4,
    )  # fmt: skip
    following = None
    if keep:
        last = sequences.table(
            ("sliding_window_following", window, past is not None),
            lambda: _last_rows(sequences, plan.ends, window, q.device),
        )
        following = packed.view(-1, heads * dim).index_select(0, last)
        following = following.view(len(sequences.lengths), 2, window - 1, heads, dim)

    if flash:
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q if angles is None else rotate(q, angles), packed[0], packed[1], plan.query_offsets,
            plan.key_offsets, plan.most_queries, plan.most_keys, softmax_scale=scale, causal=True,
            window_size=(window - 1, 0),
        )  # fmt: skip
    else:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _window_kernel[plan.tasks.shape[0], q.shape[1], _parts(dim)](
            q, cos, sin, packed[0], packed[1], out, plan.tasks, WINDOW=window, BLOCK_M=block_m,
            **_query_constants(q, heads, angles, scale), **_config(block_m, dim, q.dtype),
        )  # fmt: skip
    return out, following


class _WindowPlan(NamedTuple):
    """Packed rows are each sequence's visible past and then its own tokens, one after the other.

    Attributes:
        sources: int32 [P], of each packed row: its token; or -1 - r, for row r of `past` seen as
            [m * 2 * (window - 1), Hkv, D].
        tasks: int32 [n, 4]: first token, tokens, first packed row in reach of them, and how many
            keys in reach the first token sees up to its own.
        query_offsets, key_offsets: int32 [n + 1], as flash-attn takes them.
        most_queries, most_keys: of one sequence.
        ends: on the host, of each sequence, the first of its packed rows and their end.
    """

    sources: Tensor
    tasks: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    most_queries: int
    most_keys: int
    ends: list[tuple[int, int]]


def _window_plan(sequences: Sequences, window: int, has_past: bool, block_m: int) -> _WindowPlan:
    continued = sequences.sources or range(len(sequences.lengths))
    sources, tasks, ends, key_offsets = [], [], [], [0]
    for i, (length, start) in enumerate(zip(sequences.lengths, sequences.starts, strict=True)):
        before = min(start, window - 1) if has_past else 0
        token, packed = sequences.offsets[i], key_offsets[-1]
        end = (2 * continued[i] + 1) * (window - 1)  # of its keys in `past`
        sources += [-1 - torch.arange(end - before, end), torch.arange(token, token + length)]
        for first in range(0, length, block_m):
            reach = max(0, before + first - window + 1)
            tasks.append(
                (
                    token + first,
                    min(block_m, length - first),
                    packed + reach,
                    before + first + 1 - reach,
                )
            )
        key_offsets.append(packed + before + length)
        ends.append((packed, key_offsets[-1]))
    tables = [torch.tensor(x) for x in (tasks, sequences.offsets, key_offsets)]
    on_device = _to_device([torch.cat(sources), *tables], sequences.device)
    source_table, task_table, queries, keys = on_device
    most_keys = max(end - first for first, end in ends)
    return _WindowPlan(
        source_table, task_table, queries, keys, max(sequences.lengths), most_keys, ends
    )


def _last_rows(
    sequences: Sequences, ends: list[tuple[int, int]], window: int, device: torch.device
) -> Tensor:
    """int32 [n * 2 * (window - 1)], rows of packed [2 * P, ...] that make the next `past`."""
    first, end = torch.tensor(ends).split(1, 1)
    rows = torch.maximum(end + torch.arange(1 - window, 0), first)
    both = torch.stack((rows, rows + ends[-1][1]), 1)
    return _to_device([both.flatten()], device)[0]


@triton.jit
def _pack_kernel(
    k, v, cos, sin, past, sources, packed_keys, packed_values, WINDOW: tl.constexpr,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One packed row: a token's key, rotated, and value; or those that `past` holds."""
    to = tl.program_id(0)
    source = tl.load(sources + to)
    head = tl.arange(0, HEADS_PAD)
    dims = tl.arange(0, D_PAD)
    inside = (head < HEADS)[:, None] & (dims < D)[None, :]
    at = head[:, None] * D + dims[None, :]
    if source >= 0:
        token = head * 0 + source
        key = load_rotated(
            k, cos, sin, token, head * D, head < HEADS, K_STRIDE, D, D_PAD, ROTATE, HEADS_PAD
        )
        value = tl.load(v + source.to(tl.int64) * V_STRIDE + at, mask=inside)
    else:
        row = (-1 - source).to(tl.int64)
        key = tl.load(past + row * (HEADS * D) + at, mask=inside)
        value = tl.load(past + (row + WINDOW - 1) * (HEADS * D) + at, mask=inside)
    to = to.to(tl.int64) * (HEADS * D)
    tl.store(packed_keys + to + at, key, mask=inside)
    tl.store(packed_values + to + at, value, mask=inside)


@triton.jit
def _window_kernel(
    q, cos, sin, keys, values, out, tasks, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, V_PAD: tl.constexpr, ROTATE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One task, query head and part of the values' columns: a block of a sequence's tokens over the
    packed keys in reach."""
    head = tl.program_id(1)
    part = tl.program_id(2)
    task = tasks + 4 * tl.program_id(0)
    first_token = tl.load(task)
    tokens = tl.load(task + 1)
    first_key = tl.load(task + 2).to(tl.int64)
    seen = tl.load(task + 3)

    row = tl.arange(0, BLOCK_M)
    valid = row < tokens
    token = first_token + row
    column = row * 0 + head * D
    x = load_rotated(q, cos, sin, token, column, valid, STRIDE, D, D_PAD, ROTATE, BLOCK_M)
    keys += first_key * (HEADS * D) + head // GROUP * D
    values += first_key * (HEADS * D) + head // GROUP * D
    acc = tl.zeros((BLOCK_M, V_PAD), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    end = seen + tokens - 1
    acc, top, total = _walk(
        acc, top, total, x, None, keys, values, None, 0, end - WINDOW, seen, end, row + seen, part,
        SCALE, HEADS * D, D, D_PAD, V_PAD, BLOCK_N, WINDOW,
    )  # fmt: skip
    _store_output(out, token, column, acc, total, valid, part, HEADS * GROUP * D, D, V_PAD)
