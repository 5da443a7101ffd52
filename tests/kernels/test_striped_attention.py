"""Attention in stripes: what processes hold, and that their parts make up the whole attention."""

import pytest
import torch
from test_attention import (
    CUT,
    PACKED,
    SHARED_PREFIX,
    TREES,
    angles_at,
    cache_of,
    double,
    poisoned_cache,
    randn,
    shared_prefix,
    texts,
)

from yoco_eval.kernels import striped_attention
from yoco_eval.kernels.attention import batch_attention_reference, cache_attention_reference
from yoco_eval.kernels.sequences import Span, Spans
from yoco_eval.kernels.striped_attention import (
    batch_attention_part_reference,
    cache_attention_part_reference,
    merged,
    merged_reference,
)
from yoco_eval.kernels.stripes import Stripes

ON_GPU = torch.cuda.is_available()
LONG = 5000 if ON_GPU else 200


def stripes_of(size, block):
    return [Stripes(rank, size, block) for rank in range(size)]


@pytest.mark.parametrize(("size", "block"), [(1, 1), (1, 5), (3, 1), (4, 16), (5, 3)])
def test_every_slot_has_one_place(size, block):
    slots = torch.arange(200)
    owners = stripes_of(size, block)[0].owners(slots)
    capacity = stripes_of(size, block)[0].capacity(200)
    assert capacity - block < 200 / size + block
    for stripes in stripes_of(size, block):
        own = slots[owners == stripes.rank]
        # One behind the other, and what lies in any stretch in a row.
        assert stripes.places(own).tolist() == list(range(len(own)))
        assert len(own) <= capacity
        held = [stripes.held(slot) for slot in range(201)]
        assert held == [int((own < slot).sum()) for slot in range(201)]
        assert stripes.held_before(torch.arange(201)).tolist() == held
        assert stripes.places(own.numpy()).tolist() == stripes.places(own).tolist()
        expected = torch.full((200,), 777)
        expected[own] = torch.arange(len(own))
        assert torch.equal(stripes.places_or(slots, 777), expected)


def held_by(stripes, whole):
    """The slots of a cache [2, Hkv, N, D] that a process holds, and others that are NaN."""
    own = stripes.owners(torch.arange(whole.shape[2], device=whole.device)) == stripes.rank
    room = torch.full_like(whole[:, :, : stripes.capacity(whole.shape[2]) + 1], float("nan"))
    room[:, :, : int(own.sum())] = whole[:, :, own]
    return room


SPANS = {
    "shared prefix": SHARED_PREFIX,
    "packed": PACKED,
    "cut": CUT,
    "one key": (Span(0, 3, 7, 8, False),),
    "a continuation": (Span(0, 21, 2, LONG, True),),
    "long prefix, uneven": shared_prefix(LONG, [9, 1, 17]),
}


def check_cache_attention(part_of, check, spans, heads, dim, dtype, device, size, block):
    torch.manual_seed(0)
    spans = Spans(spans)
    length = max(span.end_query for span in spans.spans)
    q = randn(length, heads[0], dim, dtype=dtype, device=device)
    slots = max(span.end_key for span in spans.spans)
    whole = poisoned_cache(spans, heads[1], slots, dim, dtype, device)
    angles = angles_at(range(length), dim, dtype, device)
    parts = [
        part_of(q, *held_by(stripes, whole), spans, stripes, angles, 0.3)
        for stripes in stripes_of(size, block)
    ]
    assert parts[0].dtype == torch.promote_types(dtype, torch.float32)
    wide = (x.double() for x in (q, *whole))
    expected = cache_attention_reference(*wide, spans, double(angles), 0.3)
    check(merged(torch.stack(parts), heads[0], expected.dtype), expected)


def check_batch_attention(part_of, check, tree, heads, dim, dtype, device, size, block):
    torch.manual_seed(0)
    readings, positions, read = texts(*tree)
    positions = positions.to(device)
    q = randn(len(read), heads[0], dim, dtype=dtype, device=device)
    whole = cache_of(read, heads[1], dim, dtype, device)
    angles = angles_at(positions, dim, dtype, device)
    parts = [
        part_of(q, *held_by(stripes, whole), positions, readings, stripes, angles, 0.3)
        for stripes in stripes_of(size, block)
    ]
    wide = (x.double() for x in (q, *whole))
    expected = batch_attention_reference(*wide, positions, readings, double(angles), 0.3)
    check(merged(torch.stack(parts), heads[0], expected.dtype), expected)


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "block"), [(1, 4), (2, 1), (3, 16), (5, 2)])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
def test_parts_are_merged(spans, size, block, monkeypatch):
    monkeypatch.setattr(striped_attention, "SCORES", 300)
    monkeypatch.setattr(striped_attention, "KEYS", 7)
    exact = torch.float64, "cpu", size, block
    check_cache_attention(cache_attention_part_reference, equal, spans, (4, 2), 8, *exact)


@pytest.mark.parametrize(("size", "block"), [(1, 4), (2, 1), (3, 16)])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_parts_of_decoding_are_merged(tree, size, block):
    exact = torch.float64, "cpu", size, block
    check_batch_attention(batch_attention_part_reference, equal, tree, (4, 2), 8, *exact)


# -- the Triton kernels ----------------------------------------------------------------------------


@pytest.fixture
def triton_kernels():
    pytest.importorskip("triton")
    from yoco_eval.kernels import attention_triton

    return attention_triton


@pytest.fixture
def few(dtype, device):
    """The interpreter is slow."""
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("one dtype is enough for the interpreter")


@pytest.mark.slow
@pytest.mark.parametrize("name", SPANS)
def test_triton_parts(name, dtype, device, close, few, triton_kernels):
    size, block = (2, 64) if name == "a continuation" else (3, 16)
    part_of = triton_kernels.cache_attention_part
    check_cache_attention(part_of, close, SPANS[name], (6, 2), 32, dtype, device, size, block)


class Alone:
    """What kernels ask of a group, of one whose other processes need as much as told."""

    def __init__(self, stripes, needs):
        self.stripes, self._needs = stripes, needs

    def most(self, numbers):
        return list(map(max, numbers, self._needs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"),
    [("a first token", (0, 0, 0, 0)), ("a tree", (0, 0, 0, 0)), ("one branch", (9, 12, 7, 9))],
)
def test_triton_parts_of_decoding(name, needs, dtype, device, close, few, triton_kernels):
    """Also in tables that another process needs larger, where all have the same."""
    layouts = set()

    def part_of(q, keys, values, positions, readings, stripes, angles, scale):
        own = type(readings)(readings.order, readings.spans)  # one process's tables
        group = Alone(stripes, needs)
        args = q, keys, values, positions, own, group, angles, scale
        part = triton_kernels.batch_attention_part(*args)
        layouts.add(own.layout)
        return part

    check_batch_attention(part_of, close, TREES[name], (6, 2), 32, dtype, device, 3, 16)
    assert len(layouts) == 1 or not any(needs)


@pytest.mark.slow
def test_triton_heads_in_parts(dtype, device, close, few, triton_kernels):
    """Heads so large that programs take their columns in two parts, each with the same norm."""
    part_of = triton_kernels.cache_attention_part
    check_cache_attention(part_of, close, SHARED_PREFIX, (2, 1), 512, dtype, device, 2, 16)


@pytest.mark.parametrize(("size", "rows", "heads", "dim"), [(2, 3, 3, 8), (5, 1, 2, 20)])
def test_triton_merging(size, rows, heads, dim, device, dtype, close):
    """Of outputs of which some, or all, have read no key."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import striped_attention_triton

    every = randn(size, rows, heads * dim + heads, dtype=torch.float32, device=device)
    every[:, :, -heads:] *= 9
    every[0, :, -heads:] = float("-inf")
    every[:, 0, -1] = float("-inf")
    every[:, 0, (heads - 1) * dim : heads * dim] = 0
    out = striped_attention_triton.merged(every, heads, dtype)
    expected = merged_reference(every.double(), heads, torch.float64)
    assert out.dtype == dtype and not out[0, -1].any() and expected.isfinite().all()
    close(out, expected)
