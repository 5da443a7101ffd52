"""Shapes by name and by file, and random weights for them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from yoco_eval.model import CheckpointError, GatedRetentionSettings, Yoco, YocoConfig
from yoco_eval.model.checkpoint import BUNDLED, load_config
from yoco_eval.model.costs import YocoCosts
from yoco_eval.model.shapes import (
    SHAPES,
    find_shape,
    set_random_weights,
    with_random_weights,
)

DATA = Path(__file__).parents[1] / "data"
# Billions of parameters. YOCO-3B has 3.4: its vocabulary is a large one.
SIZES = {"1.6b": 1.6, "3b": 3.4, "7b": 7.0, "13b": 13.2, "fla-1.3b-gdn": 1.21}


@pytest.mark.parametrize("name", SHAPES)
def test_sizes(name):
    numbers = YocoCosts(SHAPES[name]).weight_bytes(torch.bfloat16) / 2
    assert numbers == pytest.approx(SIZES[name] * 1e9, rel=0.02)


def test_the_default_of_flash_linear_attention():
    config = SHAPES["fla-1.3b-gdn"]
    assert (config.dim, config.hidden_dim, config.vocab_size) == (2048, 5632, 32000)
    assert (config.self_layers, config.cross_layers) == (10, 11)
    assert config.n_attn_heads == config.n_attn_kv_heads == 32
    mixer = config.self_decoder
    assert (mixer.kind, mixer.n_self_heads) == ("gated_deltanet", 6)
    assert (mixer.self_key_dim, mixer.self_value_dim) == (256, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights(dtype):
    config = YocoConfig(64, 2, 32, 2, 1, 128, GatedRetentionSettings(2))
    models = [Yoco.empty(config, torch.device("cpu"), dtype) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        set_random_weights(model, seed)
    for (name, weight), same, other in zip(
        models[0].named_parameters(), models[1].parameters(), models[2].parameters(), strict=True
    ):
        assert weight.equal(same) and weight.dtype == dtype
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            assert not weight.equal(other)
            assert weight.float().std() == pytest.approx(0.02, rel=0.1), name


def test_shapes_by_name():
    for name, config in SHAPES.items():
        assert find_shape(name) is config
    for name in ("4b", "", "demo-64k", "x" * 5000):
        with pytest.raises(ValueError, match=r"shape '.*' is unknown; choose from 1\.6b, ") as told:
            find_shape(name)
        assert "or give the path of a config.json or params.json" in str(told.value)
        assert len(str(told.value)) < 500


@pytest.mark.parametrize("layout", ["published", "native", "fla"])
def test_shapes_by_path(layout, tmp_path):
    """Of the file, under another name, too; of its folder, of weights that are not there."""
    whole, file = {
        "published": (DATA / "published" / "gated_retention", "params.json"),
        "native": (BUNDLED / "demo-64k", "config.json"),
        "fla": (DATA / "fla" / "gated_deltanet", "config.json"),
    }[layout]
    shutil.copy(whole / file, tmp_path)
    shutil.copy(whole / file, tmp_path / "mine.json")
    expected = load_config(whole)
    for path in (tmp_path, tmp_path / file, tmp_path / "mine.json", whole):
        assert find_shape(str(path)) == expected


def test_what_is_no_shape(tmp_path):
    for content, reason in [
        ('{"model_type": "llama"}', "says model_type 'llama', none of YOCO, "),
        ('{"dim": 64}', "missing settings: hidden_dim, "),
        ("[]", "holds a list, not an object"),
    ]:
        (tmp_path / "config.json").write_text(content)
        for path in (tmp_path, tmp_path / "config.json"):
            with pytest.raises(CheckpointError, match=rf"config\.json: {reason}"):
                find_shape(str(path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_shape(str(tmp_path))


def test_random_states_of_phi4flash_neither_vanish_nor_grow():
    config = find_shape(str(DATA / "phi4flash"))
    model = with_random_weights(config).make(torch.device("cpu"), torch.float32)
    mixer = model.memory_layer.mixer
    decays = mixer.rates * F.softplus(mixer.time_bias)
    assert -16 * 0.2 < decays.min() and decays[0].max() < 0 and decays[0].min() > -0.2
    for bias in (mixer.tap_bias, model.cache_layer.mixer.projection.bias):
        assert not bias.any()


def test_random_states_of_gated_deltanet_last():
    """Else what they cost would be left out when it is measured."""
    config = replace(SHAPES["fla-1.3b-gdn"], dim=64, hidden_dim=8, n_layers=2, n_self_layers=1)
    config = replace(config, vocab_size=8, n_attn_heads=1, n_attn_kv_heads=1)
    model = with_random_weights(config).make(torch.device("cpu"), torch.float32)
    mixer = model.self_decoder.layers[0].mixer
    decays = 64 * mixer.a_log.exp() * F.softplus(mixer.dt_bias)  # over a chunk
    assert decays.min() < 20 and decays.max() < 64 * 16 * 0.11 and len(decays.unique()) == 6
