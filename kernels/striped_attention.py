"""Attention over a cache whose slots are dealt out to the processes of a group, as `Stripes` says.

Each process attends to the keys that it holds; the outputs are merged, weighted by their sums of
exponentials, whose logarithms (log-sum-exp) go with them from process to process. Spans, slots and
lengths are those of the whole cache, and all processes pass the same queries.

Per query, Hq (D + 1) float32 numbers go to each other process, 12 KiB for 24 heads of 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import KEYS, SCORES, known
from .dispatch import run_triton, use_triton
from .eight_bits import Held
from .group import Group
from .rotary import Angles, rotate
from .sequences import Readings, Span, Spans
from .stripes import Stripes

GATHERED = 1 << 24  # numbers of all processes' outputs that are merged at a time


def striped_cache_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Spans,
    group: Group,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention.cache_attention`, of keys and values [Hkv, n, D] that are this process's stripes:
    [T, Hq, D]."""
    part = cache_attention_part(q, keys, values, spans, group.stripes, angles, scale)
    return _merged(part, group, q)


def striped_batch_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    positions: Tensor,
    readings: Readings,
    group: Group,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention.batch_attention`, of keys and values [Hkv, n, D] that are this process's stripes:
    [B, Hq, D]."""
    if use_triton(q, keys, values):
        from .attention_triton import batch_attention_part as fast

        part = run_triton(fast, q, keys, values, positions, readings, group, angles, scale)
    else:
        part = batch_attention_part_reference(
            q, keys, values, positions, readings, group.stripes, angles, scale
        )
    return _merged(part, group, q)


def cache_attention_part(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Spans,
    stripes: Stripes,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """What one process adds to `striped_cache_attention`.

    Returns:
        [T, Hq * D + Hq] in float32 (float64 for float64 inputs): of each query the outputs of its
        heads, 0 where it reads no key here, and then their scores' log-sum-exp, -inf there.
    """
    if use_triton(q, keys, values):
        from .attention_triton import cache_attention_part as fast

        return run_triton(fast, q, keys, values, spans, stripes, angles, scale)
    return cache_attention_part_reference(q, keys, values, spans, stripes, angles, scale)


def cache_attention_part_reference(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Spans,
    stripes: Stripes,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """`cache_attention_part`, span after span."""
    if angles is not None:
        q = rotate(q, angles)
    return _attend(q, keys, values, spans.spans, stripes, scale)


def batch_attention_part_reference(
    q: Tensor,
    keys: Held,
    values: Held,
    positions: Tensor,
    readings: Readings,
    stripes: Stripes,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """What one process adds to `striped_batch_attention`, with the positions read on the host."""
    if angles is not None:
        q = rotate(q, angles)
    order = list(readings.order)
    at = positions.tolist()
    spans = [known(span, at[order[span.first_query]]) for span in readings.spans]
    spans = [span for span in spans if span.end_key > span.first_key]
    part = _attend(q[order], keys, values, spans, stripes, scale)
    out = part.new_zeros(len(q), part.shape[1])
    out[order] = part
    return out


def _attend(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Sequence[Span],
    stripes: Stripes,
    scale: float | None,
) -> Tensor:
    """q [T, Hq, D], rotated: block by block of keys, sums are scaled as larger scores turn up."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = keys.shape[0]
    # A group's query heads read the same keys, so they are queries of one head: [heads, T, group].
    rows = q.to(wide) * (q.shape[2] ** -0.5 if scale is None else scale)
    rows = rows.transpose(0, 1).unflatten(0, (heads, -1)).transpose(1, 2).contiguous()
    group = rows.shape[2]
    tops = rows.new_full((*rows.shape[:3], 1), float("-inf"))
    totals, outs = torch.zeros_like(tops), torch.zeros_like(rows)
    for span in spans:
        block = max(1, SCORES // (min(KEYS, span.end_key - span.first_key) * q.shape[1]))
        for start in range(span.first_query, span.end_query, block):
            asked = slice(start, min(start + block, span.end_query))
            query = torch.arange(asked.start, asked.stop, device=q.device)
            unread = span.end_query - 1 - query if span.causal else 0 * query
            limit = stripes.held_before(span.end_key - unread).repeat_interleave(group)[:, None]
            begin = stripes.held(span.first_key)
            end = stripes.held(span.end_key - (span.end_query - asked.stop) * span.causal)
            if begin == end:
                continue
            top, total, out, own = (x[:, asked].flatten(1, 2) for x in (tops, totals, outs, rows))
            for first in range(begin, end, KEYS):
                slots = slice(first, min(first + KEYS, end))
                scores = own @ keys[:, slots].to(wide).mT
                slot = torch.arange(slots.start, slots.stop, device=q.device)
                scores.masked_fill_(slot >= limit, float("-inf"))
                known_top, top = top, top.maximum(scores.amax(2, keepdim=True))
                shift = top.masked_fill(top == float("-inf"), 0)  # no key seen yet
                weights = (scores - shift).exp_()
                fade = (known_top - shift).exp_()
                total = total * fade + weights.sum(2, keepdim=True)
                out = out * fade + weights @ values[:, slots].to(wide)
            for whole, part in ((tops, top), (totals, total), (outs, out)):
                whole[:, asked] = part.unflatten(1, (len(query), group))
    seen = totals.masked_fill(totals == 0, 1)
    outs, norms = outs / seen, tops + seen.log()
    return torch.cat([x.transpose(0, 1).flatten(1) for x in (outs, norms)], 1)


def _merged(part: Tensor, group: Group, q: Tensor) -> Tensor:
    """The attention of queries [T, Hq, D], of what each process adds."""
    rows = max(1, GATHERED // (group.size * part.shape[1]))
    blocks = part.split(rows)
    outputs = [merged(group.gather(block), q.shape[1], q.dtype) for block in blocks]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def merged(every: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """What all processes add, [n, T, Hq * D + Hq] of `cache_attention_part`, as one [T, Hq, D];
    0 where none has read a key."""
    if use_triton(every):
        from .striped_attention_triton import merged as fast

        return run_triton(fast, every, heads, dtype)
    return merged_reference(every, heads, dtype)


def merged_reference(every: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """`merged` in PyTorch."""
    outs, norms = every.split((every.shape[2] - heads, heads), 2)
    top = norms.amax(0)
    weights = (norms - top.masked_fill(top == float("-inf"), 0)).exp()[..., None]
    total = weights.sum(0)
    out = (outs.unflatten(2, (heads, -1)) * weights).sum(0) / total.masked_fill(total == 0, 1)
    return out.to(dtype)
