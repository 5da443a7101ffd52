import base64
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from yoco_eval import convert as module
from yoco_eval.convert import convert
from yoco_eval.lm import YocoLM
from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig, load, save
from yoco_eval.model.checkpoint import CheckpointError, load_checkpoint
from yoco_eval.model.folder import end_tokens
from yoco_eval.tokenizers import TokenizerError, checkpoint_tokenizer, save_tokenizer

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
TEXT = "No. 48 is  Lisbon 's , they say ."


def write_tokenizer(folder, size):
    """A tokenizer of `size` ids: four special ones, letters of ASCII, then fillers."""
    letters = [chr(c) for c in range(32, 127)]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *(f"[{i}]" for i in range(size))][:size]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    save_tokenizer(wrapped, folder)
    return wrapped


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 96)
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    return folder


@pytest.mark.parametrize("kind", ["gated_retention", "sliding_window"])
def test_published_checkpoints(kind, small, tmp_path):
    source = PUBLISHED / kind
    dst = convert(source, tmp_path / "new" / kind, tokenizer=small)
    assert dst == tmp_path / "new" / kind
    config, weights = load_checkpoint(source)
    new_config, new_weights = load_checkpoint(dst)
    assert new_config == config
    assert new_weights.keys() == weights.keys()
    assert all(torch.equal(new_weights[name], weights[name]) for name in weights)

    expected = torch.load(source / "expected.pt", weights_only=True)
    model = load(dst)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(expected["input_ids"]), expected["logits"], atol=1e-4, rtol=0
        )

    tokenizer, original = AutoTokenizer.from_pretrained(dst), AutoTokenizer.from_pretrained(small)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.special_tokens_map == original.special_tokens_map
    assert tokenizer.encode(TEXT) == original.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT), skip_special_tokens=True) == TEXT
    assert {file.suffix for file in dst.iterdir()} == {".json", ".safetensors"}
    assert os.listdir(dst.parent) == [kind]


def test_length_and_dtype(small, tmp_path, hub_cache):
    source = PUBLISHED / "gated_retention"
    dst = convert(source, tmp_path / "a", tokenizer=small, max_length=65536, dtype="bfloat16")
    config, weights = load_checkpoint(dst)
    assert config.max_position_embeddings == 65536
    assert AutoTokenizer.from_pretrained(dst).model_max_length == 65536
    _, originals = load_checkpoint(source)
    for name, weight in weights.items():
        assert torch.equal(weight, originals[name].to(torch.bfloat16))

    # Once more, from the native folder on the hub: its own tokenizer and length are kept.
    hub_cache("org/model", dst, "1" * 40, branch="v1")
    again = convert("org/model", tmp_path / "b", dtype="float32", revision="v1")
    config, weights = load_checkpoint(again)
    assert config.max_position_embeddings == 65536
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(again)
    assert tokenizer.model_max_length == 65536
    assert tokenizer.encode(TEXT) == AutoTokenizer.from_pretrained(small).encode(TEXT)


def test_training_checkpoint_with_the_tokenizer_beside_it(tmp_path):
    source = PUBLISHED / "sliding_window"
    _, weights = load_checkpoint(source)
    run = tmp_path / "run"
    tokenizer = write_tokenizer(run, 90)
    (run / "params.json").write_text((source / "params.json").read_text())
    model = {f"decoder.{name}": weight for name, weight in weights.items()}
    torch.save({"model": model, "extra_state": {"epoch": 3}}, run / "checkpoint_last.pt")
    dst = convert(run / "checkpoint_last.pt", tmp_path / "dst")
    _, new_weights = load_checkpoint(dst)
    assert all(torch.equal(new_weights[name], weights[name]) for name in weights)
    assert AutoTokenizer.from_pretrained(dst).get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_a_vocabulary_of_the_published_size_needs_no_network(tmp_path, monkeypatch):
    """transformers asks the hub about vocabularies of more than 100 000 tokens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tokens = [*(bytes([b]) for b in range(256)), *(b"%05d" % i for i in range(100_000))]
    ranks = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    (tmp_path / "cl100k_base.tiktoken").write_text("".join(ranks))
    config = YocoConfig(
        dim=8,
        n_layers=2,
        hidden_dim=8,
        self_decoder=GatedRetentionSettings(n_self_heads=1),
        n_attn_heads=1,
        n_attn_kv_heads=1,
        vocab_size=100288,
    )
    save(Yoco(config), tmp_path)
    dst = convert(tmp_path, tmp_path / "dst")
    lm = YocoLM(pretrained=str(dst), device="cpu")
    text = "a <filename> b <jupyter_code>"
    ids = [0, 101, 36, 100273, 36, 102, 36, 100280]
    assert lm.tok_encode(text) == ids and lm.tokenizer.decode(ids[1:]) == text
    (dst / "tokenizer_config.json").unlink()
    assert checkpoint_tokenizer(dst, 100288).encode(text) == ids


def test_a_tokenizer_that_neither_begins_nor_ends_a_text_is_refused(tmp_path):
    Tokenizer(models.BPE({"N": 0, "o": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="tokenizer.json: does not say which token begins or"):
        convert(PUBLISHED / "sliding_window", tmp_path / "dst", tokenizer=tmp_path)
    assert not (tmp_path / "dst").exists()


def test_what_ends_texts_is_taken_along(small, tmp_path):
    source = convert(PUBLISHED / "gated_retention", tmp_path / "source", tokenizer=small)
    for ends, written in ([2], False), ([2, 5], True):
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        dst = convert(source, tmp_path / str(written))
        assert (dst / "generation_config.json").exists() == written
    assert end_tokens(dst, 96) == {2, 5}


@pytest.mark.parametrize("state", ["file", "full"])
def test_destination_is_never_overwritten(state, small, tmp_path):
    dst = tmp_path / "dst"
    if state == "full":
        dst.mkdir()
    mine = dst / "mine.txt" if state == "full" else dst
    mine.write_text("mine")
    with pytest.raises(CheckpointError, match=f"{dst}: already exists"):
        convert(PUBLISHED / "gated_retention", dst, tokenizer=small)
    assert mine.read_text() == "mine"
    assert os.listdir(tmp_path) == ["dst"]


def test_empty_destination_is_used(small, tmp_path):
    (tmp_path / "dst").mkdir()
    convert(PUBLISHED / "gated_retention", tmp_path / "dst", tokenizer=small)
    assert (tmp_path / "dst" / "config.json").exists()
    assert os.listdir(tmp_path) == ["dst"]


def test_nothing_is_written_on_bad_input(small, tmp_path):
    source, dst = PUBLISHED / "gated_retention", tmp_path / "out" / "dst"
    large = tmp_path / "large"
    write_tokenizer(large, 97)
    with pytest.raises(TokenizerError, match="large: its 97 token ids exceed .* 96"):
        convert(source, dst, tokenizer=large)
    with pytest.raises(TokenizerError, match="gated_retention: no tokenizer.*--tokenizer"):
        convert(source, dst)
    with pytest.raises(TokenizerError, match="no such tokenizer"):
        convert(source, dst, tokenizer=tmp_path / "none")
    with pytest.raises(CheckpointError, match="none"):
        convert(tmp_path / "none", dst, tokenizer=small)
    with pytest.raises(CheckpointError, match="int3: unknown; choose from float32, bfloat16"):
        convert(source, dst, tokenizer=small, dtype="int3")
    with pytest.raises(CheckpointError, match="max_length=0"):
        convert(source, dst, tokenizer=small, max_length=0)
    assert os.listdir(tmp_path) == ["large"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_nothing(failure, small, tmp_path, monkeypatch):
    dst = tmp_path / "dst"

    def fail(*args):
        assert os.listdir(tmp_path) != []
        assert not dst.exists()  # so that a kill leaves no half of it
        raise failure

    monkeypatch.setattr(module, "save_tokenizer", fail)
    error = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CheckpointError
    with pytest.raises(error) as raised:
        convert(PUBLISHED / "gated_retention", dst, tokenizer=small)
    if error is CheckpointError:
        assert str(raised.value).startswith(f"{dst}: cannot be written (No space left on device)")
    assert os.listdir(tmp_path) == []


def test_config_is_json_for_the_native_layout(small, tmp_path):
    dst = convert(PUBLISHED / "sliding_window", tmp_path / "dst", tokenizer=small)
    config = json.loads((dst / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("yoco", 32)


def test_weights_that_are_or_become_no_numbers_are_not_written(small, tmp_path):
    source = Path(shutil.copytree(PUBLISHED / "gated_retention", tmp_path / "source"))
    weights = torch.load(source / "checkpoint.pth", weights_only=True)
    for value, dtype, complaint in ((float("nan"), None, "NaN"), (1e5, "float16", "too large")):
        weights["layer_norm.weight"][0] = value
        torch.save(weights, source / "checkpoint.pth")
        with pytest.raises(CheckpointError, match=f"{complaint}.* in layer_norm.weight"):
            convert(source, tmp_path / "converted", tokenizer=small, dtype=dtype)
        assert not (tmp_path / "converted").exists()
    convert(source, tmp_path / "converted", tokenizer=small, dtype="bfloat16")
