"""The model: reference logits, and that every way of feeding a text gives the same."""

import copy
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yoco_eval.model import (
    GatedRetentionSettings,
    Sequences,
    Span,
    Spans,
    Yoco,
    YocoConfig,
    load,
    save,
)


@pytest.fixture
def expected(published):
    return torch.load(published / "expected.pt", weights_only=True)


def test_reference_logits(published, expected):
    model = load(published, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(model(expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4)


def test_reference_logits_after_saving(published, expected, tmp_path):
    save(load(published, device="cpu"), tmp_path)
    model = load(tmp_path, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(model(expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4)


def everything_before(first, end):
    """Queries of the tokens first .. end - 1 of the only text."""
    return Spans((Span(0, end - first, 0, end, causal=True),))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_prefill_equals_a_full_pass(exact, expected, chunk):
    ids = expected["input_ids"][0]
    cache, logits = exact.new_cache(len(ids)), []
    for start in range(0, len(ids), chunk):
        x = exact.prefill(ids[start : start + chunk], cache)
        positions = torch.arange(start, cache.state.length)
        spans = everything_before(start, cache.state.length)
        logits.append(exact.output_projection(exact.predict(x, positions, cache, spans)))
    torch.testing.assert_close(torch.cat(logits), exact(ids[None])[0], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [0, 1, 5, 40, 110])
def test_decoding_equals_a_full_pass(exact, expected, prompt):
    """From any prompt, also an empty one, and twice from the same."""
    ids = expected["input_ids"][0, :120]
    cache = exact.new_cache(len(ids))
    if prompt:
        exact.prefill(ids[:prompt], cache)
    decoder = exact.decoder(cache)
    for _ in range(2):
        decoder.start(int(ids[prompt]))
        logits = []
        for token in ids[prompt + 1 :]:
            decoder.step()
            logits.append(decoder.logits[0])
            assert decoder.tokens == decoder.logits.argmax()
            decoder.tokens.fill_(token)
        decoder.step()
        full = exact(ids[None])[0, prompt:]
        torch.testing.assert_close(
            torch.stack([*logits, decoder.logits[0]]), full, rtol=0, atol=1e-9
        )
        with pytest.raises(ValueError, match="room for 120 tokens, not for one more"):
            decoder.step()


def test_packed_sequences_equal_a_full_pass_each(exact):
    """Three continuations, the first and the last of the same text, and their asked positions."""
    torch.manual_seed(0)
    texts = [torch.randint(90, (n,)) for n in (20, 33)]
    rests = [torch.randint(90, (n,)) for n in (5, 40, 1)]
    sources = (1, 0, 1)
    cache = exact.new_cache(200)
    _, state = exact.feed(
        torch.cat(texts), Sequences((20, 33), (0, 0), cache.keys.device), cache.state, cache
    )
    assert state.lengths == (20, 33)
    sequences = Sequences((5, 40, 1), (33, 20, 33), cache.keys.device, sources)
    x, none = exact.feed(torch.cat(rests), sequences, state, cache, keep=False)
    assert none is None and cache.filled == 20 + 33 + 5 + 40 + 1
    spans = Spans(
        (
            Span(0, 5, 20, 53, causal=False),
            Span(0, 5, 53, 58, causal=True),
            Span(5, 45, 0, 20, causal=False),
            Span(5, 45, 58, 98, causal=True),
            Span(45, 46, 20, 53, causal=False),
            Span(45, 46, 98, 99, causal=True),
        )
    )
    logits = exact.output_projection(exact.predict(x, sequences.positions, cache, spans))
    for rest, source, part in zip(rests, sources, logits.split([5, 40, 1]), strict=True):
        whole = torch.cat((texts[source], rest))[None]
        torch.testing.assert_close(
            part, exact(whole, first=len(texts[source]))[0], rtol=0, atol=1e-9
        )


def test_logits_after_the_last_token(exact, expected):
    ids = expected["input_ids"][0, :70]
    cache = exact.new_cache(70)
    last = exact.prefill(ids, cache)[-1:]
    expected = exact(ids[None])[0, -1:]
    position, spans = torch.tensor([69]), everything_before(69, 70)
    for _ in range(2):  # asking changes nothing
        logits = exact.logits(exact.predict(last.clone(), position, cache, spans))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_no_tokens_have_no_logits(exact):
    for texts, length in ((1, 0), (0, 5)):
        with pytest.raises(ValueError, match=rf"input_ids \[{texts}, {length}\] holds no token"):
            exact(torch.empty(texts, length, dtype=torch.int64))


def test_early_exit_changes_no_logit(exact, expected):
    ids = expected["input_ids"]
    full = exact(ids)
    torch.testing.assert_close(exact(ids, first=101), full[:, 101:], rtol=0, atol=1e-9)
    for first in (-1, ids.shape[1] + 1):
        with pytest.raises(ValueError, match=f"first {first} is not from 0"):
            exact(ids, first=first)


def test_going_back_to_a_snapshot(exact, expected):
    """What was fed since is forgotten, however it was fed and however often one goes back."""
    ids = expected["input_ids"][0]
    cache = exact.new_cache(200)
    exact.prefill(ids[:50], cache)
    snapshot = cache.state
    for wrong in (ids[100:120], ids[70:71]):
        exact.prefill(wrong, cache)
        cache.restore(snapshot)
    x = exact.prefill(ids[50:60], cache)
    output = exact.predict(x, torch.arange(50, 60), cache, everything_before(50, 60))
    torch.testing.assert_close(
        exact.output_projection(output), exact(ids[None, :60])[0, 50:], rtol=0, atol=1e-9
    )


def test_cache_holds_one_layer_of_keys_and_values(exact):
    cache = exact.new_cache(100)
    exact.prefill(torch.arange(90), cache)
    config = exact.config
    assert cache.keys.shape == (config.n_attn_kv_heads, 100, config.attn_head_dim)
    assert cache.filled == cache.state.length == 90
    assert len(cache.state.layers) == config.n_layers // 2
    with pytest.raises(ValueError, match="room for 100 tokens, not for 101"):
        exact.prefill(torch.arange(11), cache)


def storages(model):
    """Address and bytes of each piece of memory that the weights lie in."""
    memory = [weight.untyped_storage() for weight in model.parameters()]
    return {part.data_ptr(): part.nbytes() for part in memory}


def stacks(model):
    layer = model.self_decoder.layers[0]
    return (
        (layer.ffn.stack, layer.ffn.fc1),
        (layer.mixer.stack, layer.mixer.q_proj),
        (model.cross_decoder.stack, model.cross_decoder.k_proj),
    )


@pytest.mark.parametrize("change", [lambda m: m, copy.deepcopy, lambda m: m.float()])
@pytest.mark.parametrize("inference", [False, True])
def test_stacked_weights_take_no_memory_of_their_own(exact, change, inference):
    """Also after they were copied or converted, and used."""
    ids, names = torch.arange(9)[None], list(exact.state_dict())
    logits, before = exact(ids), storages(exact)
    model = change(exact)
    with torch.inference_mode(inference):
        torch.testing.assert_close(model(ids).double(), logits, rtol=0, atol=1e-4)
    for stack, first in stacks(model):
        assert stack.weight.data_ptr() == first.weight.data_ptr() == stack.weight.data_ptr()
    after = storages(model)
    assert len(after) == len(before)
    assert sum(after.values()) == sum(before.values()) * model.dtype.itemsize // 8
    assert list(model.state_dict()) == names
    assert not any(weight.is_inference() for weight in model.parameters())


def test_a_converted_model_frees_what_it_was(exact):
    exact(torch.arange(9)[None])
    old = [weakref.ref(stack.weight.untyped_storage()) for stack, _ in stacks(exact)]
    assert all(memory() is not None for memory in old)
    exact.half()
    assert all(memory() is None for memory in old)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_replaced_weight_is_used(exact, name):
    """Set anew, or assigned from a state dict: as if it had been copied into place."""
    ids = torch.arange(9)[None]
    full, key = exact(ids), f"self_decoder.layers.0.mixer.{name}.weight"
    new = torch.randn_like(exact.state_dict()[key])
    expected = copy.deepcopy(exact)
    expected.get_parameter(key).copy_(new)
    expected = expected(ids)
    assert (expected - full).abs().max() > 1e-3
    for change in (
        lambda m: setattr(
            m.get_submodule(key.rpartition(".")[0]),
            "weight",
            nn.Parameter(new.clone(), requires_grad=False),
        ),
        lambda m: m.load_state_dict({key: new.clone()}, strict=False, assign=True),
    ):
        model = copy.deepcopy(exact)
        model(ids)
        change(model)
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-9)


def test_any_width_of_the_feed_forward_layers(exact):
    """Also one whose stacked maps have no multiple of 8 rows."""
    torch.manual_seed(0)
    model = Yoco(replace(exact.config, hidden_dim=45)).double().requires_grad_(False)
    layer = model.self_decoder.layers[0].ffn
    x, ones = torch.randn(3, exact.config.dim).double(), torch.ones(exact.config.dim).double()
    z = x * (x.square().mean(-1, keepdim=True) + exact.config.norm_eps).rsqrt()
    hidden = F.silu(layer.fc1(z)) * layer.gate(z)
    expected = x + layer.fc2(hidden)
    torch.testing.assert_close(layer(x, ones), expected, rtol=0, atol=1e-9)


def test_the_rotary_base_can_be_set_anew(exact, expected):
    """Training extends the context so; the saved configuration must then mean the same model."""
    ids = expected["input_ids"][:, :60]
    config = exact.config.with_rope_theta(3e5)
    extended = Yoco(config).double().requires_grad_(False)
    extended.load_state_dict(exact.state_dict())
    before = exact(ids)
    exact.set_rope_theta(3e5)
    assert exact.config == config
    torch.testing.assert_close(exact(ids), extended(ids), rtol=0, atol=1e-9)
    assert (exact(ids) - before).abs().max() > 1e-3


def test_a_new_model_is_initialised():
    config = YocoConfig(
        dim=32,
        n_layers=2,
        hidden_dim=48,
        self_decoder=GatedRetentionSettings(n_self_heads=2),
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=50,
    )
    torch.manual_seed(0)
    model = Yoco(config)
    torch.manual_seed(0)
    embedding, first = nn.Embedding(50, 32), nn.Linear(32, 32, bias=False)
    assert torch.equal(model.embed_tokens.weight, embedding.weight)
    assert torch.equal(model.self_decoder.layers[0].mixer.q_proj.weight, first.weight)


@pytest.mark.slow
def test_running_on_a_cpu_imports_no_compiler_and_draws_nothing():
    """They would take longer to import than all else that a short run does."""
    code = (
        "import sys, numpy as np\n"
        "from yoco_eval.engine import Engine\n"
        "from yoco_eval.requests import GenerateRequest, ScoreRequest\n"
        "from yoco_eval.model import load\n"
        "from yoco_eval.profiling import run_profile\n"
        "engine, ids = Engine(load('demo-64k', device='cpu')), np.arange(9)\n"
        "nothing = lambda *tokens: None\n"
        "assert len(list(engine.score([ScoreRequest(ids, ids)], nothing, nothing))) == 1\n"
        "assert len(list(engine.generate([GenerateRequest(ids, 3)], nothing, nothing))) == 1\n"
        "assert len(run_profile([9], pretrained='demo-64k', device='cpu').rows) == 1\n"
        "sys.exit(str({'triton', 'torch._dynamo', 'matplotlib'} & set(sys.modules) or ''))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.strip() == ""


def test_gradients_reach_every_parameter(exact):
    """Training with early exit: the loss of the last tokens trains the self-decoder, too."""
    exact(torch.arange(9)[None])  # after which the weights lie in stacks
    exact.train().requires_grad_(True)
    exact(torch.arange(90)[None], first=80).square().mean().backward()
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_stacked_weights_follow_a_replaced_map(exact):
    ids = torch.arange(9)[None]
    before = exact(ids)
    ffn = exact.self_decoder.layers[0].ffn
    ffn.fc1 = torch.nn.Linear(exact.config.dim, exact.config.hidden_dim, bias=False).double()
    ffn.fc1.requires_grad_(False)
    assert not torch.allclose(exact(ids), before)


def test_a_model_made_under_inference_mode(published):
    """Its weights take no part in autograd, and cannot be given other memory in place."""
    with torch.inference_mode():
        model = load(published, device="cpu", dtype=torch.float64)
        wide = model(torch.arange(9)[None])
        narrow = copy.deepcopy(model).float()(torch.arange(9)[None])
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-4)
