"""Sparse attention through the engine, against its definition worked out token by token."""

import random

import numpy as np
import pytest
import torch

from yoco_eval.engine import Engine
from yoco_eval.kernels.rotary import rotate
from yoco_eval.kernels.sequences import Sequences
from yoco_eval.model import GatedRetentionSettings, Span, Yoco, YocoConfig
from yoco_eval.requests import GenerateRequest, ScoreRequest

BLOCK = 64
VOCABULARY = 96


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = YocoConfig(
        dim=32,
        n_layers=4,
        hidden_dim=32,
        self_decoder=GatedRetentionSettings(n_self_heads=2),
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=VOCABULARY,
    )
    made = Yoco(config).double().requires_grad_(False).eval()
    # So that it matters what is read.
    for layer in made.cross_decoder.layers:
        layer.mixer.q_proj.weight *= 6
    return made


@pytest.fixture
def sparse(model, request):
    """Has the model's tokens choose some blocks, and goes back to all of them."""

    def set_most(most):
        model.sparse = most
        return model

    request.addfinalizer(lambda: set_most(None))
    return set_most


def logits_by_definition(model, ids, most, first):
    """Of the positions from `first` on of one text: [T - first, vocab_size]."""
    ids = torch.as_tensor(ids)
    sequences = Sequences((len(ids),), (0,), ids.device)
    x, _ = model.self_decode(ids, sequences, model._initial, keep=False)
    cross = model.cross_decoder
    keys, values = cross.keys_values(x)
    cos, sin = angles = cross.angles(sequences.positions, x.dtype)
    keys, chosen = rotate(keys, angles), {}
    group = cross.layers[0].mixer.heads // keys.shape[1]

    def attend(q):
        q = rotate(q, (cos[first:], sin[first:]))
        out = torch.empty_like(q)
        for row, position in enumerate(range(first, len(ids))):
            own = position // BLOCK
            for kv in range(keys.shape[1]):
                heads = range(kv * group, (kv + 1) * group)
                if (row, kv) not in chosen:
                    bounds = {}
                    for block in range(1, own - 1):
                        k = keys[block * BLOCK : (block + 1) * BLOCK, kv]
                        bounds[block] = sum(
                            torch.maximum(q[row, h] * k.amin(0), q[row, h] * k.amax(0)).sum()
                            for h in heads
                        )
                    best = sorted(bounds, key=bounds.get, reverse=True)[:most]
                    read = {0, max(0, own - 1), own, *best}
                    chosen[row, kv] = [t for t in range(position + 1) if t // BLOCK in read]
                read = chosen[row, kv]
                for h in heads:
                    weights = (keys[read, kv] @ q[row, h] * q.shape[2] ** -0.5).softmax(0)
                    out[row, h] = weights @ values[read, kv]
        return out

    return model.logits(model._normed(cross(x[first:], attend)))


def collect(method, requests):
    told = dict(method(requests, begin=lambda tokens: None, progress=lambda *done: None))
    return [told[index] for index in range(len(requests))]


def texts():
    """Of which some share blocks, part of a block, or all of another one."""
    rng = random.Random(0)

    def tokens(n):
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    stem = tokens(64 * 6 + 37)
    kept = [len(stem), 64 * 6, 64 * 3 + 1, 0, 40, len(stem), len(stem)]
    more = [1, 90, 300, 450, 30, 130, 1]
    return [stem[:n] + tokens(m) for n, m in zip(kept, more, strict=True)]


@pytest.fixture(scope="module")
def score_requests():
    rng = random.Random(1)
    every = texts()
    contexts = [*every, every[1], every[5]]
    return [
        ScoreRequest(context, [rng.randrange(VOCABULARY) for _ in range(length)])
        for context, length in zip(contexts, [3, 1, 70, 2, 5, 1, 4, 2, 1], strict=True)
    ]


@pytest.fixture(scope="module")
def defined(model, score_requests):
    """Scores by definition, with two blocks chosen."""
    scores = []
    for request in score_requests:
        ids, first = [*request.context, *request.continuation][:-1], len(request.context) - 1
        logprobs = logits_by_definition(model, ids, 2, first).log_softmax(-1)
        scores.append(logprobs.gather(1, torch.tensor(request.continuation)[:, None]).sum().item())
    return scores


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, None), (None, None), (None, 100)])
def test_scores_are_those_of_the_definition(sparse, score_requests, defined, batch_size, chunk):
    scores = collect(Engine(sparse(2), batch_size, chunk).score, score_requests)
    assert [score.logprob for score in scores] == pytest.approx(defined, abs=1e-9)


def test_choosing_few_blocks_changes_scores(model, score_requests, defined):
    scores = collect(Engine(model).score, score_requests)
    assert abs(scores[0].logprob - defined[0]) > 1e-3


@pytest.mark.parametrize("most", [4, 10**6])
def test_as_many_blocks_as_a_text_has_are_full_attention(model, sparse, score_requests, most):
    few = [request for request in score_requests if len(request.context) < 64 * 7 - 10]
    full = collect(Engine(model, None).score, few)
    scores = collect(Engine(sparse(most), None).score, few)
    for one, other in zip(scores, full, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, None), (4, 128), (None, None)])
def test_answers_are_those_of_the_definition(model, sparse, batch_size, chunk):
    contexts = [*texts(), texts()[0]]  # the last one has two answers
    requests = [
        GenerateRequest(context, count)
        for context, count in zip(contexts, [3, 40, 2, 5, 3, 2, 4, 5], strict=True)
    ]
    answers = collect(Engine(sparse(2), batch_size, chunk).generate, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer) == request.max_tokens
        first = len(request.context) - 1
        ids = [*request.context, *answer][:-1]
        logits = logits_by_definition(model, ids, 2, first)
        assert logits.argmax(-1).tolist() == answer


def test_what_is_read_depends_on_the_text_alone(sparse):
    """A cache whose slots are anywhere, some with what others have left."""
    model, (text, *_) = sparse(2), texts()
    ids = torch.tensor(text)
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(10 * BLOCK)  # the last one is the decoder's
    cache.fill_with_noise()
    cache.room = tuple((64 * b, 64 * b + 64) for b in rows.tolist())
    plain = model.new_cache(10 * BLOCK)
    expected, logits = [], []
    for each, found in ((plain, expected), (cache, logits)):
        model.prefill(ids[:300], each)
        model.prefill(ids[300:-1], each)
        order = np.arange(9) if each is plain else rows.numpy()
        slots = (order[:, None] * BLOCK + np.arange(BLOCK)).flatten()
        length = each.state.length
        decoder = model.decoder(each, 2, 40)
        decoder.join([1], each.state, [0], [text[-1]], [slots[length : length + 40]])
        spans = [(0, 1, 64 * b, 64 * b + 64, False, 64 * i) for i, b in enumerate(order.tolist())]
        decoder.read([1], [Span(*span) for span in spans])
        for _ in range(40):
            decoder.step(2)
            found.append(decoder.logits[1].clone())
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected))
