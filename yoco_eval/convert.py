"""Converts a checkpoint of any layout to the native folder, tokenizer included."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from yoco_eval.model.checkpoint import (
    CheckpointError,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from yoco_eval.model.families import family_name, open_folder
from yoco_eval.model.folder import GENERATION, end_tokens
from yoco_eval.model.hub import hub_commit
from yoco_eval.tokenizers import (
    check_ends,
    check_vocabulary,
    checkpoint_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    src: str | Path,
    dst: str | Path,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> Path:
    """Writes the checkpoint `src` as a native folder `dst`, which appears only once it is whole.

    Args:
        src: a checkpoint of any layout that `load_checkpoint` reads, or its name on the hub.
        dst: the folder to write; it must not exist, or be empty.
        tokenizer: whatever `load_tokenizer` takes; None for the one beside `src`, or for
            cl100k_base where there is none and the vocabulary is the published models'.
        max_length: the context length to state, in tokens; None for what `src` states.
        dtype: "float32", "bfloat16" or "float16", to store the weights in; None to keep theirs.
        revision: of a name on the hub.

    Returns:
        The absolute path of `dst`.

    Raises:
        CheckpointError: `src` cannot be used, or `dst` not written.
        TokenizerError: there is no tokenizer, or not one that fits the model.
    """
    dst = Path(dst).expanduser().resolve()
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise CheckpointError(f"{dst}: already exists; name a new folder, or empty this one")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype}: unknown; choose from {', '.join(DTYPES)}")
    if max_length is not None and max_length < 1:
        raise CheckpointError(f"max_length={max_length}: give a positive number of tokens")
    chosen = None if tokenizer is None else load_tokenizer(tokenizer)

    path = resolve_checkpoint(src, revision)
    if other := open_folder(path):
        raise CheckpointError(
            f"{src}: needs no conversion; folders of {family_name(other.config)} are evaluated as "
            f"they are, with lm_eval --model yoco --model_args pretrained={src}"
        )
    kind = None if dtype is None else DTYPES[dtype]
    config, weights = load_checkpoint(src, kind, hub_commit(path))
    if chosen is None:
        chosen = checkpoint_tokenizer(path, config.vocab_size)
    else:
        check_vocabulary(chosen, config.vocab_size)
    check_ends(chosen)
    ends = end_tokens(path, config.vocab_size)
    if max_length is not None:
        config = dataclasses.replace(config, max_position_embeddings=max_length)
    if dtype is not None:
        for name in weights:  # in place, so that only one copy of the model is held
            weights[name] = weights[name].to(DTYPES[dtype])

    partial = dst.with_name(f".{dst.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_checkpoint(partial, config, weights)
        save_tokenizer(chosen, partial, config.max_position_embeddings)
        if ends - {chosen.eos_token_id}:
            content = json.dumps({"eos_token_id": sorted(ends)})
            (partial / GENERATION).write_text(content + "\n", encoding="utf-8")
        if dst.exists():
            dst.rmdir()  # it is empty; Windows would not replace it
        os.replace(partial, dst)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{dst}: cannot be written ({reason}); make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dst
