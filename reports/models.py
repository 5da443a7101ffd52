"""Which model a results file is of, told apart from others as far as lm-eval's arguments tell.

Any difference in `--model_args` makes another model, unless it is known to change speed and memory
alone, or what is asked of the model, such as `max_length`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval.utils import simple_parse_args_string

# Arguments of lm-eval's backends that leave answers as they are, but for rounding; and secrets.
_HARMLESS = frozenset(
    """batch_size max_batch_size device devices device_map parallelize num_workers num_concurrent
    max_retries timeout max_memory_per_gpu max_cpu_memory offload_folder logits_cache prefill_chunk
    context_parallel tensor_parallel_size pipeline_parallel_size data_parallel_size tp_size dp_size
    gpu_memory_utilization mem_fraction_static swap_space cpu_offload_gb max_num_seqs
    max_num_batched_tokens enforce_eager enable_prefix_caching enable_chunked_prefill
    disable_log_stats disable_log_requests download_dir cache_dir local_files_only
    low_cpu_mem_usage verify_certificate ca_cert_path header token auth_token use_auth_token
    api_key""".split()
)
_SETTINGS = frozenset({"max_length", "max_model_len", "n_ctx"})  # of a run, not of a model
_DEFAULTS = {
    "revision": "main", "dtype": "auto", "load_in_4bit": "False", "load_in_8bit": "False",
    "trust_remote_code": "False",
}  # fmt: skip
# What is read of a model's cache, and in how many bits: what it then predicts is not what it would
# with all of it. In the order in which they are named, behind other arguments.
CACHE = ("sparse", "cache_dtype")
# By these a model is known even where there is no other to tell it from.
_TOLD = frozenset(
    "revision subfolder gguf_file peft delta lora_local_path load_in_4bit load_in_8bit".split()
).union(CACHE)
# A path, or the name of a folder that lm-eval made of it.
_SNAPSHOT = re.compile(r"models--([^/\\]+?)(?:[/\\]|__)snapshots(?:[/\\]|__)([0-9a-f]{7,64})$")
_DIGITS = 8  # of a commit


@dataclass(frozen=True)
class Model:
    """What tells a model apart.

    origin: a path, or a name on the hub or a server.
    args: other arguments that matter, by name, as text.
    commit: of the origin's repository, and of adapters'; None if the file does not tell.
    shown: the origin in short, for titles.
    """

    origin: str
    args: tuple[tuple[str, str], ...] = ()
    commit: str | None = None
    shown: str = field(default="", compare=False)

    def __str__(self) -> str:
        """All of it, for those who ask how two models differ."""
        return " ".join([self.origin, *(f"{name}={value}" for name, value in self.args)])


def model_args(data: dict[str, Any]) -> dict[str, Any]:
    """The `--model_args` of a results file, which it has as a text or as a mapping."""
    args = data["config"].get("model_args")
    if isinstance(args, str):
        try:
            parsed = json.loads(args) if args.lstrip().startswith("{") else None
        except (ValueError, RecursionError):
            parsed = None
        args = parsed if isinstance(parsed, dict) else simple_parse_args_string(args)
    return args if isinstance(args, dict) else {}


def identify(data: dict[str, Any]) -> Model:
    """The model of a results file."""
    config, args = data["config"], model_args(data)
    # An API takes `model` before `pretrained`. The yoco backend puts its bundled checkpoint, which
    # nobody names in the arguments, in the config. What lm-eval itself calls a model without a name
    # is drawn at random.
    named = next((key for key in ("model", "pretrained", "path", "engine") if args.get(key)), None)
    name = str(
        (named and args[named])
        or config.get("pretrained")
        or config.get("model")
        or data.get("model_name")
        or "model"
    )
    ignored = {named} | _HARMLESS | _SETTINGS
    if config.get("model") == "yoco":
        ignored.add("trust_remote_code")  # which has no effect there
    told = {str(key): _text(value) for key, value in args.items() if key not in ignored}
    told |= {key: _text(config.get(key)) for key in CACHE if config.get(key) is not None}
    told = {key: value for key, value in told.items() if value not in ("", _DEFAULTS.get(key))}
    commits = [config.get(key) for key in ("model_sha", "peft_sha", "delta_sha")]
    origin = os.path.normpath(name) if named != "model" else name
    shown = name if named == "model" else Path(name).name or name
    if snapshot := find_snapshot(origin):
        origin, commits[0] = snapshot
        shown = origin
    commit = " ".join(one for one in commits if isinstance(one, str) and one)
    ordered = [*sorted(told.keys() - CACHE), *(key for key in CACHE if key in told)]
    return Model(origin, tuple((key, told[key]) for key in ordered), commit or None, shown)


def find_snapshot(path: str) -> tuple[str, str] | None:
    """The repository and the commit of a snapshot in the hub's cache; None of any other path."""
    match = _SNAPSHOT.search(path)
    return (match[1].replace("--", "/", 1), match[2]) if match else None


def name_folders(folders: Sequence[str]) -> list[str]:
    """The names of folders of results; of those of the hub's snapshots their repositories."""
    found = [find_snapshot(folder) or (folder, "") for folder in folders]
    names = [name for name, _ in found]
    return [
        f"{name} {commit[:_DIGITS]}" if commit and names.count(name) > 1 else name
        for name, commit in found
    ]


def settle(models: Sequence[Model]) -> list[Model]:
    """The models, oldest first; one whose commit is not told is taken for the newest that is."""
    newest = {(model.origin, model.args): model.commit for model in models if model.commit}
    return [
        replace(model, commit=model.commit or newest.get((model.origin, model.args)))
        for model in models
    ]


def name_models(models: Sequence[Model]) -> dict[Model, str]:
    """Names for titles, with what differs: another folder, other arguments, another commit."""
    models = list(dict.fromkeys(models))
    names = {}
    for model in models:
        alike = [other for other in models if other.origin == model.origin]
        differing = {key for other in alike for key, _ in set(other.args) ^ set(model.args)}
        told = [f"{key}={value}" for key, value in model.args if key in _TOLD or key in differing]
        if model.commit and len({other.commit for other in alike}) > 1:
            told.append(" ".join(one[:_DIGITS] for one in model.commit.split()))
        others = {other.origin for other in models if other.shown == model.shown}
        names[model] = " ".join([_tail(model, others - {model.origin}), *told])
    return names


def _tail(model: Model, others: set[str]) -> str:
    """The model's short name, with as many of the folders before it as tell it from the others."""
    if not others:
        return model.shown
    parts = Path(model.origin).parts
    for taken in range(1, len(parts)):
        if all(Path(other).parts[-taken:] != parts[-taken:] for other in others):
            return "/".join(parts[-taken:])
    return model.origin


def _text(value: Any) -> str:
    if value is None:
        return ""
    try:
        return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
    except (ValueError, TypeError, RecursionError):
        return repr(type(value))
