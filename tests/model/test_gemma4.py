"""Gemma 4: equal to the class of transformers, however a text is fed, and no token goes too far."""

import gc
import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from predicting import decoded_side_by_side, predictions
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from yoco_eval.engine import Engine
from yoco_eval.kernels.sequences import Sequences, Span, Spans
from yoco_eval.model import CheckpointError, load, open_checkpoint
from yoco_eval.model.costs import OVERHEAD
from yoco_eval.model.footprint import footprint
from yoco_eval.model.gemma4 import Gemma4
from yoco_eval.model.gemma4_config import Gemma4Config
from yoco_eval.model.interface import concatenate, take
from yoco_eval.model.shapes import set_random_weights
from yoco_eval.requests import GenerateRequest, ScoreRequest

S, F = "sliding_attention", "full_attention"
LENGTH, WINDOW, VOCABULARY = 64, 12, 50
SMALL = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 6,
    "sliding_window": WINDOW,
}
CONFIGS = {
    # As E2B and E4B are, in small.
    "e2b": {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "layer_types": [S, S, S, S, F] * 2,
        "num_key_value_heads": 1,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    "e4b": {
        "num_hidden_layers": 12,
        "num_kv_shared_layers": 6,
        "num_key_value_heads": 2,
        "final_logit_softcapping": 30.0,
    },
    # Sources that are not neighbours, other embeddings of positions, heads that differ in number.
    "other": {
        "num_hidden_layers": 7,
        "num_kv_shared_layers": 3,
        "layer_types": [F, S, F, F, F, S, F],
        "num_key_value_heads": 2,
        "per_layer_config": {
            i: {"head_dim": 16, "num_key_value_heads": 4} for i in (0, 2, 3, 4, 6)
        },
        "rope_parameters": {
            S: {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.7},
            F: {"rope_type": "default", "rope_theta": 300.0},
        },
    },
}
IDS = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(0))


class Wide:
    """`torch`, with float64 for whoever asks for float32."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


class Reference:
    """The class of transformers with its casts to float32 lifted: they would hide differences."""

    def __init__(self):
        self.made = {}
        self.transformers = pytest.importorskip("transformers", minversion="5.5")

    @contextmanager
    def lifted(self):
        from transformers import modeling_rope_utils
        from transformers.models.gemma4 import modeling_gemma4

        default = torch.get_default_dtype()
        with pytest.MonkeyPatch.context() as patch:
            for module in (modeling_gemma4, modeling_rope_utils):
                patch.setattr(module, "torch", Wide())
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            torch.set_default_dtype(torch.float64)
            try:
                yield
            finally:
                torch.set_default_dtype(default)

    def model(self, name):
        """With random weights that are large enough that attention is far from uniform."""
        if name in self.made:
            return self.made[name]
        config = self.transformers.Gemma4TextConfig(**SMALL, **CONFIGS[name])
        if "per_layer_config" in CONFIGS[name] and hasattr(config, "global_head_dim"):
            pytest.skip("this version of the class has two sizes of heads only")
        with self.lifted():
            model = self.transformers.Gemma4ForCausalLM(config).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(1)
        for weight in model.state_dict().values():
            if weight.dim() > 1:
                weight.normal_(0, 1.5 / math.sqrt(weight.shape[1]), generator=generator)
            else:
                weight.uniform_(0.7, 1.4, generator=generator)
        self.made[name] = model
        return model

    def logits(self, name, ids):
        """[T, VOCABULARY] of a text."""
        with self.lifted():
            return self.model(name)(ids[None], use_cache=True).logits[0]

    def save(self, name, folder, multimodal=False):
        """In the layout of the multimodal class, or in that of the language model alone."""
        model = self.model(name)
        config = json.loads(model.config.to_json_string(use_diff=False))
        weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        if multimodal:
            others = {"vision_config": {"hidden_size": 8}, "image_token_id": 7}
            config = {"model_type": "gemma4", "text_config": config, **others}
            weights = {k.replace("model.", "model.language_model."): v for k, v in weights.items()}
            weights["model.vision_tower.patch_embedder.input_proj.weight"] = torch.ones(3, 4)
            last = f"model.language_model.layers.{CONFIGS[name]['num_hidden_layers'] - 1}"
            weights[f"{last}.self_attn.k_proj.weight"] = torch.ones(3)  # which nothing reads
        (folder / "config.json").write_text(json.dumps(config))
        save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(reference, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    reference.save(name, folder)
    return load(folder, "cpu", torch.float64)


@pytest.fixture(scope="module")
def expected(reference, name):
    logits = reference.logits(name, IDS)
    assert logits.std() > 0.1  # else the comparison says little
    return logits


def assert_equal(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def scattered(positions):
    """What tokens at these positions of the cache's only text read, each for itself."""
    return Spans(tuple(Span(i, i + 1, 0, p + 1, True, 0) for i, p in enumerate(positions)))


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
def test_prefill_in_chunks(model, expected, chunk):
    cache = model.new_cache(LENGTH)
    stretches = [model.prefill(part, cache) for part in IDS.split(chunk)]
    for _ in range(2):  # asking changes nothing
        assert_equal(predictions(model, concatenate(stretches), cache), expected)


def test_some_are_asked(model, expected):
    """In any order, by chunks that are all in the cache before the first is asked."""
    cache = model.new_cache(LENGTH)
    rows = concatenate([model.prefill(part, cache) for part in IDS.split(17)])
    for positions in ([LENGTH - 1], [3, 50, 0, 49, 17, 16, 63, 12]):
        index = torch.tensor(positions)
        out = model.predict(take(rows, index), index, cache, scattered(positions))
        assert_equal(model.logits(out), expected[index])


def test_restored_and_fed_again(model, expected):
    """Another text in between; states are as they were."""
    cache = model.new_cache(LENGTH)
    model.prefill(IDS[:20], cache)
    snapshot = cache.state
    model.prefill(IDS.flip(0)[:30], cache)
    cache.restore(snapshot)
    rows = model.prefill(IDS[20:], cache)
    assert_equal(predictions(model, rows, cache), expected[20:])


def test_packed_branches(model, reference, name):
    """Of a stem that lies in two places, and of branches, which are fed side by side."""
    generator = torch.Generator().manual_seed(3)
    stem, *branches, long, short = (
        torch.randint(VOCABULARY, (n,), generator=generator) for n in (30, 5, 17, 1, 15, 2)
    )
    cache = model.new_cache(70)
    cache.room = ((55, 70), (0, 55))
    first = Sequences((5, 17, 1), (30,) * 3, IDS.device, sources=(0, 0, 0))
    second = Sequences((15, 2), (47, 35), IDS.device, sources=(1, 0))
    state, levels = (
        cache.state,
        (
            (Sequences((30,), (0,), IDS.device), [stem]),
            (first, [torch.cat((stem, branch)) for branch in branches]),
            (second, [torch.cat((stem, branches[1], long)), torch.cat((stem, branches[0], short))]),
        ),
    )
    fed = []
    for sequences, texts in levels:
        ends = [text[-length:] for text, length in zip(texts, sequences.lengths, strict=True)]
        rows, state = model.feed(torch.cat(ends), sequences, state, cache)
        fed.append((rows, state.places.readings(sequences), sequences, texts))
    for rows, spans, sequences, texts in fed:
        logits = model.logits(model.predict(rows, sequences.positions, cache, spans))
        for part, text in zip(logits.split(sequences.lengths), texts, strict=True):
            assert_equal(part, reference.logits(name, text)[-len(part) :])


@pytest.mark.parametrize("begin", [3, 40])
def test_decoding(model, expected, begin):
    """Step after step, and again from where the cache is."""
    cache = model.new_cache(LENGTH)
    model.prefill(IDS[:begin], cache)
    decoder = model.decoder(cache)
    for steps in (20, 3):
        decoder.start(int(IDS[begin]))
        for position in range(begin, begin + steps):
            decoder.tokens.fill_(IDS[position])
            decoder.step()
            assert_equal(decoder.logits[0], expected[position])
            assert decoder.tokens == decoder.logits.argmax()


def test_decoding_side_by_side(model, reference, name):
    other = torch.cat((IDS[:30], IDS.flip(0)[:20]))
    texts = [IDS, other, IDS.flip(0)]
    expected = [reference.logits(name, text) for text in texts]
    numbers = {}
    for number, position, logits in decoded_side_by_side(model, texts):
        assert_equal(logits, expected[number][position])
        numbers[number] = numbers.get(number, 0) + 1
    assert numbers == {0: 9, 1: 12, 2: 8}


def test_through_the_engine(model):
    """Texts that share stems and branch, scored and generated."""
    random = np.random.default_rng(0)
    stem, other = random.integers(VOCABULARY, size=(2, 30))
    contexts = [stem, other, stem[:12], *[np.append(stem, other[:9])] * 2]
    scored = [
        ScoreRequest(context, end[:length])
        for context, end in zip(contexts, random.integers(VOCABULARY, size=(5, 7)), strict=True)
        for length in (1, 7)
    ]

    def rows(ids):
        cache = model.new_cache(len(ids))
        return predictions(model, model.prefill(torch.as_tensor(ids), cache), cache)

    quiet = {"begin": lambda count: None, "progress": lambda *counts: None}
    engine = Engine(model, prefill_chunk=9, batch_size=3)
    scores = dict(engine.score(scored, **quiet))
    assert len(scores) == len(scored)
    for index, score in scores.items():
        context, continuation = scored[index].context, torch.as_tensor(scored[index].continuation)
        whole = rows(np.append(context, continuation))[len(context) - 1 : -1].log_softmax(-1)
        likely = whole.gather(1, continuation[:, None]).sum().item()
        assert score.logprob == pytest.approx(likely, abs=1e-9)
    answers = dict(engine.generate([GenerateRequest(c, 5) for c in contexts], **quiet))
    assert list(map(len, answers.values())) == [5] * len(contexts)
    for index, tokens in answers.items():
        ids = list(contexts[index])
        for token in tokens:
            assert token == int(rows(ids)[-1].argmax())
            ids.append(token)


def test_no_token_goes_further_than_it_has_to(model):
    """The rows that go through each layer's MLP, and those that are asked for."""
    counts = dict.fromkeys(range(len(model.layers)), 0)

    def counting(i):
        def count(module, inputs):
            counts[i] += len(inputs[0])

        return count

    hooks = [
        layer.mlp.register_forward_pre_hook(counting(i)) for i, layer in enumerate(model.layers)
    ]
    cache = model.new_cache(LENGTH)
    rows = concatenate([model.prefill(part, cache) for part in IDS.split(20)])
    asked = torch.tensor([30, LENGTH - 1])
    before = [LENGTH if i < model.layout.exit else 0 for i in counts]
    assert list(counts.values()) == before
    model.predict(take(rows, asked), asked, cache, scattered(asked.tolist()))
    assert list(counts.values()) == [count or 2 for count in before]
    for hook in hooks:
        hook.remove()


def test_the_first_token_matters(model, expected):
    """To all others, though no window reaches so far."""
    cache, ids = model.new_cache(LENGTH), IDS.clone()
    ids[0] += 1
    logits = predictions(model, model.prefill(ids, cache), cache)
    assert (logits - expected).abs().amax(1).min() > 1e-6


def test_both_layouts(model, reference, name, expected, tmp_path):
    reference.save(name, tmp_path, multimodal=True)
    other = load(tmp_path, "cpu", torch.float64)
    assert other.config == model.config
    for (key, weight), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same), key


def test_costs_are_those_of_a_real_model(model):
    costs, config = model.costs, model.config
    assert costs.weight_bytes(torch.float64) == sum(p.nbytes for p in model.parameters())
    cache = model.new_cache(LENGTH)
    parts = (cache.keys, cache.values, cache.window_keys, cache.window_values)
    assert costs.cache_bytes(torch.float64, LENGTH) == sum(part.nbytes for part in parts)
    with FlopCounterMode(display=False) as counter:
        model.prefill(IDS, cache)
    assert costs.state_bytes(torch.float64) == sum(part.nbytes for part in cache.state.windows)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    attended = 0
    for layer, kind in enumerate(config.layer_types[: model.layout.exit]):
        pairs = sum(min(t + 1, WINDOW if kind == S else LENGTH) for t in range(LENGTH))
        attended += 4 * pairs * config.num_attention_heads * model.layout.heads(layer).dim
    padding = 2 * LENGTH * 8 * config.hidden_size * (model.layout.exit + 1)
    assert 0 <= products + attended - costs.prefill_operations(LENGTH) <= padding
    table = model.embed_tokens_per_layer.weight
    read = costs.decode_bytes(torch.float64, 0) + table.nbytes - table[0].nbytes
    assert read == costs.weight_bytes(torch.float64)
    more = costs.decode_bytes(torch.float64, 10) - costs.decode_bytes(torch.float64, 9)
    layers = [model.layout.heads(i).numbers for i in range(len(config.layer_types))]
    assert more == 8 * sum(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 8])
def test_activations_on_a_cpu(heads, dtype, live_bytes):
    """Of a chunk before the exit, and of one from there on."""
    config = Gemma4Config(
        layer_types=(S, F, S, F),
        num_kv_shared_layers=2,
        vocab_size=100,
        hidden_size=128,
        intermediate_size=1000,
        use_double_wide_mlp=True,
        num_attention_heads=heads,
        num_key_value_heads=1,
        num_global_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        sliding_window=64,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=100,
    )
    model = Gemma4.empty(config, torch.device("cpu"), dtype)
    set_random_weights(model, 0)
    ids = torch.randint(100, (1000,))
    positions, spans = torch.arange(1, 1000), Spans((Span(0, 999, 0, 1000, True, 0),))
    memory = footprint(model.costs, dtype, 1000, 1000, device=torch.device("cpu"))
    most = memory.activations - OVERHEAD
    with torch.inference_mode():
        cache = model.new_cache(1000)
        model.prefill(ids[:1], cache)
        parts = (cache.keys, cache.values, cache.window_keys, cache.window_values)
        with live_bytes(besides=[*model.parameters(), *parts]) as feeding:
            rows = model.prefill(ids[1:], cache)
        with live_bytes(besides=[*model.parameters(), *parts, *rows]) as predicting:
            model.predict(rows, positions, cache, spans)
    assert feeding.peak < most + memory.states and predicting.peak < most
    assert predicting.peak > 0.9 * most or heads > 1  # what attention keeps is less in the small


def test_embeddings_are_scaled_as_in_training(reference, tmp_path):
    """By a root that is rounded to bfloat16, to the last bit."""
    torch.manual_seed(0)
    config = reference.transformers.Gemma4TextConfig(**SMALL, **CONFIGS["e2b"])
    theirs = reference.transformers.Gemma4ForCausalLM(config).bfloat16().model
    ours = Gemma4.empty(Gemma4Config.from_dict(config.to_dict()), IDS.device, torch.bfloat16)
    for name, weight in ours.named_parameters():
        weight.copy_(theirs.state_dict()[name])
    with torch.no_grad():
        x = theirs.embed_tokens(IDS[None])
        inputs = theirs.project_per_layer_inputs(x, theirs.get_per_layer_inputs(IDS[None], x))
    assert (math.sqrt(24) * ours.embed_tokens(IDS) != x[0]).any()
    for part, same in zip(ours._embedded(IDS, range(10)), (x[0], inputs[0]), strict=True):
        torch.testing.assert_close(part, same, rtol=0.01 * (part.dim() - 2), atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_card(dtype):
    """Heads as the published models have them: fed in chunks, and decoded side by side under
    graphs, near the same weights in float64."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 256, "global_head_dim": 512}
    changes = {"sliding_window": 40, "hidden_size_per_layer_input": 64}
    config = Gemma4Config.from_dict({**SMALL, **CONFIGS["e2b"], **sizes, **changes})
    exact = Gemma4.empty(config, IDS.device, torch.float64)
    set_random_weights(exact, seed=0)
    for name, weight in exact.named_parameters():
        # Scores are small enough that no rounding decides which of the keys is read.
        weight.mul_(0.1 if "q_norm" in name else 1 + (weight.dim() > 1)).copy_(weight.to(dtype))
    fast = Gemma4.empty(config, torch.device("cuda"), dtype)
    fast.load_state_dict(exact.state_dict())
    texts = torch.randint(VOCABULARY, (3, 300), generator=torch.Generator().manual_seed(2))
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
        for part in texts[0].cuda().split(129):
            found += predictions(fast, fast.prefill(part, cache), cache)
        assert_near(found, list(expected[0]))
        steps = list(decoded_side_by_side(fast, texts))
        assert_near([step[2] for step in steps], [expected[n][at] for n, at, _ in steps])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_activations_on_a_gpu():
    """Not more than estimated, and not much less, in a model as wide as E2B."""
    device, chunk = torch.device("cuda"), 8448
    changes = {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "layer_types": [S, S, S, S, F] * 2,
    }
    small = {"vocab_size": 1000, "vocab_size_per_layer_input": 1000}
    config = Gemma4Config.from_dict(E2B["text_config"] | changes | small)
    gc.collect()  # what is freed meanwhile would be missed
    model = Gemma4.empty(config, device, torch.bfloat16)
    set_random_weights(model, 0)
    ids = torch.zeros(chunk, dtype=torch.long, device=device)
    positions = torch.arange(chunk, device=device)
    extra = []
    with torch.inference_mode():
        for _ in range(2):  # the matrix library's own memory may have to be taken first
            cache = model.new_cache(chunk)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            rows = model.prefill(ids, cache)
            extra.append(torch.cuda.max_memory_allocated() - before)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.predict(rows, positions, cache, Spans((Span(0, chunk, 0, chunk, True, 0),)))
            extra.append(torch.cuda.max_memory_allocated() - before)
    memory = footprint(model.costs, torch.bfloat16, chunk, chunk)
    assert 0.6 * memory.activations < max(extra) < memory.activations + memory.states


E2B = {
    "model_type": "gemma4",
    "vision_config": {"model_type": "gemma4_vision"},
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "gemma4_text",
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "layer_types": [S, S, S, S, F] * 7,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            F: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            S: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": True,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    },
}
E4B = {
    "layer_types": None,  # every sixth with full attention
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 42,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "use_double_wide_mlp": False,
}


def written(folder, changes=None, top=None):
    """A folder with the configuration of E2B, with changes in its text_config and above it."""
    text = E2B["text_config"] | (changes or {})
    (folder / "config.json").write_text(json.dumps(E2B | {"text_config": text} | (top or {})))
    return folder


def test_the_published_models(tmp_path):
    """Figures that others give of them, and tokens that leave early."""
    bf16 = torch.bfloat16
    for changes, numbers, cache, state, saved in (
        ({}, 4.6e9, 7, 6, 0.65),
        (E4B, 7.5e9, 18, 20, 0.42),
    ):
        costs = open_checkpoint(written(tmp_path, changes)).costs
        assert costs.weight_bytes(bf16) / 2 == pytest.approx(numbers, rel=0.02)
        assert costs.cache_bytes(bf16, 1) == cache * 1024
        assert costs.state_bytes(bf16) == pytest.approx(state * 2**20, rel=0.01)
        whole = 2 * 4096 * sum(costs._maps(i) for i in range(len(costs.config.layer_types)))
        assert costs.prefill_operations(4096) == pytest.approx((1 - saved) * whole, rel=0.12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_shared_layers": 0}, "num_kv_shared_layers = 0: all layers own keys and values"),
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers must be at most 34, not 35"),
        ({"num_kv_shared_layers": "20"}, "num_kv_shared_layers must be a positive whole number"),
        ({"num_kv_shared_layers": 31}, "layer_types has no full_attention among the 4 layers that"),
        ({"num_kv_shared_layers": 21}, "layer_types has sliding_attention for the last layer that"),
        ({"layer_types": [F] * 35}, "layer_types has no sliding_attention among the 15 layers"),
        ({"layer_types": [S, F]}, "is no list of 35 layers' kinds"),
        ({"layer_types": [[]] * 35}, "layer_types names [], neither 'full_attention' nor"),
        ({"enable_moe_block": True}, "enable_moe_block = True is not supported, only False"),
        ({"attention_k_eq_v": True}, "attention_k_eq_v = True is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_activation": "silu"}, "only 'gelu_pytorch_tanh'; evaluate this model with --mo"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all' is not"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input must be a positive"),
        ({"global_head_dim": 1024}, "global_head_dim must be at most 512, not 1024"),
        ({"head_dim": 255}, "head_dim = 255 is no multiple of 2"),
        ({"head_dim": None}, "head_dim must be a positive whole number, not None"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 8 is no multiple of 3"),
        ({"vocab_size": 2**19}, "vocab_size = 524288 is more than vocab_size_per_layer_input"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, not 0"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping must be a positive number"),
        ({"use_double_wide_mlp": "yes"}, "use_double_wide_mlp must be true or false, not 'yes'"),
        ({"attention_temperature": 2.0}, "unknown settings: attention_temperature; if they change"),
        ({"rope_parameters": {F: {"rope_theta": 1e6}}}, "not a table of sliding_attention and"),
        ({"per_layer_config": {"40": {}}}, "per_layer_config is {'40': {}}, not a table of layers"),
        ({"per_layer_config": {"04": {"head_dim": 128}}}, "full_attention layers of several sizes"),
        ({"per_layer_config": {"4": {"window": 8}}}, "per_layer_config of layer 4 is {'window'"),
    ],
)  # fmt: skip
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(written(tmp_path, changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (F, {"rope_type": "yarn"}, "only rope_type 'default' and 'proportional', without a factor"),
        (F, {"factor": 8.0}, "only rope_type 'default' and 'proportional', without a factor"),
        (S, {"rope_theta": 0}, "rope_theta must be a positive number, not 0"),
        (F, {"partial_rotary_factor": 1.5}, "global_partial_rotary_factor must be from 1e-30 to 1"),
        (S, {"beta_fast": 32}, "rope_parameters of sliding_attention has beta_fast, unknown"),
    ],
)
def test_bad_embeddings_of_positions(tmp_path, kind, change, message):
    tables = E2B["text_config"]["rope_parameters"]
    tables = tables | {kind: tables[kind] | change}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(written(tmp_path, {"rope_parameters": tables}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"model_type": "gemma4_assistant"}, "which drafts for another model, whose keys and"),
        ({"model_type": "gemma4_unified_assistant"}, "which drafts for another model"),
        ({"model_type": "gemma4_unified"}, "which has layers that all own keys and values"),
        (
            {"model_type": "gemma4_vision"},
            "says model_type 'gemma4_vision', none of YOCO",
        ),
        ({"model_type": ["gemma4"]}, "says model_type ['gemma4'], none of YOCO"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config; take a checkpoint"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"text_config": None}, "text_config is None, not an object"),
        ({"text_config": {"model_type": "llama"}}, "text_config has model_type 'llama', not 'gemm"),
    ],
)
def test_other_models(tmp_path, top, message):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(written(tmp_path, top=top))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_multimodal_folder_without_its_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma4"}')
    with pytest.raises(CheckpointError, match=r"config\.json: missing settings: text_config$"):
        open_checkpoint(tmp_path)


def test_weights_are_named_where_they_are_refused(reference, tmp_path):
    for multimodal, prefix in ((False, "model"), (True, "model.language_model")):
        reference.save("e2b", tmp_path, multimodal)
        weights = load_file(tmp_path / "model.safetensors")
        bad = {
            "norm.weight": None,
            "layers.9.layer_scalar": torch.ones(2),
            "new.weight": torch.ones(1),
        }
        for name, weight in bad.items():
            weights.pop(f"{prefix}.{name}", None)
            if weight is not None:
                weights[f"{prefix}.{name}"] = weight
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path, "cpu")
        for part in (
            "missing: {}.norm.weight",
            "surplus: {}.new.weight",
            "{}.layers.9.layer_scalar is",
        ):
            assert part.format(prefix) in str(caught.value)
