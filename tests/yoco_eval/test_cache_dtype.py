"""A cache in eight bits through the engine, against its definition worked out token by token; and
how it is asked for."""

import copy
from dataclasses import replace

import pytest
import torch
from test_sparse import VOCABULARY, Ahead, collect, logits_by_definition, made_model, texts

from yoco_eval.cli import main
from yoco_eval.engine import Engine
from yoco_eval.kernels.eight_bits import quantise
from yoco_eval.lm import YocoLM
from yoco_eval.model.families import with_eight_bits
from yoco_eval.model.phi4flash_config import Phi4FlashConfig
from yoco_eval.model.shapes import with_random_weights
from yoco_eval.profiling import ProfileError, run_profile
from yoco_eval.requests import GenerateRequest, ScoreRequest

ALL = 10**6  # blocks


def as_read(x):
    return quantise(x).to(x.dtype)


@pytest.fixture(scope="module")
def plain():
    return made_model()


@pytest.fixture(params=[None, 2], ids=["whole", "sparse"])
def model(plain, request):
    """Beside it, how many blocks are read at most."""
    made = copy.copy(plain)
    made.eight_bits, made.sparse = True, request.param
    return made, request.param or ALL


@pytest.fixture(scope="module")
def score_requests():
    generator = torch.Generator().manual_seed(1)
    return [
        ScoreRequest(context, torch.randint(VOCABULARY, (count,), generator=generator).tolist())
        for context, count in zip(texts(), [3, 1, 20, 2, 5, 1, 4], strict=True)
    ]


@pytest.fixture(scope="module")
def defined(plain, score_requests):
    """Scores by definition, by the number of blocks."""

    def score(request, most):
        ids, first = [*request.context, *request.continuation][:-1], len(request.context) - 1
        logprobs = logits_by_definition(plain, ids, most, first, as_read).log_softmax(-1)
        return logprobs.gather(1, torch.tensor(request.continuation)[:, None]).sum().item()

    return {most: [score(request, most) for request in score_requests] for most in (ALL, 2)}


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, None), (None, None), (None, 100)])
def test_scores_are_those_of_the_definition(model, score_requests, defined, batch_size, chunk):
    model, most = model
    scores = collect(Engine(model, batch_size, chunk).score, score_requests)
    assert [score.logprob for score in scores] == pytest.approx(defined[most], abs=1e-9)


def test_scores_are_others_than_in_the_dtype_of_the_model(plain, score_requests, defined):
    scores = collect(Engine(plain, None).score, score_requests)
    differences = [abs(x.logprob - y) for x, y in zip(scores, defined[ALL], strict=True)]
    assert 1e-4 < max(differences) < 1


def check_answers(plain, requests, answers, most, tolerance=0.0):
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer) == request.max_tokens
        ids = [*request.context, *answer][:-1]
        logits = logits_by_definition(plain, ids, most, len(request.context) - 1, as_read)
        taken = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.amax(1) - taken).max() <= tolerance


@pytest.mark.parametrize(
    ("engine", "batch_size", "chunk"), [(Engine, 1, None), (Engine, 4, 128), (Ahead, 6, None)]
)
def test_answers_are_those_of_the_definition(plain, model, engine, batch_size, chunk):
    model, most = model
    requests = [
        GenerateRequest(context, count)
        for context, count in zip(texts(), [3, 40, 2, 5, 3, 2, 4], strict=True)
    ]
    answers = collect(engine(model, batch_size, chunk).generate, requests)
    check_answers(plain, requests, answers, most)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with numbers of eight bits",
)
def test_kernels_and_graphs_on_a_gpu(plain, model, score_requests, defined):
    """In float32. A number may be rounded otherwise where one of float64 is next to halfway."""
    model, most = model
    fast, tolerance = copy.deepcopy(model).float().cuda(), 5e-2
    scores = collect(Engine(fast, None).score, score_requests)
    assert [score.logprob for score in scores] == pytest.approx(defined[most], abs=tolerance)
    requests = [GenerateRequest(context, 40) for context in texts()]
    for batch_size in (1, None):
        answers = collect(Engine(fast, batch_size).generate, requests)
        check_answers(plain, requests, answers, most, tolerance)


def test_costs_are_those_of_the_cache(model):
    model, most = model
    cache = model.new_cache(640)
    held = sum(x.numbers.nbytes + x.scales.nbytes for x in (cache.keys, cache.values))
    if most != ALL:
        held += cache.summaries.nbytes
    assert model.costs.cache_bytes(torch.float64, 640) == held
    assert held < 640 * 2 * 2 * (8 + 2) * 1.2


@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float64, 600), (torch.float64, 2000), (torch.bfloat16, 2000)]
)
def test_memory_is_planned_for(model, live_bytes, dtype, length):
    """Of a text all of whose positions are asked for, chunk by chunk."""
    model = copy.deepcopy(model[0]).to(dtype)
    ids = [token % VOCABULARY for token in range(length)]
    engine = Engine(model, prefill_chunk=256)
    planned = engine._fit(length, length + 64, spare=63).need
    with live_bytes(model.parameters()) as live:
        collect(engine.score, [ScoreRequest(ids[:1], ids[1:])])
    assert live.peak <= planned


def test_no_copy_of_the_whole_cache_is_planned_for(plain):
    """As PyTorch makes of one in bfloat16, on a CPU."""

    def activations(costs, length):
        return costs.activation_bytes(torch.bfloat16, length, 256, 256, torch.device("cpu"))

    eight_bits = replace(plain.costs, eight_bits=True)
    assert activations(eight_bits, 100_000) == activations(eight_bits, 10_000)
    assert activations(plain.costs, 100_000) > activations(plain.costs, 10_000)


def test_what_the_backend_says_of_it():
    plain, one, both = (
        YocoLM("demo-4k", device="cpu", **more)
        for more in ({}, {"cache_dtype": "fp8"}, {"cache_dtype": "fp8", "sparse": 4})
    )
    assert one.model.eight_bits and one.get_model_info()["cache_dtype"] == "fp8"
    assert both.model.eight_bits and both.model.sparse == 4
    assert not plain.model.eight_bits and "cache_dtype" not in plain.get_model_info()
    assert len({lm._fingerprint() for lm in (plain, one, both)}) == 3


@pytest.mark.parametrize("value", ["fp4", "bfloat16", True])
def test_refused_values(value):
    with pytest.raises(ValueError, match=f"^cache_dtype={value}: choose fp8, or leave it out"):
        YocoLM("demo-4k", device="cpu", cache_dtype=value)


def test_families_that_cannot():
    other = with_random_weights(Phi4FlashConfig(256, 2048, 4, 8, 4, 100, vocab_size=50))
    with pytest.raises(ValueError, match="^cache_dtype=fp8 is for YOCO .* of Phi-4-mini-flash,"):
        with_eight_bits(other, "cache_dtype=fp8")


def test_older_gpus_are_refused(monkeypatch, capsys):
    """By evaluations before a checkpoint is looked for."""
    for module in ("lm", "profiling", "devices"):
        monkeypatch.setattr(f"yoco_eval.{module}.find_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match="^cache_dtype=fp8 takes .* 8.9 .* NVIDIA A100 has 8.0"):
        YocoLM("nowhere", cache_dtype="fp8")
    refusal = "--cache-dtype fp8 takes a GPU of compute capability 8.9 or above"
    with pytest.raises(ProfileError, match=f"^{refusal}"):
        run_profile([100], pretrained="demo-4k", cache_dtype="fp8")
    command = ["plan", "--pretrained", "demo-4k", "--length", "4k", "--cache-dtype", "fp8"]
    assert main(command) == 2 and refusal in capsys.readouterr().err


def test_plan(capsys):
    command = ["plan", "--shape", "3b", "--length", "1m", "--memory", "80g", "--speeds", "700,2900"]
    rates = []
    for more in ([], ["--cache-dtype", "fp8"], ["--cache-dtype", "fp8", "--sparse", "64"]):
        assert main([*command, *more]) == 0
        text = capsys.readouterr().out
        rates.append(float(text.split("allows about ")[1].split(" ")[0]))
    assert "3b sparse=64 cache_dtype=fp8, 1M tokens" in text
    assert 1.7 * rates[0] < rates[1] < 2 * rates[0] and rates[2] > 6 * rates[0]
    assert main([*command, "--cache-dtype", "fp8", "--gpus", "2"]) == 0
    assert " 1.02 " in capsys.readouterr().out  # GiB of the cache, of texts that both cards hold
    slower = "On a CPU, numbers of eight bits are converted first, and decoding is slower."
    command = ["plan", "--shape", "3b", "--length", "4k", "--device", "cpu"]
    for more, told in ([], False), (["--cache-dtype", "fp8"], True):
        main([*command, *more])
        assert (slower in capsys.readouterr().out) == told


def test_profile(monkeypatch):
    monkeypatch.setattr("yoco_eval.profiling.LARGEST_BATCH", {"cpu": 3})
    profile = run_profile([100], pretrained="demo-4k", cache_dtype="fp8", device="cpu")
    assert profile.name == "demo-4k cache_dtype=fp8"
    assert all(row.outcome == "measured" for row in profile.rows)
    assert all(one.outcome == "measured" for row in profile.rows for one in row.throughput)
