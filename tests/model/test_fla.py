"""flash-linear-attention's YOCO: its folders as they are, against the logits of its own class."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from yoco_eval.convert import convert
from yoco_eval.model import CheckpointError, load
from yoco_eval.model.checkpoint import load_config
from yoco_eval.model.fla import fla_name, fla_weights

FOLDERS = sorted(Path(__file__).parents[1].glob("data/fla/*/"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def expected(folder):
    found = torch.load(folder / "expected.pt", weights_only=True)
    return found["input_ids"], found["logits"]


def test_logits(folder):
    ids, logits = expected(folder)
    model = load(folder, "cpu", torch.float32)
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=2e-4)
    assert logits.std() > 0.1  # else the comparison says little


def test_converted(folder, tmp_path):
    """To this project's layout, in which the logits are the same."""
    shutil.copytree(folder, tmp_path / "fla")
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": rows - 1}}}
    tokenizer["model"]["unk_token"] = "a"
    tokenizer["added_tokens"] = [
        {"id": i, "content": c, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, c in ((1, "<s>"), (2, "</s>"))
    ]  # fmt: skip
    (tmp_path / "fla/tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (tmp_path / "fla/tokenizer_config.json").write_text(json.dumps(kind))
    convert(tmp_path / "fla", tmp_path / "here")
    assert "dim" in json.loads((tmp_path / "here/config.json").read_text())
    ids, _ = expected(folder)
    a, b = (load(tmp_path / name, "cpu", torch.float64) for name in ("fla", "here"))
    assert torch.equal(a(ids), b(ids))


@pytest.fixture
def windowed(tmp_path):
    """A folder with a sliding-window self-decoder, which that library runs on flash-attn alone."""
    config = {
        "model_type": "yoco",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_self_decoder_layers": 1,
        "intermediate_size": 40,
        "vocab_size": 30,
        "norm_eps": 1e-6,
        "self_decoder_attn": {
            "type": "swa", "num_heads": 4, "num_v_heads": 2, "window_size": 9, "qkv_bias": True,
            "rope_theta": 300.0, "rope_inv_freq": "yoco",
        },
        "cross_decoder_attn": {"num_heads": 2, "num_kv_heads": 1, "rope_theta": 100.0},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embeddings.weight": (30, 32),
        "model.self_layers.0.attn.q_proj.weight": (32, 32),
        "model.self_layers.0.attn.k_proj.weight": (16, 32),
        "model.self_layers.0.attn.v_proj.weight": (16, 32),
        "model.self_layers.0.attn.q_proj.bias": (32,),
        "model.self_layers.0.attn.k_proj.bias": (16,),
        "model.self_layers.0.attn.v_proj.bias": (16,),
        "model.self_layers.0.attn.o_proj.weight": (32, 32),
        "model.cross_layers.0.attn.q_proj.weight": (32, 32),
        "model.cross_layers.0.attn.o_proj.weight": (32, 32),
        "model.shared_kv_builder.kv_norm.weight": (32,),
        "model.shared_kv_builder.k_proj.weight": (16, 32),
        "model.shared_kv_builder.v_proj.weight": (16, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (30, 32),
    }
    for layer in ("self_layers.0", "cross_layers.0"):
        shapes |= {
            f"model.{layer}.attn_norm.weight": (32,),
            f"model.{layer}.mlp_norm.weight": (32,),
            f"model.{layer}.mlp.gate_proj.weight": (40, 32),
            f"model.{layer}.mlp.up_proj.weight": (40, 32),
            f"model.{layer}.mlp.down_proj.weight": (32, 40),
        }
    weights = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path, {name: weight.double() for name, weight in weights.items()}


def turned(x, theta, halves):
    """Rotary embedding of x [heads, T, D], of channel j with j + D / 2, or with its neighbour."""
    pairs = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(pairs).double() / pairs)
    a, b = x.chunk(2, -1) if halves else (x[..., ::2], x[..., 1::2])
    a, b = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    return torch.cat((a, b), -1) if halves else torch.stack((a, b), -1).flatten(-2)


def attended(q, k, v, hidden):
    """[heads, T, D] each; `hidden` [T, T] says what is not seen."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def test_sliding_windows_are_those_of_its_equations(windowed):
    """Written down from its source: rotary embedding of halves, windows that end at the token."""
    folder, w = windowed
    ids = torch.randint(30, (40,), generator=torch.Generator().manual_seed(1))
    distance = torch.arange(40)[:, None] - torch.arange(40)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"model.{name}.weight"]

    def mapped(x, name, heads):
        y = x @ w[f"model.{name}.weight"].T + w.get(f"model.{name}.bias", 0)
        return y.unflatten(-1, (heads, -1)).transpose(0, 1)

    def mlp(x, layer):
        z = norm(x, f"{layer}.mlp_norm")
        gate, up, down = (w[f"model.{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return x + (F.silu(z @ gate.T) * (z @ up.T)) @ down.T

    x = math.sqrt(32) * w["model.embeddings.weight"][ids]
    z, layer = norm(x, "self_layers.0.attn_norm"), "self_layers.0"
    q, k, v = (mapped(z, f"{layer}.attn.{n}_proj", h) for n, h in (("q", 4), ("k", 2), ("v", 2)))
    q, k = turned(q, 300.0, halves=True), turned(k, 300.0, halves=True)
    out = attended(q, k, v, (distance < 0) | (distance >= 9))
    x = mlp(x + out @ w[f"model.{layer}.attn.o_proj.weight"].T, layer)
    z = norm(x, "shared_kv_builder.kv_norm")
    k, v = (mapped(z, f"shared_kv_builder.{n}_proj", 1) for n in ("k", "v"))
    q = mapped(norm(x, "cross_layers.0.attn_norm"), "cross_layers.0.attn.q_proj", 2)
    q, k = turned(q, 100.0, halves=False), turned(k, 100.0, halves=False)
    out = attended(q, k, v, distance < 0) @ w["model.cross_layers.0.attn.o_proj.weight"].T
    logits = norm(mlp(x + out, "cross_layers.0"), "norm") @ w["lm_head.weight"].T
    model = load(folder, "cpu", torch.float64)
    torch.testing.assert_close(model(ids[None])[0], logits, rtol=0, atol=1e-9)
    assert logits.std() > 0.1


def test_what_is_left_out_has_that_library_s_defaults(tmp_path):
    settings = {"model_type": "yoco", "hidden_size": 2048, "self_decoder_attn": {}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = load_config(tmp_path)
    own = config.self_decoder
    assert (config.self_layers, config.cross_layers, config.hidden_dim) == (10, 11, 5632)
    assert (config.n_attn_heads, config.n_attn_kv_heads, config.vocab_size) == (32, 32, 32000)
    assert (own.kind, own.n_self_heads, own.n_self_value_heads) == ("gated_deltanet", 6, 6)
    assert (own.self_key_dim, own.self_value_dim, own.convolution) == (256, 512, 4)
    assert own.output_gate and not own.negative_eigenvalues
    assert config.norm_eps == 1e-6 and not config.rope_endpoint and not config.tied_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attnres_block_size": 4}, "attnres_block_size = 4: attention residuals are not"),
        ({"hidden_act": "powlu"}, "hidden_act 'powlu' is not 'swish'"),
        ({"self_decoder_attn": {"type": "mamba"}}, "self_decoder_attn type 'mamba' is not known"),
        ({"self_decoder_attn": [1]}, "self_decoder_attn is [1], not an object"),
        ({"self_decoder_attn": {"type": "swa"}}, "window_size must be a positive whole number"),
        ({"self_decoder_attn": {"expand_v": "x"}}, "expand_v must be a positive number, not 'x'"),
        (
            {"self_decoder_attn": {"num_heads": 4, "num_v_heads": 6}},
            "num_v_heads = 6 is no multiple",
        ),
        ({"cross_decoder_attn": {"rope_inv_freq": "ntk"}}, "'ntk' is neither 'fla' nor 'yoco'"),
        ({"num_self_decoder_layers": 21}, "leaves none of 21 layers to the cross-decoder"),
        ({"hidden_ratio": "4x"}, "hidden_ratio must be a positive number, not '4x'"),
        ({"self_decoder_attn": {"head_dim": 100, "expand_v": 1.255}}, "is no whole number"),
        ({"self_decoder_attn": {"conv_bias": True}}, "unknown settings: conv_bias"),
        ({"self_decoder_attn": {"use_short_conv": "no"}}, "use_short_conv must be true or false"),
        ({"cross_decoder_attn": {"window_size": 9}}, "unknown settings: window_size"),
        ({"hidden_size": 2050}, "hidden_size = 2050 is no multiple of 64"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, not None"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    settings = {"model_type": "yoco", "hidden_size": 2048, "self_decoder_attn": {}, **change}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_null_is_no(tmp_path):
    """As that library reads it."""
    settings = {"model_type": "yoco", "hidden_size": 2048, "tie_word_embeddings": None}
    settings["self_decoder_attn"] = {"use_gate": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = load_config(tmp_path)
    assert not config.tied_embeddings and not config.self_decoder.output_gate


@pytest.mark.parametrize("damage", ["width", "dimensions", "dtype", "number"])
def test_damaged_weights_are_named(tmp_path, damage):
    """Also those that are put together, or in another order."""
    folder = tmp_path / "fla"
    shutil.copytree(FOLDERS[0].parent / "deltanet_value_heads", folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.self_layers.0.attn.q_conv1d.weight"
    weights[name] = {
        "width": weights[name][..., 1:].contiguous(),
        "dimensions": weights[name][:, 0, 0].contiguous(),
        "dtype": weights[name].int(),
        "number": torch.tensor(1.0),
    }[damage]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.self_layers.0.attn.({q,k,v}|q)_conv1d.weight"):
        load(folder, "cpu")


def test_weights_have_that_library_s_names_where_they_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "fla")
    for file in (tmp_path / "fla").glob("*.safetensors"):
        weights = load_file(file)
        names = {name for name in weights if "_conv1d" not in name}
        save_file({name: weights[name].int() for name in names}, file)
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "fla", "cpu")
        said = str(caught.value)
        assert "model.self_layers.0.attn.{q,k,v}_conv1d.weight" in said or "holds int32" in said
        assert "self_decoder" not in said and "output_projection" not in said
        shutil.copy(folder / file.name, file)


def test_names_there_and_back(folder):
    for file in folder.glob("*.safetensors"):
        for name in load_file(file):
            if "_conv1d" not in name:
                ours = next(iter(fla_weights(load_config(folder), {name: torch.zeros(4, 4)})), None)
                assert ours is None or (fla_name(ours) == name and ours != name)
