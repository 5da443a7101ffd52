"""Whose tokenizer and whose positions a task takes, from the arguments of any backend."""

import json
import logging
import shutil
import warnings

import pytest
from transformers import PretrainedConfig

from yoco_eval.tasks import evaluated_model
from yoco_eval.tasks.evaluated_model import load_tokenizer, max_positions
from yoco_eval.tasks.prompts import TokenCounter


@pytest.fixture
def folder(tmp_path, tokenizers):
    """A model folder of a GPT-2-like model, with a tokenizer of its own."""
    tokenizers["byte-level"].save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2", "n_positions": 777}')
    return tmp_path / "model"


def test_without_arguments_it_is_the_bundled_default():
    assert max_positions({}) == 1048576
    assert load_tokenizer({}).bos_token == "<s>"


def test_bundled_by_name():
    assert max_positions({"pretrained": "demo-64k"}) == 65536
    assert load_tokenizer({"pretrained": "demo-64k"}).vocab_size == 2048


def test_bundled_tokenizer_loads_silently(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer({"pretrained": "demo-64k"})
        TokenCounter(tokenizer).count("word " * 70_000)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_tokenizer_comes_before_pretrained_before_model(folder, tokenizers):
    own, vocab_size = str(folder), tokenizers["byte-level"].vocab_size
    assert load_tokenizer({"tokenizer": own, "pretrained": "demo-64k"}).vocab_size == vocab_size
    assert load_tokenizer({"pretrained": own, "model": "demo-64k"}).vocab_size == vocab_size
    assert load_tokenizer({"model": own}).vocab_size == vocab_size
    # A file in a folder stands for the folder, as a training checkpoint does.
    assert load_tokenizer({"pretrained": f"{own}/config.json"}).vocab_size == vocab_size


def test_published_layout(tmp_path, folder):
    """The tokenizers that the yoco backend takes for it: beside it, or a file given by name."""
    (tmp_path / "params.json").write_text('{"vocab_size": 2048}')
    shutil.copy(folder / "tokenizer.json", tmp_path / "own.json")
    with pytest.raises(ValueError, match="no tokenizer in this folder"):
        load_tokenizer({"pretrained": str(tmp_path)})
    arguments = {"pretrained": str(tmp_path), "tokenizer": str(tmp_path / "own.json")}
    own = load_tokenizer({"pretrained": str(folder)})
    assert load_tokenizer(arguments).get_vocab() == own.get_vocab()
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert load_tokenizer({"pretrained": str(tmp_path)}).get_vocab() == own.get_vocab()
    (tmp_path / "params.json").write_text('{"vocab_size": 9}')
    with pytest.raises(ValueError, match="exceed the model's vocabulary of 9"):
        load_tokenizer({"pretrained": str(tmp_path)})


def test_positions_of_the_usual_layouts(tmp_path, folder):
    assert max_positions({"pretrained": str(folder)}) == 777
    for config, positions in [
        ({"text_config": {"max_position_embeddings": 123}}, 123),
        ({"max_position_embeddings": 5, "text_config": {"max_position_embeddings": 6}}, 5),
        ({"vocab_size": 10}, None),
    ]:
        (folder / "config.json").write_text(json.dumps(config))
        assert max_positions({"pretrained": str(folder)}) == positions
    for params, positions in [({"dim": 1, "max_seq_len": 99}, 99), ({"max_seq_len": -1}, None)]:
        (tmp_path / "params.json").write_text(json.dumps(params))
        assert max_positions({"pretrained": str(tmp_path)}) == positions
    assert max_positions({"tokenizer": str(folder)}) is None
    assert max_positions({"model": "some-api"}) is None


def test_positions_of_a_name_on_the_hub(monkeypatch):
    configs = {"org/model": {"max_position_embeddings": 4096}}

    def get_config_dict(name):
        if name not in configs:
            raise OSError("no such model")
        return configs[name], {}

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", get_config_dict)
    assert max_positions({"pretrained": "org/model"}) == 4096
    assert max_positions({"pretrained": "org/other"}) is None


def test_what_the_user_says_comes_before_the_configuration():
    assert max_positions({"pretrained": "demo-64k", "max_length": 1000}) == 1000
    assert max_positions({"pretrained": "demo-64k", "max_model_len": "1m"}) == 1048576
    with pytest.raises(ValueError, match="^max_length: 'long' is not a length"):
        max_positions({"max_length": "long"})


@pytest.mark.parametrize("key", ["tokenizer", "pretrained"])
@pytest.mark.parametrize("name", ["params.json", "config.json"])
def test_no_tokenizer_to_be_had(tmp_path, key, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer .* tokenizer=") as caught:
        load_tokenizer({key: str(tmp_path)})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_slow_tokenizers_are_refused(monkeypatch, tmp_path):
    class Slow:
        is_fast = False

    monkeypatch.setattr(
        evaluated_model.AutoTokenizer, "from_pretrained", lambda *args, **options: Slow()
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="^tokenizer: .*no fast tokenizer"):
        load_tokenizer({"pretrained": str(tmp_path)})


def test_no_code_of_a_tokenizer_is_run(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'run')!r}, 'w').close()\nclass Evil: ...")
    try:
        load_tokenizer({"pretrained": str(folder)})
    except ValueError:
        pass
    assert not (folder / "run").exists()
