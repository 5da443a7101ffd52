"""Attention over a cache, of many tokens or of one of each of many texts, and over a window.

Scores are multiplied by `scale`, D^(-1/2) unless it is given. Query head h reads key-value head
h // (Hq / Hkv).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache_writes import store_keys_values
from .dispatch import run_triton, use_triton
from .eight_bits import Held
from .relay import Relay
from .rotary import Angles, rotate
from .sequences import (
    Readings,
    Sequences,
    Span,
    Spans,
    cut_span,
    query_runs,
    to_device,
    window_shifts,
)

SCORES = 1 << 22  # queries are taken in blocks so that no more scores exist at a time
KEYS = 1 << 12  # of a cache, widened and multiplied at a time
FEW = 64  # queries of a group of heads up to which reading its keys only once is worth a mask


def cache_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Spans,
    angles: Angles | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Queries over the keys of a shared cache that `spans` gives them.

    Args:
        q: [T, Hq, D].
        keys, values: [Hkv, N, D], rotated; both of one buffer shape, or of such buffers the same
            slots; or both of an `EightBits.pair`. Keys outside the spans may be uninitialised.
        spans: which keys each query reads.
        angles: cos and sin [T, D / 2] by which q is rotated first; None: it is rotated already.
        scale: of the scores, positive.
        window: how many of its text's last tokens a query reads at most, its own included; None:
            all. Each query lies in one causal span then, and all spans say their `start`.

    Returns:
        [T, Hq, D].

    Raises:
        ValueError: the spans do not say what a window needs.
    """
    if use_triton(q, keys, values):
        from .attention_triton import cache_attention as fast

        return run_triton(fast, q, keys, values, spans, angles, scale, window)
    return cache_attention_reference(q, keys, values, spans, angles, scale, window)


def cache_attention_reference(
    q: Tensor,
    keys: Held,
    values: Held,
    spans: Spans,
    angles: Angles | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`cache_attention`, run after run of queries that read the same spans."""
    if angles is not None:
        q = rotate(q, angles)
    if window is not None:
        return torch.cat(
            [
                _attend_windows(q, keys, values, run, first, end, scale, window)
                for first, end, run in query_runs(spans)
            ]
        )
    outputs = []
    for first, end, run in query_runs(spans):
        run = sorted((cut_span(span, first, end) for span in run), key=lambda s: s.first_key)
        if q.device.type == "cpu" and _is_one_text(run):
            if isinstance(keys, Tensor) and isinstance(values, Tensor):  # not in eight bits
                outputs.append(_attend_text(q[first:end], keys, values, run, spans, scale))
                continue
        longest = min(KEYS, max(span.end_key - span.first_key for span in run))
        block = max(1, SCORES // (longest * q.shape[1]))
        for start in range(first, end, block):
            stop = min(start + block, end)
            cut = [_from_zero(cut_span(span, start, stop)) for span in run]
            outputs.append(_attend_apart(q[start:stop], keys, values, cut, scale))
    return torch.cat(outputs)


def _attend_windows(
    q: Tensor,
    keys: Held,
    values: Held,
    run: list[Span],
    first: int,
    end: int,
    scale: float | None,
    window: int,
) -> Tensor:
    """Queries first .. end - 1 of q [T, Hq, D], rotated, over a run: [end - first, Hq, D].

    Each block of queries meets the keys in reach of any of them.
    """
    shifts, outputs = window_shifts(run), []
    block = max(128, min(window, 512))
    for start in range(first, end, block):
        queries = torch.arange(start, min(start + block, end), device=q.device)
        slots, visible = [], []
        for span, shift in zip(run, shifts, strict=True):
            reach = max(span.first_key, start + shift - window)
            slot = torch.arange(
                reach, max(reach, min(span.end_key, start + len(queries) - 1 + shift))
            ).to(q.device)
            limit = queries[:, None] + shift
            slots.append(slot)
            visible.append((slot < limit) & (slot >= limit - window))
        every, mask = torch.cat(slots), torch.cat(visible, 1)
        heads = keys.shape[0]
        rows = q[start : start + len(queries)].transpose(0, 1).unflatten(0, (heads, -1))
        mask = mask.repeat(rows.shape[1], 1)
        k, v = (x[:, every].to(q.dtype) for x in (keys, values))
        out = F.scaled_dot_product_attention(rows.flatten(1, 2), k, v, mask, scale=scale)
        outputs.append(out.unflatten(1, rows.shape[1:3]).flatten(0, 1).transpose(0, 1))
    return torch.cat(outputs)


def _from_zero(span: Span) -> Span:
    """Of queries that are counted from the span's first one."""
    return span._replace(first_query=0, end_query=span.end_query - span.first_query)


def _is_one_text(run: list[Span]) -> bool:
    """Whether spans lie one behind the other, and the queries at the end of the last one if any."""
    causal = any(span.causal for span in run[:-1])
    return not causal and all(a.end_key == b.first_key for a, b in pairwise(run))


def _attend_text(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    run: list[Span],
    spans: Spans,
    scale: float | None,
) -> Tensor:
    """q [T, Hq, D], rotated, over a run that `_is_one_text`: [T, Hq, D].

    Left to PyTorch, which on a CPU goes through keys and queries in blocks of its own. All chunks
    of a text are calls of one shape but for the number of keys, and nothing that is allocated grows
    with queries times keys, unless the queries are few: masks of ever new sizes would leave gaps in
    the heap, of several times their size.
    """
    length, heads = q.shape[0], keys.shape[0]
    every = slice(run[0].first_key, run[-1].end_key)
    keys, values = keys[:, None, every], values[:, None, every]
    q = q.flip(0).transpose(0, 1).unflatten(0, (heads, -1))
    group, mask = q.shape[1], None
    if length > 1 and run[-1].causal:
        count, copies = keys.shape[2], group if group * length <= FEW else 1
        mask = spans.table(
            ("text_mask", length, count, copies, q.dtype),
            lambda: _text_mask(length, count, q.dtype, copies),
        )
    if mask is None or len(mask) > length:
        # A group's query heads read the same keys: as queries of one head, only once.
        rows = q.flatten(1, 2)[:, None]
        out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
        out = out.squeeze(1).unflatten(1, (group, length))
    else:
        # Where the processor multiplies bfloat16, PyTorch copies the keys and values of all heads
        # at hand in another order: one of each group at a time.
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        heads_at_hand = (part[None] for part in q.unbind(1))
        parts = [
            F.scaled_dot_product_attention(part, keys, values, mask, scale=scale)[0]
            for part in heads_at_hand
        ]
        out = torch.stack(parts, 1)
    return out.flatten(0, 1).transpose(0, 1).flip(0)


def _text_mask(queries: int, keys: int, dtype: torch.dtype, copies: int) -> Tensor:
    """[copies * queries, keys] to add to the scores of a text's last tokens, the LAST QUERY FIRST.

    In that order each query reads one key less than the one before it, so that all rows of one copy
    are views of one vector.
    """
    row = torch.zeros(keys + queries - 1, dtype=dtype)
    row[keys:] = float("-inf")
    mask = row.as_strided((queries, keys), (1, 1))
    return mask.repeat(copies, 1) if copies > 1 else mask


def _attend_apart(
    q: Tensor, keys: Held, values: Held, spans: Sequence[Span], scale: float | None
) -> Tensor:
    """q [T, Hq, D], rotated, over spans of some of these T queries each: [T, Hq, D].

    There may be gaps between them, which may be NaN, which no mask would hide, and a long cache is
    not copied to leave them out: block by block, sums are scaled as larger scores turn up.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = keys.shape[0]
    # A group's query heads read the same keys, so they are queries of one head: [heads, T, group].
    factor = q.shape[2] ** -0.5 if scale is None else scale
    rows = (q.to(wide) * factor).transpose(0, 1).unflatten(0, (heads, -1))
    rows = rows.transpose(1, 2).contiguous()
    group = rows.shape[2]
    tops = rows.new_full((*rows.shape[:3], 1), float("-inf"))
    totals, outs = torch.zeros_like(tops), torch.zeros_like(rows)
    for span in spans:
        asked = slice(span.first_query, span.end_query)
        length = span.end_query - span.first_query
        top, total, out, own = (x[:, asked].flatten(1, 2) for x in (tops, totals, outs, rows))
        seen = span.end_key - length + 1 if span.causal else span.end_key  # by all queries
        for first in range(span.first_key, span.end_key, KEYS):
            block = slice(first, min(first + KEYS, span.end_key))
            scores = own @ keys[:, block].to(wide).mT
            if block.stop > seen:
                later = torch.ones(length, block.stop - first, dtype=torch.bool, device=q.device)
                later = later.triu(seen - first).repeat_interleave(group, 0)
                scores.masked_fill_(later, float("-inf"))
            known, top = top, top.maximum(scores.amax(2, keepdim=True))
            weights = scores.sub_(top).exp_()
            fade = (known - top).exp_()
            total = total * fade + weights.sum(2, keepdim=True)
            out = out * fade + weights @ values[:, block].to(wide)
            del scores, weights  # not two blocks' at a time
        for whole, part in ((tops, top), (totals, total), (outs, out)):
            whole[:, asked] = part.unflatten(1, (length, group))
    outs = (outs / totals).transpose(1, 2).flatten(0, 1).transpose(0, 1)
    return outs.to(q.dtype)


def batch_attention(
    q: Tensor,
    keys: Held,
    values: Held,
    positions: Tensor,
    readings: Readings,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """One token of each of B texts over their keys in a cache, in a CUDA graph if need be.

    A graph may hold it once it has been called outside the graph with the same shapes, and as long
    as `readings.layout` stays.

    Args:
        q: [B, Hq, D].
        keys, values: [Hkv, N, D], rotated, as in `cache_attention`.
        positions: int64 [B], of the tokens in their texts, on q's device.
        readings: which keys each reads, at least one. Rows that it does not name come out as
            anything.
        angles: cos and sin [B, D / 2] by which q is rotated first; None: it is rotated already.
        scale: of the scores, positive.

    Returns:
        [B, Hq, D].
    """
    if use_triton(q, keys, values):
        from .attention_triton import batch_attention as fast

        return run_triton(fast, q, keys, values, positions, readings, angles, scale)
    return batch_attention_reference(q, keys, values, positions, readings, angles, scale)


def batch_attention_reference(
    q: Tensor,
    keys: Held,
    values: Held,
    positions: Tensor,
    readings: Readings,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """`batch_attention`, with the positions read on the host."""
    if angles is not None:
        q = rotate(q, angles)
    order = list(readings.order)
    at = positions.tolist()
    spans = [known(span, at[order[span.first_query]]) for span in readings.spans]
    spans = sorted((s for s in spans if s.end_key > s.first_key), key=lambda s: s.first_key)
    if order == [0] and q.device.type == "cpu" and _is_one_text(spans):
        if isinstance(keys, Tensor) and isinstance(values, Tensor):  # not in eight bits
            return _attend_text(q, keys, values, spans, Spans(()), scale)
    out = q.new_empty(q.shape)
    out[order] = _attend_apart(q[order], keys, values, spans, scale)
    return out


def known(span: Span, position: int) -> Span:
    """What a text's token at `position` reads of a span."""
    if span.start is None:
        return span
    end = min(span.end_key, span.first_key + position + 1 - span.start)
    return span._replace(end_key=end, start=None)


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
    """Each token attends to itself and the `window` - 1 tokens before it in its sequence.

    Args:
        q: [T, Hq, D].
        k, v: [T, Hkv, D].
        window: number of visible tokens, own position included.
        sequences: how the T tokens are packed.
        past: [m, 2, window - 1, Hkv, D], rotated keys (0) and values (1) of tokens that were fed
            before, right-aligned: the last slot is the token just before a sequence that continues
            this state. Slots before a text's first token may be uninitialised. None: every
            sequence begins its text.
        angles: cos and sin [T, D / 2] by which q and k are rotated first; None: they are already.
        keep: whether to return the past of the tokens that follow.
        scale: of the scores, positive.

    Returns:
        The output [T, Hq, D] and, of the n sequences, the `past` [n, 2, window - 1, Hkv, D] of the
        tokens that follow, in new memory, or None.
    """
    relay = sequences.relay
    if relay is not None:
        past = _past_of_part(k, v, window, relay, past, angles)
    if use_triton(q, k, v):
        from .attention_triton import sliding_window_attention as fast

        out, after = run_triton(fast, q, k, v, window, sequences, past, angles, keep, scale)
    else:
        out, after = sliding_window_attention_reference(
            q, k, v, window, sequences, past, angles, keep, scale
        )
    return out, after if relay is None or after is None else relay.after(after)


def _past_of_part(
    k: Tensor, v: Tensor, window: int, relay: Relay, past: Tensor | None, angles: Angles | None
) -> Tensor:
    """The `past` of this process's part of a text, whose `past` before all parts is given."""
    reach = window - 1
    last = slice(max(0, len(k) - reach), None)
    k, v = k[last], v[last]
    if angles is not None:
        k = rotate(k, (angles[0][last], angles[1][last]))
    rows = torch.stack((k, v), 1)
    before = relay.before(rows, reach, None if past is None else past[0].transpose(0, 1))
    return before.transpose(0, 1)[None]


def sliding_window_attention_reference(
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
    """`sliding_window_attention`; sequences of one length and one length of past are a batch."""
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    batches = defaultdict(list)
    for i, (length, start) in enumerate(zip(sequences.lengths, sequences.starts, strict=True)):
        batches[length, min(start, window - 1)].append(i)
    sources = sequences.sources or tuple(range(len(sequences.lengths)))

    out = q.new_empty(q.shape)
    following = k.new_empty(len(sequences.lengths), 2, window - 1, *k.shape[1:]) if keep else None
    for (length, before), members in batches.items():
        offsets = torch.tensor([sequences.offsets[i] for i in members], device=q.device)
        rows = offsets[:, None] + torch.arange(length, device=q.device)
        own = torch.stack((k[rows], v[rows]), 1)  # [n, 2, length, Hkv, D]
        if past is not None and before:
            continued = torch.tensor([sources[i] for i in members], device=q.device)
            own = torch.cat((past[continued, :, window - 1 - before :], own), 2)
        out[rows] = _window(q[rows], own[:, 0], own[:, 1], window, scale)
        if following is not None:
            last = own[:, :, max(0, before + length - window + 1) :]
            padding = window - 1 - last.shape[2]
            following[torch.tensor(members, device=q.device)] = F.pad(
                last, (0, 0, 0, 0, padding, 0)
            )
    return out, following


def _window(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """q [n, length, Hq, D] over k, v [n, total, Hkv, D], whose last `length` are the queries' own.

    Each block of queries meets the keys in reach of any of them: length * (block + window) scores
    in place of length * total. A group's query heads are queries of one head.
    """
    length, offset = q.shape[1], k.shape[1] - q.shape[1]
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    block = max(128, min(window, 512))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        reach = slice(max(0, start + offset - window + 1), end + offset)
        i = torch.arange(start + offset, end + offset, device=q.device).repeat(group)[:, None]
        j = torch.arange(reach.start, reach.stop, device=q.device)
        visible = (j <= i) & (j > i - window)
        rows = q[:, start:end].transpose(1, 2).unflatten(1, (heads, group)).flatten(2, 3)
        keys, values = (x[:, reach].transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(rows, keys, values, visible, scale=scale)
        outputs.append(out.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2))
    return torch.cat(outputs, 1)


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    positions: Tensor,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """`sliding_window_attention` of a decoded token of each of B texts, in a CUDA graph if need be.

    Args:
        q: [B, Hq, D].
        k, v: [B, Hkv, D].
        ring_keys, ring_values: [B, Hkv, window, D], contiguous; token p lies in slot p % window.
            The tokens' own rotated keys and values are written to theirs. Slots never written may
            be uninitialised.
        positions: int64 [B], of the tokens in their texts, on q's device.
        angles: cos and sin [B, D / 2] by which q and k are rotated first; None: they are already.
        scale: of the scores, positive.

    Returns:
        [B, Hq, D].
    """
    _, firsts = _ring_readings(ring_keys.shape, q.shape[1], q.dtype, q.device)
    keys, values = _as_cache(ring_keys), _as_cache(ring_values)
    store_keys_values(k, v, angles, keys, values, firsts + positions % ring_keys.shape[2])
    return ring_attention(q, ring_keys, ring_values, positions, angles, scale)


def ring_attention(
    q: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    positions: Tensor,
    angles: Angles | None = None,
    scale: float | None = None,
) -> Tensor:
    """What `window_step` reads of rings that the tokens' own keys and values are in already."""
    readings, _ = _ring_readings(ring_keys.shape, q.shape[1], q.dtype, q.device)
    keys, values = _as_cache(ring_keys), _as_cache(ring_values)
    return batch_attention(q, keys, values, positions, readings, angles, scale)


def _as_cache(rings: Tensor) -> Tensor:
    """Rings [B, Hkv, window, D] seen as a cache [Hkv, N, D]: text b's begin at b * Hkv * window.

    A head's slots are those of the first head, so many further on; those between are of others.
    """
    count, heads, window, dim = rings.shape
    slots = (count * heads - heads + 1) * window
    return rings.view(-1).as_strided((heads, slots, dim), (window * dim, dim, 1))


@cache
def _ring_readings(
    shape: torch.Size, query_heads: int, dtype: torch.dtype, device: torch.device
) -> tuple[Readings, Tensor]:
    """Of `_as_cache`, and int64 [B], where each text's slots begin; kept, with the tables on the
    device, since they are the same for every layer and step of one model. What tells models apart
    is asked for because these tables are of one shape and dtype of what reads by them."""
    count, heads, window, _ = shape
    starts = range(0, count * heads * window, heads * window)
    spans = [Span(b, b + 1, at, at + window, False, start=0) for b, at in enumerate(starts)]
    return Readings(range(count), spans), torch.tensor(starts, device=device)


def rings_from_past(past: Tensor, positions: Sequence[int]) -> Tensor:
    """What `window_step` needs as ring_keys and ring_values for the tokens at `positions`.

    Args:
        past: [B, 2, window - 1, Hkv, D], of B texts, as `sliding_window_attention` has it.
        positions: of the tokens that follow it.

    Returns:
        [B, 2, Hkv, window, D], ring_keys and ring_values; slots of no token are zero.
    """
    window = past.shape[2] + 1
    past = F.pad(past, (0, 0, 0, 0, 1, 0))  # slot 0 is of no token
    position = to_device(torch.tensor(positions), past.device)[:, None]
    # In slot w lies the last token p before the position with p % window = w.
    back = (position - 1 - torch.arange(window, device=past.device)) % window + 1
    index = torch.where(back <= position, window - back, 0)
    rows = torch.arange(len(past), device=past.device)[:, None]
    rings = past.transpose(1, 2)[rows, index]  # [B, window, 2, Hkv, D]
    return rings.permute(0, 2, 3, 1, 4).contiguous()
