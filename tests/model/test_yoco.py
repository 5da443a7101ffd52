"""The model: reference logits, and that every way of feeding a text gives the same."""

import copy

import pytest
import torch

from yoco_eval.model import Sequences, Span, Spans, Yoco


@pytest.fixture
def expected(published):
    return torch.load(published / "expected.pt", weights_only=True)


def test_reference_logits(published, expected):
    model = Yoco.from_pretrained(published, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(
        model(expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4
    )


def test_reference_logits_after_saving(published, expected, tmp_path):
    Yoco.from_pretrained(published, device="cpu").save_pretrained(tmp_path)
    model = Yoco.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(
        model(expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4
    )


def everything_before(first, end):
    """Queries of the tokens first .. end - 1 of the only text."""
    return Spans((Span(0, end - first, 0, end, causal=True),))


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
            logits.append(decoder.logits)
            assert decoder.token == decoder.logits.argmax()
            decoder.token.fill_(token)
        decoder.step()
        full = exact(ids[None])[0, prompt:]
        torch.testing.assert_close(
            torch.stack([*logits, decoder.logits]), full, rtol=0, atol=1e-9
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
            Span(0, 5, 20, 53, causal=False), Span(0, 5, 53, 58, causal=True),
            Span(5, 45, 0, 20, causal=False), Span(5, 45, 58, 98, causal=True),
            Span(45, 46, 20, 53, causal=False), Span(45, 46, 98, 99, causal=True),
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
    x = exact.prefill(ids, cache)
    torch.testing.assert_close(
        exact.predict_last(x[-1:], cache), exact(ids[None])[0, -1], rtol=0, atol=1e-9
    )


def test_early_exit_changes_no_logit(exact, expected):
    ids = expected["input_ids"]
    full = exact(ids)
    torch.testing.assert_close(exact(ids, first=101), full[:, 101:], rtol=0, atol=1e-9)


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


def test_stacked_weights_take_no_memory_of_their_own(exact):
    layer = exact.self_decoder.layers[0]
    for stack, first in (
        (layer.ffn.stack, layer.ffn.fc1), (layer.mixer.stack, layer.mixer.q_proj),
        (exact.cross_decoder.stack, exact.cross_decoder.k_proj),
    ):
        assert stack.weight.data_ptr() == first.weight.data_ptr()
    moved = copy.deepcopy(exact).float()
    torch.testing.assert_close(
        moved(torch.arange(9)[None]).double(), exact(torch.arange(9)[None]), rtol=0, atol=1e-4
    )


def test_gradients_reach_every_parameter(exact):
    """Training with early exit: the loss of the last tokens trains the self-decoder, too."""
    exact.train().requires_grad_(True)
    exact(torch.arange(90)[None], first=80).square().mean().backward()
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
