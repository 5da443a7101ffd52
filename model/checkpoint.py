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
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import YocoConfig
from .yoco import Yoco

BUNDLED = Path(__file__).parent / "checkpoints"
DEFAULT_CHECKPOINT = (BUNDLED / "DEFAULT").read_text(encoding="utf-8").strip()

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What stands in training checkpoints beside the weights and is never needed, or only for its
# attributes. A shell takes its place, so that not even these names are looked up.
_HARMLESS = re.compile(
    r"argparse\.Namespace|(fairseq|omegaconf|numpy|pathlib|enum|typing)\..+|_codecs\.encode"
    r"|collections\.(defaultdict|deque)"
    r"|builtins\.(bool|bytearray|complex|dict|float|frozenset|int|list|object|set|slice|str|tuple)"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and the mend, in one line."""


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


def resolve_checkpoint(name: str | Path) -> Path:
    """The path of a checkpoint given by path or by the name of a bundled one.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    bundled = sorted(folder.name for folder in BUNDLED.iterdir() if folder.is_dir())
    if str(name) in bundled:
        return BUNDLED / str(name)
    raise CheckpointError(
        f"{name}: no such checkpoint; give a folder or file, or a bundled one: {', '.join(bundled)}"
    )


def load_config(path: str | Path) -> YocoConfig:
    """Reads the configuration of a checkpoint of any layout alone.

    Weights stay unread where a `config.json` or `params.json` holds it. A fairseq checkpoint holds
    it beside the weights and is unpickled as a whole: fairseq files are mapped into memory, so that
    weights are not read from the disk, but those of PyTorch before 1.6 are read entirely.

    Raises:
        CheckpointError: as `load_checkpoint`, for faults that show without the weights.
    """
    path = resolve_checkpoint(path)
    try:
        if path.is_dir() and (path / _CONFIG).exists():
            return _native_config(path)
        file = _torch_file(path)
        params = file.parent / "params.json"
        if params.exists():
            return YocoConfig.from_dict(_read_json(params))
        return _load_torch(file)[0]
    except (TypeError, ValueError) as error:
        prefix = "" if isinstance(error, CheckpointError) else f"{path}: "
        raise CheckpointError(f"{prefix}{error}") from error


def load_checkpoint(path: str | Path) -> tuple[YocoConfig, dict[str, Tensor]]:
    """Reads a checkpoint of any layout, on the CPU, in the dtypes that it was stored in.

    Args:
        path: a native folder (`config.json`, `model.safetensors` or shards with an index); a
            published folder (`params.json`, `checkpoint.pth`); a fairseq checkpoint file, or a
            folder that holds one `.pt` file; or the name of a bundled checkpoint.

    Returns:
        The configuration, and every parameter of `Yoco` by name, in the shape that it asks for.

    Raises:
        CheckpointError: no such path, no such layout, damaged or unsafe files, or parameters that
            are missing, surplus or of another shape (all are named).
    """
    path = resolve_checkpoint(path)
    try:
        if path.is_dir() and (path / _CONFIG).exists():
            config, weights = _load_native(path)
        else:
            config, weights = _load_torch(_torch_file(path))
    except (TypeError, ValueError) as error:
        prefix = "" if isinstance(error, CheckpointError) else f"{path}: "
        raise CheckpointError(f"{prefix}{error}") from error
    _check_weights(path, config, weights)
    return config, weights


def save_checkpoint(path: str | Path, config: YocoConfig, weights: Mapping[str, Tensor]) -> None:
    """Writes the native folder: weights as safetensors, in shards of 5 GB when large, then config.

    Files appear under their names only once they are whole, the configuration last.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "yoco", "architectures": ["Yoco"]}
    settings |= {key: value for key, value in asdict(config).items() if value is not None}
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
        Path(temporary, _CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        for name in files:  # safetensors writes files that only their owner may read
            shutil.copymode(Path(temporary, _CONFIG), Path(temporary, name))
        for name in sorted(files):
            os.replace(Path(temporary, name), path / name)
        for old in path.glob("model*.safetensors*"):
            if old.name not in files:  # the shards and the index of an earlier model
                old.unlink()
        os.replace(Path(temporary, _CONFIG), path / _CONFIG)


def _native_config(folder: Path) -> YocoConfig:
    settings = _read_json(folder / _CONFIG)
    if settings.get("model_type") != "yoco":
        raise CheckpointError(
            f"{folder}: {_CONFIG} says model_type {settings.get('model_type')!r}, not 'yoco'; "
            "evaluate other models with lm-eval's own backends, such as --model hf"
        )
    known = {field.name for field in fields(YocoConfig)}
    return YocoConfig.from_dict({k: v for k, v in settings.items() if k in known})


def _load_native(folder: Path) -> tuple[YocoConfig, dict[str, Tensor]]:
    config = _native_config(folder)
    if (folder / _INDEX).exists():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / _INDEX}: has no weight_map; copy it again")
        files = sorted(set(map(str, weight_map.values())))
    else:
        files = [_WEIGHTS]
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(folder / file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder}: {file} is missing; copy the whole folder") from error
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / file}: damaged or truncated ({error}); copy it again"
            ) from error
    return config, weights


def _torch_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix in (".safetensors", ".json"):
            raise CheckpointError(f"{path}: is a part of a checkpoint; name its folder")
        return path
    candidates = [path / "checkpoint.pth"]
    if not candidates[0].exists():
        candidates = sorted(path.glob("*.pt"))
    if len(candidates) > 1:
        raise CheckpointError(
            f"{path}: holds several checkpoints ({', '.join(c.name for c in candidates)}); name one"
        )
    if not candidates:
        raise CheckpointError(
            f"{path}: not a YOCO checkpoint; expected {_CONFIG} with {_WEIGHTS}, or params.json "
            "with checkpoint.pth, or a fairseq .pt file"
        )
    return candidates[0]


def _load_torch(file: Path) -> tuple[YocoConfig, dict[str, Tensor]]:
    content = _unpickle(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a state dict")
    weights = content["model"] if isinstance(content.get("model"), Mapping) else content
    if odd := [k for k, v in weights.items() if not isinstance(k, str) or not torch.is_tensor(v)]:
        raise CheckpointError(f"{file}: not a state dict; {odd[0]!r} in it names no tensor")
    marks = ("embed_tokens.weight", "output_projection.weight", "cross_decoder.k_proj.weight")
    found = [(name, mark) for mark in marks for name in weights if name.endswith(mark)]
    if not found:
        raise CheckpointError(f"{file}: not a YOCO checkpoint; it has no {marks[0]}")
    prefix = found[0][0].removesuffix(found[0][1])
    params = file.parent / "params.json"
    if params.exists():
        config = YocoConfig.from_dict(_read_json(params))
    elif settings := _training_settings(content):
        config = YocoConfig.from_dict({"vocab_size": weights[found[0][0]].shape[0], **settings})
    else:
        raise CheckpointError(f"{file}: no params.json beside it and no model settings in it")
    return config, {name.removeprefix(prefix): weight for name, weight in weights.items()}


def _training_settings(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's settings as fairseq stores them: under cfg.model, or under args in older runs."""
    cfg = _as_dict(content.get("cfg"))
    model = _as_dict(cfg.get("model")) or _as_dict(content.get("args"))
    task = _as_dict(cfg.get("task"))
    settings = {f.name: model[f.name] for f in fields(YocoConfig) if f.name in model}
    length = model.get("tokens_per_sample") or task.get("tokens_per_sample")
    return {**settings, "max_seq_len": length} if settings and length else settings


def _as_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def _unpickle(file: Path) -> Any:
    mend = "save its state dict alone with torch.save(model.state_dict(), ...)"
    zipped = zipfile.is_zipfile(file)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipped else []
        unsafe = [name for name in unknown if not _HARMLESS.fullmatch(name)]
        if unsafe:
            raise CheckpointError(
                f"{file}: refused, its pickle asks for {', '.join(sorted(unsafe))}, which could "
                f"execute code; {mend}"
            )
        shells = [_shell(name) for name in unknown]
        with torch.serialization.safe_globals(shells), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old kinds of pickles, which are read or refused
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, its pickle is damaged or holds more than plain data; {mend}"
        ) from error
    except Exception as error:  # the reader raises whatever a damaged file leads it to
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file}: damaged or truncated ({first_line}); copy it again, or {mend}"
        ) from error


def _check_weights(path: Path, config: YocoConfig, weights: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in Yoco(config).state_dict().items()}
    faults = []
    if missing := [name for name in expected if name not in weights]:
        faults.append(f"missing: {', '.join(missing)}")
    if surplus := [name for name in weights if name not in expected]:
        faults.append(f"surplus: {', '.join(surplus)}")
    if wrong := [
        f"{name} is {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]:
        faults.append(f"mis-shaped: {', '.join(wrong)}")
    if faults:
        raise CheckpointError(
            f"{path}: its parameters do not fit its configuration; {'; '.join(faults)}"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not an object")
    return content
