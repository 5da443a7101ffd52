"""Triton kernels of `sparse_attention`: summaries, scores of blocks, lists, attention over them.

Bytes and operations, with T queries of Hq heads over Hkv key-value heads, M blocks that a text has,
C that a query reads, and element size e; in brackets a token decoded after 1M by 24 heads over 8 of
128 in bfloat16, 67 blocks read:
- Summaries: 66 * D * Hkv * e for each block that a token fills, nothing for the other tokens.
- Scores: reads 2 * Hkv * M * D * e (67 MB, 22 us at 3 TB/s) for each block of queries of a text,
  and writes 4 * T * Hkv * M; 4 * Hq * D * M operations for each query. With many queries of a long
  text what is written is the limit.
- Attention: reads 2 * Hkv * 64 * C * D * e (18 MB, 6 us) for each query, since each has blocks of
  its own; neighbours in a text may find them in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_triton import (
    _config,
    _parts,
    _query_constants,
    _scaled,
    _step,
    _store_output,
    _store_piece,
    _whole,
    _zeros,
    load_rotated,
    words,
)
from .eight_bits import EightBits, Held, numbers_of, scale_words
from .launch import multiprocessors, packed_heads, padded
from .rotary import Angles
from .sequences import to_device
from .text_blocks import ALWAYS, BLOCK, SCORED, Texts

_TILE = 1 << 14  # bytes of summaries, and of query heads, that a program of scores multiplies
_ALONE = 16  # of these where queries are alone, the fewest that are multiplied
_PIECE = 2  # blocks, at least, of a query's that a program reads
_PIECES = 64  # of a query's, at most


# -- summaries -------------------------------------------------------------------------------------


def summarise(keys: Held, summaries: Tensor, slots: Tensor) -> None:
    """As `sparse_attention.summarise`."""
    heads, capacity, dim = keys.shape
    scales = keys.scales if isinstance(keys, EightBits) else None
    _summary_kernel[len(slots), heads](
        numbers_of(keys), scales, summaries, slots, capacity, summaries.shape[1], D=dim,
        D_PAD=padded(dim), BLOCK=BLOCK, APART=1 if scales is None else scales.stride(1),
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=("capacity", "blocks"))
def _summary_kernel(
    keys, scales, summaries, slots, capacity, blocks, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One head of the block that a slot is the last one of, if it is."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    if slot % BLOCK == BLOCK - 1:
        block = slot // BLOCK
        dims = tl.arange(0, D_PAD)
        token = block * BLOCK + tl.arange(0, BLOCK)
        at = token[:, None] * D + dims[None, :]
        k = tl.load(keys + head * capacity * D + at, mask=(dims < D)[None, :], other=0.0)
        k = k.to(tl.float32)
        if scales is not None:
            k *= tl.load(scales + (head * capacity + token) * APART).to(tl.float32)[:, None]
        to = summaries + (head * blocks + block) * (2 * D) + dims
        tl.store(to, tl.min(k, 0), mask=dims < D)
        tl.store(to + D, tl.max(k, 0), mask=dims < D)


# -- the choice ------------------------------------------------------------------------------------


def best_blocks(q: Tensor, summaries: Tensor, texts: Texts, most: int) -> Tensor:
    """As `sparse_attention.choose_blocks`, of rotated queries, where texts have more blocks than
    are read."""
    q, positions = packed_heads(q), texts.positions.contiguous()
    length, (heads, blocks, _, dim) = len(q), summaries.shape
    group, width = q.shape[1] // heads, texts.places.shape[1]
    block_n = min(BLOCK, max(16, _TILE // (padded(dim) * q.dtype.itemsize)))
    tasks, queries, cuts = _tasks(texts, triton.next_power_of_2(group), block_n, heads * width)
    chosen = torch.empty(length, heads, most + ALWAYS, dtype=torch.int32, device=q.device)
    for first_task, end_task, first, end in cuts:
        scores = torch.empty(end - first, heads, width, dtype=torch.float32, device=q.device)
        _score_kernel[end_task - first_task, triton.cdiv(width, block_n), heads](
            q, summaries, texts.places, texts.numbers, positions,
            tasks[first_task:], scores, first, width, blocks,
            STRIDE=q.stride(0), HEADS=heads, GROUP=group, QUERIES=queries,
            MEMBERS=max(triton.next_power_of_2(group), _ALONE // queries), D=dim, D_PAD=padded(dim),
            BLOCK=BLOCK, BLOCK_N=block_n, num_warps=4, num_stages=2,
        )  # fmt: skip
        best = scores.topk(most).indices
        _list_kernel[end - first, heads](
            best, texts.places, texts.numbers, positions, chosen, first, width, MOST=most,
            ALWAYS=ALWAYS, PAD=triton.next_power_of_2(most + ALWAYS), BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
    return chosen


_Cut = tuple[int, int, int, int]  # first task and end, first query and end


def _tasks(texts: Texts, members: int, rows: int, row: int) -> tuple[Tensor, int, list[_Cut]]:
    """Programs' blocks of queries.

    Args:
        members: rows that a query takes.
        rows: that a program has, unless a query takes more.
        row: scores of a query.

    Returns:
        On the device, int32 [n, 2], the first query of each task and their end, unless each has one
        query; how many queries a task has at most; and the tasks whose scores exist at a time.
    """
    length = len(texts.positions)
    if texts.runs is None:
        return texts.numbers, 1, [(0, length, 0, length)]  # nothing reads the former
    longest = max(end - first for first, end in texts.runs)
    queries = min(max(1, rows // members), triton.next_power_of_2(longest))
    tasks = [
        (start, min(start + queries, end))
        for first, end in texts.runs
        for start in range(first, end, queries)
    ]
    most = max(queries, SCORED // row)
    cuts, begin = [], 0
    for i, (_, end) in enumerate(tasks):
        following = tasks[i + 1][1] if i + 1 < len(tasks) else length + most + 1
        if following - tasks[begin][0] > most:
            cuts.append((begin, i + 1, tasks[begin][0], end))
            begin = i + 1
    table = torch.tensor(tasks, dtype=torch.int32)
    return to_device(table, texts.places.device), queries, cuts


@triton.jit(do_not_specialize=("base", "width", "blocks"))
def _score_kernel(
    q, summaries, places, numbers, positions, tasks, scores, base, width, blocks,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    MEMBERS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One key-value head's scores of BLOCK_N blocks with up to QUERIES queries of their text.

    Row r is query r // MEMBERS of them and the head's query head r % MEMBERS, if there is one.
    """
    head = tl.program_id(2)
    if QUERIES == 1:
        first = tl.program_id(0) + base
        end = first + 1
    else:
        first = tl.load(tasks + 2 * tl.program_id(0))
        end = tl.load(tasks + 2 * tl.program_id(0) + 1)
    ROWS: tl.constexpr = QUERIES * MEMBERS
    block = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    query = first + tl.arange(0, QUERIES)
    own = tl.load(positions + query, mask=query < end, other=0).to(tl.int32) // BLOCK
    out = tl.full((QUERIES, BLOCK_N), float("-inf"), tl.float32)
    most = tl.max(own, 0) - 1  # blocks before this one may be chosen
    if tl.program_id(1) * BLOCK_N < most:
        row = tl.arange(0, ROWS)
        token = first + row // MEMBERS
        member = row % MEMBERS
        valid = (token < end) & (member < GROUP)
        dims = tl.arange(0, D_PAD)
        at = token.to(tl.int64) * STRIDE + (head * GROUP + member) * D
        mask = valid[:, None] & (dims < D)[None, :]
        x = tl.load(q + at[:, None] + dims[None, :], mask=mask, other=0.0)
        text = tl.load(numbers + first).to(tl.int64)
        place = tl.load(places + text * width + block, mask=block < most, other=0).to(tl.int64)
        at = (head.to(tl.int64) * blocks + place)[:, None] * (2 * D) + dims[None, :]
        seen = (block < most)[:, None] & (dims < D)[None, :]
        least = tl.load(summaries + at, mask=seen, other=0.0)
        largest = tl.load(summaries + at + D, mask=seen, other=0.0)
        above, below = tl.where(x > 0, x, tl.zeros_like(x)), tl.where(x < 0, x, tl.zeros_like(x))
        product = tl.dot(above, tl.trans(largest), input_precision="ieee")
        product = tl.dot(below, tl.trans(least), product, input_precision="ieee")
        product = tl.where((member < GROUP)[:, None], product, float("-inf"))
        highest = tl.max(tl.reshape(product, (QUERIES, MEMBERS, BLOCK_N)), 1)
        between = (block > 0)[None, :] & (block[None, :] < (own - 1)[:, None])
        out = tl.where(between, highest, float("-inf"))
    at = ((query - base).to(tl.int64) * HEADS + head)[:, None] * width + block[None, :]
    tl.store(scores + at, out, mask=(query < end)[:, None] & (block < width)[None, :])


@triton.jit(do_not_specialize=("base", "width"))
def _list_kernel(
    best, places, numbers, positions, chosen, base, width, MOST: tl.constexpr,
    ALWAYS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sparse_attention.listed` of one query and head, as blocks of the cache."""
    count: tl.constexpr = MOST + ALWAYS
    heads = tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    query = tl.program_id(0) + base
    own = tl.load(positions + query).to(tl.int32) // BLOCK
    text = tl.load(numbers + query).to(tl.int64)
    place = tl.arange(0, PAD)
    behind = tl.minimum(own, count - 1) - place
    by_score = behind >= ALWAYS
    always = tl.where(behind < ALWAYS - 1, own - behind, 0)
    found = tl.load(best + row * MOST + place, mask=by_score, other=0).to(tl.int32)
    block = tl.where(by_score, found, always)
    valid = behind >= 0
    listed = tl.load(places + text * width + block, mask=valid, other=0)
    row += tl.cast(base, tl.int64) * heads
    tl.store(chosen + row * count + place, listed, mask=valid)


# -- attention -------------------------------------------------------------------------------------


def listed_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    chosen: Tensor,
    positions: Tensor,
    angles: Angles | None = None,
) -> Tensor:
    """As `sparse_attention.listed_attention`."""
    q = packed_heads(q)
    length, query_heads, dim = q.shape
    heads, capacity, _ = keys.shape
    group, count = query_heads // heads, chosen.shape[2]
    rows = max(_ALONE, triton.next_power_of_2(group))
    # Two programs for each multiprocessor hide what a few steps wait for.
    wanted = triton.cdiv(2 * multiprocessors(q.device), length * heads * _parts(dim))
    size = max(_PIECE, triton.cdiv(count, min(_PIECES, wanted)))
    pieces = triton.cdiv(count, size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    apart = pieces * length * query_heads if pieces > 1 else 0
    partial = torch.empty(apart, dim, dtype=torch.float32, device=q.device)
    norms = torch.empty(apart, dtype=torch.float32, device=q.device)
    cos, sin = angles or (q, q)
    _listed_kernel[length, heads * _parts(dim), pieces](
        q, cos, sin, numbers_of(keys), numbers_of(values), scale_words(keys, values), chosen,
        positions.contiguous(), out, partial, norms, capacity, chosen.stride(0), chosen.stride(1),
        length, COUNT=count, SIZE=size, ROWS=rows, BLOCK=BLOCK, APART=pieces > 1,
        WORDS=words(rows, keys), **_query_constants(q, heads, angles, None),
        **_config(rows, dim, q.dtype),
    )  # fmt: skip
    if apart:
        _merge_pieces[length, query_heads](
            partial, norms, out, length, PIECES=pieces, PAD=triton.next_power_of_2(pieces),
            HEADS=heads, GROUP=group, D=dim, D_PAD=padded(dim), num_warps=2,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("capacity", "length", "by_query", "by_head"))
def _listed_kernel(
    q, cos, sin, keys, values, scales, chosen, positions, out, partial, norms, capacity, by_query,
    by_head, length, SCALE: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, V_PAD: tl.constexpr, ROTATE: tl.constexpr,
    BLOCK: tl.constexpr, APART: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One query, key-value head, part of the values' columns, and SIZE of the blocks that are
    listed: the last one is the query's own, which it reads up to its position."""
    parts: tl.constexpr = D_PAD // V_PAD
    query = tl.program_id(0)
    head = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    piece = tl.program_id(2)
    position = tl.load(positions + query).to(tl.int32)
    last = tl.minimum(position // BLOCK, COUNT - 1)
    row = tl.arange(0, ROWS)
    valid = row < GROUP
    token = row * 0 + query
    column = (head * GROUP + row) * D
    x = load_rotated(q, cos, sin, token, column, valid, STRIDE, D, D_PAD, ROTATE, ROWS)
    keys += head.to(tl.int64) * capacity * D
    values += head.to(tl.int64) * capacity * D
    x_scales = None
    if scales is not None:
        scales += head.to(tl.int64) * capacity
        x, x_scales = _scaled(x, SCALE)
    chosen += query.to(tl.int64) * by_query + head * by_head
    acc = _zeros(ROWS, V_PAD, WORDS)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = piece * SIZE
    end = tl.minimum(first + SIZE, last)
    limit = row * 0
    tl.static_assert(BLOCK % BLOCK_N == 0)
    steps: tl.constexpr = BLOCK // BLOCK_N
    for i in range(first * steps, end * steps):
        start = tl.load(chosen + i // steps) * BLOCK + i % steps * BLOCK_N
        acc, top, total = _step(
            acc, top, total, x, x_scales, keys, values, scales, start, start, limit, part, SCALE, D,
            D, D_PAD, V_PAD, BLOCK_N, 0, False, WORDS,
        )  # fmt: skip
    if (last >= first) & (last < first + SIZE):
        start = tl.load(chosen + last) * BLOCK
        stop = start + position % BLOCK + 1
        for begin in range(start, stop, BLOCK_N):
            acc, top, total = _step(
                acc, top, total, x, x_scales, keys, values, scales, begin, stop, limit + stop, part,
                SCALE, D, D, D_PAD, V_PAD, BLOCK_N, 0, True, WORDS,
            )  # fmt: skip
    acc = _whole(acc, ROWS, V_PAD, WORDS)
    if APART:
        place = ((piece * length + query) * HEADS + head) * GROUP + row
        _store_piece(partial, norms, place, acc, top, total, valid, part, D, V_PAD)
    else:
        _store_output(out, token, column, acc, total, valid, part, HEADS * GROUP * D, D, V_PAD)


@triton.jit(do_not_specialize=("length",))
def _merge_pieces(
    partial, norms, out, length, PIECES: tl.constexpr, PAD: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One query head: the mean of its pieces' outputs, weighted by exp2 of their norms."""
    heads: tl.constexpr = HEADS * GROUP
    row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    piece = tl.arange(0, PAD)
    place = piece.to(tl.int64) * (length * heads) + row
    norm = tl.load(norms + place, mask=piece < PIECES, other=float("-inf"))
    weight = tl.exp2(norm - tl.max(norm, 0))
    dims = tl.arange(0, D_PAD)
    inside = (piece < PIECES)[:, None] & (dims < D)[None, :]
    x = tl.load(partial + place[:, None] * D + dims[None, :], mask=inside, other=0.0)
    mean = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * D + dims, mean.to(out.dtype.element_ty), mask=dims < D)
