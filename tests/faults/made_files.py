"""What the fuzzer starts from: small whole files of every kind that the project reads."""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
from pathlib import Path

import torch
from made_results import log_samples, needle_results, results, write
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from yoco_eval.model import GatedRetentionSettings, SlidingWindowSettings, Yoco, YocoConfig, save
from yoco_eval.model import checkpoint as checkpoints
from yoco_eval.model.gemma3n import Gemma3n
from yoco_eval.model.gemma3n_config import Gemma3nConfig
from yoco_eval.model.gemma4 import Gemma4
from yoco_eval.model.gemma4_config import Gemma4Config
from yoco_eval.reports.profile import Profile, ProfileRow
from yoco_eval.reports.profile_files import save_profile
from yoco_eval.tokenizers import save_tokenizer

DATA = Path(__file__).parents[1] / "data"
FLA = DATA / "fla"
VOCABULARY = 320
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_files(folder: Path) -> None:
    """Writes to `folder`: checkpoints/LAYOUT, tokenizers/KIND, results and profiles."""
    torch.manual_seed(0)
    for window in (None, 8):
        config = YocoConfig(
            dim=16,
            n_layers=4,
            hidden_dim=24,
            self_decoder=SlidingWindowSettings(2, window) if window else GatedRetentionSettings(2),
            n_attn_heads=4,
            n_attn_kv_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
        )
        model = Yoco(config).requires_grad_(False)
        _checkpoints(folder / "checkpoints", model, "window" if window else "retention")
    for name in ("deltanet_bare", "deltanet_value_heads"):
        fla = folder / "checkpoints" / f"fla-{name}"
        shutil.copytree(FLA / name, fla, ignore=shutil.ignore_patterns("expected.pt"))
        _letters(fla, json.loads((fla / "config.json").read_text())["vocab_size"])
    _gemma3n(folder / "checkpoints" / "gemma3n")
    _gemma4(folder / "checkpoints" / "gemma4")
    _phi4flash(folder / "checkpoints" / "phi4flash")
    _tokenizers(folder / "tokenizers")
    _results(folder / "results")
    _profile(folder / "profiles")


def _checkpoints(folder: Path, model: Yoco, kind: str) -> None:
    native, sharded = folder / f"native-{kind}", folder / f"sharded-{kind}"
    save(model, native)
    (native / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    whole = checkpoints.save_torch_state_dict
    checkpoints.save_torch_state_dict = lambda *args: whole(*args, max_shard_size=20_000)
    try:
        save(model, sharded)
    finally:
        checkpoints.save_torch_state_dict = whole
    weights = dict(model.state_dict())
    settings = model.config.to_dict()
    params = {k: v for k, v in settings.items() if k != "max_position_embeddings"}
    for zipped in (True, False):
        published = folder / f"published-{kind}-{'zip' if zipped else 'legacy'}"
        published.mkdir()
        (published / "params.json").write_text(json.dumps({**params, "max_seq_len": 512}))
        torch.save(weights, published / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    fairseq = folder / f"fairseq-{kind}"
    fairseq.mkdir()
    cfg = {"model": argparse.Namespace(**params), "task": {"tokens_per_sample": 512}}
    torch.save({"model": weights, "cfg": cfg}, fairseq / "checkpoint_last.pt")
    for each in (native, sharded, published.with_name(f"published-{kind}-zip"), published, fairseq):
        _letters(each)


def _gemma3n(folder: Path) -> None:
    """A whole folder, with a text model of a few layers in it."""
    kinds = ["sliding_attention", "full_attention"]
    settings = {
        "vocab_size": VOCABULARY, "vocab_size_per_layer_input": 300, "hidden_size": 16,
        "hidden_size_per_layer_input": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "intermediate_size": [24, 16, 16, 24], "laurel_rank": 2,
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [*kinds, *kinds],
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0], "sliding_window": 6,
        "final_logit_softcapping": 30.0, "max_position_embeddings": 512, "rope_theta": 1000.0,
        "rms_norm_eps": 1e-6, "altup_num_inputs": 3, "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    config = Gemma3nConfig.from_dict(settings)
    model = Gemma3n.empty(config, torch.device("cpu"), torch.float32)
    weights = {
        f"model.language_model.{name}": torch.randn(weight.shape)
        for name, weight in model.named_parameters()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    whole = {"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text", **settings}}
    (folder / "config.json").write_text(json.dumps({**whole, "tie_word_embeddings": True}))
    _letters(folder)


def _gemma4(folder: Path) -> None:
    """A folder of the language model alone."""
    kinds = ["sliding_attention", "full_attention"]
    settings = {
        "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": 16,
        "hidden_size_per_layer_input": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "intermediate_size": 24, "use_double_wide_mlp": True,
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [*kinds, *kinds],
        "sliding_window": 6, "final_logit_softcapping": 30.0, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}},
        "rope_parameters": {
            kinds[0]: {"rope_type": "default", "rope_theta": 1000.0},
            kinds[1]: {
                "rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25
            },
        },
    }  # fmt: skip
    model = Gemma4.empty(Gemma4Config.from_dict(settings), torch.device("cpu"), torch.float32)
    weights = {
        f"model.{name}": torch.randn(weight.shape) for name, weight in model.named_parameters()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4_text", **settings}))
    _letters(folder)


def _phi4flash(folder: Path) -> None:
    shutil.copytree(DATA / "phi4flash", folder, ignore=shutil.ignore_patterns("expected.pt"))
    _letters(folder, json.loads((folder / "config.json").read_text())["vocab_size"])


def _tokenizers(folder: Path) -> None:
    _letters(folder / "json")
    tiktoken = folder / "tiktoken"
    tiktoken.mkdir()
    pieces = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"in", b"er"]
    (tiktoken / "small.tiktoken").write_text(
        "".join(f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(pieces))
    )
    sentencepiece = folder / "sentencepiece"
    sentencepiece.mkdir()
    for name in ("BPE", "UNIGRAM"):
        proto = import_protobuf().ModelProto()
        kinds = proto.SentencePiece
        special = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
        letters = [(c, kinds.NORMAL) for c in ("▁", "▁t", *map(chr, range(33, 127)), "th", "▁th")]
        for i, (piece, kind) in enumerate(special + letters):
            proto.pieces.add(piece=piece, score=-float(i), type=kind)
        proto.trainer_spec.model_type = getattr(proto.trainer_spec, name)
        proto.trainer_spec.pad_id = -1
        (sentencepiece / f"{name.lower()}.model").write_bytes(proto.SerializeToString())


def _letters(folder: Path, size: int = VOCABULARY) -> None:
    """Writes a tokenizer of single letters with a chat template, and of `size` tokens at most."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(32, 127)), "th", "the"][:size]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("t", "h"), ("th", "e")] if "the" in vocabulary else []
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(wrapped, folder, 512)
    # transformers keeps a template in a file of its own; older versions wrote it here.
    template = folder / "chat_template.jinja"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template.unlink(missing_ok=True)


def _results(folder: Path) -> None:
    for model, right in (("early", 0.5), ("late", 0.9)):
        grid = needle_results(
            lambda length, depth, right=right: right,
            model,
            draws=model,
            lengths=[4096, 16384],
            depths=[0, 0.5, 1],
            samples=3,
        )
        log_samples(write(folder / model / "needles", grid))
        scores = {
            "arc_easy": {"alias": "arc_easy", "acc,none": right, "acc_stderr,none": 0.02},
            "both": {"alias": "both", "acc,none": right, "acc_stderr,none": 0.01},
            "yoco_long_loss_book": {
                "loss,none": 2.0, "loss@0004096,none": 2 - right, "loss_to@0004096,none": 2.1,
            },
        }  # fmt: skip
        loss = {"metadata": {"by_length": ["loss", "loss_to"], "prompts": {"4096": "0badcafe"}}}
        others = results(
            scores,
            model,
            date=1.8e9,
            group_subtasks={"both": ["arc_easy"]},
            configs={"arc_easy": {}, "yoco_long_loss_book": loss},
        )
        write(folder / model / "others", others, "results_2027-01-01T00-00-00.json")
        _profile(folder / model)


def _profile(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in ("YOCO", "Transformer"):
        rows += [
            ProfileRow(model, 32768, "measured", 2**30, 2**28, 2**31, 0.5, 90.0),
            ProfileRow(model, 65536, "out of memory", 2**30, 2**29),
        ]
    profile = Profile(
        name="3b",
        shapes={"YOCO": {"dim": 3072}, "Transformer": {"dim": 3072}},
        dtype="bfloat16",
        device="a card",
        device_bytes=2**36,
        versions={"torch": "2.6.0"},
        prefill_chunk=8192,
        decode_steps=16,
        patience=120.0,
        seed=0,
        rows=tuple(rows),
    )
    save_profile(profile, folder / "profile.json")


def files_below(folder: Path) -> list[Path]:
    """All files in the folder and its subfolders, in one order on every machine."""
    found = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(found)
