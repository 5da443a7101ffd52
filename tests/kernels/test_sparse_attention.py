"""Sparse attention's kernels: summaries, the choice of blocks, attention over them.

The references are tested by definition through the engine, in tests/yoco_eval/test_sparse.py.
"""

import pytest
import torch

from yoco_eval.kernels import sparse_attention
from yoco_eval.kernels.rotary import rotary_angles, rotate
from yoco_eval.kernels.sequences import Readings, Span, Spans
from yoco_eval.kernels.sparse_attention import (
    choose_blocks,
    listed_attention_reference,
    summarise_reference,
)
from yoco_eval.kernels.text_blocks import ALWAYS, BLOCK, texts_of, texts_of_rows

BLOCKS = 14  # of the cache
# Query heads, key-value heads, and numbers in each.
SHAPES = [(4, 2, 16), (3, 1, 24)]
if torch.cuda.is_available():
    SHAPES += [(24, 8, 128), (8, 8, 64), (16, 2, 256), (2, 1, 512)]


def cache(heads, dim, dtype, device):
    torch.manual_seed(0)
    return torch.randn(2, heads, BLOCKS * BLOCK, dim, dtype=dtype, device=device)


def prediction(heads, dim, dtype, device):
    """q, angles and texts: queries of a long text, and some of three that share blocks with it."""
    spans: list[Span] = []
    query, place = 0, 5
    # Of each text: where its own tokens begin and how many they are, and queries at its end.
    for start, tokens, asked in [(320, 200, 90), (320, 65, 2), (320, 1, 1), (0, 30, 3)]:
        if start:
            spans.append(Span(query, query + asked, 0, start, False, 0))
        first = place * BLOCK
        spans.append(Span(query, query + asked, first, first + tokens, True, start))
        query, place = query + asked, place + -(-tokens // BLOCK)
    positions = [*range(430, 520), 383, 384, 320, 27, 28, 29]
    positions = torch.tensor(positions, device=device)
    q = torch.randn(query, heads, dim, dtype=dtype, device=device)
    angles = rotary_angles(positions, dim, 1e4, dtype)
    return q, angles, texts_of(Spans(tuple(spans)), positions)


def decoding(heads, dim, dtype, device):
    """The same of four rows, one of which is nobody's."""
    spans = [
        Span(0, 2, 0, 320, False, 0),
        Span(0, 1, 320, 576, False, 320),
        Span(1, 2, 576, 704, False, 320),
        Span(2, 3, 704, 832, False, 0),
    ]
    positions = torch.tensor([100, 511, 0, 400], device=device)
    readings = Readings([1, 3, 0], spans)
    q = torch.randn(4, heads, dim, dtype=dtype, device=device)
    angles = rotary_angles(positions, dim, 1e4, dtype)
    return q, angles, texts_of_rows(readings, positions)


def of_keys(keys):
    summaries = keys.new_full((len(keys), BLOCKS, 2, keys.shape[2]), float("nan"))
    slots = torch.arange(keys.shape[1], device=keys.device)
    summarise_reference(keys, summaries, slots)
    return summaries


def wide(angles):
    return tuple(x.double() for x in angles)


@pytest.mark.parametrize(("query_heads", "heads", "dim"), SHAPES)
def test_triton_summaries(query_heads, heads, dim, dtype, device):
    pytest.importorskip("triton")
    from yoco_eval.kernels.sparse_attention_triton import summarise

    keys, _ = cache(heads, dim, dtype, device)
    found = keys.new_full((heads, BLOCKS, 2, dim), -7.0)
    expected = found.clone()
    slots = torch.tensor([0, 62, 63, 64, 191, 320, 64 * 9 + 63], device=device)
    summarise(keys, found, slots)
    summarise_reference(keys, expected, slots)
    assert torch.equal(found, expected)
    assert ((found != -7).flatten(2).any(2).sum(1) == 3).all()


@pytest.mark.parametrize("make", [prediction, decoding])
@pytest.mark.parametrize(("query_heads", "heads", "dim"), SHAPES)
def test_triton_choice(make, query_heads, heads, dim, dtype, device, monkeypatch):
    """The blocks may be others where they score alike: what counts are the scores."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import sparse_attention_triton

    monkeypatch.setattr(sparse_attention_triton, "SCORED", 40 * heads * 9)  # of 40 queries
    keys, _ = cache(heads, dim, dtype, device)
    summaries = of_keys(keys)
    q, angles, texts = make(query_heads, dim, dtype, device)
    most = 2
    q = rotate(q, angles)
    found = sparse_attention_triton.best_blocks(q, summaries, texts, most)
    q = q.double()
    expected = choose_blocks(q, summaries.double(), texts, most)
    assert found.shape == expected.shape == (len(q), heads, most + ALWAYS)
    for row, (position, text) in enumerate(
        zip(texts.positions.tolist(), texts.numbers.tolist(), strict=True)
    ):
        places = texts.places[text]
        scores = sparse_attention.block_scores_reference(
            q[row : row + 1], summaries.double(), places, texts.positions[row : row + 1]
        )[0]
        count = min(position // BLOCK + 1, most + ALWAYS)
        best = max(0, count - ALWAYS)
        for head in range(heads):
            here, there = (x[row, head, :count].tolist() for x in (found, expected))
            assert here[best:] == there[best:]
            assert len(set(here)) == count and set(here) <= set(places.tolist())
            by_place = dict(zip(places.tolist(), scores[head].tolist(), strict=False))
            sums = [sum(by_place[block] for block in ones[:best]) for ones in (here, there)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-2)


@pytest.mark.parametrize("make", [prediction, decoding])
@pytest.mark.parametrize(("query_heads", "heads", "dim"), SHAPES)
def test_triton_attention(make, query_heads, heads, dim, dtype, device, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.sparse_attention_triton import listed_attention

    keys, values = cache(heads, dim, dtype, device)
    q, angles, texts = make(query_heads, dim, dtype, device)
    # 9 blocks of a text are all: then what is given is not one list for each head.
    for most in (1, 9) if make is prediction else (3,):
        chosen = choose_blocks(
            rotate(q.double(), wide(angles)), of_keys(keys).double(), texts, most
        )
        some = slice(None, None, 8 if device == "cpu" and len(q) > 8 else 1)  # others alike
        chosen, positions, queries = chosen[some], texts.positions[some], q[some]
        turned = angles[0][some].contiguous(), angles[1][some].contiguous()
        read = torch.zeros(BLOCKS * BLOCK, dtype=torch.bool, device=device)
        for row, position in enumerate(positions.tolist()):
            count = min(position // BLOCK + 1, chosen.shape[2])
            for head in range(heads):
                *others, own = chosen[row, head, :count].tolist()
                for block in others:
                    read[block * BLOCK : block * BLOCK + BLOCK] = True
                read[own * BLOCK : own * BLOCK + position % BLOCK + 1] = True
        unread = ~read[None, :, None]
        held = [x.masked_fill(unread, float("nan")) for x in (keys, values)]
        out = listed_attention(queries, *held, chosen, positions, turned)
        double = (x.double() for x in held)
        expected = listed_attention_reference(
            queries.double(), *double, chosen, positions, wide(turned)
        )
        close(out, expected)


def test_one_table_serves_texts_that_come_and_go():
    """As long as it has room in it, which a CUDA graph depends on."""
    readings = Readings([0], [Span(0, 1, 64, 200, False, 0)])
    positions = torch.zeros(2, dtype=torch.int64)
    texts = texts_of_rows(readings, positions)
    layout, places = readings.layout, texts.places
    assert places[0, :3].tolist() == [1, 2, 3]
    readings.set([0], [Span(0, 1, 320, 448, False, 0), Span(0, 1, 64, 128, False, 128)])
    assert readings.layout == layout and places[0, :3].tolist() == [5, 6, 1]
    readings.set([1, 0], [Span(0, 1, 0, 64, False, 0), Span(1, 2, 64, 640, False, 0)])
    assert readings.layout != layout
    places = texts_of_rows(readings, positions).places
    assert places[1, 0] == 0 and places[0, :9].tolist() == list(range(1, 10))


def test_what_begins_within_a_block_is_refused():
    spans = Spans((Span(0, 1, 32, 100, True, 0),))
    with pytest.raises(ValueError, match="the span from 0, at slot 32, begins with no block"):
        texts_of(spans, torch.zeros(1, dtype=torch.int64))
