"""What a task must know of the evaluated model: its tokenizer, and how many positions it has.

lm-eval hands a task the arguments of the backend (`--model_args`) in its metadata, whichever the
backend is. Nothing here loads the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from yoco_eval.lengths import parse_length
from yoco_eval.tokenizers import ENCODINGS, checkpoint_tokenizer
from yoco_eval.tokenizers import load_tokenizer as load_any_tokenizer

from .prompts import TokenCounter

logger = logging.getLogger(__name__)


def load_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The evaluated model's tokenizer: `tokenizer`, else that of `pretrained`, else of `model`.

    Without any of these it is the default bundled checkpoint's, as for `--model yoco`.

    Raises:
        ValueError: it cannot be loaded, or it cannot tell where its tokens are in the text.
    """
    names = (metadata.get(key) for key in ("tokenizer", "pretrained", "model"))
    name = next((name for name in names if name), None) or _default_checkpoint()
    source = _locate(name)
    logger.info("prompts are sized with the tokenizer of %s", name)
    if metadata.get("tokenizer") and (Path(name).is_file() or name in ENCODINGS):
        return load_any_tokenizer(name)
    if isinstance(source, Path):
        config = _read_config(source)
        # Other models' folders go to AutoTokenizer, as their backends do.
        foreign = (source / "config.json").is_file() and config.get("model_type") != "yoco"
        if not foreign and "vocab_size" in config:
            return checkpoint_tokenizer(source, config["vocab_size"])
        if not foreign and not (source / "tokenizer_config.json").is_file():
            return load_any_tokenizer(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=metadata.get("revision") or "main", trust_remote_code=False
        )
    except Exception as error:  # the libraries raise whatever their readers do
        raise ValueError(
            f"tokenizer: {name} has no tokenizer that can be loaded; name another one with "
            "--metadata tokenizer=NAME"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: {name} has no fast tokenizer, which sizing prompts takes; name another "
            "one with --metadata tokenizer=NAME"
        )
    return tokenizer


def token_counter(metadata: Mapping[str, Any]) -> TokenCounter:
    """Counts tokens as the evaluated model's backend will.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    return TokenCounter(load_tokenizer(metadata), bool(metadata.get("add_bos_token")))


def max_positions(metadata: Mapping[str, Any]) -> int | None:
    """The longest context in tokens: what the user says, else what the model's configuration says.

    A user's `max_length` (`max_model_len` is vLLM's name of it, `context_length` SGLang's) may be
    beyond the trained length.
    None if neither tells.

    Raises:
        ValueError: the user's is not a length.
    """
    for key in ("max_length", "max_model_len", "context_length"):
        if metadata.get(key):
            try:
                return parse_length(metadata[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    name = metadata.get("pretrained")
    if not name:
        if metadata.get("tokenizer") or metadata.get("model"):
            return None
        name = _default_checkpoint()
    source = _locate(name)
    if isinstance(source, Path):
        config = _read_config(source)
    else:
        try:
            config, _ = PretrainedConfig.get_config_dict(source)
        except (OSError, ValueError):
            return None
    config = {**config.get("text_config", {}), **config}
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(config.get(key), int) and config[key] > 0:
            return config[key]
    return None


def check_positions(context_lengths: Sequence[int], positions: int | None) -> None:
    """Raises ValueError if the longest context has more tokens than the model has positions."""
    longest = max(context_lengths)
    if positions is not None and longest > positions:
        raise ValueError(
            f"context_lengths: {longest} exceeds the model's {positions} positions; give shorter "
            f"ones, or allow it with --model_args max_length={longest}"
        )


def _default_checkpoint() -> str:
    return (_bundled() / "DEFAULT").read_text(encoding="utf-8").strip()


def _bundled() -> Path:
    """The folder of the bundled checkpoints, found without importing the model's code."""
    [folder] = find_spec("yoco_eval.model").submodule_search_locations
    return Path(folder, "checkpoints")


def _locate(name: Any) -> Path | str:
    """The folder of a local or bundled checkpoint; any other name as it is."""
    path = Path(str(name)).expanduser()
    if path.exists():
        return path if path.is_dir() else path.parent
    if (_bundled() / str(name)).is_dir():
        return _bundled() / str(name)
    return str(name)


def _read_config(folder: Path) -> dict[str, Any]:
    """A model's configuration, in the Hugging Face or the published layout; {} if there is none."""
    for file in (folder / "config.json", folder / "params.json"):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return {}
