"""The model: reference logits, and that every way of feeding a text gives the same."""

import pytest
import torch

from yoco_eval.model import Yoco


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


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_prefill_and_decoding_equal_a_full_pass(exact, expected, chunk):
    ids = expected["input_ids"][0]
    cache, logits = exact.new_cache(len(ids)), []
    for start in range(0, len(ids), chunk):
        x = exact.prefill(ids[start : start + chunk], cache)
        positions = torch.arange(start, cache.state.length)
        causal = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()
        logits.append(exact.output_projection(exact.predict(x, positions, cache, causal)))
    torch.testing.assert_close(torch.cat(logits), exact(ids[None])[0], rtol=0, atol=1e-9)


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
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    output = exact.predict(x, torch.arange(50, 60), cache, causal)
    torch.testing.assert_close(
        exact.output_projection(output), exact(ids[None, :60])[0, 50:], rtol=0, atol=1e-9
    )


def test_cache_holds_one_layer_of_keys_and_values(exact):
    cache = exact.new_cache(100)
    exact.prefill(torch.arange(90), cache)
    config = exact.config
    assert cache.keys.shape == (1, config.n_attn_kv_heads, 90, config.attn_head_dim)
    assert len(cache.state.layers) == config.n_layers // 2
    with pytest.raises(ValueError, match="room for 100 tokens, not for 101"):
        exact.prefill(torch.arange(11), cache)


def test_gradients_reach_every_parameter(exact):
    """Training with early exit: the loss of the last tokens trains the self-decoder, too."""
    exact.train().requires_grad_(True)
    exact(torch.arange(90)[None], first=80).square().mean().backward()
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
