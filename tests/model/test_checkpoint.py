"""Checkpoints: every layout is read, nothing in them is executed, faults are named in one line."""

import argparse
import json
import os
import shutil

import pytest
import torch

from yoco_eval.model import (
    CheckpointError,
    Yoco,
    YocoConfig,
    load_checkpoint,
    save_checkpoint,
)
from yoco_eval.model import checkpoint as module


@pytest.fixture
def weights(published):
    return torch.load(published / "checkpoint.pth", weights_only=True)


@pytest.fixture
def params(published):
    return json.loads((published / "params.json").read_text())


def fault(path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def test_native_round_trip(published, tmp_path):
    config, weights = load_checkpoint(published)
    save_checkpoint(tmp_path, config, weights)
    again, same = load_checkpoint(tmp_path)
    assert again == config and same.keys() == weights.keys()
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "yoco"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o077 == (
        (tmp_path / "config.json").stat().st_mode & 0o077
    )


def test_shards(published, tmp_path, monkeypatch):
    config, weights = load_checkpoint(published)
    save = module.save_torch_state_dict
    monkeypatch.setattr(
        module, "save_torch_state_dict", lambda *args: save(*args, max_shard_size=100_000)
    )
    save_checkpoint(tmp_path, config, weights)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    _, same = load_checkpoint(tmp_path)
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    shards[0].unlink()
    assert shards[0].name in fault(tmp_path)


def test_fairseq_checkpoint(params, weights, tmp_path):
    """A state dict under "model" with a prefix, settings and other objects beside it."""
    content = {
        "model": {f"decoder.model.{name}": weight for name, weight in weights.items()},
        "cfg": {
            "model": argparse.Namespace(**params, arch="yoco_3b"),
            "task": {"tokens_per_sample": 4096},
        },
        "optimizer_history": [{"num_updates": 7}],
        "last_optimizer_state": {"state": {0: torch.zeros(2)}},
    }
    torch.save(content, tmp_path / "checkpoint_last.pt")
    for path in (tmp_path, tmp_path / "checkpoint_last.pt"):
        config, loaded = load_checkpoint(path)
        assert config == YocoConfig(**params, max_position_embeddings=4096)
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_settings_come_from_params_json_first(params, weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "a.pt")
    assert "no params.json beside it" in fault(tmp_path / "a.pt")
    (tmp_path / "params.json").write_text(json.dumps({**params, "max_seq_len": 512}))
    assert load_checkpoint(tmp_path / "a.pt")[0].max_position_embeddings == 512


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed(published, weights, tmp_path, zipped):
    folder, target = copy(published, tmp_path), tmp_path / "exploded"
    content = {**weights, "bomb": Bomb(target)}
    torch.save(content, folder / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    message = fault(folder)
    assert "refused" in message and "torch.save(model.state_dict()" in message
    assert not target.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pth"])
def test_truncated(published, tmp_path, name):
    folder = copy(published, tmp_path)
    if name == "model.safetensors":
        Yoco.from_pretrained(folder, device="cpu").save_pretrained(folder)
    file = folder / name
    file.write_bytes(file.read_bytes()[:-1000])
    message = fault(folder)
    assert str(file) in message and "damaged" in message


def test_every_fault_of_the_parameters_is_named(published, weights, tmp_path):
    folder = copy(published, tmp_path)
    del weights["layer_norm.weight"], weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.zeros(5, 64)
    weights["extra.bias"] = torch.zeros(3)
    torch.save(weights, folder / "checkpoint.pth")
    message = fault(folder)
    assert "missing: layer_norm.weight" in message
    assert "surplus: extra.bias" in message
    assert "embed_tokens.weight is [5, 64], not [96, 64]" in message


def test_no_such_checkpoint(tmp_path):
    assert "no such checkpoint" in fault(tmp_path / "none")
    assert "demo-64k" in fault("demo-65k")


def test_neither_layout(tmp_path):
    assert "not a YOCO checkpoint" in fault(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    message = fault(tmp_path)
    assert "'llama'" in message and "--model hf" in message
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in fault(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "missing settings: dim"),
        ({"alibi": True}, "unknown settings: alibi"),
        ({"n_layers": 5}, "n_layers = 5 is no multiple of 2"),
        ({"n_attn_heads": 6}, "dim = 64 is no multiple of 12"),
        ({"vocab_size": "96"}, "vocab_size must be a positive whole number, not '96'"),
        ({"sliding_window": True}, "sliding_window must be a positive whole number"),
    ],
)
def test_bad_settings(published, params, tmp_path, change, message):
    folder = copy(published, tmp_path)
    changed = {k: v for k, v in {**params, **change}.items() if v is not None}
    (folder / "params.json").write_text(json.dumps(changed))
    assert message in fault(folder) and str(folder) in fault(folder)


def test_settings_of_the_published_code(params):
    extra = {"max_batch_size": 4, "max_seq_len": -1, "model_parallel_size": 1}
    assert YocoConfig.from_dict({**params, **extra}) == YocoConfig(**params)


def test_bundled_checkpoint_by_name():
    config, _ = load_checkpoint("demo-64k")
    assert config.max_position_embeddings == 65536
