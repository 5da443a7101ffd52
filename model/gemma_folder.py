"""What folders of Gemma 3n and 4 have in common: a language model, alone or in a multimodal one.

What else a multimodal folder holds, for images and sounds, is not read: the texts of evaluations
have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yoco_eval.printable import shown

from .checks import check_only
from .folder import CONFIG, check_names, check_numbers, read_json, read_weights
from .kv_sharing import Layout
from .rotary import neighbours

_TEXT = "text_config"  # of a multimodal folder's settings
_KEYS_VALUES = re.compile(r"layers\.([0-9]{1,9})\.self_attn\.[kv]_(?:proj|norm)\..*")
_QUERIES_KEYS = re.compile(r"layers\.([0-9]{1,9})\.self_attn\.[qk]_(?:proj|norm)\.weight")


def text_settings(settings: Mapping[str, Any], family: str) -> Mapping[str, Any] | None:
    """The language model's part of what a `config.json` says; None where it is of another family.

    Args:
        family: what multimodal folders call their model_type.

    Raises:
        ValueError: there is no such part, or it is quantized, or its embeddings are not tied.
    """
    kind, alone = settings.get("model_type"), f"{family}_text"
    if kind not in (family, alone):
        return None
    if settings.get("quantization_config") is not None:
        raise ValueError("has a quantization_config; take a checkpoint without one")
    check_only(settings, {"tie_word_embeddings": True})
    if kind != alone and _TEXT not in settings:
        raise ValueError(f"missing settings: {_TEXT}")
    text = settings if kind == alone else settings[_TEXT]
    if not isinstance(text, Mapping):
        raise ValueError(f"{_TEXT} is {shown(text)}, not an object")
    if text.get("model_type", alone) != alone:
        raise ValueError(f"{_TEXT} has model_type {shown(text['model_type'])}, not {alone!r}")
    return text


def text_weights(
    folder: Path, model: nn.Module, layout: Layout, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The language model's weights by the names of its parameters, on the CPU, as they are stored
    but for heads, which are `turned`.

    Args:
        model: on the meta device, whose parameters say names and shapes.
        layout: which of its layers share keys and values. Published files have some for these, too,
            which nothing reads.
        dtype: what the weights are going to be converted to.

    Raises:
        CheckpointError: files are missing or damaged, or weights are not the model's, or not finite
            numbers.
    """
    prefix = "model.language_model." if _TEXT in read_json(folder / CONFIG) else "model."

    def wanted(name: str) -> bool:
        found = _KEYS_VALUES.fullmatch(name.removeprefix(prefix))
        return name.startswith(prefix) and not (found and int(found[1]) > layout.exit)

    stored = read_weights(folder, wanted)
    weights = {name.removeprefix(prefix): weight for name, weight in stored.items()}
    expected = {name: weight.shape for name, weight in model.named_parameters()}
    check_names(folder, expected, weights, prefix.__add__)
    check_numbers(folder, stored, dtype)
    return turned(weights, layout)


def turned(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The same weights, with heads in the order in which neighbours are turned."""
    others = dict(weights)
    for name in weights:
        if found := _QUERIES_KEYS.fullmatch(name):
            others[name] = neighbours(weights[name], layout.heads(int(found[1])).dim)
    return others
