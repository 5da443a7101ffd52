"""What a task must know of the evaluated model: its tokenizer, and how many tokens it is given.

Where lm-eval evaluates, the model is there before the tasks are, and tells both itself. A task that
is loaded by itself goes by its metadata, in which lm-eval puts the arguments of the backend
(`--model_args`), whichever it is.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from yoco_eval import registration
from yoco_eval.lengths import parse_length
from yoco_eval.tokenizers import ENCODINGS, checkpoint_tokenizer
from yoco_eval.tokenizers import load_tokenizer as load_any_tokenizer

from .prompts import TokenCounter

logger = logging.getLogger(__name__)

# Where configurations hold that of the text model, and under which names it has its positions:
# first those that lm-eval's own rule knows, in its order.
_NESTED = ("text_config", "llm_config", "language_config")
_POSITIONS = (
    "n_positions", "max_position_embeddings", "n_ctx", "seq_length", "max_sequence_length",
    "max_seq_len",
)  # fmt: skip
# Backends that have a `max_length` and never look at it: their servers get texts.
_SENT_AS_TEXT = {"AnthropicLM", "GGUFLM", "TextSynthLM"}
# What backends call the longest context in their arguments.
_ARGUMENTS = ("max_length", "max_model_len", "context_length", "seq_length", "max_input_len")


def load_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The evaluated model's tokenizer.

    It is the `tokenizer` that the user names for the tasks, else the model's own where lm-eval has
    made the model, else that of the name `pretrained` or `model` in its arguments.

    Raises:
        ValueError: nothing tells which it is; it cannot be loaded; or it cannot tell where its
            tokens are in the text.
    """
    own = getattr(evaluated(), "tokenizer", None)
    for_tasks = metadata.get("tokenizer") and "tokenizer" not in registration.given_model_args
    if not for_tasks and isinstance(own, PreTrainedTokenizerBase) and own.is_fast:
        return own
    named = [metadata.get(key) for key in ("tokenizer", "pretrained", "model")]
    encoding = getattr(own, "name", None)  # tiktoken's, as servers have it
    if not for_tasks and encoding in ENCODINGS:
        named = [encoding]
    name = next((name for name in named if name), None)
    if name is None:
        raise ValueError(
            "tokenizer: the evaluated model's is not known here, and prompts are sized with it; "
            'name it with --metadata tokenizer=NAME (in Python: metadata={"tokenizer": NAME})'
        )
    source = _locate(name)
    logger.info("prompts are sized with the tokenizer of %s", name)
    if name in ENCODINGS or metadata.get("tokenizer") and Path(name).is_file():
        return load_any_tokenizer(name)
    if isinstance(source, Path):
        config = _read_config(source)
        # Other models' folders go to AutoTokenizer, as their backends do.
        foreign = (source / "config.json").is_file() and config.get("model_type") != "yoco"
        foreign = foreign or bool(metadata.get("subfolder"))
        if not foreign and "vocab_size" in config:
            return checkpoint_tokenizer(source, config["vocab_size"])
        if not foreign and not (source / "tokenizer_config.json").is_file():
            return load_any_tokenizer(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=metadata.get("revision") or "main",
            subfolder=metadata.get("subfolder") or "",
            trust_remote_code=metadata.get("trust_remote_code") in (True, "True", "true"),
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
    add_bos_token = getattr(evaluated(), "add_bos_token", metadata.get("add_bos_token"))
    return TokenCounter(load_tokenizer(metadata), bool(add_bos_token))


def max_positions(metadata: Mapping[str, Any], scored: bool = False) -> int | None:
    """The longest context in tokens, prompt and answer together.

    It is what the model's backend leaves whole, by its own rule, where lm-eval has made the model;
    else what the user says (under any backend's name for it), which may be beyond the trained
    length; else what the model's configuration says. None if nothing tells.

    Args:
        scored: whether the backend is asked for log-likelihoods, not for answers.

    Raises:
        ValueError: the user's is not a length.
    """
    if (kept := _kept_whole(evaluated(), scored)) is not None:
        return None if kept == sys.maxsize else kept
    for key in _ARGUMENTS:
        if metadata.get(key):
            try:
                return parse_length(metadata[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    name = metadata.get("pretrained")
    return _stated_positions(_config(name, metadata)) if name else None


def check_positions(
    context_lengths: Sequence[int], metadata: Mapping[str, Any], scored: bool = False
) -> None:
    """Raises ValueError if the longest context has more tokens than `max_positions`."""
    longest, positions = max(context_lengths), max_positions(metadata, scored)
    if positions is None or longest <= positions:
        return
    beyond, mend = f"the model's {positions} positions", f"max_length={longest}"
    model = evaluated()
    if _kept_whole(model, scored) is not None:
        beyond = f"{positions} tokens, beyond which the backend cuts prompts"
        known = inspect.signature(type(model)).parameters
        name = next((name for name in _ARGUMENTS if name in known), "max_length")
        # lm-eval's servers take one off what they are given.
        mend = f"{name}={longest + hasattr(model, 'tokenized_requests')}"
    raise ValueError(
        f"context_lengths: {longest} exceeds {beyond}; give shorter ones, or allow it with "
        f"--model_args {mend}"
    )


def hidden_size(metadata: Mapping[str, Any]) -> int | None:
    """The channels between the model's layers, where its configuration tells them."""
    name = metadata.get("pretrained")
    config = _config(name, metadata) if name else {}
    for part in [*(config.get(key) for key in _NESTED), config]:
        if isinstance(part, dict) and isinstance(size := part.get("hidden_size"), int) and size > 0:
            return size
    return None


def evaluated() -> LM | None:
    """The model that lm-eval evaluates, where it is known."""
    [model] = registration.evaluated or [None]
    return model.lm if isinstance(model, CachingLM) else model


def _kept_whole(model: LM | None, scored: bool) -> int | None:
    """The tokens of context and continuation that a backend does not cut; None if it cuts none."""
    if {kind.__name__ for kind in type(model).__mro__} & _SENT_AS_TEXT:
        return None
    if not scored and not getattr(model, "tokenized_requests", True):
        return None
    kept = getattr(model, "max_length", None)
    return kept if isinstance(kept, int) else None


def _config(name: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model by name; {} if there is none."""
    source, subfolder = _locate(name), metadata.get("subfolder") or ""
    if isinstance(source, Path):
        return _read_config(source / subfolder)
    options = {"revision": metadata.get("revision") or "main", "subfolder": subfolder}
    try:
        return PretrainedConfig.get_config_dict(source, **options)[0]
    except (OSError, ValueError):
        return {}


def _stated_positions(config: Mapping[str, Any]) -> int | None:
    """The positions that a model's configuration states; None if it does not.

    YaRN's factor counts from `original_max_position_embeddings`; whether the positions beside it
    are those, or already the extended ones, differs from model to model.
    """
    for part in [*(config.get(key) for key in _NESTED), config]:
        if not isinstance(part, dict):
            continue
        stated = (part.get(key) for key in _POSITIONS)
        positions = next((n for n in stated if isinstance(n, int) and n > 0), None)
        if positions is None:
            continue
        rope = part.get("rope_scaling") or part.get("rope_parameters")
        if isinstance(rope, dict) and "yarn" in (rope.get("rope_type"), rope.get("type")):
            original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
            if isinstance(original, int) and isinstance(factor, int | float):
                positions = max(positions, int(original * factor))
        return positions
    return None


def _bundled() -> Path:
    """The folder of the bundled checkpoints, found without importing the model's code."""
    spec = find_spec("yoco_eval.model")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "checkpoints")


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
