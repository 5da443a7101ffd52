"""Hugging Face folders: `config.json` and safetensors, in shards with an index when large; and
which tokens end a text, which stands in `generation_config.json`.

What is wrong with a file is told in one line. Nothing of a folder is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from yoco_eval.printable import VALUE, listed, shortened, shown

from .errors import CheckpointError
from .hub import hub_commit

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
# What Hugging Face's libraries, and others that train with them, write into any config.json, and
# says nothing about the model.
BOOKKEEPING = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ENDS = "eos_token_id"
_LARGEST_JSON = 64 << 20  # bytes; the index of the largest models has a few million


def is_folder(path: Path) -> bool:
    """Whether a Hugging Face folder lies there."""
    return path.is_dir() and (path / CONFIG).exists()


def read_weights(
    folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The weights of a folder by name, on the CPU, as they are stored; none that is not wanted.

    Raises:
        CheckpointError: a file is missing, damaged, or none of the folder's.
    """
    weights: dict[str, Tensor] = {}
    for file in _shards(folder / INDEX) if (folder / INDEX).exists() else [WEIGHTS]:
        if not os.path.exists(folder / file):  # whatever the system has against such a name
            mend = "copy the whole folder"
            if hub_commit(folder):
                mend = "its download is not complete; download it once without HF_HUB_OFFLINE"
            raise CheckpointError(f"{folder}: {shortened(file, VALUE)} is missing; {mend}")
        check_regular(folder / file)
        try:
            with safe_open(folder / file, framework="pt") as stored:
                weights |= {name: stored.get_tensor(name) for name in filter(wanted, stored.keys())}
        except Exception as error:  # the reader raises whatever a damaged file leads it to
            raise damaged(folder / file, error) from error
    return weights


def check_names(
    path: Path,
    expected: Mapping[str, Sequence[int]],
    weights: Mapping[str, Tensor],
    said: Callable[[str], str] = str,
) -> None:
    """Refuses parameters that are not those of the configuration, in name and shape.

    `said` gives the name that the file has for a parameter.
    """
    faults = []
    if missing := [said(name) for name in expected if name not in weights]:
        faults.append(f"missing: {listed(missing)}")
    if surplus := [said(name) for name in weights if name not in expected]:
        faults.append(f"surplus: {listed(surplus)}")
    if wrong := [
        f"{said(name)} is {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != torch.Size(shape)
    ]:
        faults.append(f"mis-shaped: {listed(wrong)}")
    if faults:
        raise CheckpointError(
            f"{path}: its parameters do not fit its configuration; {'; '.join(faults)}"
        )


def check_numbers(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Refuses parameters that are no floating-point numbers, NaN or infinite, or become so."""
    if odd := [name for name, weight in weights.items() if weight.dtype not in _DTYPES]:
        kinds = {str(weights[name].dtype).removeprefix("torch.") for name in odd}
        raise CheckpointError(
            f"{path}: holds {listed(sorted(kinds))} in {listed(odd)}; weights must be float16, "
            "bfloat16, float32 or float64"
        )
    # NaN is both the least and the greatest of numbers that it stands among.
    ends = {name: torch.stack(torch.aminmax(weight.detach())) for name, weight in weights.items()}
    if bad := [name for name, end in ends.items() if not end.isfinite().all()]:
        raise CheckpointError(
            f"{path}: NaN or infinite numbers in {listed(bad)}; copy it again, or take a "
            "checkpoint from before its training diverged"
        )
    if bad := [n for n, end in ends.items() if dtype and not end.to(dtype).isfinite().all()]:
        raise CheckpointError(
            f"{path}: too large for {str(dtype).removeprefix('torch.')} are numbers in "
            f"{listed(bad)}; choose another dtype, such as bfloat16"
        )


def end_tokens(folder: Path, vocab_size: int) -> frozenset[int]:
    """Ids of the tokens that end a text in generation, as transformers reads them: those that
    `generation_config.json` lists or, where there is none, `config.json`; none if it does not say.

    Raises:
        CheckpointError: the file is damaged, or an id is no token's of the vocabulary.
    """
    file = next((folder / n for n in (GENERATION, CONFIG) if (folder / n).exists()), None)
    if file is None:
        return frozenset()
    settings = read_json(file)
    text = settings.get("text_config")  # of a model that reads more than texts
    parts = [settings, text] if file.name == CONFIG and isinstance(text, dict) else [settings]
    found: Any = next((part[_ENDS] for part in parts if part.get(_ENDS) is not None), [])
    ids = found if isinstance(found, list) else [found]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise CheckpointError(
            f"{file}: {_ENDS} must be the id of a token, 0 to {vocab_size - 1}, or a list of such, "
            f"not {shown(found)}; copy it again from the model's own folder"
        )
    return frozenset(ids)


def _shards(index: Path) -> list[str]:
    """The names of the weights' files, all in the folder of their index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; copy it again")
    for file in weight_map.values():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.strip("."):
            raise CheckpointError(
                f"{index}: names {shown(file)}, which is no file beside it; copy the whole folder"
            )
    return sorted(set(weight_map.values()))


def read_json(file: Path) -> dict[str, Any]:
    check_regular(file)
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{file}: far larger than any model's; copy it again")
        content = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not an object")
    return content


def check_regular(file: Path) -> None:
    """Refuses what would be waited for, or read without end: pipes, sockets, devices; folders."""
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file}: is no regular file; put a copy of the file there")


def damaged(file: Path, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(f"{file}: damaged or truncated ({lines[0]}); copy it again")
