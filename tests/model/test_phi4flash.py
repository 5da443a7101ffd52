"""Phi-4-mini-flash: published logits, however a text is fed; nothing of tokens that nobody asks for
goes behind the layer whose keys and values are shared."""

import json
from pathlib import Path

import pytest
import torch
from phi4flash_equations import by_equations
from predicting import decoded_side_by_side, predictions
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from yoco_eval.engine import Engine
from yoco_eval.kernels import dispatch
from yoco_eval.model import (
    CheckpointError,
    Sequences,
    Span,
    Spans,
    load,
    open_checkpoint,
    phi4flash,
)
from yoco_eval.model.costs import OVERHEAD
from yoco_eval.model.footprint import footprint
from yoco_eval.model.interface import take
from yoco_eval.model.phi4flash import Phi4Flash
from yoco_eval.model.phi4flash_config import Phi4FlashConfig
from yoco_eval.model.phi4flash_weights import initial_factor, weight_shapes
from yoco_eval.requests import ScoreRequest

ON_GPU = torch.cuda.is_available()
FOLDER = Path(__file__).parents[1] / "data" / "phi4flash"
CPU = torch.device("cpu")
LENGTH = 96
SETTINGS = json.loads((FOLDER / "config.json").read_text())
PUBLISHED = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 40,
    "num_key_value_heads": 20,
    "sliding_window": 512,
    "vocab_size": 200064,
    "max_position_embeddings": 262144,
}


@pytest.fixture(scope="module")
def model():
    return load(FOLDER, "cpu", torch.float64)


@pytest.fixture(scope="module")
def published():
    """Texts [2, LENGTH] and their logits, which the published code's equations give in float64; of
    float32, as they are stored."""
    expected = torch.load(FOLDER / "expected.pt", weights_only=True)
    return expected["input_ids"], expected["logits"].double()


@pytest.fixture(scope="module")
def full(model, published):
    """Texts [3, LENGTH], of which the last begins as the first does, and our own logits of each as
    a whole: nearer to what is compared than those that are stored."""
    texts = torch.cat((published[0], published[0][:1].roll(40, 1)))
    texts[2, :30] = texts[0, :30]
    return texts, torch.stack([fed(model, text) for text in texts])


def fed(model, text, chunk=LENGTH):
    """Logits of a text, chunk by chunk."""
    cache, logits = model.new_cache(len(text)), []
    for part in text.split(chunk):
        logits.append(predictions(model, model.prefill(part, cache), cache))
    return torch.cat(logits)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_logits(published, full):
    texts, expected = published
    torch.testing.assert_close(full[1][:2], expected, rtol=0, atol=2e-6)
    assert torch.equal(full[0][:2], texts) and expected.std() > 1  # else this says little


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_equal_a_full_pass(model, full, chunk):
    length = 40 if chunk == 1 else LENGTH
    same(fed(model, full[0][1, :length], chunk), full[1][1, :length])


def test_tokens_asked_anywhere_and_they_alone_pass_the_exit(model, full, monkeypatch):
    """In any order, once all of the text has been fed; what was asked before does not matter, and
    the first token counts to the end."""
    texts, expected = full
    passed = []
    behind = [model.cache_layer, *model.unit_layers, *model.cross_layers]
    parts = [part for layer in behind for part in (layer.mixer, layer.fc1, layer.fc2)]
    for part in [*parts, model.memory_layer.fc2, model.final_layernorm]:
        monkeypatch.setattr(part, "forward", counted(part.forward, passed))
    cache = model.new_cache(LENGTH)
    rows = model.prefill(texts[0], cache)
    assert passed == [LENGTH]  # of the layer before
    for asked in ([LENGTH - 1], [LENGTH - 1, 3, 40, 41, 0, LENGTH - 2]):
        spans = Spans(tuple(Span(i, i + 1, 0, p + 1, True, 0) for i, p in enumerate(asked)))
        asked = torch.tensor(asked)
        passed.clear()
        output = model.predict(take(rows, asked), asked, cache, spans)
        assert passed == [len(asked)] * (2 * len(behind) + 1)
        same(model.logits(output), expected[0, asked])

    other = texts[0].clone()
    other[0] = (other[0] + 1) % 90
    assert (fed(model, other)[-1] - expected[0, -1]).abs().max() > 1e-3


def counted(forward, passed):
    def run(x, *args):
        passed.append(len(x))
        return forward(x, *args)

    return run


def test_packed_branches_equal_a_full_pass_each(model, full):
    """Continuations of two texts, shorter than a convolution among them, and what follows one of
    them, from their states."""
    texts, expected = full
    cache = model.new_cache(300)
    empty = model.new_cache(1).state
    packed = Sequences((30, 2), (0, 0), CPU, (0, 0))
    _, state = model.feed(torch.cat((texts[0, :30], texts[1, :2])), packed, empty, cache)
    packed = Sequences((20, 1, 21), (30, 30, 2), CPU, (0, 0, 1))
    fed = torch.cat((texts[0, 30:50], texts[2, 30:31], texts[1, 2:23]))
    rows, state = model.feed(fed, packed, state, cache)
    spans = (
        Span(0, 20, 0, 30, False, 0), Span(0, 20, 32, 52, True, 30),
        Span(20, 21, 0, 30, False, 0), Span(20, 21, 52, 53, True, 30),
        Span(21, 42, 30, 32, False, 0), Span(21, 42, 53, 74, True, 2),
    )  # fmt: skip
    logits = model.logits(model.predict(rows, packed.positions, cache, Spans(spans)))
    same(logits, torch.cat((expected[0, 30:50], expected[2, 30:31], expected[1, 2:23])))
    packed = Sequences((20,), (31,), CPU, (1,))
    rows, _ = model.feed(texts[2, 31:51], packed, state, cache, keep=False)
    spans = (
        Span(0, 20, 0, 30, False, 0), Span(0, 20, 52, 53, False, 30), Span(0, 20, 74, 94, True, 31),
    )  # fmt: skip
    logits = model.logits(model.predict(rows, packed.positions, cache, Spans(spans)))
    same(logits, expected[2, 31:51])


def test_going_back_to_a_snapshot(model, full):
    texts, expected = full
    cache = model.new_cache(LENGTH)
    model.prefill(texts[0, :30], cache)
    snapshot = cache.state
    for text in (1, 0, 2):
        rows = model.prefill(texts[text, 30:], cache)
        if text != 1:
            same(predictions(model, rows, cache), expected[text, 30:])
        cache.restore(snapshot)


@pytest.mark.parametrize("prompt", [0, 20])
def test_decoding_equals_a_full_pass(model, full, prompt):
    """From any prompt, also an empty one, twice from each; windows fill and move."""
    texts, expected = full
    cache = model.new_cache(40)
    if prompt:
        model.prefill(texts[0, :prompt], cache)
    decoder = model.decoder(cache)
    for _ in range(2):
        decoder.start(int(texts[0, prompt]))
        for position in range(prompt, 40):
            decoder.tokens.fill_(texts[0, position])
            decoder.step()
            same(decoder.logits[0], expected[0, position])


def test_texts_decode_side_by_side(model, full):
    texts, expected = full[0][[0, 2, 1]], full[1][[0, 2, 1]]
    steps = list(decoded_side_by_side(model, texts))
    assert len(steps) == 9 + 12 + 8
    for text, position, logits in steps:
        same(logits, expected[text, position])


def test_the_engine_runs_it_as_any_model(model, full):
    """Packed branches as it plans them, and prompts in chunks."""
    texts, expected = full
    requests = [
        ScoreRequest(text[:context].numpy(), text[context:end].numpy())
        for text in texts
        for context, end in ((1, 9), (35, 60), (60, LENGTH))
    ]
    truth = expected.log_softmax(-1)[:, :-1].gather(2, texts[:, 1:, None])[..., 0]
    quiet = {"begin": lambda count: None, "progress": lambda *counts: None}
    for options in ({"prefill_chunk": 16}, {}):
        scores = dict(Engine(model, **options).score(requests, **quiet))
        assert len(scores) == len(requests)
        for index, score in scores.items():
            first = len(requests[index].context) - 1
            logprobs = truth[index // 3, first : first + len(requests[index].continuation)]
            assert score.logprob == pytest.approx(logprobs.sum().item(), abs=1e-9)


def test_triton_kernels(full, monkeypatch):
    """All of them together: fed in chunks, and decoded."""
    pytest.importorskip("triton")
    texts, expected = full
    monkeypatch.setattr(dispatch, "triton_takes", lambda device, dtype: True)
    monkeypatch.setattr(phi4flash, "use_triton", lambda *tensors: ON_GPU)  # graphs need one
    model = load(FOLDER, "cuda" if ON_GPU else "cpu", torch.float32)
    text = texts[0].to(model.device)
    cache = model.new_cache(LENGTH)
    with torch.inference_mode():
        for part in text[:18].split(11):
            logits = predictions(model, model.prefill(part, cache), cache)
            begin = cache.state.length - len(part)
            close(logits, expected[0, begin : cache.state.length])
        decoder = model.decoder(cache)
        decoder.start(int(text[18]))
        for position in range(18, 19):
            decoder.tokens.fill_(text[position])
            decoder.step()
            close(decoder.logits[0], expected[0, position])


def close(found, expected):
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(full, dtype):
    """With the stream, states and rates in float32."""
    texts, expected = full
    model = load(FOLDER, "cpu", dtype)
    cache = model.new_cache(LENGTH)
    rows = model.prefill(texts[0, :50], cache)
    assert rows[0].dtype == cache.state.layers[0][1].dtype == torch.float32
    logits = predictions(model, rows, cache)
    assert logits.dtype == dtype
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert (logits.double() - expected[0, :50]).norm() < limit * expected[0, :50].norm()
    decoder = model.decoder(cache)
    decoder.start(int(texts[0, 50]))
    decoder.step()
    assert (decoder.logits[0].double() - expected[0, 50]).norm() < limit * expected[0, 50].norm()


def test_costs_are_those_of_a_real_model(model, full):
    costs, cache, config = model.costs, model.new_cache(LENGTH), model.config
    for dtype in (torch.float64, torch.bfloat16):
        weights = Phi4Flash.empty(config, torch.device("meta"), dtype).parameters()
        assert costs.weight_bytes(dtype) == sum(weight.nbytes for weight in weights)
    assert costs.cache_bytes(torch.float64, LENGTH) == cache.keys.nbytes + cache.values.nbytes
    with FlopCounterMode(display=False) as counter:
        model.prefill(full[0][0], cache)
    states = tree_leaves(cache.state.layers)
    assert costs.state_bytes(torch.float64) == sum(part.nbytes for part in states)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert products == costs.prefill_operations(LENGTH)


def test_the_published_size():
    """As its index and its sizes have it, lambdas being one number a layer here."""
    config = Phi4FlashConfig.from_dict(PUBLISHED)
    costs = Phi4Flash.costs_of(config)
    shapes = weight_shapes(config)
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (len(shapes), numbers) == (434, 3_852_562_944)
    assert costs.weight_bytes(torch.float32) == 4 * (numbers - 16 * (4 * 64 - 1))
    assert costs.cache_bytes(torch.bfloat16, 1) == 5120
    assert costs.state_bytes(torch.bfloat16) == 276_480 + 2_949_120 + 20_930_560


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_on_a_cpu(dtype, live_bytes):
    """Not more than planned."""
    config = Phi4FlashConfig(256, 2048, 4, 8, 4, 100, vocab_size=50)
    model = Phi4Flash.empty(config, CPU, dtype)
    for name, weight in model.named_parameters():
        weight.normal_(-1 if name.endswith("rates") else 0, 0.1)
    ids, cache = torch.randint(50, (300,)), model.new_cache(300)
    with torch.inference_mode():
        model.prefill(ids[:1], cache)
        with live_bytes(besides=[*model.parameters(), cache.keys, cache.values]) as live:
            predictions(model, model.prefill(ids[1:], cache), cache)
    memory = footprint(model.costs, dtype, 300, 300, device=CPU)
    assert live.peak < memory.activations + memory.states - OVERHEAD


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_card(dtype):
    """Many tokens in chunks, and decoded side by side under graphs, near the same weights in
    float64."""
    torch.manual_seed(0)
    config = Phi4FlashConfig(512, 1024, 8, 8, 4, 100, vocab_size=60)
    exact = Phi4Flash.empty(config, CPU, torch.float64)
    for name, weight in exact.named_parameters():
        if name.endswith("rates"):
            weight.copy_(-torch.arange(1, 17)[:, None])
        elif name.endswith("time_bias"):
            weight.uniform_(-6, -2)
        else:
            weight.normal_(float(weight.dim() == 1), weight.shape[-1] ** -0.5)
        weight.copy_(weight.to(dtype))
    fast = Phi4Flash.empty(config, torch.device("cuda"), dtype)
    fast.load_state_dict(exact.state_dict())
    texts = torch.randint(60, (3, 800))
    texts[1, :30] = texts[0, :30]
    expected = [fed(exact, text, 800) for text in (texts[0], *texts[1:, :60])]
    limit = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]

    def assert_near(found, reference):
        assert (found.double().cpu() - reference).norm() < limit * reference.norm()

    with torch.inference_mode():
        assert_near(fed(fast, texts[0].cuda(), 555), expected[0])
        steps = list(decoded_side_by_side(fast, texts))
        found = torch.stack([logits for *_, logits in steps])
        assert_near(found, torch.stack([expected[text][position] for text, position, _ in steps]))


SHAPES = {
    "published": {},
    "least": {"num_hidden_layers": 4, "sliding_window": 1, "num_key_value_heads": 8},
    "most": {
        "num_hidden_layers": 12, "num_key_value_heads": 2, "sliding_window": 30,
        "hidden_size": 40, "mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 3,
        "layer_norm_eps": 1e-3,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_are_those_of_the_equations(full, tmp_path, shape):
    """And those of the logits that are stored."""
    texts, expected = full
    settings = SETTINGS | SHAPES[shape]
    config = Phi4FlashConfig.from_dict(settings)
    weights = load_file(FOLDER / "model.safetensors")
    if shape == "published":
        same(by_equations(config, weights, texts[0]), expected[0])
        return
    torch.manual_seed(0)
    for name, size in weight_shapes(config).items():
        weights[name] = torch.randn(size) / (size[-1] ** 0.5 if len(size) > 1 else 2)
    weights = {name: weights[name] for name in weight_shapes(config)}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(weights, tmp_path / "model.safetensors")
    model, ids = load(tmp_path, "cpu", torch.float64), texts[0, :50]
    logits = by_equations(config, weights, ids)
    same(fed(model, ids, 13), logits)
    assert logits.std() > 0.3
    cache = model.new_cache(50)
    model.prefill(ids[:40], cache)
    decoder = model.decoder(cache)
    decoder.start(int(ids[40]))
    for position in range(40, 50):
        decoder.tokens.fill_(ids[position])
        decoder.step()
        same(decoder.logits[0], logits[position])


def test_second_attentions_begin_as_the_layer_says():
    assert initial_factor(0) == pytest.approx(0.2)
    assert initial_factor(31) == pytest.approx(0.79994515)


def test_windows_as_a_list():
    """As saving a configuration again writes them, with settings that say nothing."""
    again = SETTINGS | {"sliding_window": [None, 16, None, 16, None, None, None, None]}
    again |= {"rope_theta": 1e4, "mamba_dt_rank": 3, "mamba_d_state": 16, "mamba_conv_bias": True}
    config = Phi4FlashConfig.from_dict(again)
    assert config == Phi4FlashConfig.from_dict(SETTINGS)
    assert Phi4FlashConfig.from_dict(config.to_dict()) == config
    assert (config.memory_layer, config.sliding_window, config.time_rank) == (4, 16, 3)


REFUSED = [
    ({"num_hidden_layers": 10}, "num_hidden_layers = 10 is no multiple of 4"),
    ({"num_attention_heads": 6}, "num_attention_heads = 6 is no multiple of 4"),
    ({"num_key_value_heads": 1}, "num_key_value_heads = 1 is no multiple of 2"),
    ({"hidden_size": 50}, "hidden_size = 50 is no multiple of 8"),
    ({"hidden_size": 8 * 257}, "8 heads of 257 channels each"),
    ({"hidden_size": True}, "hidden_size must be a positive whole number"),
    ({"vocab_size": 2**30}, "vocab_size must be at most"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a positive number"),
    ({"sliding_window": None}, "sliding_window must be a positive whole number, not None"),
    ({"sliding_window": [None, 16]}, "is neither a number nor a list of 8 layers'"),
    ({"sliding_window": [None, 16, None, 8, *[None] * 4]}, "windows, with one number in every"),
    ({"sliding_window": [None, 16] * 4}, "of the first 4 and null else"),
    ({"sliding_window": [None] * 8}, "sliding_window must be a positive whole number"),
    ({"sliding_window": [16], "num_hidden_layers": "8"}, "num_hidden_layers must be"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
    ({"mlp_bias": True}, "mlp_bias = True is not supported, only False"),
    ({"lm_head_bias": True}, "lm_head_bias"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"mb_per_layer": 1}, "mb_per_layer = 1"),
    ({"mamba_conv_bias": False}, "mamba_conv_bias"),
    ({"mamba_proj_bias": True}, "mamba_proj_bias"),
    ({"mamba_dt_rank": 4}, "mamba_dt_rank = 4 is not supported, only 'auto', a sixteenth"),
    ({"mamba_d_conv": 1}, "mamba_d_conv must be at least 2"),
    ({"mamba_expand": 1.5}, "mamba_expand must be a positive whole number"),
    ({"mamba_d_state": 10**400}, "mamba_d_state must be at most 256"),
    ({"max_position_embeddings": "64K"}, "max_position_embeddings"),
    ({"quantization_config": {}, "rope_scaling": None}, "unknown settings: quantization_config, r"),
    ({"num_key_value_heads": "left out", "vocab_size": "left out"}, "missing settings: num_key"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=lambda case: str(case)[:40])
def test_refused_configurations(tmp_path, change, told):
    settings = {name: value for name, value in (SETTINGS | change).items() if value != "left out"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path)
    assert told in str(raised.value) and str(tmp_path / "config.json") in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_damaged_weights_are_refused_in_one_line(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    convolution, rates = "model.layers.2.attn.conv1d.weight", "model.layers.4.attn.A_log"
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    lambdas = "model.layers.5.attn.inner_cross_attn.lambda_q1"
    for changes, told in (
        ({convolution: None}, f"missing: {convolution}"),
        ({convolution: torch.ones(96, 4)}, f"{convolution} is [96, 4], not [96, 1, 4]"),
        (head, "surplus: lm_head.weight"),
        ({lambdas: torch.full((6,), float("nan"))}, f"NaN or infinite numbers in {lambdas}"),
        (
            {rates: torch.full((96, 16), 100.0)},
            f"too large for float32 are exponentials of {rates}",
        ),
        (
            {lambdas: 1e4 * weights[lambdas.replace("q1", "k1")]},
            f"too large for float32 are exponentials of {lambdas}",
        ),
        ({rates: torch.ones(96, 16, dtype=torch.int32)}, "holds int32"),
    ):
        kept = {name: weight for name, weight in (weights | changes).items() if weight is not None}
        save_file(
            {name: weight.clone() for name, weight in kept.items()}, tmp_path / "model.safetensors"
        )
        with pytest.raises(CheckpointError) as raised:
            load(tmp_path, "cpu", torch.float32)
        assert told in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1


def test_nothing_of_a_folder_is_executed(tmp_path):
    """Neither what `auto_map` names nor what lies beside it."""
    for name in ("modeling_phi4flash", "configuration_phi4flash"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes())
    assert "auto_map" in SETTINGS and isinstance(load(tmp_path, "cpu"), Phi4Flash)
