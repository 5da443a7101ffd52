"""Every kind of self-decoder: however a text is fed, and whatever it branches from, the same."""

import pytest
import torch
from predicting import decoded_side_by_side, predictions
from torch.utils._pytree import tree_leaves
from toy_self_decoder import MovingAverageSettings

from yoco_eval.model import Sequences, Span, Spans, Yoco, YocoConfig, load, save
from yoco_eval.model.costs import OVERHEAD
from yoco_eval.model.footprint import footprint
from yoco_eval.model.mixers import (
    KINDS,
    GatedDeltaNetSettings,
    GatedRetentionSettings,
    RetentionSettings,
    SlidingWindowSettings,
)

LENGTH = 80  # tokens: more than a chunk of the kernels' references
MODELS = {
    "gated_retention": (
        GatedRetentionSettings(2, self_rope_theta=500.0),
        {"n_layers": 3, "n_self_layers": 2, "rope_endpoint": False},
    ),
    "gated_retention, another gate": (
        GatedRetentionSettings(2, self_rope_endpoint=False, gate_temperature=40.0),
        {"query_norm_eps": 1e-5},
    ),
    "retention": (RetentionSettings(4), {"n_layers": 3, "n_self_layers": 1}),
    "sliding_window": (SlidingWindowSettings(4, 7), {}),
    "sliding_window, grouped": (
        SlidingWindowSettings(4, 12, n_self_kv_heads=2, self_qkv_bias=True),
        {"qkv_bias": True, "tied_embeddings": True},
    ),
    "gated_deltanet": (GatedDeltaNetSettings(2, 4, 8, 12), {"n_layers": 3, "n_self_layers": 2}),
    "gated_deltanet, negative": (
        GatedDeltaNetSettings(2, 2, 16, 8, convolution=3, negative_eigenvalues=True),
        {"qkv_bias": True, "query_norm_eps": 1e-6},
    ),
    "gated_deltanet, bare": (
        GatedDeltaNetSettings(1, 2, 8, 8, convolution=None, output_gate=False),
        {},
    ),
    "moving_average, a toy": (MovingAverageSettings(9), {"n_layers": 3, "n_self_layers": 2}),
}
pytestmark = pytest.mark.usefixtures("toy_kind")


@pytest.fixture(params=MODELS)
def model(request):
    """In float64, with all weights away from what they are made with."""
    settings, options = MODELS[request.param]
    torch.manual_seed(0)
    config = YocoConfig(
        dim=32,
        hidden_dim=40,
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=50,
        self_decoder=settings,
        **{"n_layers": 2} | options,
    )
    model = Yoco(config).double().requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.add_(0.3 * torch.randn_like(weight) - 5 * name.endswith("dt_bias"))
    return model


@pytest.fixture
def ids():
    return torch.randint(50, (LENGTH,), generator=torch.Generator().manual_seed(1))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_every_kind_is_tested():
    assert {settings.kind for settings, _ in MODELS.values()} == set(KINDS)


@pytest.mark.parametrize("chunk", [1, 25])
def test_chunks_equal_a_full_pass(model, ids, chunk):
    full, cache, logits = model(ids[None])[0], model.new_cache(LENGTH), []
    for part in ids.split(chunk):
        logits.append(predictions(model, model.prefill(part, cache), cache))
    same(torch.cat(logits), full)
    assert full.std() > 0.1


def test_the_state_lasts(model, ids):
    """To the end of the texts that are compared here, or of a window; else equality says little."""
    packed, state = Sequences((LENGTH,), (0,), ids.device), model.new_cache(0).state
    other = ids.clone()
    reach = {"sliding_window": 4, "moving_average": 3}.get(model.config.self_decoder.kind, LENGTH)
    other[-reach] = (other[-reach] + 1) % 50
    rows = [model.self_decode(text, packed, state, keep=False)[0][-1] for text in (ids, other)]
    assert (rows[0] - rows[1]).abs().max() > 1e-6


def test_branches_equal_a_full_pass_each(model, ids):
    """Packed continuations of two texts, shorter than a window or a convolution among them."""
    texts, rests = ids[:34].split([4, 30]), ids[34:].split([5, 30, 1, 2, 8])
    sources = (1, 0, 1, 0, 0)
    cache = model.new_cache(LENGTH)
    packed = Sequences((4, 30), (0, 0), ids.device)
    none = model.new_cache(0).state
    none = type(none)((0, 0), none.layers)
    _, state = model.feed(torch.cat(texts), packed, none, cache)
    starts = tuple(len(texts[source]) for source in sources)
    packed = Sequences(tuple(map(len, rests)), starts, ids.device, sources)
    x, state = model.feed(torch.cat(rests), packed, state, cache)
    places = ((0, 4), (4, 34))
    spans = []
    for source, first, end in zip(sources, packed.offsets, packed.offsets[1:], strict=False):
        spans.append(Span(first, end, *places[source], False))
        spans.append(Span(first, end, 34 + first, 34 + end, True))
    logits = model.logits(model.predict(x, packed.positions, cache, Spans(tuple(spans))))
    for source, rest, part in zip(sources, rests, logits.split([*map(len, rests)]), strict=True):
        whole = torch.cat((texts[source], rest))[None]
        same(part, model(whole, first=len(texts[source]))[0])
    # What follows a branch starts from its state, whatever lies beside it in the batch.
    again = Sequences((3,), (starts[1] + len(rests[1]),), ids.device, (1,))
    x, _ = model.self_decode(ids[:3], again, state)
    whole = torch.cat((texts[0], rests[1], ids[:3]))
    alone, _ = model.self_decode(whole, Sequences((len(whole),), (0,), ids.device), none, False)
    same(x, alone[-3:])


def test_going_back_to_a_snapshot(model, ids):
    cache = model.new_cache(LENGTH)
    model.prefill(ids[:20], cache)
    snapshot = cache.state
    model.prefill(ids[50:65], cache)
    cache.restore(snapshot)
    x = model.prefill(ids[20:70], cache)
    same(predictions(model, x, cache), model(ids[None, :70])[0, 20:])


@pytest.mark.parametrize("prompt", [0, 30])
def test_decoding_equals_a_full_pass(model, ids, prompt):
    """From any prompt, also an empty one, and twice from the same."""
    full, cache = model(ids[None, :50])[0], model.new_cache(50)
    if prompt:
        model.prefill(ids[:prompt], cache)
    decoder = model.decoder(cache)
    for _ in range(2):
        decoder.start(int(ids[prompt]))
        for position in range(prompt, 50):
            decoder.tokens.fill_(ids[position])
            decoder.step()
            same(decoder.logits[0], full[position])


def test_texts_decode_side_by_side(model):
    """Two that share a prefix and one from its first token on, as they come, move and go."""
    texts = torch.randint(50, (3, 50), generator=torch.Generator().manual_seed(3))
    texts[1, :30] = texts[0, :30]
    full = model(texts)
    steps = list(decoded_side_by_side(model, texts))
    assert len(steps) == 9 + 12 + 8
    for text, position, logits in steps:
        same(logits, full[text, position])


def test_costs_are_those_of_a_real_model(model, ids):
    model.float()
    costs, cache = model.costs, model.new_cache(LENGTH)
    assert costs.weight_bytes(torch.float32) == sum(p.nbytes for p in model.parameters())
    assert costs.cache_bytes(torch.float32, LENGTH) == cache.keys.nbytes + cache.values.nbytes
    model.prefill(ids, cache)
    states = sum(part.nbytes for part in tree_leaves(cache.state.layers))
    assert costs.state_bytes(torch.float32) == states


def test_saved_and_loaded_again(model, ids, tmp_path):
    save(model, tmp_path)
    again = load(tmp_path, "cpu", torch.float64)
    assert again.config == model.config
    same(again(ids[None]), model(ids[None]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        GatedDeltaNetSettings(2, 2, 128, 256),
        GatedDeltaNetSettings(4, 8, 32, 64, convolution=None),
        RetentionSettings(8),
        SlidingWindowSettings(8, 100, n_self_kv_heads=2),
    ],
    ids=lambda settings: settings.kind,
)
def test_activations_on_a_cpu(settings, dtype, live_bytes):
    """Not more than planned."""
    config = YocoConfig(512, 2, 256, 1, 1, 100, settings)
    model = Yoco(config).to(dtype).requires_grad_(False)
    ids = torch.randint(100, (1000,))
    cache = model.new_cache(len(ids))
    with torch.inference_mode():
        model.prefill(ids[:1], cache)
        with live_bytes(besides=[*model.parameters(), cache.keys, cache.values]) as live:
            model.prefill(ids[1:], cache)
    memory = footprint(model.costs, dtype, 1000, 1000, device=torch.device("cpu"))
    assert live.peak < memory.activations + memory.states - OVERHEAD
