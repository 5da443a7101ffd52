"""Sparse attention through the engine, against its definition worked out token by token; and how it
is asked for."""

import copy
import random

import numpy as np
import pytest
import torch

from yoco_eval.cli import main
from yoco_eval.engine import Engine
from yoco_eval.kernels.rotary import rotate
from yoco_eval.kernels.sequences import Sequences
from yoco_eval.lm import YocoLM
from yoco_eval.model import GatedRetentionSettings, Span, Yoco, YocoConfig
from yoco_eval.model.costs import YocoCosts
from yoco_eval.model.families import with_sparse
from yoco_eval.model.phi4flash_config import Phi4FlashConfig
from yoco_eval.model.shapes import SHAPES, with_random_weights
from yoco_eval.profiling import run_profile
from yoco_eval.requests import GenerateRequest, ScoreRequest

BLOCK = 64
VOCABULARY = 96


def made_model():
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


@pytest.fixture(scope="module")
def model():
    return made_model()


@pytest.fixture
def sparse(model, request):
    """Has the model's tokens choose some blocks, and goes back to all of them."""

    def set_most(most):
        model.sparse = most
        return model

    request.addfinalizer(lambda: set_most(None))
    return set_most


def logits_by_definition(model, ids, most, first, read=lambda x: x):
    """Of the positions from `first` on of one text: [T - first, vocab_size]; `read` is what is read
    of keys, or values, [T, heads, head_dim]."""
    ids = torch.as_tensor(ids)
    sequences = Sequences((len(ids),), (0,), ids.device)
    x, _ = model.self_decode(ids, sequences, model._initial, keep=False)
    cross = model.cross_decoder
    keys, values = cross.keys_values(x)
    cos, sin = angles = cross.angles(sequences.positions, x.dtype)
    keys, values, chosen = read(rotate(keys, angles)), read(values), {}
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
                        bounds[block] = max(
                            torch.maximum(q[row, h] * k.amin(0), q[row, h] * k.amax(0)).sum()
                            for h in heads
                        )
                    best = sorted(bounds, key=bounds.get, reverse=True)[:most]
                    blocks = {0, max(0, own - 1), own, *best}
                    chosen[row, kv] = [t for t in range(position + 1) if t // BLOCK in blocks]
                own_read = chosen[row, kv]
                for h in heads:
                    weights = (keys[own_read, kv] @ q[row, h] * q.shape[2] ** -0.5).softmax(0)
                    out[row, h] = weights @ values[own_read, kv]
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


class Ahead(Engine):
    """Launches steps ahead, as on a GPU, and has rows of texts that have ended go on."""

    def _generation(self, *args):
        run = super()._generation(*args)
        run._on_gpu = True
        return run


@pytest.mark.parametrize(
    ("engine", "batch_size", "chunk"), [(Engine, 1, None), (Engine, 4, 128), (Ahead, 6, None)]
)
def test_answers_are_those_of_the_definition(model, sparse, engine, batch_size, chunk):
    contexts = [*texts(), texts()[0]]  # the last one has two answers
    requests = [
        GenerateRequest(context, count)
        for context, count in zip(contexts, [3, 40, 2, 5, 3, 2, 4, 5], strict=True)
    ]
    answers = collect(engine(sparse(2), batch_size, chunk).generate, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer) == request.max_tokens
        first = len(request.context) - 1
        ids = [*request.context, *answer][:-1]
        logits = logits_by_definition(model, ids, 2, first)
        assert logits.argmax(-1).tolist() == answer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_and_graphs_on_a_gpu(model, score_requests, defined):
    """In float32: among blocks, and tokens, that score alike another one may be taken."""
    fast = copy.deepcopy(model).float().cuda()
    fast.sparse = 2
    scores = collect(Engine(fast, None).score, score_requests)
    assert [score.logprob for score in scores] == pytest.approx(defined, abs=1e-2)
    requests = [GenerateRequest(context, 40) for context in texts()]
    for batch_size in (1, None):
        answers = collect(Engine(fast, batch_size).generate, requests)
        for request, answer in zip(requests, answers, strict=True):
            ids = [*request.context, *answer][:-1]
            logits = logits_by_definition(model, ids, 2, len(request.context) - 1)
            taken = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert (logits.amax(1) - taken).max() < 1e-2


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


def test_costs_are_those_of_the_cache(sparse):
    """Summaries take a 64th of it; a decoded token reads all of these, and few blocks."""
    model = sparse(5)
    cache = model.new_cache(640)
    held = cache.keys, cache.values, cache.summaries
    assert model.costs.cache_bytes(torch.float64, 640) == sum(x.nbytes for x in held)
    dense, few = YocoCosts(SHAPES["3b"]), YocoCosts(SHAPES["3b"], sparse=64)
    one, layers = dense.cache_bytes(torch.bfloat16, 1), SHAPES["3b"].cross_layers
    assert few.cache_bytes(torch.bfloat16, 1 << 20) == (one << 20) * 65 // 64
    saved = dense.decode_bytes(torch.bfloat16, 1 << 20) - few.decode_bytes(torch.bfloat16, 1 << 20)
    assert saved == one * ((layers << 20) - layers * 67 * 64 - (1 << 14))


@pytest.mark.parametrize(("length", "most"), [(600, 2), (2000, 4), (1000, 100)])
def test_memory_is_planned_for(sparse, live_bytes, length, most):
    """Of a text all of whose positions are asked for, chunk by chunk."""
    model = sparse(most)
    ids = [token % VOCABULARY for token in range(length)]
    engine = Engine(model, prefill_chunk=256)
    planned = engine._fit(length, length + BLOCK, spare=BLOCK - 1).need
    with live_bytes(model.parameters()) as live:
        collect(engine.score, [ScoreRequest(ids[:1], ids[1:])])
    assert live.peak <= planned


def test_what_the_backend_says_of_it():
    plain, few, more = (YocoLM("demo-4k", device="cpu", sparse=k) for k in (None, "4", 8))
    assert few.model.sparse == 4 and few.get_model_info()["sparse"] == 4
    assert plain.model.sparse is None and "sparse" not in plain.get_model_info()
    assert len({lm._fingerprint() for lm in (plain, few, more)}) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sparse": 0}, "sparse: '0' "),
        ({"sparse": "many"}, "sparse: 'many' "),
        ({"sparse": True}, "sparse: 'True' "),
        (
            {"sparse": 65537},
            "sparse: '65537' is no number of blocks from 1 to 65536; write 64, or leave it out",
        ),
    ],
)
def test_refused_arguments(arguments, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        YocoLM("demo-4k", device="cpu", **arguments)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="^sparse=4 is for .* context_parallel=2 has several"):
        YocoLM("demo-4k", device="cpu", sparse=4, context_parallel=2)
    other = with_random_weights(Phi4FlashConfig(256, 2048, 4, 8, 4, 100, vocab_size=50))
    with pytest.raises(ValueError, match="^sparse=4 is for YOCO models.* of Phi-4-mini-flash,"):
        with_sparse(other, 4, "sparse=4")


def test_plan(capsys):
    command = ["plan", "--shape", "3b", "--length", "1m", "--memory", "80g", "--speeds", "700,2900"]
    rates = []
    for more in ([], ["--sparse", "64"]):
        assert main([*command, *more]) == 0
        text = capsys.readouterr().out
        rates.append(float(text.split("allows about ")[1].split(" ")[0]))
    assert "3b sparse=64, 1M tokens" in text and rates[1] > 6 * rates[0]
    assert main([*command, "--sparse", "64", "--gpus", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "context_parallel=2 is not for sparse attention" in text and " 4.06 " in text


def test_profile(monkeypatch):
    monkeypatch.setattr("yoco_eval.profiling.LARGEST_BATCH", {"cpu": 3})
    profile = run_profile([100, 500], pretrained="demo-4k", sparse=2, device="cpu")
    assert profile.name == "demo-4k sparse=2"
    assert all(row.outcome == "measured" for row in profile.rows)
    assert all(one.outcome == "measured" for row in profile.rows for one in row.throughput)
