"""Estimates of memory and work against a model that is really built and run."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from yoco_eval.kernels.sequences import Span, Spans
from yoco_eval.model import GatedRetentionSettings, SlidingWindowSettings, Yoco, load
from yoco_eval.model import costs as module
from yoco_eval.model.costs import OVERHEAD, YocoCosts
from yoco_eval.model.footprint import footprint
from yoco_eval.model.mixers import GatedDeltaNetSettings
from yoco_eval.model.shapes import SHAPES, set_random_weights


@pytest.fixture
def model(published):
    return load(published, device="cpu", dtype=torch.float32)


def test_parts_are_those_of_a_real_model(model):
    costs = model.costs
    assert costs.weight_bytes(torch.float32) == sum(p.nbytes for p in model.parameters())
    cache = model.new_cache(50)
    assert costs.cache_bytes(torch.float32, 50) == cache.keys.nbytes + cache.values.nbytes
    model.prefill(torch.arange(20), cache)
    assert costs.state_bytes(torch.float32) == sum(s.nbytes for s in cache.state.layers)


def test_operations_are_those_of_the_matrix_products(model):
    cache = model.new_cache(50)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model.prefill(torch.arange(20), cache)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm_"))
    # The stacked projections are padded to a multiple of 8 rows.
    padding = 2 * 20 * 8 * model.config.dim * model.config.n_layers // 2
    assert 0 <= products - model.costs.prefill_operations(20) <= padding


def test_decoding_reads_the_cache_once_for_each_cross_decoder_layer(published):
    costs = load(published, device="cpu").costs
    more = costs.decode_bytes(torch.bfloat16, 101) - costs.decode_bytes(torch.bfloat16, 100)
    assert more == costs.config.cross_layers * costs.cache_bytes(torch.bfloat16, 1)


def test_memory_grows_with_length_by_the_cache_alone(published):
    costs = load(published, device="cpu").costs
    short, long = (footprint(costs, torch.bfloat16, n, 64) for n in (100, 1000))
    assert long.total - short.total == costs.cache_bytes(torch.bfloat16, 900)


def test_what_is_fused_takes_less_but_not_a_text_s_last_tokens(monkeypatch):
    def activations(chunk):
        return footprint(YocoCosts(SHAPES["3b"]), torch.bfloat16, 2**20, chunk).activations

    monkeypatch.setattr(module, "triton_takes", lambda device, dtype: True)
    monkeypatch.setattr(module, "fuses_swiglu", lambda *shape: False)
    apart = [activations(chunk) for chunk in (12672, 2112, 2047)]
    monkeypatch.setattr(module, "fuses_swiglu", lambda tokens, *shape: tokens >= 2048)
    fused = [activations(chunk) for chunk in (12672, 2112, 2047)]
    assert fused[0] < 0.9 * apart[0]
    assert fused[1] == fused[2] == apart[2] < apart[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 256])
def test_activations_on_a_cpu(window, dtype, live_bytes):
    config = replace(
        SHAPES["3b"],
        dim=1024,
        n_layers=2,
        hidden_dim=1408,
        self_decoder=SlidingWindowSettings(8, window) if window else GatedRetentionSettings(8),
        n_attn_heads=1,
        n_attn_kv_heads=1,
        vocab_size=100,
    )
    model = Yoco(config).to(dtype).requires_grad_(False)
    ids = torch.randint(100, (1000,))
    with torch.inference_mode():
        cache = model.new_cache(len(ids))
        model.prefill(ids[:1], cache)
        weights = [*model.parameters(), cache.keys, cache.values]
        with live_bytes(besides=weights) as live:
            model.prefill(ids[1:], cache)
    memory = footprint(YocoCosts(config), dtype, len(ids), len(ids), device=torch.device("cpu"))
    assert live.peak < memory.activations + memory.states - OVERHEAD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 1])
def test_attention_on_a_cpu(gap, dtype, live_bytes):
    """Of a text's last tokens; of tokens whose text lies in two places of the cache."""
    config = replace(
        SHAPES["3b"],
        dim=256,
        n_layers=2,
        hidden_dim=64,
        self_decoder=GatedRetentionSettings(2),
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=100,
    )
    model = Yoco(config).to(dtype).requires_grad_(False)
    length, chunk = 9000, 500
    cache = model.new_cache(length)
    x = torch.randn(chunk, config.dim).to(dtype)
    for part in (cache.keys, cache.values):
        part.normal_()
    first = length - chunk - gap
    spans = Spans((Span(0, chunk, 0, first, False), Span(0, chunk, first + gap, length, True)))
    positions = torch.arange(length - chunk, length)
    with torch.inference_mode():
        model.predict(x[:1], positions[:1], cache, Spans((Span(0, 1, 0, 1, True),)))
        with live_bytes(besides=[*model.parameters(), cache.keys, cache.values]) as live:
            model.predict(x, positions, cache, spans)
    memory = footprint(YocoCosts(config), dtype, length, chunk, device=torch.device("cpu"))
    assert live.peak < memory.activations - OVERHEAD


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "mixer",
    [
        SHAPES["3b"].self_decoder,
        SlidingWindowSettings(24, 1024),
        GatedDeltaNetSettings(9, 9, 256, 512),
        GatedDeltaNetSettings(6, 12, 128, 64, convolution=None, output_gate=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [2112, 12672])
def test_activations_on_a_gpu(mixer, chunk):
    """Not more than estimated, and not much less, of a chunk and of fewer tokens than are fused."""
    device = torch.device("cuda")
    config = replace(SHAPES["3b"], n_layers=2, vocab_size=1000, self_decoder=mixer)
    gc.collect()  # what is freed meanwhile would be missed
    model = Yoco.empty(config, device, torch.bfloat16)
    set_random_weights(model, 0)
    extra = []
    with torch.inference_mode():
        for tokens in (chunk, 2047):
            cache = model.new_cache(tokens)
            ids = torch.zeros(tokens, dtype=torch.long, device=device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.prefill(ids, cache)
            extra.append(torch.cuda.max_memory_allocated() - before)
    memory = footprint(YocoCosts(config), torch.bfloat16, chunk, chunk)
    # What the matrix library keeps for itself may be there from an earlier test.
    least = 0.6 * (memory.activations - OVERHEAD)
    assert least < max(extra) < memory.activations + memory.states


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("length", [8192, 131072])
def test_the_peak_on_a_gpu(length):
    config, chunk, device = SHAPES["3b"], 4096, torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = Yoco.empty(config, device, torch.bfloat16)
    set_random_weights(model, 0)
    with torch.inference_mode():
        cache = model.new_cache(length)
        for ids in torch.randint(config.vocab_size, (length - 3,), device=device).split(chunk):
            model.prefill(ids, cache)
        decoder = model.decoder(cache)
        decoder.start(0)
        for _ in range(3):
            decoder.step()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(
        footprint(YocoCosts(config), torch.bfloat16, length, chunk).total, rel=0.1
    )
