"""The Transformer: equal to its equations written plainly, however a text is fed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from predicting import predictions
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.utils.flop_counter import FlopCounterMode

from yoco_eval.engine import Engine
from yoco_eval.kernels.sequences import Span, Spans
from yoco_eval.model import transformer
from yoco_eval.model.shapes import SHAPES, set_random_weights
from yoco_eval.model.transformer import Transformer, TransformerConfig
from yoco_eval.requests import GenerateRequest, ScoreRequest

CONFIG = TransformerConfig(
    dim=48, n_layers=3, hidden_dim=40, n_heads=6, n_kv_heads=2, vocab_size=64, rope_theta=500.0
)
IDS = torch.randint(64, (50,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    model = Transformer.empty(CONFIG, torch.device("cpu"), torch.float64)
    set_random_weights(model, seed=0)
    for weight in model.parameters():  # large enough that attention is far from uniform
        weight.mul_(12).add_(torch.arange(weight.shape[-1]) * 1e-3)
    return model


@pytest.fixture
def expected(model):
    """Logits [50, 64], from the weights alone and with no function of the project's."""
    w = dict(model.named_parameters())
    heads, groups, dim, length = CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim, len(IDS)

    def norm(x, name):
        scale = (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt()
        return x / scale * w[f"{name}.weight"]

    def rotated(x):  # [heads, length, dim] as complex numbers
        j = torch.arange(dim // 2, dtype=torch.float64)
        angles = torch.arange(length)[:, None] * 500.0 ** (-j / (dim // 2 - 1))
        x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(x * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def split(x, count):
        return x.view(length, count, dim).transpose(0, 1)

    x = w["embed_tokens.weight"][IDS]
    for i in range(CONFIG.n_layers):
        layer = f"layers.{i}"
        z = norm(x, f"{layer}.mixer_layer_norm")
        q = rotated(split(z @ w[f"{layer}.mixer.q_proj.weight"].T, heads))
        k = rotated(split(z @ w[f"{layer}.mixer.k_proj.weight"].T, groups))
        v = split(z @ w[f"{layer}.mixer.v_proj.weight"].T, groups)
        k, v = (part.repeat_interleave(heads // groups, 0) for part in (k, v))
        scores = q @ k.mT / math.sqrt(dim)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + out.transpose(0, 1).flatten(1) @ w[f"{layer}.mixer.out_proj.weight"].T
        z = norm(x, f"{layer}.final_layer_norm")
        hidden = F.silu(z @ w[f"{layer}.ffn.fc1.weight"].T) * (z @ w[f"{layer}.ffn.gate.weight"].T)
        x = x + hidden @ w[f"{layer}.ffn.fc2.weight"].T
    return norm(x, "layer_norm") @ w["output_projection.weight"].T


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_prefill_in_chunks(model, expected, chunk):
    cache = model.new_cache(50)
    for start in range(0, 50, chunk):
        x = model.prefill(IDS[start : start + chunk], cache)
        for _ in range(2):  # asking changes nothing
            logits = predictions(model, x, cache)
            now = expected[start : cache.state.length]
            torch.testing.assert_close(logits, now, rtol=0, atol=1e-9)
    assert expected.std() > 0.1  # else the comparison says little


def test_decoding(model, expected):
    """Step after step, and again from where the cache is."""
    cache = model.new_cache(50)
    model.prefill(IDS[:30], cache)
    decoder = model.decoder(cache)
    for _ in range(2):
        decoder.start(int(IDS[30]))
        for position in range(30, 50):
            decoder.tokens.fill_(IDS[position])
            decoder.step()
            torch.testing.assert_close(decoder.logits[0], expected[position], rtol=0, atol=1e-9)
            assert decoder.tokens == decoder.logits.argmax()
    with pytest.raises(ValueError, match="room for 50 tokens"):
        decoder.step()


def test_cache_keeps_every_layer(model):
    cache = model.new_cache(20)
    assert cache.keys.shape == cache.values.shape == (3, 2, 20, 8)
    model.prefill(IDS[:15], cache)
    with pytest.raises(ValueError, match="room for 20 tokens, not for 21"):
        model.prefill(IDS[:6], cache)


def test_as_large_as_a_yoco_model():
    config = TransformerConfig.like(SHAPES["3b"])
    assert config == TransformerConfig(3072, 26, 8192, 24, 8, 100288, 8e7, 1e-5, 2**20)
    model = Transformer.empty(config, torch.device("meta"), torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(3.2e9, rel=0.02)


def test_costs_are_those_of_a_real_model(model):
    costs = model.costs
    assert costs.weight_bytes(torch.float64) == sum(p.nbytes for p in model.parameters())
    cache = model.new_cache(30)
    assert costs.cache_bytes(torch.float64, 30) == cache.keys.nbytes + cache.values.nbytes
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model.prefill(IDS[:30], cache)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op))
    attended = 4 * CONFIG.n_layers * CONFIG.dim * 30 * 31 // 2
    padding = 2 * 30 * 8 * CONFIG.dim * CONFIG.n_layers
    assert 0 <= products + attended - costs.prefill_operations(30) <= padding


def plain_attention(q, keys, values, bias, lse, dropout, causal):
    """The result and log-sum-exp of cuDNN's attention, whose causal mask begins at key 0."""
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
    scores = q @ keys.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
    return scores.softmax(-1) @ values, scores.logsumexp(-1, keepdim=True)


def lower_right(q, keys, values):
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device)
    mask = mask.tril(keys.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


@pytest.mark.parametrize("keys", [20, 27, 36, 53])
def test_attention_put_together_from_pieces(keys, monkeypatch):
    monkeypatch.setattr(transformer, "_PIECE", 16)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", plain_attention)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        3 * torch.randn(1, heads, length, 8, dtype=torch.float64, generator=generator)
        for heads, length in ((6, 20), (2, keys), (2, keys))
    )
    out = transformer._cudnn_attention(q, k, v)
    torch.testing.assert_close(out, lower_right(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's attention needs a GPU")
@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("length", [1024, 3000])
@pytest.mark.parametrize("past", [0, 100, 5000])
def test_attention_on_the_card(cudnn, length, past, monkeypatch):
    monkeypatch.setattr(transformer, "_PIECE", 2048)
    generator = torch.Generator("cuda").manual_seed(1)
    total, options = past + length, {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(length, 6, 128, generator=generator, **options)
    keys, values = torch.full((2, 2, total + 9, 128), math.nan, **options)
    for part in (keys, values):
        part[:, :total].normal_(generator=generator)
    own = (part[None, :, past:total] for part in (keys, values))
    parameters = SDPAParams(q.transpose(0, 1)[None], *own, None, 0.0, True, True)
    if cudnn and not can_use_cudnn_attention(parameters):
        pytest.skip("no cuDNN attention here")
    monkeypatch.setattr(transformer, "can_use_cudnn_attention", lambda parameters: cudnn)
    unturned = (torch.ones(length, 64, **options), torch.zeros(length, 64, **options))
    spans = Spans((Span(0, length, 0, total, True),))
    out = transformer._attention(q, keys, values, spans, unturned)
    q, keys, values = q.transpose(0, 1)[None].double(), keys[None].double(), values[None].double()
    reference = lower_right(q, keys[:, :, :total], values[:, :, :total])[0].transpose(0, 1)
    assert (out.double() - reference).norm() / reference.norm() < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_card():
    """bfloat16 with many tokens, in chunks and decoded, near the same weights in float64."""
    config = TransformerConfig(256, 2, 512, 4, 2, 1000, 5e5)
    model = Transformer.empty(config, torch.device("cuda"), torch.bfloat16)
    set_random_weights(model, seed=0)
    exact = Transformer.empty(config, torch.device("cpu"), torch.float64)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(1000, (3010,))
    wide, narrow = exact.new_cache(3010), model.new_cache(3010)
    x = exact.prefill(ids[:3000], wide)
    for chunk in ids[:3000].cuda().split(1500):
        y = model.prefill(chunk, narrow)
    reference, logits = predictions(exact, x[-1:], wide)[0], predictions(model, y[-1:], narrow)[0]
    assert (logits.cpu().double() - reference).norm() / reference.norm() < 3e-2
    decoder = model.decoder(narrow)
    decoder.start(int(ids[3000]))
    for token in ids[3000:]:
        decoder.tokens.fill_(token)
        decoder.step()
        (reference,) = predictions(exact, exact.prefill(token[None], wide), wide)
        assert (decoder.logits[0].cpu().double() - reference).norm() / reference.norm() < 3e-2


def through_the_engine(model, **options):
    """An engine for texts that share stems and branch, and requests of both kinds."""
    random = np.random.default_rng(0)
    stem, other = random.integers(64, size=(2, 30))
    contexts = [stem, other, stem[:12], np.append(stem, other[:9]), np.append(stem, other[:9])]
    ends = random.integers(64, size=(5, 7))
    scored = [
        ScoreRequest(context, end[:length])
        for context, end in zip(contexts, ends, strict=True)
        for length in (1, 2, 7)
    ]
    return Engine(model, **options), scored, [GenerateRequest(context, 5) for context in contexts]


def full_pass(model, ids):
    """Logits [T, vocab_size] of a text fed as a whole."""
    cache = model.new_cache(len(ids))
    return predictions(model, model.prefill(torch.as_tensor(ids), cache), cache)


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk": 9}, {"batch_size": None}, {"batch_size": 3}], ids=str
)
def test_the_engine_runs_it_as_any_model(model, options):
    engine, scored, generated = through_the_engine(model, **options)
    quiet = {"begin": lambda count: None, "progress": lambda *counts: None}
    for index, score in engine.score(scored, **quiet):
        request = scored[index]
        ids = np.append(request.context, request.continuation)
        rows = full_pass(model, ids)[len(request.context) - 1 : -1].log_softmax(-1)
        targets = torch.as_tensor(request.continuation)
        expected = rows.gather(1, targets[:, None]).sum().item()
        assert score.logprob == pytest.approx(expected, abs=1e-9)
        assert score.greedy == bool((rows.argmax(-1) == targets).all())
    for index, tokens in engine.generate(generated, **quiet):
        ids = list(generated[index].context)
        for token in tokens:
            assert token == int(full_pass(model, ids)[-1].argmax())
            ids.append(token)
        assert len(tokens) == 5
