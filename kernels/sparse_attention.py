"""Sparse attention over a cache: of all blocks of a text, each query reads a few of its choice.

A text's tokens lie in whole blocks of the cache, from its first token on: the 64 positions from
64 b on are its block b, wherever that lies. Of each block that is full and each key-value head, the
least and the largest number of its keys in each channel are kept, as in Quest (arXiv:2406.10774),
of which follows the most that a key of the block may score with a query q:

    sum over channels of max(q * least, q * largest)

A query at position p, in block n = p // 64 of its text, reads that one up to its own position, the
one before it, the first, and of those between the `most` that may score highest with any of the
query heads that share the key-value head. So what it reads depends on its text alone.

Measured on demo-1m, 48 answers in texts of 32K tokens, eight needles in each: with 1, 2, 4 and 8
blocks, 13, 33, 42 and 48 are right so; with the sum over the query heads in place of the highest,
14, 28, 42 and 48; with the mean of a block's keys, half the bytes, 7, 13, 18 and 23.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton
from .eight_bits import Held
from .rotary import Angles, rotate
from .text_blocks import ALWAYS, BLOCK, Texts

NUMBERS = 1 << 22  # of keys, or of values, that the reference takes out of the cache at a time


# -- summaries -------------------------------------------------------------------------------------


def summarise(keys: Held, summaries: Tensor, slots: Tensor) -> None:
    """Sums up the blocks whose last slots are among some that have been written.

    Args:
        keys: [Hkv, N, D], rotated.
        summaries: [Hkv, N / 64, 2, D], least and largest; changed in place.
        slots: integers [T], on the device. What other slots they are does not matter.
    """
    if use_triton(keys, summaries):
        from .sparse_attention_triton import summarise as fast

        run_triton(fast, keys, summaries, slots)
    else:
        summarise_reference(keys, summaries, slots)


def summarise_reference(keys: Held, summaries: Tensor, slots: Tensor) -> None:
    """`summarise`, all blocks at once."""
    blocks = slots[slots % BLOCK == BLOCK - 1] // BLOCK
    tokens = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=slots.device)
    own = keys[:, tokens].to(summaries.dtype)
    summaries[:, blocks] = torch.stack((own.amin(2), own.amax(2)), 2)


# -- the choice ------------------------------------------------------------------------------------


def choose_blocks(
    q: Tensor, summaries: Tensor, texts: Texts, most: int, angles: Angles | None = None
) -> Tensor:
    """Which blocks of the cache each query reads.

    Args:
        q: [T, Hq, D].
        summaries: [Hkv, M, 2, D].
        texts: that they belong to.
        most: blocks that are chosen by score.
        angles: cos and sin [T, D / 2] by which q is rotated first; None: it is rotated already.

    Returns:
        int32 [T, Hkv, C], the last one its own, of the min(p // 64 + 1, C) that a query at position
        p reads; anything from 0 on behind.
    """
    length, heads, width = len(q), summaries.shape[0], texts.places.shape[1]
    if width <= most + ALWAYS:  # all
        every = texts.places.index_select(0, texts.numbers)
        return every[:, None].expand(-1, heads, -1)
    if angles is not None:
        q = rotate(q, angles)
    if use_triton(q, summaries):
        from .sparse_attention_triton import best_blocks

        return run_triton(best_blocks, q, summaries, texts, most)
    chosen = torch.empty(length, heads, most + ALWAYS, dtype=torch.int32, device=q.device)
    for text, first, end in _stretches(texts, max(1, NUMBERS // (width * q.shape[1]))):
        rows = slice(first, end)
        places, positions = texts.places[text], texts.positions[rows]
        scores = block_scores_reference(q[rows], summaries, places, positions)
        best = scores.topk(most).indices
        chosen[rows] = places[listed(best, positions)]
    return chosen


def _stretches(texts: Texts, most: int) -> Iterator[tuple[int, int, int]]:
    """Number of a text, first and end of up to `most` queries of it."""
    first = 0
    for text, members in groupby(texts.numbers.tolist()):
        end = first + len(list(members))
        for start in range(first, end, most):
            yield text, start, min(start + most, end)
        first = end


def block_scores_reference(
    q: Tensor, summaries: Tensor, places: Tensor, positions: Tensor
) -> Tensor:
    """What the blocks of a text may score at most with each of some queries of it.

    Args:
        q: [T, Hq, D], rotated.
        summaries: [Hkv, M, 2, D].
        places: integers [W], of the text's blocks.
        positions: int64 [T].

    Returns:
        [T, Hkv, W], -inf of blocks that are not to be chosen.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    least, largest = summaries[:, places].to(wide).unbind(2)
    rows = q.to(wide).unflatten(1, (len(summaries), -1))
    scores = rows.clamp(min=0) @ largest.mT + rows.clamp(max=0) @ least.mT
    block = torch.arange(len(places), device=q.device)
    between = (block > 0) & (block < (positions // BLOCK - 1)[:, None])
    return scores.amax(2).masked_fill(~between[:, None], float("-inf"))


def listed(best: Tensor, positions: Tensor) -> Tensor:
    """Blocks of their texts that queries read.

    Args:
        best: integers [T, H, K], the blocks that score highest, in order.
        positions: int64 [T].

    Returns:
        [T, H, K + 3], in the order of `choose_blocks`.
    """
    own = (positions // BLOCK)[:, None, None]
    place = torch.arange(best.shape[2] + ALWAYS, device=best.device)
    behind = own.clamp(max=len(place) - 1) - place  # it in the list
    always = torch.where(behind < ALWAYS - 1, own - behind, 0).clamp(min=0)
    padded = torch.nn.functional.pad(best, (0, ALWAYS))
    return torch.where(behind >= ALWAYS, padded, torch.where(behind < 0, 0, always))


# -- attention -------------------------------------------------------------------------------------


def listed_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    chosen: Tensor,
    positions: Tensor,
    angles: Angles | None = None,
) -> Tensor:
    """Queries over the blocks that `choose_blocks` has chosen for them.

    Args:
        q: [T, Hq, D].
        keys, values: [Hkv, N, D], rotated. What is not read may be uninitialised.
        chosen: int32 [T, Hkv, C].
        positions: int64 [T].
        angles: as in `choose_blocks`.

    Returns:
        [T, Hq, D].
    """
    if use_triton(q, keys, values):
        from .sparse_attention_triton import listed_attention as fast

        return run_triton(fast, q, keys, values, chosen, positions, angles)
    return listed_attention_reference(q, keys, values, chosen, positions, angles)


def listed_attention_reference(
    q: Tensor,
    keys: Held,
    values: Held,
    chosen: Tensor,
    positions: Tensor,
    angles: Angles | None = None,
) -> Tensor:
    """`listed_attention`, with copies of what some queries read."""
    if angles is not None:
        q = rotate(q, angles)
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, _, dim = keys.shape
    count = chosen.shape[2]
    block, token = torch.arange(count, device=q.device), torch.arange(BLOCK, device=q.device)
    head = torch.arange(heads, device=q.device)[:, None]
    outputs = []
    for some in torch.arange(len(q), device=q.device).split(
        max(1, NUMBERS // (heads * count * BLOCK * dim))
    ):
        last = (positions[some] // BLOCK).clamp(max=count - 1)[:, None, None]
        own = (block[:, None] == last) & (token <= (positions[some] % BLOCK)[:, None, None])
        visible = ((block[:, None] < last) | own).flatten(1)[:, None, :, None]
        slots = (chosen[some].long()[..., None] * BLOCK + token).flatten(2)
        k, v = (x[head, slots].to(wide).masked_fill(~visible, 0) for x in (keys, values))
        rows = q[some].to(wide).unflatten(1, (heads, -1)) * dim**-0.5
        scores = (rows @ k.mT).masked_fill(~visible.mT, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).flatten(1, 2))
    return torch.cat(outputs).to(q.dtype)
