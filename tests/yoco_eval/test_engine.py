"""The engine against brute force: one full float64 pass per request."""

import gc
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from yoco_eval import engine as module
from yoco_eval.engine import Engine
from yoco_eval.memory import fit
from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig, load
from yoco_eval.requests import GenerateRequest, ScoreRequest
from yoco_eval.sampling import Sampling, draw


def collect(method, requests):
    """Results in request order, and the tokens announced and reported."""
    announced, reported, spared = [], [], []

    def progress(done, less=0):
        reported.append(done)
        spared.append(less)

    results = dict(method(requests, begin=announced.append, progress=progress))
    assert sorted(results) == list(range(len(requests)))
    assert announced == [sum(reported) + sum(spared)]
    return [results[index] for index in range(len(requests))], sum(reported)


def score_by_definition(model, request):
    ids = torch.tensor([[*request.context, *request.continuation]])
    logprobs = model(ids)[0].log_softmax(-1)
    rows = logprobs[len(request.context) - 1 : -1]
    targets = torch.tensor(request.continuation)
    return rows.gather(1, targets[:, None]).sum().item(), bool((rows.argmax(-1) == targets).all())


def generate_by_definition(model, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(context) :]


def contexts(count, seed=0, vocabulary=96):
    rng = random.Random(seed)

    def tokens(n):
        return [rng.randrange(vocabulary) for _ in range(n)]

    stem = tokens(200)
    return [
        stem[: rng.choice([0, 40, 41, 200])] + tokens(rng.choice([1, 2, 30])) for _ in range(count)
    ]


@pytest.fixture
def requests(exact):
    rng = random.Random(1)
    result = [ScoreRequest([3], [5]), ScoreRequest([3], [])]
    for context in contexts(20):
        for length in (rng.choice([1, 2, 300]), 1, 1, rng.randrange(2, 8)):
            result.append(ScoreRequest(context, [rng.randrange(96) for _ in range(length)]))
        # What greedy decoding gives, so that both values of `greedy` occur.
        result.append(ScoreRequest(context, generate_by_definition(exact, context, 2)))
    rng.shuffle(result)
    return result


@pytest.fixture(scope="module")
def defined():
    """What the requests' scores are by definition, worked out once for each model."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "chunk"), [(1, None), (1, 17), (4, 64), (None, None), (None, 300), (3, 1)]
)
def test_scores_equal_one_full_pass_each(exact, published, requests, defined, batch_size, chunk):
    if published not in defined:
        defined[published] = [
            score_by_definition(exact, request) if request.continuation else (0.0, True)
            for request in requests
        ]
    kept = slice(None, None, 3 if chunk == 1 else 1)  # token by token takes long
    requests, expected = requests[kept], defined[published][kept]
    scores, fed = collect(Engine(exact, batch_size, chunk).score, requests)
    for (logprob, greedy), score in zip(expected, scores, strict=True):
        assert score.logprob == pytest.approx(logprob, abs=1e-9)
        assert score.greedy == greedy
    assert {score.greedy for score in scores} == {True, False}
    assert fed < sum(len(r.context) + len(r.continuation) for r in requests) / 2


@pytest.fixture
def buckets():
    """A text whose stretches are each asked for as the continuation of what is before them."""
    rng = random.Random(3)
    text = [rng.randrange(96) for _ in range(400)]
    cuts = [1, 2, 60, 200, 201, 400]
    pairs = zip(cuts, cuts[1:], strict=False)
    return [ScoreRequest(text[:begin], text[begin:end]) for begin, end in pairs]


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, None), (1, 64), (None, 1000)])
def test_stretches_of_a_text_are_fed_once(exact, buckets, batch_size, chunk):
    other_end = ScoreRequest(buckets[2].context, [1])
    requests = [other_end, *reversed(buckets)]
    scores, fed = collect(Engine(exact, batch_size, chunk).score, requests)
    assert fed == 399  # the last token is only predicted
    for request, score in zip(requests, scores, strict=True):
        logprob, greedy = score_by_definition(exact, request)
        assert score.logprob == pytest.approx(logprob, abs=1e-9) and score.greedy == greedy


def test_logits_are_never_held_for_a_whole_text(exact, buckets, monkeypatch):
    most = 10 * exact.config.vocab_size

    def few(*args, **rest):
        return replace(fit(*args, **rest), logits=most)

    monkeypatch.setattr(module, "fit", few)
    largest = []
    exact.output_projection.register_forward_hook(lambda *args: largest.append(len(args[2])))
    scores, _ = collect(Engine(exact, prefill_chunk=64).score, buckets)
    assert max(largest) == 10
    for request, score in zip(buckets, scores, strict=True):
        logprob, _ = score_by_definition(exact, request)
        assert score.logprob == pytest.approx(logprob, abs=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_scoring_a_long_text_takes_little_more_memory_than_its_prefill():
    """All logits of this text, 24 GiB, would be many times that."""
    config = YocoConfig(
        dim=1024,
        n_layers=8,
        hidden_dim=2816,
        self_decoder=GatedRetentionSettings(n_self_heads=8),
        n_attn_heads=8,
        n_attn_kv_heads=4,
        vocab_size=100288,
        rope_theta=5e6,
    )
    with torch.device("cuda"):
        engine = Engine(Yoco(config).bfloat16().requires_grad_(False).eval())
    text = np.random.default_rng(0).integers(config.vocab_size, size=2**17, dtype=np.int32)
    ends = [8, *(1024 << i for i in range(8))]
    buckets = [ScoreRequest(text[:a], text[a:b]) for a, b in zip(ends, ends[1:], strict=False)]

    def peak(method, requests):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _, fed = collect(method, requests)
        assert fed in (len(text) + 1, len(text) - 1)
        return torch.cuda.max_memory_allocated()

    prefill = peak(engine.generate, [GenerateRequest(text, 1)])
    assert peak(engine.score, buckets) < 2 * prefill
    torch.cuda.empty_cache()


def test_an_impossible_answer_spoils_no_other(exact):
    """A logit of minus infinity, in a batch and one by one."""
    exact.output_projection.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([7]), float("-inf"))
    )
    requests = [ScoreRequest([1, 2, a], [a, 5]) for a in (3, 7, 8, 7, 9)]
    alone, _ = collect(Engine(exact).score, requests)
    packed, _ = collect(Engine(exact, batch_size=None).score, requests)
    assert [score.logprob == float("-inf") for score in alone] == [False, True, False, True, False]
    for a, b in zip(alone, packed, strict=True):
        assert a.greedy == b.greedy and a.logprob == pytest.approx(b.logprob, abs=1e-9)


def test_what_is_computed_is_handed_over_when_a_run_breaks(exact, monkeypatch):
    """The device runs ahead of the host by one batch; an error in the next one loses none."""
    predict, calls = exact.predict, []

    def breaking(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(exact, "predict", breaking)
    requests = [ScoreRequest([a] * 20, [1]) for a in range(4)]
    scores = []
    with pytest.raises(KeyboardInterrupt):
        for score in Engine(exact).score(requests, lambda n: None, lambda *n: None):
            scores.append(score)
    assert len(scores) == 2


def test_a_run_does_not_wait_for_garbage_from_before_it(exact):
    gc.freeze()  # as Python 3.12 does with some objects
    before = gc.get_freeze_count()
    requests = [ScoreRequest([1], [2]), ScoreRequest([3], [4])]
    scores = Engine(exact).score(requests, begin=[].append, progress=[].append)
    for _ in scores:
        assert gc.get_freeze_count() > before
    assert not gc.get_freeze_count()


def test_the_last_of_several_runs_thaws(exact):
    runs = [Engine(exact).score([ScoreRequest([1], [2])], [].append, [].append) for _ in range(2)]
    for run in runs:
        next(run)
    for run in runs:
        assert gc.get_freeze_count()
        run.close()
    assert not gc.get_freeze_count()


def test_only_asked_positions_enter_the_cross_decoder(exact):
    entered = []
    exact.cross_decoder.register_forward_hook(lambda *args: entered.append(args[1][0].shape[0]))
    context = list(range(80))
    collect(Engine(exact).score, [ScoreRequest(context, [1, 2, 3])])
    assert sum(entered) == 3
    entered.clear()
    collect(Engine(exact).generate, [GenerateRequest(context, 5)])
    assert sum(entered) == 5


def test_generation_ends(exact):
    prompt = contexts(1)[0]
    full = generate_by_definition(exact, prompt, 12)
    cut = next(i for i in range(2, 12) if full[i] not in full[:i])
    requests = [
        GenerateRequest(prompt, 12, end_tokens=frozenset([full[cut]])),
        GenerateRequest(
            prompt, 12, stop=lambda tokens, seen: cut + 1 if full[cut] in tokens else None
        ),
        GenerateRequest(prompt, 0),
    ]
    results, _ = collect(Engine(exact).generate, requests)
    assert results == [full[:cut], full[: cut + 1], []]


def frequencies(sampling, draws=4000):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(draws, -1)
    noise = torch.empty(draws, 4).exponential_(generator=sampling.generator(logits.device))
    return torch.bincount(draw(logits, [sampling] * draws, noise), minlength=4) / draws


def test_sampling_follows_the_tempered_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for sampling, expected in (
        (Sampling(temperature=1.0), logits.softmax(0)),
        (Sampling(temperature=2.0), (logits / 2).softmax(0)),
        (Sampling(temperature=1.0, top_k=2), logits[:2].softmax(0)),
        # The likeliest two have 0.64 + 0.24 of the probability.
        (Sampling(temperature=1.0, top_p=0.8), logits[:2].softmax(0)),
        (Sampling(temperature=1.0, top_p=0.1), torch.tensor([1.0])),
        (Sampling(temperature=1.0, top_p=0.0), torch.tensor([1.0])),
    ):
        expected = torch.nn.functional.pad(expected, (0, 4 - len(expected)))
        torch.testing.assert_close(frequencies(sampling), expected, rtol=0, atol=0.03)


def test_sampling_repeats_with_the_seed(exact):
    def drawn(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        request = GenerateRequest([1, 2, 3], 20, sampling=sampling)
        return collect(Engine(exact).generate, [request])[0][0]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: ScoreRequest([], [1]), "context is empty"),
        (lambda model: GenerateRequest([], 1), "context is empty"),
        (lambda model: GenerateRequest([1], -1), "max_tokens -1"),
        (lambda model: Sampling(temperature=float("nan")), "temperature nan"),
        (lambda model: Engine(model, batch_size=0), "batch_size 0"),
        (lambda model: Engine(model, prefill_chunk=-5), "prefill_chunk -5"),
    ],
)
def test_refused_arguments(make, said, exact):
    with pytest.raises(ValueError, match=said):
        make(exact)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["embed_tokens", "output_projection"])
def test_predictions_that_are_no_numbers_are_refused(published, name, temperature):
    """Each weight is finite; what is computed with it is not."""
    model = load(published, device="cpu", dtype=torch.float32)
    getattr(model, name).weight[7:] = 3e38
    engine = Engine(model)
    with pytest.raises(ValueError, match="predictions are nan: .* overflow in float32"):
        collect(engine.score, [ScoreRequest([3, 9], [5])])
    request = GenerateRequest([3, 9], 2, sampling=Sampling(temperature=temperature))
    with pytest.raises(ValueError, match="overflow in float32"):
        collect(engine.generate, [request])


def test_one_prediction_that_overflows_is_refused_whatever_follows(published):
    """A logit that is infinite makes its token certain, and others impossible, where it occurs."""
    model = load(published, device="cpu", dtype=torch.float32)
    model.layer_norm.weight[0] = 100  # which decides by its sign whether token 7 overflows
    model.output_projection.weight[7] = 0
    model.output_projection.weight[7, 0] = 3e38
    engine = Engine(model)

    def overflows(method, request):
        try:
            collect(method, [request])
        except ValueError as error:
            assert "overflow in float32" in str(error)
            return True
        return False

    def decoded(start, length):
        return overflows(engine.generate, GenerateRequest([start], length))

    at_once = [start for start in range(24) if decoded(start, 1)]
    assert 0 < len(at_once) < 24
    assert all(decoded(start, 2) for start in at_once)
    assert all(overflows(engine.score, ScoreRequest([start], [5])) for start in at_once)
