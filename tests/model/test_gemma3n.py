"""Gemma 3n: the logits of the published class, however a text is fed; nothing of tokens that nobody
asks for goes behind the exit."""

import json
import math
import types

import pytest
import torch
from packaging.version import Version
from predicting import decoded_side_by_side, predictions
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from yoco_eval.engine import Engine
from yoco_eval.model import CheckpointError, Sequences, Span, Spans, load, open_checkpoint
from yoco_eval.model.costs import OVERHEAD
from yoco_eval.model.footprint import footprint
from yoco_eval.model.gemma3n import Gemma3n
from yoco_eval.model.gemma3n_config import Gemma3nConfig, read_gemma3n
from yoco_eval.model.interface import take
from yoco_eval.requests import ScoreRequest

published = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
LENGTH = 70
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "vocab_size": 50,
    "vocab_size_per_layer_input": 45,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "laurel_rank": 5,
    "final_logit_softcapping": 5.0,
}
# Earlier versions of the class know no tokens without an input of their own.
TOKENS = 50 if Version(transformers.__version__) >= Version("5.23") else 45
# Some as in the published models: layer after layer, two kinds of feed-forward parts, bases.
SHAPES = {
    "sparse": {
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL, SLIDING],
        "activation_sparsity_pattern": [0.95, 0.6, *[0.0] * 6],
        "intermediate_size": [40, 56, 40, 40, 40, 24, 40, 40],
        "sliding_window": 9,
    },
    "default pattern": {
        "num_hidden_layers": 15,
        "num_kv_shared_layers": 10,
        "num_key_value_heads": 1,
        "sliding_window": 30,
        "rope_theta": 1e3,
        "rope_local_base_freq": 50.0,
    },
    "least": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": [SLIDING, FULL, FULL, SLIDING],
        "altup_num_inputs": 3,
        "sliding_window": 1,
    },
}


class Lifted(types.ModuleType):
    """PyTorch, for a class that asks for float32 in places: it gets float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(scope="module", params=SHAPES)
def oracle(request, tmp_path_factory):
    """A folder of the published class's, texts [3, LENGTH], two of which begin alike, and their
    logits."""
    folder = tmp_path_factory.mktemp("gemma3n")
    torch.manual_seed(0)
    texts = torch.randint(TOKENS, (3, LENGTH))
    texts[1, :30] = texts[0, :30]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "torch", Lifted("torch"))
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)  # of its constants
        try:
            config = published.Gemma3nTextConfig(**SIZES | SHAPES[request.param])
            model = published.Gemma3nForCausalLM(config).eval()
            for weight in model.parameters():
                spread = 1.5 / math.sqrt(weight.shape[-1]) if weight.dim() > 1 else 0.3
                torch.nn.init.normal_(weight, weight.dim() == 1, spread)
            with torch.no_grad():
                logits = model(texts, use_cache=True).logits
        finally:
            torch.set_default_dtype(torch.float32)
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    return folder, texts, logits


@pytest.fixture(scope="module")
def model(oracle):
    return load(oracle[0], "cpu", torch.float64)


@pytest.fixture
def text(oracle):
    """A text and its logits."""
    _, texts, logits = oracle
    return texts[0], logits[0]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_equal_a_full_pass(model, text, chunk):
    ids, expected = text
    cache = model.new_cache(LENGTH)
    for part in ids.split(chunk):
        rows = model.prefill(part, cache)
        now = expected[cache.state.length - len(part) : cache.state.length]
        same(predictions(model, rows, cache), now)
    assert LENGTH > 2 * model.config.sliding_window
    assert expected.std() > 0.5  # else the comparison says little


def test_tokens_asked_anywhere_and_they_alone_pass_the_exit(model, text, monkeypatch):
    """In any order, once all of the text has been fed; the first token counts to the end."""
    ids, expected = text
    passed = []
    for layer in model.layers:
        monkeypatch.setattr(layer, "forward", counted(layer.forward, passed))
    cache = model.new_cache(LENGTH)
    rows = model.prefill(ids, cache)
    leaving, layers = model.layout.exit, len(model.layers)
    assert passed == [LENGTH] * leaving
    asked = torch.tensor([LENGTH - 1, 3, 40, 41, 0, LENGTH - 2])
    spans = Spans(tuple(Span(i, i + 1, 0, int(p) + 1, True, 0) for i, p in enumerate(asked)))
    passed.clear()
    output = model.predict(take(rows, asked), asked, cache, spans)
    assert passed == [len(asked)] * (layers - leaving)
    same(model.logits(output), expected[asked])

    other = ids.clone()
    other[0] = (ids[0] + 1) % TOKENS
    cache = model.new_cache(LENGTH)
    rows = take(model.prefill(other, cache), slice(-1, None))
    assert (predictions(model, rows, cache) - expected[-1]).abs().max() > 1e-3


def counted(forward, passed):
    def run(streams, *args, **options):
        passed.append(len(streams))
        return forward(streams, *args, **options)

    return run


def test_packed_branches_equal_a_full_pass_each(model, oracle):
    """Continuations of two texts, and what follows one of them, from their states."""
    _, texts, expected = oracle
    cache = model.new_cache(300)
    empty = model.new_cache(1).state
    packed = Sequences((30, 4), (0, 0), CPU, (0, 0))
    _, state = model.feed(torch.cat((texts[0, :30], texts[2, :4])), packed, empty, cache)
    ends = (50, 33, 25)
    packed = Sequences((20, 3, 21), (30, 30, 4), CPU, (0, 0, 1))
    fed = torch.cat((texts[0, 30:50], texts[1, 30:33], texts[2, 4:25]))
    rows, state = model.feed(fed, packed, state, cache)
    spans = (
        Span(0, 20, 0, 30, False, 0), Span(0, 20, 34, 54, True, 30),
        Span(20, 23, 0, 30, False, 0), Span(20, 23, 54, 57, True, 30),
        Span(23, 44, 30, 34, False, 0), Span(23, 44, 57, 78, True, 4),
    )  # fmt: skip
    logits = model.logits(model.predict(rows, packed.positions, cache, Spans(spans)))
    for text, part in enumerate(logits.split(packed.lengths)):
        same(part, expected[text, ends[text] - len(part) : ends[text]])
    packed = Sequences((20,), (33,), CPU, (1,))
    rows, _ = model.feed(texts[1, 33:53], packed, state, cache, keep=False)
    spans = (
        Span(0, 20, 0, 30, False, 0), Span(0, 20, 54, 57, False, 30), Span(0, 20, 78, 98, True, 33),
    )  # fmt: skip
    logits = model.logits(model.predict(rows, packed.positions, cache, Spans(spans)))
    same(logits, expected[1, 33:53])


def test_going_back_to_a_snapshot(model, oracle):
    _, texts, expected = oracle
    cache = model.new_cache(LENGTH)
    model.prefill(texts[0, :30], cache)
    snapshot = cache.state
    for text in (2, 0, 1):
        rows = model.prefill(texts[text, 30:], cache)
        if text != 2:
            same(predictions(model, rows, cache), expected[text, 30:])
        cache.restore(snapshot)


def test_decoding_equals_a_full_pass(model, text):
    """Twice from the same prompt."""
    ids, expected = text
    cache = model.new_cache(LENGTH)
    model.prefill(ids[:30], cache)
    decoder = model.decoder(cache)
    for _ in range(2):
        decoder.start(int(ids[30]))
        for position in range(30, LENGTH):
            decoder.tokens.fill_(ids[position])
            decoder.step()
            same(decoder.logits[0], expected[position])


def test_texts_decode_side_by_side(model, oracle):
    _, texts, expected = oracle
    steps = list(decoded_side_by_side(model, texts))
    assert len(steps) == 9 + 12 + 8
    for text, position, logits in steps:
        same(logits, expected[text, position])


def test_the_engine_runs_it_as_any_model(model, oracle):
    """Packed branches as it plans them, and prompts in chunks."""
    _, texts, expected = oracle
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(oracle, text, dtype):
    model, (ids, expected) = load(oracle[0], "cpu", dtype), text
    cache = model.new_cache(LENGTH)
    logits = predictions(model, model.prefill(ids[:50], cache), cache)
    assert logits.dtype == dtype
    limit = {torch.float32: 1e-3, torch.bfloat16: 0.8}[dtype]  # of 0.5 the class itself is off
    assert (logits.double() - expected[:50]).norm() < limit * expected[:50].norm()
    decoder = model.decoder(cache)
    decoder.start(int(ids[50]))
    decoder.step()
    assert decoder.logits.dtype == dtype
    if dtype == torch.float32:  # one token alone says nothing in bfloat16
        assert (decoder.logits[0].double() - expected[50]).norm() < limit * expected[50].norm()


def test_costs_are_those_of_a_real_model(model, text):
    costs, cache, config = model.costs, model.new_cache(LENGTH), model.config
    assert costs.weight_bytes(torch.float64) == sum(p.nbytes for p in model.parameters())
    tensors = (cache.keys, cache.values, cache.window_keys, cache.window_values)
    assert costs.cache_bytes(torch.float64, LENGTH) == sum(part.nbytes for part in tensors)
    with FlopCounterMode(display=False) as counter:
        model.prefill(text[0], cache)
    states = tree_leaves(cache.state.windows)
    assert costs.state_bytes(torch.float64) == sum(part.nbytes for part in states)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op))
    own = config.layer_types[: model.layout.exit]
    seen = {FULL: LENGTH, SLIDING: config.sliding_window}
    pairs = sum(min(i + 1, seen[kind]) for kind in own for i in range(LENGTH))
    attended = 4 * config.num_attention_heads * config.head_dim * pairs
    padding = 2 * LENGTH * 8 * config.hidden_size * (len(own) + 1)
    assert 0 <= products + attended - costs.prefill_operations(LENGTH) <= padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_on_a_cpu(dtype, live_bytes):
    """Not more than planned."""
    wide = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 8, "intermediate_size": 4096}
    config = Gemma3nConfig.from_dict(SIZES | SHAPES["sparse"] | wide)
    model = Gemma3n.empty(config, CPU, dtype)
    for weight in model.parameters():
        weight.normal_(0, 0.1)
    ids, cache = torch.randint(SIZES["vocab_size"], (1000,)), model.new_cache(1000)
    tensors = (cache.keys, cache.values, cache.window_keys, cache.window_values)
    with torch.inference_mode():
        model.prefill(ids[:1], cache)
        with live_bytes(besides=[*model.parameters(), *tensors]) as live:
            predictions(model, model.prefill(ids[1:], cache), cache)
    memory = footprint(model.costs, dtype, 1000, 1000, device=CPU)
    assert live.peak < memory.activations + memory.states - OVERHEAD


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_card(dtype, device="cuda"):
    """Fed in chunks, and decoded side by side under graphs, near the same weights in float64."""
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "laurel_rank": 16}
    shape = SIZES | SHAPES["sparse"] | wide | {"activation_sparsity_pattern": [0.5, *[0.0] * 7]}
    config = Gemma3nConfig.from_dict(shape | {"sliding_window": 40})
    exact = Gemma3n.empty(config, CPU, torch.float64)
    for weight in exact.parameters():
        weight.normal_(weight.dim() == 1, 1 / math.sqrt(weight.shape[-1])).copy_(weight.to(dtype))
    fast = Gemma3n.empty(config, torch.device(device), dtype)
    fast.load_state_dict(exact.state_dict())
    texts = torch.randint(SIZES["vocab_size"], (3, 300))
    texts[1, :30] = texts[0, :30]
    expected = []
    for text in texts:
        cache = exact.new_cache(300)
        expected.append(predictions(exact, exact.prefill(text, cache), cache))
    limit = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]

    def assert_near(found, reference):
        found, reference = torch.stack(found).double().cpu(), torch.stack(reference)
        assert (found - reference).norm() < limit * reference.norm()

    with torch.inference_mode():
        cache, found = fast.new_cache(300), []
        for part in texts[0].to(device).split(129):
            found += predictions(fast, fast.prefill(part, cache), cache)
        assert_near(found, list(expected[0]))
        steps = list(decoded_side_by_side(fast, texts))
        found, reference = [], []
        for text, position, logits in steps:
            found.append(logits)
            reference.append(expected[text][position])
        assert_near(found, reference)


def changed(folder, to, settings=None, weights=None):
    """A copy of a folder with other settings (None: without) and weights."""
    config = json.loads((folder / "config.json").read_text()) | (settings or {})
    config = {name: value for name, value in config.items() if value is not None}
    (to / "config.json").write_text(json.dumps(config))
    save_file(weights or load_file(folder / "model.safetensors"), to / "model.safetensors")
    return to


def test_text_model_of_a_whole_folder(oracle, text, tmp_path):
    """Beside vision and audio, which are not looked at, and with keys and values that nobody reads,
    as published ones are."""
    config = json.loads((oracle[0] / "config.json").read_text())
    stored = load_file(oracle[0] / "model.safetensors")
    weights = {name.replace("model.", "model.language_model."): w for name, w in stored.items()}
    last = f"model.language_model.layers.{config['num_hidden_layers'] - 1}.self_attn"
    for name in ("k_proj", "v_proj", "k_norm"):
        weights[f"{last}.{name}.weight"] = torch.full((3,), math.nan)
    weights["model.vision_tower.weight"] = torch.full((3,), math.nan)
    weights["lm_head.weight"] = torch.zeros(2)
    settings = {"model_type": "gemma3n", "text_config": config, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"image_token_id": 7}))
    save_file(weights, tmp_path / "model.safetensors")
    model = load(tmp_path, "cpu", torch.float64)
    ids, expected = text
    cache = model.new_cache(LENGTH)
    same(predictions(model, model.prefill(ids, cache), cache), expected)


def test_defaults_are_those_of_the_published_class():
    """What a file leaves out; and the bases of rotary embeddings where older files have them."""
    theirs = published.Gemma3nTextConfig()
    ours = Gemma3nConfig.from_dict({"model_type": "gemma3n_text"})
    for name, value in vars(ours).items():
        if not name.startswith("rope"):
            known = getattr(theirs, name)
            assert value == (tuple(known) if isinstance(known, list) else known), name
    tables = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    for settings in ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": tables}):
        assert Gemma3nConfig.from_dict(settings) == ours
    assert ours.layout.cache_bytes(torch.bfloat16, 1) == 10 << 10
    assert ours.layout.state_bytes(torch.bfloat16) == 16 * 2048 * 511


REFUSED = [
    ({"num_kv_shared_layers": 0}, "all layers own keys and values"),
    ({"num_kv_shared_layers": 8}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": 4}, "last layer that owns"),
    ({"num_kv_shared_layers": "3"}, "num_kv_shared_layers"),
    ({"layer_types": [FULL] * 8}, "no sliding_attention among"),
    ({"layer_types": [SLIDING] * 7}, "no list of 8"),
    ({"layer_types": "full_attention"}, "not a list"),
    ({"altup_active_idx": 1}, "altup_active_idx = 1 is not supported"),
    ({"altup_correct_scale": False}, "altup_correct_scale"),
    ({"altup_num_inputs": 1}, "altup_num_inputs"),
    ({"attention_bias": True}, "attention_bias"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of 3"),
    ({"intermediate_size": [40] * 7}, "intermediate_size"),
    ({"activation_sparsity_pattern": [1.0] * 8}, "activation_sparsity_pattern"),
    ({"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 2.0}}}, "not supported"),
    ({"rope_scaling": {"type": "linear"}}, "not supported"),
    ({"quantization_config": {"bits": 4}}, "has a quantization_config"),
    ({"model_type": "gemma3n", "text_config": []}, "text_config is []"),
    ({"model_type": "gemma3n", "text_config": {}, "quantization_config": {}}, "has a quantization"),
    ({"model_type": "gemma3n", "text_config": {"model_type": "gemma3"}}, "'gemma3'"),
]


@pytest.mark.parametrize(("settings", "told"), REFUSED, ids=lambda case: str(case)[:40])
def test_refused_configurations(settings, told):
    sound = {"model_type": "gemma3n_text"} | SIZES | SHAPES["sparse"]
    with pytest.raises(ValueError) as raised:
        read_gemma3n(settings if "text_config" in settings else sound | settings)
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_damaged_folders_are_refused_in_one_line(oracle, tmp_path):
    folder = oracle[0]
    weights = load_file(folder / "model.safetensors")
    missing = {name: weight for name, weight in weights.items() if "k_norm" not in name}
    name = "model.layers.0.altup.router_norm.weight"
    for other, told in (
        (missing, "missing: model.layers.0.self_attn.k_norm.weight"),
        (weights | {name: torch.ones(5)}, f"{name} is \\[5\\], not \\[32\\]"),
        (weights | {name: torch.full((32,), math.inf)}, f"infinite numbers in {name}"),
        (weights | {"model.extra": torch.ones(5)}, "surplus: model.extra"),
    ):
        path = changed(folder, tmp_path, weights=other)
        with pytest.raises(CheckpointError, match=told) as raised:
            load(path, "cpu", torch.float32)
        assert len(str(raised.value).splitlines()) == 1
    changed(folder, tmp_path, {"num_kv_shared_layers": 0})
    with pytest.raises(CheckpointError, match=r"config.json: num_kv_shared_layers = 0"):
        open_checkpoint(tmp_path)


def test_any_value_is_read_or_refused_in_one_line():
    odd = [
        None, True, 0, -1, 3, 10**400, 0.5, 1e308, math.nan, -math.inf, "", "a\nb", "\ud800", [],
        [None], ["a"] * 8, [0.5] * 8, [2**70] * 8, {}, {"a": 1}, {FULL: 3}, {FULL: {"a": [1]}},
        {SLIDING: {"rope_theta": "x"}}, {SLIDING: {"rope_type": {}}},
    ]  # fmt: skip
    sound = SIZES | SHAPES["sparse"]
    tables = {"rope_parameters": 0, "rope_scaling": 0, "model_type": 0, "text_config": 0}
    read = 0
    for name in (*Gemma3nConfig.from_dict(sound).to_dict(), *tables):
        for value in odd:
            try:
                config = Gemma3nConfig.from_dict(sound | {name: value})
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
                continue
            read += 1
            assert config.layout.exit < config.num_hidden_layers
            json.dumps(config.to_dict(), allow_nan=False)
    assert read > 10
