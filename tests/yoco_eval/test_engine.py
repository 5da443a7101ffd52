"""The engine against brute force: one full float64 pass per request."""

import random
from dataclasses import replace

import pytest
import torch

from yoco_eval import engine as module
from yoco_eval.engine import Engine, GenerateRequest, Sampling, ScoreRequest
from yoco_eval.memory import fit


def collect(method, requests):
    """Results in request order, and the tokens announced and reported."""
    announced, reported = [], []
    results = dict(method(requests, begin=announced.append, progress=reported.append))
    assert sorted(results) == list(range(len(requests)))
    assert announced == [sum(reported)]
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


@pytest.mark.parametrize(
    ("batch_size", "chunk"), [(1, None), (1, 17), (4, 64), (None, None), (None, 300), (3, 1)]
)
def test_scores_equal_one_full_pass_each(exact, requests, batch_size, chunk):
    scores, fed = collect(Engine(exact, batch_size, chunk).score, requests)
    for request, score in zip(requests, scores, strict=True):
        logprob, greedy = (
            score_by_definition(exact, request) if request.continuation else (0.0, True)
        )
        assert score.logprob == pytest.approx(logprob, abs=1e-9)
        assert score.greedy == greedy
    assert {score.greedy for score in scores} == {True, False}
    assert fed < sum(len(r.context) + len(r.continuation) for r in requests) / 2


def test_logits_are_never_held_for_a_whole_text(exact, monkeypatch):
    most = 10 * exact.config.vocab_size

    def few(*args, **rest):
        return replace(fit(*args, **rest), logits=most)

    monkeypatch.setattr(module, "fit", few)
    largest = []
    exact.output_projection.register_forward_hook(lambda *args: largest.append(len(args[2])))
    request = ScoreRequest([1], list(range(90)) * 2)
    (score,), _ = collect(Engine(exact).score, [request])
    assert max(largest) == 10
    assert score.logprob == pytest.approx(score_by_definition(exact, request)[0], abs=1e-9)


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
        for score in Engine(exact).score(requests, lambda n: None, lambda n: None):
            scores.append(score)
    assert len(scores) == 2


def test_only_asked_positions_enter_the_cross_decoder(exact):
    entered = []
    exact.cross_decoder.register_forward_hook(lambda *args: entered.append(args[1][0].shape[0]))
    context = list(range(80))
    collect(Engine(exact).score, [ScoreRequest(context, [1, 2, 3])])
    assert sum(entered) == 3
    entered.clear()
    collect(Engine(exact).generate, [GenerateRequest(context, 5)])
    assert sum(entered) == 5


@pytest.mark.parametrize("chunk", [None, 13])
def test_generation_equals_naive_greedy_decoding(exact, chunk):
    prompts = contexts(12, seed=2)
    prompts.append(prompts[0])
    results, _ = collect(
        Engine(exact, prefill_chunk=chunk).generate,
        [GenerateRequest(prompt, 6) for prompt in prompts],
    )
    assert results == [generate_by_definition(exact, prompt, 6) for prompt in prompts]


def test_generation_ends(exact):
    prompt = contexts(1)[0]
    full = generate_by_definition(exact, prompt, 12)
    cut = next(i for i in range(2, 12) if full[i] not in full[:i])
    requests = [
        GenerateRequest(prompt, 12, end_tokens=frozenset([full[cut]])),
        GenerateRequest(prompt, 12, finished=lambda tokens: tokens[-1] == full[cut]),
        GenerateRequest(prompt, 0),
    ]
    results, _ = collect(Engine(exact).generate, requests)
    assert results == [full[:cut], full[: cut + 1], []]


def frequencies(sampling, draws=4000):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    torch.manual_seed(0)
    drawn = [module._draw(logits, sampling) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=4) / draws


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
    request = GenerateRequest([1, 2, 3], 20, sampling=Sampling(temperature=1.0))

    def draw(seed):
        torch.manual_seed(seed)
        return collect(Engine(exact).generate, [request])[0][0]

    assert draw(1) == draw(1) != draw(2)
