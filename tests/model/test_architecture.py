"""That docs/architecture.md holds: a new kind of self-decoder is one short file.

That it is the same however a text is fed is in test_mixers.py, with all the others.
"""

import random
from pathlib import Path

import pytest
import torch

from yoco_eval.engine import Engine
from yoco_eval.model import Sequences, Yoco, YocoConfig, load, save
from yoco_eval.requests import GenerateRequest, ScoreRequest

TOY = Path(__file__).with_name("toy_self_decoder.py")


def test_a_kind_is_one_short_file():
    assert len(TOY.read_text().splitlines()) < 80


@pytest.fixture
def model(toy_kind, tmp_path):
    """With the toy, in float64, as it is loaded from a checkpoint."""
    torch.manual_seed(0)
    made = Yoco(YocoConfig(32, 4, 40, 4, 2, 50, toy_kind(9))).double()
    save(made, tmp_path)
    return load(tmp_path, "cpu", torch.float64)


def test_the_engine_runs_a_new_kind(model):
    """Branches of two prefixes, packed and one by one, against a full pass each."""
    rng = random.Random(0)
    texts = [[rng.randrange(50) for _ in range(n)] for n in (30, 5)]
    contexts = [texts[i % 2] + [rng.randrange(50) for _ in range(i)] for i in range(8)]
    asked = [ScoreRequest(context, [context[0], 7, 11]) for context in contexts]
    expected = []
    for request in asked:
        ids = torch.tensor([[*request.context, *request.continuation]])
        logprobs = model(ids[:, :-1], first=len(request.context) - 1)[0].log_softmax(-1)
        expected.append(logprobs.gather(1, ids[0, -3:, None]).sum().item())
    for batch_size, chunk in ((1, 4), (None, None)):
        engine = Engine(model, batch_size, chunk)
        scores = dict(engine.score(asked, lambda n: None, lambda *n: None))
        logprobs = [scores[index].logprob for index in range(len(asked))]
        assert logprobs == pytest.approx(expected, abs=1e-9)

    wanted = [GenerateRequest(context, 4) for context in contexts]
    decoded = dict(Engine(model).generate(wanted, lambda n: None, lambda *n: None))
    for index, ids in enumerate(contexts):
        for token in decoded[index]:
            assert token == model(torch.tensor([ids]))[0, -1].argmax()
            ids = [*ids, token]
        assert len(decoded[index]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_kind_takes_no_more_memory_than_it_says(toy_kind, dtype, live_bytes):
    """In the layer alone: in a model's plan, what is wider would hide it."""
    settings, dim, lengths = toy_kind(9), 256, (300, 200)
    mixer = settings.build(dim, 1e-5).to(dtype).requires_grad_(False)
    x, norm = torch.randn(1 + sum(lengths), dim).to(dtype), torch.ones(dim, dtype=dtype)
    rest = Sequences(lengths, (1, 1), x.device, (0, 0))
    with torch.inference_mode():
        _, state = mixer(x[:1], norm, Sequences((1,), (0,), x.device), None, True)
        with live_bytes(besides=[*mixer.parameters(), x, norm, state]) as live:
            mixer(x[1:], norm, rest, state, True)
    planned = rest.total * settings.activations(dim, dtype, fast=False) * dtype.itemsize
    planned += len(lengths) * settings.stages[1] * settings.state_bytes(dim, dtype)
    assert live.peak <= planned
