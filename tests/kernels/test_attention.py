"""Attention against attention written out query by query, and Triton against the reference."""

import pytest
import torch

from yoco_eval.kernels import attention, dispatch
from yoco_eval.kernels.attention import (
    batch_attention_reference,
    cache_attention_reference,
    rings_from_past,
    sliding_window_attention_reference,
    window_step,
)
from yoco_eval.kernels.rotary import rotary_angles, rotate
from yoco_eval.kernels.sequences import Readings, Sequences, Span, Spans, query_runs

NAN = float("nan")


def randn(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=dtype, device=device)


def attend(q, keys, values):
    """One query [D] over keys [n, D] and values [n, D]."""
    return ((keys @ q) / q.shape[0] ** 0.5).softmax(0) @ values


@pytest.fixture
def triton_kernels():
    pytest.importorskip("triton")
    from yoco_eval.kernels import attention_triton

    return attention_triton


def angles_at(positions, dim, dtype, device):
    return rotary_angles(torch.as_tensor(positions, device=device), dim, 1e4, dtype)


def double(angles):
    return tuple(x.double() for x in angles)


# -- a cache ---------------------------------------------------------------------------------------


def keys_read(spans, t):
    """The cache slots that query t reads, by the definition of a span."""
    slots = []
    for span in spans.spans:
        if span.first_query <= t < span.end_query:
            unread = span.end_query - 1 - t if span.causal else 0
            slots += range(span.first_key, span.end_key - unread)
    return slots


def cache_by_definition(q, keys, values, spans):
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[0]
    for t in range(q.shape[0]):
        read = keys_read(spans, t)
        for h in range(q.shape[1]):
            out[t, h] = attend(q[t, h], keys[h // group, read], values[h // group, read])
    return out


def poisoned_cache(spans, heads, slots, dim, dtype=torch.float64, device="cpu"):
    """Keys and values that are NaN wherever no span reads."""
    cache = torch.full((2, heads, slots + 9, dim), NAN, dtype=dtype, device=device)[:, :, :slots]
    for span in spans.spans:
        read = slice(span.first_key, span.end_key)
        cache[:, :, read] = torch.randn_like(cache[:, :, read])
    return cache


SHARED_PREFIX = (
    Span(0, 12, 3, 20, False),  # three sequences of 5, 1 and 6 queries behind one prefix
    Span(0, 5, 20, 25, True),
    Span(5, 6, 30, 31, True),
    Span(6, 12, 31, 39, True),  # two of its keys come before the first of its queries
)
PACKED = tuple(Span(4 * i, 4 * i + 4, 6 * i + 1, 6 * i + 5, True) for i in range(6))
# Some of the causal span's queries read another one, too, in front of it or behind a gap.
CUT = (Span(2, 5, 0, 3, False), Span(0, 9, 3, 13, True), Span(6, 7, 14, 16, False))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("scores", [1, 300, 1 << 22])
@pytest.mark.parametrize("spans", [SHARED_PREFIX, PACKED, CUT, (Span(0, 9, 2, 20, True),)])
def test_cache_attention(heads, scores, few, spans, monkeypatch):
    monkeypatch.setattr(attention, "FEW", few)
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "KEYS", 7)
    torch.manual_seed(1)
    spans = Spans(spans)
    q = randn(spans.spans[-1].end_query, heads[0], 8)
    keys, values = poisoned_cache(spans, heads[1], 40, 8)
    out = cache_attention_reference(q, keys, values, spans)
    expected = cache_by_definition(q, keys, values, spans)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_queries_are_rotated():
    spans = Spans(SHARED_PREFIX)
    q = randn(12, 2, 8)
    keys, values = poisoned_cache(spans, 1, 40, 8)
    angles = rotary_angles(torch.arange(12), 8, 1e4, torch.float64)
    torch.testing.assert_close(
        cache_attention_reference(q, keys, values, spans, angles),
        cache_by_definition(rotate(q, angles), keys, values, spans),
    )


# Two texts behind one prefix of 12 tokens, of which the second goes on behind a gap; and one alone.
# Its last token asks, and those of the others.
STARTS = (
    Span(0, 9, 3, 15, False, 0),
    Span(0, 5, 20, 25, True, 12),
    Span(5, 9, 16, 19, False, 12),
    Span(5, 9, 30, 34, True, 15),
    Span(9, 10, 36, 40, True, 0),
)


def positions_of(spans):
    """Of each query in its text."""
    own = [span for span in spans if span.causal]
    return [
        span.start + span.end_key - span.first_key - (span.end_query - query)
        for span in own
        for query in range(span.first_query, span.end_query)
    ]


def windows_by_definition(q, keys, values, spans, window):
    """With the keys that a query must not read left out of the definition's slots."""
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[0]
    for t, position in enumerate(positions_of(spans)):
        at = {
            slot: span.start + slot - span.first_key
            for span in spans
            if span.first_query <= t < span.end_query
            for slot in range(span.first_key, span.end_key)
        }
        read = [slot for slot, p in at.items() if position - window < p <= position]
        for h in range(q.shape[1]):
            out[t, h] = attend(q[t, h], keys[h // group, read], values[h // group, read])
    return out


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("window", [1, 2, 6, 14, 100])
def test_windows_over_a_cache(heads, window):
    torch.manual_seed(0)
    q = randn(10, heads[0], 8)
    keys, values = poisoned_cache(Spans(STARTS), heads[1], 40, 8)
    torch.testing.assert_close(
        cache_attention_reference(q, keys, values, Spans(STARTS), window=window),
        windows_by_definition(q, keys, values, STARTS, window),
    )


def test_windows_need_to_know_where_texts_begin():
    q, (keys, values) = randn(5, 1, 8), randn(2, 1, 9, 8)
    for spans in [(Span(0, 5, 0, 9, True),), (Span(0, 5, 0, 9, False, 0),)]:
        with pytest.raises(ValueError, match="say their start, one of each query causal"):
            cache_attention_reference(q, keys, values, Spans(spans), window=3)


def test_scores_are_scaled_as_told():
    torch.manual_seed(0)
    scale, factor = 1.7, 1.7 * 8**0.5
    spans = Spans((Span(0, 5, 0, 9, True, 0),))
    q, (keys, values) = randn(5, 2, 8), randn(2, 1, 9, 8)
    for window in (None, 3):
        torch.testing.assert_close(
            cache_attention_reference(q, keys, values, spans, scale=scale, window=window),
            cache_attention_reference(factor * q, keys, values, spans, window=window),
        )
    k, v = randn(2, 5, 1, 8)
    sequences = Sequences((5,), (0,), CPU)
    torch.testing.assert_close(
        sliding_window_attention_reference(q, k, v, 3, sequences, scale=scale),
        sliding_window_attention_reference(factor * q, k, v, 3, sequences),
    )
    outputs = []
    for x, told in ((q, scale), (factor * q, None)):
        rings = torch.zeros(2, 5, 1, 3, 8, dtype=q.dtype)
        outputs.append(window_step(x, k, v, *rings, torch.arange(5), scale=told))
    torch.testing.assert_close(*outputs)


def test_queries_are_not_rounded_when_scores_are_scaled():
    """Nor do they overflow."""
    q, (keys, values) = torch.full((2, 2, 8), 6e4, dtype=torch.float16), randn(2, 1, 9, 8)
    keys, values = (1e-6 * keys).half(), values.half()
    apart = (Span(0, 2, 0, 4, False), Span(0, 2, 5, 9, True))
    for spans in ((Span(0, 2, 0, 9, True),), apart):
        out = cache_attention_reference(q, keys, values, Spans(spans), scale=1.0)
        wide = (x.double() for x in (q, keys, values))
        expected = cache_attention_reference(*wide, Spans(spans), scale=1.0)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


# -- one token of each of many texts ---------------------------------------------------------------


def texts(branches, owns, room=40):
    """Readings of texts in a batch, their positions, and the slots that each row reads.

    Args:
        branches: tokens, and the texts below: (first, end) in the order of the tree.
        owns: of each text, in this order, its tokens before the one at hand, beside those of its
            branches; they lie in two stretches, with `room` for those to come.
    """
    rows = torch.randperm(len(owns)).tolist()
    slot, spans, read = 3, [], [[] for _ in owns]
    positions = torch.zeros(len(owns), dtype=torch.int64)
    for length, (first, end) in branches:
        spans.append(Span(first, end, slot, slot + length, False))
        for text in range(first, end):
            read[rows[text]] += range(slot, slot + length)
            positions[rows[text]] += length
        slot += length + 2
    for text, own in enumerate(owns):
        row, start = rows[text], int(positions[rows[text]])
        for first, end in ((0, own // 2 + 1), (own // 2 + 1, own + room)):
            spans.append(Span(text, text + 1, slot, slot + end - first, False, start + first))
            read[row] += range(slot, slot + max(0, min(end, own + 1) - first))
            slot += end - first + 1
        positions[row] += own
    return Readings(rows, spans), positions, read


def cache_of(read, heads, dim, dtype=torch.float64, device="cpu"):
    """Keys and values where somebody reads them, NaN elsewhere."""
    slots = max(map(max, read)) + 50
    cache = torch.full((2, heads, slots, dim), NAN, dtype=dtype, device=device)
    known = torch.tensor(sorted({slot for own in read for slot in own}), device=device)
    cache[:, :, known] = randn(2, heads, len(known), dim, dtype=dtype, device=device)
    return cache


TREES = {
    "one text": ([], [16]),
    "a first token": ([], [0]),
    "texts apart": ([], [5, 0, 70]),
    "one branch": ([(90, (0, 5))], [1, 30, 0, 7, 2]),
    "a tree": ([(70, (0, 6)), (20, (1, 4)), (33, (2, 4))], [3, 1, 9, 2, 0, 30]),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_batch_attention(tree, heads):
    torch.manual_seed(0)
    readings, positions, read = texts(*tree)
    q = randn(len(read), heads[0], 8)
    keys, values = cache_of(read, heads[1], 8)
    angles = angles_at(positions, 8, torch.float64, "cpu")
    out = batch_attention_reference(q, keys, values, positions, readings, angles)
    group = heads[0] // heads[1]
    for row, own in enumerate(read):
        for head, x in enumerate(rotate(q, angles)[row]):
            expected = attend(x, keys[head // group, own], values[head // group, own])
            torch.testing.assert_close(out[row, head], expected)


# -- a sliding window ------------------------------------------------------------------------------


def window_by_definition(q, k, v, window):
    """One text, q [T, Hq, D] and k, v [T, Hkv, D]."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for p in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = slice(max(0, p - window + 1), p + 1)
            out[p, h] = attend(q[p, h], k[seen, h // group], v[seen, h // group])
    return out


CPU = torch.device("cpu")


def queries_keys_values(length, heads):
    return tuple(randn(length, n, 8) for n in (heads[0], heads[1], heads[1]))


@pytest.mark.parametrize(
    ("window", "heads"), [(1, (4, 2)), (2, (3, 3)), (8, (3, 3)), (8, (4, 1)), (100, (4, 2))]
)
@pytest.mark.parametrize("cuts", [[40], [1] * 40, [7, 7, 26], [39, 1], [8, 8, 8, 8, 8]])
def test_a_text_may_be_cut_anywhere(window, heads, cuts):
    torch.manual_seed(0)
    q, k, v = queries_keys_values(40, heads)
    angles = rotary_angles(torch.arange(40), 8, 100.0, torch.float64)
    expected = window_by_definition(rotate(q, angles), rotate(k, angles), v, window)
    past, outputs, start = None, [], 0
    for length in cuts:
        part, sequences = slice(start, start + length), Sequences((length,), (start,), CPU)
        cut_angles = tuple(x[part] for x in angles)
        out, past = sliding_window_attention_reference(
            q[part], k[part], v[part], window, sequences, past, cut_angles
        )
        past[:, :, : max(0, window - 1 - start - length)] = NAN  # slots of no token
        outputs.append(out)
        start += length
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=0, atol=1e-12)


def test_packed_sequences_may_continue_one_past():
    """Several texts that branch off two others, and one with nothing before it."""
    torch.manual_seed(0)
    window, texts = 6, [[(0, 9), (1, 4)], [(0, 5), (0, 2), (1, 9), (0, 5)]]
    trunks = [queries_keys_values(length, (4, 2)) for _, length in texts[0]]
    q, k, v = (torch.cat(x) for x in zip(*trunks, strict=True))
    out, past = sliding_window_attention_reference(q, k, v, window, Sequences((9, 4), (0, 0), CPU))
    whole = [window_by_definition(*trunk, window) for trunk in trunks]
    torch.testing.assert_close(out, torch.cat(whole))

    branches = [queries_keys_values(length, (4, 2)) for _, length in texts[1]]
    q, k, v = (torch.cat(x) for x in zip(*branches, strict=True))
    sequences = Sequences((5, 2, 9, 5), (9, 9, 4, 9), CPU, sources=(0, 0, 1, 0))
    out, following = sliding_window_attention_reference(q, k, v, window, sequences, past)
    expected, ends = [], []
    for (source, length), branch in zip(texts[1], branches, strict=True):
        text = [torch.cat(parts) for parts in zip(trunks[source], branch, strict=True)]
        expected.append(window_by_definition(*text, window)[-length:])
        ends.append(torch.stack((text[1][-window + 1 :], text[2][-window + 1 :])))
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(following, torch.stack(ends))
    again, nothing = sliding_window_attention_reference(
        q, k, v, window, sequences, past, keep=False
    )
    assert torch.equal(again, out) and nothing is None


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("prompt", [2, 13])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
def test_window_step_follows_a_prompt(window, prompt, heads):
    torch.manual_seed(0)
    total = prompt + 7
    q, k, v = queries_keys_values(total, heads)
    angles = rotary_angles(torch.arange(total), 8, 100.0, torch.float64)
    sequences = Sequences((prompt,), (0,), CPU)
    _, past = sliding_window_attention_reference(
        q[:prompt], k[:prompt], v[:prompt], window, sequences, None, [x[:prompt] for x in angles]
    )
    rings = [ring.contiguous() for ring in rings_from_past(past, [prompt]).unbind(1)]
    expected = window_by_definition(rotate(q, angles), rotate(k, angles), v, window)
    for p in range(prompt, total):
        at = slice(p, p + 1)
        step_angles = tuple(x[at] for x in angles)
        out = window_step(q[at], k[at], v[at], *rings, torch.tensor([p]), step_angles)
        torch.testing.assert_close(out, expected[at], rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_window_steps_of_texts_of_any_length(heads):
    """Side by side as one by one."""
    torch.manual_seed(0)
    window, before = 5, [0, 2, 3, 30]
    pasts = randn(len(before), 2, window - 1, heads[1], 8)
    rings = [ring.contiguous() for ring in rings_from_past(pasts, before).unbind(1)]
    apart = [ring.clone() for ring in rings]
    for step in range(7):
        q, k, v = queries_keys_values(len(before), heads)
        positions = torch.tensor(before) + step
        angles = rotary_angles(positions, 8, 100.0, torch.float64)
        out = window_step(q, k, v, *rings, positions, angles)
        for row in range(len(before)):
            at = slice(row, row + 1)
            one = tuple(x[at] for x in angles)
            own = [ring[at] for ring in apart]
            alone = window_step(q[at], k[at], v[at], *own, positions[at], one)
            torch.testing.assert_close(out[at], alone, rtol=0, atol=1e-12)
    assert all(map(torch.equal, rings, apart))


# -- the Triton kernels ----------------------------------------------------------------------------

ON_GPU = torch.cuda.is_available()
LENGTHS = [1, 63, 65, 1000, 32769] if ON_GPU else [1, 63, 1000]
HEAD_SIZES = [4, 8, 32, 48, 64, 96, 128, 256, 512] if ON_GPU else [8, 48]
LONG = 5000 if ON_GPU else 700


def shared_prefix(prefix, lengths):
    """Sequences behind one prefix, each with its own keys somewhere after it."""
    total, spans, key = sum(lengths), [], prefix + 3
    spans.append(Span(0, total, 2, 2 + prefix, False))
    first = 0
    for length in lengths:
        spans.append(Span(first, first + length, key, key + length, True))
        first, key = first + length, key + length + 5
    return tuple(spans)


SPANS = {
    "shared prefix": SHARED_PREFIX,
    "packed": PACKED,
    "one query": (Span(0, 1, 3, LONG, False),),
    "a continuation": (Span(0, 21, 0, LONG, True),),
    "long prefix, one query each": shared_prefix(LONG, [1] * 6),
    "long prefix, uneven": shared_prefix(LONG, [9, 1, 17]),
    "two ranges": (Span(0, 7, 1, LONG // 2, False), Span(0, 7, LONG // 2 + 9, LONG, True)),
}


def check_cache_attention(kernels, close, spans, heads, dim, dtype, device):
    torch.manual_seed(0)
    length = max(span.end_query for span in spans)
    slots = max(span.end_key for span in spans) + 3
    # A view into a wider matrix, as one product of several projections makes.
    q = randn(length, heads[0] * dim + 16, dtype=dtype, device=device)
    q = q[:, 8:-8].view(length, heads[0], dim)
    keys, values = poisoned_cache(Spans(spans), heads[1], slots, dim, dtype, device)
    angles = angles_at(range(1, 3 * length, 3), dim, dtype, device)
    out = kernels.cache_attention(q, keys, values, Spans(spans), angles)
    assert out.dtype == dtype
    wide = (x.double() for x in (q, keys, values))
    close(out, cache_attention_reference(*wide, Spans(spans), double(angles)))


@pytest.mark.slow
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
def test_triton_cache_attention(spans, dtype, device, close, triton_kernels):
    if device == "cpu" and dtype != torch.float32 and spans is not SHARED_PREFIX:
        pytest.skip("one case in float16 is enough for the interpreter")
    check_cache_attention(triton_kernels, close, spans, (6, 2), 64, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (24, 1)])
def test_triton_cache_attention_heads(heads, dim, dtype, device, close, triton_kernels):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter is slow")
    spans = shared_prefix(100, [40, 1])
    check_cache_attention(triton_kernels, close, spans, heads, dim, dtype, device)


@pytest.mark.skipif(not ON_GPU, reason="too long for the interpreter")
@pytest.mark.parametrize("queries", [200, 1500])
@pytest.mark.parametrize("length", [1500, 32769])
def test_triton_cache_attention_of_long_texts(
    queries, length, dtype, device, close, triton_kernels
):
    spans = (Span(0, queries, 5, 5 + length, True),)
    check_cache_attention(triton_kernels, close, spans, (6, 2), 128, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spans", "window", "dim"),
    [
        (STARTS, 6, 48),
        ((Span(0, 150, 7, 7 + LONG, True, 0),), 65, 64),
        ((Span(0, 3, 1, LONG, False, 0), Span(0, 3, LONG + 5, LONG + 9, True, LONG - 1)), 100, 512),
    ],
)
def test_triton_windows_over_a_cache(spans, window, dim, dtype, device, close, triton_kernels):
    if device == "cpu" and (dtype != torch.float32):
        pytest.skip("the interpreter is slow")
    torch.manual_seed(0)
    q = randn(spans[-1].end_query, 6, dim, dtype=dtype, device=device)
    slots = max(span.end_key for span in spans)
    keys, values = poisoned_cache(Spans(spans), 2, slots, dim, dtype, device)
    out = triton_kernels.cache_attention(q, keys, values, Spans(spans), None, 0.1, window)
    wide = (x.double() for x in (q, keys, values))
    close(out, cache_attention_reference(*wide, Spans(spans), None, 0.1, window))


def test_triton_cache_attention_needs_no_angles(device, triton_kernels):
    spans = Spans(SHARED_PREFIX)
    q = randn(12, 2, 32, dtype=torch.float32, device=device)
    keys, values = poisoned_cache(spans, 1, 40, 32, torch.float32, device)
    torch.testing.assert_close(
        triton_kernels.cache_attention(q, keys, values, spans),
        cache_attention_reference(q, keys, values, spans),
    )


@pytest.mark.skipif(not ON_GPU or torch.cuda.mem_get_info()[0] < 10e9, reason="needs 10 GB")
def test_triton_reaches_keys_beyond_32_bits(device, triton_kernels):
    """The last keys of a head of more than 2^31 numbers, and of a second such head."""
    torch.manual_seed(0)
    slots, dim, read = 2**24 + 333, 128, 300
    q = randn(1, 2, dim, dtype=torch.bfloat16, device=device)
    cache = torch.zeros(2, slots, dim, dtype=torch.bfloat16, device=device)
    tail = cache[:, -read:]
    tail.copy_(torch.randn_like(tail))
    expected = cache_attention_reference(
        q.double(), tail.double(), tail.double(), Spans((Span(0, 1, 0, read, True),))
    )
    spans = Spans((Span(0, 1, slots - read, slots, True),))
    out = triton_kernels.cache_attention(q, cache, cache, spans)
    assert (out - expected).norm() < 1e-2 * expected.norm()
    # Decoding reads the zeros, too: what it must find is the one key that outweighs them all.
    cache[:, -1] = q[0] * 8
    readings = Readings([0], [Span(0, 1, 0, slots, False, start=0)])
    last = torch.tensor([slots - 1], device=device)
    out = triton_kernels.batch_attention(q, cache, cache, last, readings)
    assert (out[0] - cache[:, -1]).norm() < 1e-2 * out.norm()


def test_a_shared_prefix_is_read_once(triton_kernels):
    spans = Spans(shared_prefix(1000, [1] * 5))
    shape = triton_kernels._Shape(6, 2, 64, torch.float32, CPU)
    plan = triton_kernels._plan(spans.spans, query_runs(spans), shape)
    ranges = plan.ranges.tolist()
    read = sorted(slot for first, end, _ in ranges for slot in range(first, end) if slot < 1002)
    assert read == list(range(2, 1002))
    assert plan.tasks.shape[0] > 6  # and by several programs of each head


def test_short_texts_are_neither_split_nor_merged(triton_kernels):
    spans = tuple(Span(20 * i, 20 * i + 20, 20 * i, 20 * i + 20, True) for i in range(50))
    shape = triton_kernels._Shape(6, 2, 64, torch.bfloat16, CPU)
    plan = triton_kernels._plan(spans, query_runs(Spans(spans)), shape)
    assert plan.block_m == 64 and plan.tasks.shape[0] == 50 and plan.pieces == 0


LARGE_TREES = {
    "a long text": ([], [max(LENGTHS)]),
    "a long branch": ([(max(LENGTHS), (0, 7)), (65, (2, 5))], [3, 1, 70, 2, 0, 63, 64]),
    "many texts": ([(60, (0, 12)), (30, (12, 20))], [*range(20)]),
}


def check_batch_attention(kernels, close, tree, heads, dim, dtype, device):
    torch.manual_seed(0)
    readings, positions, read = texts(*tree)
    positions = positions.to(device)
    q = randn(len(read), heads[0], dim, dtype=dtype, device=device)
    keys, values = cache_of(read, heads[1], dim, dtype, device)
    angles = angles_at(positions, dim, dtype, device)
    out = kernels.batch_attention(q, keys, values, positions, readings, angles)
    assert out.dtype == dtype
    wide = (x.double() for x in (q, keys, values))
    close(out, batch_attention_reference(*wide, positions, readings, double(angles)))


@pytest.mark.slow
@pytest.mark.parametrize("tree", [*TREES.values(), *LARGE_TREES.values()], ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (2, 2)])
def test_triton_batch_attention(tree, heads, dtype, device, close, triton_kernels):
    if device == "cpu" and (dtype != torch.float32 or heads[0] == heads[1]) and tree[0]:
        pytest.skip("a few cases are enough for the interpreter")
    check_batch_attention(triton_kernels, close, tree, heads, 64, dtype, device)


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_triton_batch_attention_head_sizes(dim, dtype, device, close, triton_kernels):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter is slow")
    tree = ([(290, (0, 2))], [5, 100, 3])
    check_batch_attention(triton_kernels, close, tree, (6, 2), dim, dtype, device)


@pytest.mark.slow
def test_triton_batch_attention_while_texts_come_and_go(device, triton_kernels):
    """One cache and one set of tables, which is filled again and again, some rows being empty."""
    torch.manual_seed(0)
    keys, values = randn(2, 1, 400, 32, dtype=torch.float32, device=device)
    q = randn(6, 2, 32, dtype=torch.float32, device=device)
    readings = Readings()
    for tree in (TREES["a tree"], TREES["one text"], ([(60, (0, 3))], [3, 60, 9])):
        made, positions, read = texts(*tree)
        rows = torch.randperm(6)[: len(read)]
        spread = torch.zeros(6, dtype=torch.int64).index_copy(0, rows, positions).to(device)
        readings.set([int(rows[row]) for row in made.order], made.spans)
        out = triton_kernels.batch_attention(q, keys, values, spread, readings)
        expected = batch_attention_reference(q, keys, values, spread, readings)
        torch.testing.assert_close(out[rows], expected[rows], rtol=1e-4, atol=1e-5)


def test_triton_window_steps_of_several_models(device, monkeypatch):
    """In one process, of rings that are alike, but read by other queries."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    positions, window = torch.tensor([9, 0, 3], device=device), 5
    for heads, dim in ((6, 8), (2, 8), (2, 24), (4, 8)):
        q, k, v = (randn(3, n, dim, dtype=torch.float32, device=device) for n in (heads, 2, 2))
        rings = randn(2, 3, 2, window, dim, dtype=torch.float32, device=device)
        wide = (x.double() for x in (q, k, v, *rings))
        expected = window_step(*wide, positions)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "triton_takes", lambda device, dtype: True)
            out = window_step(q, k, v, *rings, positions)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_batch_attention_in_a_cuda_graph(device):
    """The replays of one graph read ever longer texts, and others where the layout is the same."""
    torch.manual_seed(0)
    q = randn(5, 6, 64, dtype=torch.float32, device=device)
    keys, values = (randn(2, 9000, 64, dtype=torch.float32, device=device) for _ in range(2))
    readings, positions, _ = texts([(700, (0, 5))], [0] * 5, room=1500)
    positions = positions.to(device)
    attention.batch_attention(q, keys, values, positions, readings)
    graph, layout = torch.cuda.CUDAGraph(), readings.layout
    with torch.cuda.graph(graph):
        out = attention.batch_attention(q, keys, values, positions, readings)
    for steps in (1, 2, 1490):
        positions.fill_(700 + steps)
        graph.replay()
        expected = batch_attention_reference(q, keys, values, positions, readings)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    other, positions_now, _ = texts([(650, (0, 5))], [3, 1, 60, 2, 0], room=1500)
    readings.set(other.order, other.spans)
    assert readings.layout == layout
    positions.copy_(positions_now)
    graph.replay()
    expected = batch_attention_reference(q, keys, values, positions, readings)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def check_window(kernels, close, window, dim, sequences, past, dtype, device, heads=(3, 3)):
    # Views into a wider matrix, as one product of several projections makes.
    widths = [n * dim for n in (heads[0], heads[1], heads[1])]
    parts = randn(sequences.total, 8 + sum(widths), dtype=dtype, device=device)[:, 8:].split(
        widths, 1
    )
    q, k, v = (part.unflatten(1, (-1, dim)) for part in parts)
    angles = angles_at(sequences.positions, dim, dtype, device)
    fast = kernels.sliding_window_attention(q, k, v, window, sequences, past, angles)
    wide = [x.double() for x in (q, k, v)]
    wide_past = None if past is None else past.double()
    out, following = sliding_window_attention_reference(
        *wide, window, sequences, wide_past, double(angles)
    )
    close(fast[0], out)
    if window > 1:
        for i, (start, length) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
            n = min(start + length, window - 1)
            close(fast[1][i, :, window - 1 - n :], following[i, :, window - 1 - n :])
    assert fast[1].shape == following.shape and fast[1].is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 50] + [300] * ON_GPU)
@pytest.mark.parametrize("lengths", [(1,), (63, 1, 5), (LONG // 8,)])
def test_triton_sliding_window(window, lengths, dtype, device, close, triton_kernels):
    if device == "cpu" and dtype != torch.float32 and (window, lengths) != (50, (63, 1, 5)):
        pytest.skip("one case in float16 is enough for the interpreter")
    torch.manual_seed(0)
    device = torch.device(device)
    n = len(lengths)
    sequences = Sequences(lengths, (0,) * n, device)
    check_window(triton_kernels, close, window, 64, sequences, None, dtype, device)
    starts = (7, 400, 0)[:n]
    past = torch.full((2, 2, window - 1, 3, 64), NAN, dtype=dtype, device=device)
    past[0, :, max(0, window - 8) :] = torch.randn_like(past[0, :, max(0, window - 8) :])
    past[1] = torch.randn_like(past[1])
    sequences = Sequences(lengths, starts, device, sources=(0, 1, 0)[:n])
    check_window(triton_kernels, close, window, 64, sequences, past, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_triton_sliding_window_head_sizes(dim, dtype, device, close, triton_kernels):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter is slow")
    sequences = Sequences((100,), (0,), torch.device(device))
    check_window(triton_kernels, close, 30, dim, sequences, None, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 2)])
def test_triton_sliding_window_groups(heads, dtype, device, close, triton_kernels):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter is slow")
    torch.manual_seed(0)
    sequences = Sequences((40, 1), (12, 30), torch.device(device), sources=(1, 0))
    past = randn(2, 2, 18, heads[1], 32, dtype=dtype, device=device)
    check_window(triton_kernels, close, 19, 32, sequences, past, dtype, device, heads)


@pytest.mark.skipif(not ON_GPU, reason="too long for the interpreter")
@pytest.mark.parametrize("length", [1000, 32769])
def test_triton_sliding_window_of_long_texts(length, dtype, device, close, triton_kernels):
    sequences = Sequences((length,), (5000,), torch.device(device))
    past = randn(1, 2, 1023, 3, 128, dtype=dtype, device=device)
    check_window(triton_kernels, close, 1024, 128, sequences, past, dtype, sequences.device)


@pytest.mark.slow
def test_triton_takes_any_strides(device, dtype, triton_kernels, head_by_head):
    q, k, v = randn(3, 40, 2, 32, dtype=dtype, device=device)
    keys, values = randn(2, 2, 60, 32, dtype=dtype, device=device)
    spans, last = Spans(SHARED_PREFIX), torch.tensor([49], device=device)
    readings = Readings([0], [Span(0, 1, 0, 60, False, start=0)])
    sequences = Sequences((40,), (0,), torch.device(device))
    for run in (
        lambda q, k, v: triton_kernels.cache_attention(q[:12], keys, values, spans),
        lambda q, k, v: triton_kernels.batch_attention(q[:1], keys, values, last, readings),
        lambda q, k, v: triton_kernels.sliding_window_attention(q, k, v, 9, sequences)[0],
    ):
        assert torch.equal(run(q, k, v), run(*map(head_by_head, (q, k, v))))


def test_on_hopper_work_is_cut_for_one_to_four_programs_a_multiprocessor(
    triton_kernels, monkeypatch
):
    """Of every size of blocks; the larger a program, the fewer."""
    monkeypatch.setattr(triton_kernels, "on_hopper", lambda device: True)
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda device: 132)
    card, dtype = torch.device("cuda"), torch.bfloat16
    for dim in (8, 64, 128, 256, 512):
        sizes = triton_kernels._block_sizes(dtype, dim)
        shape = triton_kernels._Shape(24, 8, dim, dtype, card)
        fit = [triton_kernels._at_once(size, shape) / 132 for size in sizes]
        assert fit == sorted(fit, reverse=True) and set(fit) <= {1, 2, 3, 4}


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256, 512])
def test_on_hopper_registers_let_as_many_programs_fit_as_work_is_cut_for(
    triton_kernels, monkeypatch, dim, eight_bits
):
    monkeypatch.setattr(triton_kernels, "on_hopper", lambda device: True)
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda device: 132)
    shape = triton_kernels._Shape(
        24, 8, dim, torch.bfloat16, torch.device("cuda"), eight_bits=eight_bits
    )
    for size in triton_kernels._block_sizes(shape.dtype, dim):
        fit = triton_kernels._at_once(size, shape) / 132
        warps = triton_kernels._cache_config(size, shape)["num_warps"]
        most = triton_kernels._registers(size, shape, striped=True).get("maxnreg", 256)
        assert most % 8 == 0 and fit * warps * 32 * most <= 1 << 16


@pytest.mark.skipif(not ON_GPU, reason="dispatch to Triton needs a GPU")
def test_dispatch_runs_triton(device):
    """What the public functions give on a GPU is what the references give."""
    torch.manual_seed(0)
    spans = Spans(SHARED_PREFIX)
    q, k, v = randn(3, 12, 2, 64, dtype=torch.float32, device=device)
    keys, values = poisoned_cache(spans, 1, 40, 64, torch.float32, device)
    torch.testing.assert_close(
        attention.cache_attention(q, keys, values, spans),
        cache_attention_reference(q, keys, values, spans),
    )
    sequences = Sequences((5, 7), (0, 0), q.device)
    torch.testing.assert_close(
        attention.sliding_window_attention(q, k, v, 4, sequences)[0],
        sliding_window_attention_reference(q, k, v, 4, sequences)[0],
    )
