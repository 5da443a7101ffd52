"""Checkpoints: every layout is read, nothing in them is executed, faults are named in one line."""

import argparse
import collections
import enum
import json
import os
import pathlib
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from yoco_eval.model import (
    CheckpointError,
    YocoConfig,
    load,
    load_checkpoint,
    save,
    save_checkpoint,
)
from yoco_eval.model import checkpoint as module
from yoco_eval.model.checkpoint import resolve_checkpoint


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


def test_saving_over_another_model(published, tmp_path, monkeypatch):
    """The shards and the index of the earlier one do not outlive it."""
    config, weights = load_checkpoint(published)
    save = module.save_torch_state_dict
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "save_torch_state_dict", lambda *args: save(*args, max_shard_size=100_000)
        )
        save_checkpoint(tmp_path, config, weights)
    changed = {name: weight + 1 for name, weight in weights.items()}
    save_checkpoint(tmp_path, config, changed)
    _, loaded = load_checkpoint(tmp_path)
    assert all(torch.equal(loaded[name], changed[name]) for name in changed)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_tied_embeddings(published, tmp_path):
    config, weights = load_checkpoint(published)
    weights["output_projection.weight"] = weights["embed_tokens.weight"]
    save_checkpoint(tmp_path, config, weights)
    _, loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded["output_projection.weight"], weights["embed_tokens.weight"])


class Enumerated(enum.Enum):
    CHOICE = "choice"


class DictConfig:
    """Pickled as omegaconf's is: an object with a state, and a type as a value."""

    def __init__(self, **content):
        self._content = content
        self._type = dict


def test_other_objects_of_a_training_checkpoint(params, weights, tmp_path, monkeypatch):
    for kind, name in ((Enumerated, "fairseq.dataclass"), (DictConfig, "omegaconf.dictconfig")):
        monkeypatch.setattr(kind, "__module__", name)
        stand_in = types.ModuleType(name)
        setattr(stand_in, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.setitem(sys.modules, name.split(".")[0], stand_in)
    content = {
        "model": weights,
        "cfg": {
            "model": argparse.Namespace(**params),
            "common": DictConfig(fp16=True),
            "choice": Enumerated.CHOICE,
        },
        "extra_state": {
            "loss": np.float64(3.5),
            "meters": collections.defaultdict(list, {"a": [1]}),
            "file": pathlib.PurePosixPath("/data"),
        },
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    assert load_checkpoint(tmp_path)[0] == YocoConfig.from_dict(params)


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
        assert config == YocoConfig.from_dict({**params, "max_position_embeddings": 4096})
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
        save(load(folder, device="cpu"), folder)
    file = folder / name
    file.write_bytes(file.read_bytes()[:-1000])
    message = fault(folder)
    assert str(file) in message and "damaged" in message


@pytest.mark.parametrize(
    "content",
    [b"hello world", b"", b"\x80\x04K\x01.", b"abc\n.", bytes(range(256)), b"PK\x03\x04 not a zip"],
)
def test_garbage(published, tmp_path, content):
    folder = copy(published, tmp_path)
    (folder / "checkpoint.pth").write_bytes(content)
    assert str(folder / "checkpoint.pth") in fault(folder)


@pytest.mark.parametrize("content", [{1: torch.zeros(2)}, {"a": 3}, {"a": torch.zeros(2)}, [1, 2]])
def test_no_state_dict(published, tmp_path, content):
    folder = copy(published, tmp_path)
    torch.save(content, folder / "checkpoint.pth")
    assert "not a" in fault(folder)


def repack(file, compression):
    """Writes a zip file's records anew."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_compressed_records_are_read_as_what_they_hold(published, weights, tmp_path):
    folder = copy(published, tmp_path)
    repack(folder / "checkpoint.pth", zipfile.ZIP_DEFLATED)
    _, loaded = load_checkpoint(folder)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    repack(folder / "checkpoint.pth", zipfile.ZIP_BZIP2)
    assert "compressed in an unknown way" in fault(folder)


def test_records_that_unpack_without_end_are_not_unpacked(published, tmp_path):
    folder = copy(published, tmp_path)
    torch.save({"embed_tokens.weight": torch.zeros(10**7)}, folder / "checkpoint.pth")
    repack(folder / "checkpoint.pth", zipfile.ZIP_DEFLATED)
    assert "unpack to over" in fault(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(published, weights, tmp_path, value, dtype):
    folder = copy(published, tmp_path)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    weights["layer_norm.weight"][3] = value
    weights["cross_decoder.k_proj.weight"][0, 5] = value
    torch.save(weights, folder / "checkpoint.pth")
    message = fault(folder)
    assert "NaN or infinite numbers in cross_decoder.k_proj.weight, layer_norm.weight" in message


def test_weights_that_a_narrower_dtype_makes_infinite(published, weights, tmp_path):
    folder = copy(published, tmp_path)
    weights["layer_norm.weight"][3] = 65520.0
    torch.save(weights, folder / "checkpoint.pth")
    load_checkpoint(folder, torch.bfloat16)
    with pytest.raises(CheckpointError, match="too large for float16.* in layer_norm.weight"):
        load(folder, "cpu", torch.float16)
    weights["layer_norm.weight"][3] = 65519.0  # rounds to float16's largest
    torch.save(weights, folder / "checkpoint.pth")
    load(folder, "cpu", torch.float16)


def test_weights_that_are_no_floating_point_numbers(published, weights, tmp_path):
    folder = copy(published, tmp_path)
    weights["layer_norm.weight"] = weights["layer_norm.weight"].to(torch.int8)
    torch.save(weights, folder / "checkpoint.pth")
    assert "holds int8 in layer_norm.weight" in fault(folder)


@pytest.mark.parametrize(
    "odd", [torch.zeros(1).expand(96, 64), torch.zeros(96, 64).to_sparse()], ids=["same", "sparse"]
)
def test_tensors_that_claim_more_numbers_than_there_are(published, weights, tmp_path, odd):
    folder = copy(published, tmp_path)
    torch.save({**weights, "embed_tokens.weight": odd}, folder / "checkpoint.pth")
    assert "'embed_tokens.weight' names no dense tensor" in fault(folder)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/dev/zero", "..", "", 3, "a\0b", "a" * 999]
)
def test_an_index_names_files_beside_it(published, tmp_path, file):
    save(load(published, device="cpu"), tmp_path / "a")
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layer_norm.weight": file}}))
    shutil.copy(tmp_path / "a" / "model.safetensors", tmp_path)
    message = fault(tmp_path / "a")
    missing = ("a\N{REPLACEMENT CHARACTER}b is missing", "aaa is missing")
    assert str(index) in message or any(told in message for told in missing)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {}}'])
def test_bad_index(published, tmp_path, content):
    save(load(published, device="cpu"), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "has no weight_map" in fault(tmp_path)


def test_a_file_of_a_native_folder(published, tmp_path):
    save(load(published, device="cpu"), tmp_path)
    assert "name its folder" in fault(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoint.pth", "a.pt"])
def test_pipes_and_devices_are_not_waited_for(published, tmp_path, name):
    folder = tmp_path / "copy"
    if name in ("config.json", "model.safetensors"):
        save(load(published, device="cpu"), folder)
    else:
        folder.mkdir()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{folder / name}: is no regular file" in fault(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{folder / name}: is no regular file" in fault(folder)
    assert f"{folder / name}: is no regular file" in fault(folder / name)


@pytest.mark.parametrize("name", ["config.json", "params.json", "model.safetensors.index.json"])
def test_json_nested_without_end(published, tmp_path, name):
    folder = copy(published, tmp_path)
    if name != "params.json":
        save(load(published, device="cpu"), folder)
    levels = 10**5  # beyond what any Python's reader takes
    (folder / name).write_text('{"dim": ' + "[" * levels + "]" * levels + "}")
    assert f"{folder / name}: not valid JSON" in fault(folder)


def test_names_and_values_of_a_file_are_shown_harmlessly_and_cut(published, params, tmp_path):
    folder = copy(published, tmp_path)
    unknown = {f"\x1b[2J\ud800\n{i}{'x' * 5000}": 1 for i in range(500)}
    for change in ({"dim": "\x1b[2J\ud800\n" * 900}, {"dim": 10**4000}, unknown):
        (folder / "params.json").write_text(json.dumps({**params, **change}))
        message = fault(folder)
        assert message.isprintable() and len(message) < 2000


def test_every_fault_of_the_parameters_is_named(published, weights, tmp_path):
    folder = copy(published, tmp_path)
    del weights["layer_norm.weight"], weights["self_decoder.layers.0.ffn.fc1.weight"]
    weights["embed_tokens.weight"] = torch.zeros(5, 64)
    weights["extra.bias"] = torch.zeros(3)
    torch.save(weights, folder / "checkpoint.pth")
    message = fault(folder)
    assert "missing: self_decoder.layers.0.ffn.fc1.weight, layer_norm.weight" in message
    assert "surplus: extra.bias" in message
    assert "embed_tokens.weight is [5, 64], not [96, 64]" in message


def test_no_such_checkpoint(tmp_path):
    assert "no such checkpoint" in fault(tmp_path / "none")
    assert "demo-64k" in fault("demo-65k")


def test_names_on_the_hub(published, tmp_path, hub_cache):
    snapshot = hub_cache("org/model", published, "1" * 40, branch="main")
    assert resolve_checkpoint("org/model") == resolve_checkpoint("org/model", "1" * 40) == snapshot
    assert resolve_checkpoint(str(snapshot), "1" * 40) == snapshot
    config, weights = load_checkpoint("org/model")
    expected, same = load_checkpoint(published)
    assert config == expected and weights.keys() == same.keys()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        resolve_checkpoint(pathlib.Path("org/model"))  # a path is nothing but a path
    with pytest.raises(CheckpointError, match=r"demo-4k: has no revision 'v1', as names on the hu"):
        resolve_checkpoint("demo-4k", "v1")
    assert "no/where: no such path, and not in the hub's cache" in fault("no/where")
    # Told before weights, which are not there, are asked for.
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    hub_cache("org/llama", tmp_path / "llama", "2" * 40, branch="main")
    assert "'llama'" in fault("org/llama")


def test_neither_layout(tmp_path):
    assert "holds no checkpoint" in fault(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    message = fault(tmp_path)
    assert "'llama'" in message and "--model hf" in message
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    assert "config.json: has no model_type; copy it again" in fault(tmp_path)


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds an adapter alone; merge it into its base model" in fault(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in fault(tmp_path)


def test_another_projects_yoco_is_told_apart(tmp_path):
    settings = {"model_type": "yoco", "hidden_size": 64, "num_hidden_layers": 5, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "another project" in fault(tmp_path) and "hidden_size" in fault(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "missing settings: dim"),
        ({"alibi": True}, "unknown settings: alibi"),
        ({"n_layers": 5}, "n_layers = 5 is no multiple of 2"),
        ({"n_attn_heads": 6}, "dim = 64 is no multiple of 12"),
        ({"vocab_size": "96"}, "vocab_size must be a positive whole number, not '96'"),
        ({"sliding_window": True}, "sliding_window must be a positive whole number"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number, not '1e4'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, not nan"),
        ({"rope_theta": float("inf")}, "rope_theta must be from 1 to 1e+30, not inf"),
        ({"rope_theta": 10**400}, "rope_theta must be from 1 to 1e+30, not 1000"),
        ({"norm_eps": 1e-300}, "norm_eps must be from 1e-30 to 1, not 1e-300"),
        ({"n_layers": 50_000}, "n_layers must be at most 4096, not 50000"),
        ({"dim": 10**12}, "dim must be at most 131072, not 1000000000000"),
        ({"vocab_size": 10**400}, "vocab_size must be at most 16777216, not 1000"),
        ({"max_seq_len": "long"}, "max_position_embeddings must be a positive whole number"),
    ],
)
def test_bad_settings(published, params, tmp_path, change, message):
    folder = copy(published, tmp_path)
    changed = {k: v for k, v in {**params, **change}.items() if v is not None}
    (folder / "params.json").write_text(json.dumps(changed))
    assert message in fault(folder) and str(folder) in fault(folder)


def test_settings_of_the_published_code(params):
    extra = {"max_batch_size": 4, "max_seq_len": -1, "model_parallel_size": 1}
    assert YocoConfig.from_dict({**params, **extra}) == YocoConfig.from_dict(params)


def test_settings_of_a_training_checkpoint_may_be_anything(params, weights, tmp_path):
    maze = []
    for _ in range(60):
        maze = [maze, maze]
    for odd in ({"rope_theta": torch.ones(3)}, {"dim": maze}):
        torch.save({"model": weights, "args": {**params, **odd}}, tmp_path / "a.pt")
        assert f"{next(iter(odd))} must be a positive" in fault(tmp_path)
    weights["embed_tokens.weight"] = torch.tensor(1.0)
    del params["vocab_size"]
    args = {**params, "tokens_per_sample": torch.ones(3)}
    torch.save({"model": weights, "args": args}, tmp_path / "a.pt")
    assert "vocab_size must be a positive whole number, not 0" in fault(tmp_path)


def test_a_setting_that_is_not_known_is_refused(published, tmp_path):
    """Ignored, it could change the model; what Hugging Face's libraries add does not."""
    save(load(published, device="cpu"), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    added = {"torch_dtype": "float32", "transformers_version": "5.0.0", "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings | added))
    load(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"head_norm": True}))
    assert "unknown settings: head_norm" in fault(tmp_path)


def test_bundled_checkpoint_by_name():
    config, _ = load_checkpoint("demo-64k")
    assert config.max_position_embeddings == 65536
