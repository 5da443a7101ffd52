"""Checkpoints in and out: the native folder, the published layout, fairseq training checkpoints.

Nothing that a file says is executed: safetensors hold no code, and pickles are read by PyTorch's
weights-only reader, which knows tensors and plain containers. A training checkpoint may hold a few
more kinds of objects; those are read as empty shells.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from yoco_eval.printable import VALUE, listed, shortened, shown

from .config import YocoConfig, known_settings
from .errors import CheckpointError
from .fla import fla_config, fla_name, fla_weights, is_fla
from .folder import (
    BOOKKEEPING,
    CONFIG,
    WEIGHTS,
    check_names,
    check_numbers,
    check_regular,
    damaged,
    is_folder,
    read_json,
    read_weights,
)
from .hub import hub_commit, hub_folder, is_hub_name
from .interface import Blueprint
from .yoco import Yoco

BUNDLED = Path(__file__).parent / "checkpoints"
DEFAULT_CHECKPOINT = (BUNDLED / "DEFAULT").read_text(encoding="utf-8").strip()

MODEL_TYPE = "yoco"
_PARAMS = "params.json"
_ADAPTER = "adapter_config.json"  # of a LoRA, which peft has trained
_ENCRYPTED = 1  # a zip record's flag
_MOST_UNPACKED = 20  # times the size of a compressed file; weights hardly shrink
# What stands in training checkpoints beside the weights and is never needed, or only for its
# attributes. A shell takes its place, so that not even these names are looked up.
_HARMLESS = re.compile(
    r"argparse\.Namespace|(fairseq|omegaconf|numpy|pathlib|enum|typing)\..+|_codecs\.encode"
    r"|collections\.(defaultdict|deque)"
    r"|builtins\.(bool|bytearray|complex|dict|float|frozenset|int|list|object|set|slice|str|tuple)"
)


class _Shell:
    """Stands for an object of a pickle: takes any arguments and state, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Shell:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _shell(name: str) -> tuple[Callable[..., Any], str]:
    """What to call where a pickle says `name`; the reader fills plain lists and dicts only."""
    if name == "collections.defaultdict":
        return (lambda *args: {}), name
    if name == "collections.deque":
        return (lambda *args: []), name
    return type("Shell", (_Shell,), {}), name


def resolve_checkpoint(
    name: str | Path, revision: str | None = None, weights: bool = False
) -> Path:
    """The path of a checkpoint given by path, by the name of a bundled one, or by one on the hub.

    Args:
        name: looked for in this order. On the hub (`hub_folder`) it is `org/name`, as a text.
        revision: a branch, a tag or a commit of a name on the hub; None for its main branch.
        weights: whether those of a name on the hub are fetched, too: to be asked for once it is
            known that they can be used, at the commit (`hub_commit`) of which that is known.

    Raises:
        CheckpointError: there is none, or it has no such revision.
    """
    path = Path(os.path.expanduser(name))
    bundled = sorted(folder.name for folder in BUNDLED.iterdir() if folder.is_dir())
    found = path if os.path.exists(path) else None  # whatever the system has against such a name
    if found is None and str(name) in bundled:
        found = BUNDLED / str(name)
    if found is None and isinstance(name, str) and is_hub_name(name):
        return hub_folder(name, revision, weights)
    if found is None:
        raise CheckpointError(
            f"{shortened(str(name), VALUE)}: no such checkpoint; give a folder or file, a name on "
            f"the hub, org/name, or a bundled one: {', '.join(bundled)}"
        )
    if revision not in (None, hub_commit(found)):
        raise CheckpointError(
            f"{name}: has no revision {shown(revision)}, as names on the hub have; leave it out"
        )
    return found


def open_yoco(path: Path) -> Blueprint:
    """The model of a checkpoint of any layout of YOCO's, whose weights are read when it is made.

    Raises:
        CheckpointError: as `load_config`; and when it is made, as `load_checkpoint`.
    """
    config = load_config(path)

    def make(device: torch.device, dtype: torch.dtype) -> Yoco:
        return Yoco.of_weights(*load_checkpoint(path, dtype), device, dtype)

    return Blueprint(config, Yoco.costs_of(config), make)


def load_config(path: str | Path) -> YocoConfig:
    """Reads the configuration of a checkpoint of any layout alone.

    Weights stay unread where a `config.json` or `params.json` holds it. A fairseq checkpoint holds
    it beside the weights and is unpickled as a whole: fairseq files are mapped into memory, so that
    weights are not read from the disk, but those of PyTorch before 1.6 are read entirely.

    Raises:
        CheckpointError: as `load_checkpoint`, for faults that show without the weights.
    """
    path = resolve_checkpoint(path)
    if is_folder(path):
        return _native_config(path / CONFIG)
    file = _torch_file(path)
    params = file.parent / _PARAMS
    return _params_config(params) if params.exists() else _load_torch(file)[0]


def load_shape(path: Path) -> YocoConfig:
    """The configuration in a `config.json` or `params.json`; no weights need to be there.

    Args:
        path: of the file, whatever it is called but for `.json`, of its folder, or else what
            `load_config` takes.

    Raises:
        CheckpointError: as `load_config`.
    """
    if path.is_dir():
        path = next((path / name for name in (CONFIG, _PARAMS) if (path / name).exists()), path)
    if path.suffix != ".json":
        return load_config(path)
    return _native_config(path) if "model_type" in read_json(path) else _params_config(path)


def load_checkpoint(
    path: str | Path, dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[YocoConfig, dict[str, Tensor]]:
    """Reads a checkpoint of any layout, on the CPU, in the dtypes that it was stored in.

    Every weight is looked at once: none is NaN or infinite.

    Args:
        path: a native folder (`config.json`, `model.safetensors` or shards with an index), or one
            of flash-linear-attention's; a published folder (`params.json`, `checkpoint.pth`); a
            fairseq checkpoint file, or a folder that holds one `.pt` file; or the name of a bundled
            checkpoint, or of one on the hub.
        dtype: what the weights are going to be converted to, which must not make any infinite.
        revision: of a name on the hub.

    Returns:
        The configuration, and every parameter of `Yoco` by name, in the shape that it asks for.

    Raises:
        CheckpointError: no such path, no such layout, damaged or unsafe files, or parameters that
            are missing, surplus, of another shape or not finite numbers (they are named).
    """
    folder = resolve_checkpoint(path, revision)
    if commit := hub_commit(folder):
        load_config(folder)  # says that it is of another model before weights are fetched
    path = resolve_checkpoint(path, commit, weights=True)
    said: Callable[[str], str] = str
    if is_folder(path):
        config, weights, said = _load_native(path)
    else:
        config, weights = _load_torch(_torch_file(path))
    check_names(path, _expected_shapes(config), weights, said)
    check_numbers(path, {said(name): weight for name, weight in weights.items()}, dtype)
    return config, weights


def save_checkpoint(path: str | Path, config: YocoConfig, weights: Mapping[str, Tensor]) -> None:
    """Writes the native folder: weights as safetensors, in shards of 5 GB when large, then config.

    Files appear under their names only once they are whole, the configuration last.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": MODEL_TYPE, "architectures": ["Yoco"]}
    settings |= config.to_dict()
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():  # safetensors knows no tensors that share their memory
        storage = weight.untyped_storage()
        alone = storage.nbytes() == weight.nbytes and storage.data_ptr() not in seen
        whole[name] = weight.contiguous() if alone else weight.clone()
        seen.add(storage.data_ptr())
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as temporary:
        save_torch_state_dict(whole, temporary)
        files = os.listdir(temporary)
        Path(temporary, CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        for name in files:  # safetensors writes files that only their owner may read
            shutil.copymode(Path(temporary, CONFIG), Path(temporary, name))
        for name in sorted(files):
            os.replace(Path(temporary, name), path / name)
        for old in path.glob("model*.safetensors*"):
            if old.name not in files:  # the shards and the index of an earlier model
                old.unlink()
        os.replace(Path(temporary, CONFIG), path / CONFIG)


def save(model: Yoco, path: str | Path) -> None:
    """`save_checkpoint` of a model."""
    save_checkpoint(path, model.config, dict(model.named_parameters()))


def _native_config(file: Path) -> YocoConfig:
    settings = read_json(file)
    kind = settings.get("model_type")
    if kind is None:
        raise CheckpointError(f"{file}: has no model_type; copy it again from the model's folder")
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"{file}: says model_type {shown(kind)}, not 'yoco'; "
            "evaluate other models with lm-eval's own backends, such as --model hf"
        )
    if is_fla(settings):
        return _config(file, settings, fla_config)
    if "dim" not in settings and "hidden_size" in settings:
        raise CheckpointError(
            f"{file}: is of another project's models of model_type 'yoco', with hidden_size in "
            "place of dim, which are not read; evaluate it with that project"
        )
    return _config(file, {k: v for k, v in settings.items() if k not in BOOKKEEPING})


def _params_config(file: Path) -> YocoConfig:
    return _config(file, read_json(file))


def _config(
    file: Path,
    settings: dict[str, Any],
    read: Callable[[dict[str, Any]], YocoConfig] = YocoConfig.from_dict,
) -> YocoConfig:
    try:
        return read(settings)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _load_native(folder: Path) -> tuple[YocoConfig, dict[str, Tensor], Callable[[str], str]]:
    """With what the files call a weight, given its name here."""
    config = _native_config(folder / CONFIG)
    weights = read_weights(folder)
    if is_fla(read_json(folder / CONFIG)):
        return config, fla_weights(config, weights), fla_name
    return config, weights, str


def _torch_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix in (".safetensors", ".json"):
            raise CheckpointError(f"{path}: is a part of a checkpoint; name its folder")
        return path
    if not path.is_dir():
        check_regular(path)
    candidates = [path / "checkpoint.pth"]
    if not candidates[0].exists():
        candidates = sorted(path.glob("*.pt"))
    if len(candidates) > 1:
        raise CheckpointError(
            f"{path}: holds several checkpoints ({listed([c.name for c in candidates])}); name one"
        )
    if not candidates and (path / _ADAPTER).exists():
        raise CheckpointError(
            f"{path}: holds an adapter alone; merge it into its base model, and name the folder of "
            "the result"
        )
    if not candidates:
        raise CheckpointError(
            f"{path}: holds no checkpoint; expected {CONFIG} with {WEIGHTS}, or params.json "
            "with checkpoint.pth, or a fairseq .pt file"
        )
    return candidates[0]


def _load_torch(file: Path) -> tuple[YocoConfig, dict[str, Tensor]]:
    content = _unpickle(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a state dict")
    weights = content["model"] if isinstance(content.get("model"), Mapping) else content
    for name, weight in weights.items():
        if not isinstance(name, str) or not _is_dense(weight):
            raise CheckpointError(f"{file}: not a state dict; {shown(name)} names no dense tensor")
    marks = ("embed_tokens.weight", "output_projection.weight", "cross_decoder.k_proj.weight")
    found = [(name, mark) for mark in marks for name in weights if name.endswith(mark)]
    if not found:
        raise CheckpointError(f"{file}: not a YOCO checkpoint; it has no {marks[0]}")
    prefix = found[0][0].removesuffix(found[0][1])
    params = file.parent / _PARAMS
    if params.exists():
        config = _params_config(params)
    elif settings := _training_settings(content):
        rows = len(weights[found[0][0]]) if weights[found[0][0]].dim() else 0
        config = _config(file, {"vocab_size": rows, **settings})
    else:
        raise CheckpointError(f"{file}: no {_PARAMS} beside it and no model settings in it")
    return config, {name.removeprefix(prefix): weight for name, weight in weights.items()}


def _training_settings(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's settings as fairseq stores them: under cfg.model, or under args in older runs."""
    cfg = _as_dict(content.get("cfg"))
    model = _as_dict(cfg.get("model")) or _as_dict(content.get("args"))
    task = _as_dict(cfg.get("task"))
    settings = {name: _plain(model[name]) for name in known_settings() if name in model}
    lengths = (group.get("tokens_per_sample") for group in (model, task))
    length = next((length for length in lengths if isinstance(length, int)), None)
    return {**settings, "max_seq_len": length} if settings and length is not None else settings


def _plain(setting: Any) -> Any:
    """The setting, or its kind in place of what is none: a pickle holds tensors, too, or mazes."""
    plain = isinstance(setting, bool | int | float | str | None)
    return setting if plain else type(setting).__name__


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor whose numbers lie in memory, no more of them than memory has."""
    if not torch.is_tensor(value) or value.is_nested or value.is_quantized:
        return False
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def _as_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def _unpickle(file: Path) -> Any:
    check_regular(file)
    mend = "save its state dict alone with torch.save(model.state_dict(), ...)"
    try:
        zipped = zipfile.is_zipfile(file)
        mapped = zipped and _is_stored(file)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipped else []
        unsafe = [name for name in unknown if not _HARMLESS.fullmatch(name)]
        if unsafe:
            raise CheckpointError(
                f"{file}: refused, its pickle asks for {listed(sorted(unsafe))}, which could "
                f"execute code; {mend}"
            )
        shells: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
        shells = [_shell(name) for name in unknown]
        with torch.serialization.safe_globals(shells), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old kinds of pickles, which are read or refused
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, its pickle is damaged or holds more than plain data; {mend}"
        ) from error
    except Exception as error:  # the reader raises whatever a damaged file leads it to
        raise damaged(file, error) from error


def _is_stored(file: Path) -> bool:
    """Whether a zip file's records lie in it as they are: mapped, others would be read as garbage.

    Raises:
        CheckpointError: they are compressed in a way that PyTorch does not read, or to almost
            nothing, as weights never are.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if {record.compress_type for record in records} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise CheckpointError(f"{file}: compressed in an unknown way; copy the original file again")
    if sum(record.file_size for record in records) > _MOST_UNPACKED * file.stat().st_size:
        raise CheckpointError(
            f"{file}: its records unpack to over {_MOST_UNPACKED} times its size, as weights never "
            "do; copy the original file again"
        )
    return all(
        record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & _ENCRYPTED
        for record in records
    )


def _expected_shapes(config: YocoConfig) -> dict[str, torch.Size]:
    """Of every parameter. All layers of a decoder are alike, so that one of each is made."""
    with torch.device("meta"):
        two = Yoco(replace(config, n_layers=2, n_self_layers=1))
    layers = {"self_decoder": config.self_layers, "cross_decoder": config.cross_layers}
    first = ".layers.0."
    return {
        name.replace(first, f".layers.{layer}."): weight.shape
        for name, weight in two.named_parameters()
        for layer in range(layers[name.partition(".")[0]] if first in name else 1)
    }
