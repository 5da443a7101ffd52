"""The weights in checkpoints of Phi-4-mini-flash: their names, shapes, and what the model keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from yoco_eval.printable import listed

from .errors import CheckpointError
from .folder import check_names, check_numbers, read_weights
from .phi4flash_config import Phi4FlashConfig

_LAMBDAS = tuple(f"inner_cross_attn.lambda_{name}" for name in ("q1", "k1", "q2", "k2"))


class _Weight(NamedTuple):
    """Of a checkpoint: its shape, the model's parameter, and what that is made of it."""

    shape: tuple[int, ...]
    parameter: str
    kept: Callable[[Tensor], Tensor] = lambda weight: weight


def phi4flash_weights(
    folder: Path, config: Phi4FlashConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All weights of a folder under the names of `Phi4Flash`'s parameters, as these are kept.

    Args:
        dtype: what they are going to be converted to, but for those that stay float32.

    Raises:
        CheckpointError: files are missing or damaged, or weights are not those of the
            configuration, or not finite numbers.
    """
    weights = read_weights(folder)
    check_names(folder, weight_shapes(config), weights)
    check_numbers(folder, weights, dtype)
    kept = kept_weights(config, weights)
    made = _exponentials(config).items()
    if bad := [name for name, ours in made if not kept[ours].float().isfinite().all()]:
        raise CheckpointError(
            f"{folder}: too large for float32 are exponentials of {listed(bad)}; copy it again"
        )
    return kept


def weight_shapes(config: Phi4FlashConfig) -> dict[str, tuple[int, ...]]:
    """Of all weights of a checkpoint."""
    shapes = {name: weight.shape for name, weight in _outside(config).items()}
    for layer in range(config.num_hidden_layers):
        parts = {name: weight.shape for name, weight in _layer(config, layer).items()}
        if layer % 2:
            parts |= {f"attn.{name}": (config.head_dim,) for name in _LAMBDAS}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def kept_weights(config: Phi4FlashConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint as `Phi4Flash` keeps them, under its parameters' names."""
    kept = {w.parameter: w.kept(weights[name]) for name, w in _outside(config).items()}
    for layer in range(config.num_hidden_layers):
        prefix, place = f"model.layers.{layer}.", _place(config, layer)
        for name, weight in _layer(config, layer).items():
            kept[place + weight.parameter] = weight.kept(weights[prefix + name])
        if layer % 2:
            q1, k1, q2, k2 = (weights[f"{prefix}attn.{name}"].double() for name in _LAMBDAS)
            factor = (q1 @ k1).exp() - (q2 @ k2).exp() + initial_factor(layer)
            kept[f"{place}{_mixer(config, layer)}factor"] = factor.view(1)
    return kept


def _exponentials(config: Phi4FlashConfig) -> dict[str, str]:
    """Of weights whose exponentials are kept, one of each four for lambdas: the parameters."""
    made = {}
    for layer in range(config.num_hidden_layers):
        prefix, place = f"model.layers.{layer}.attn.", _place(config, layer)
        if layer % 2:
            made[prefix + _LAMBDAS[0]] = f"{place}{_mixer(config, layer)}factor"
        elif layer <= config.memory_layer:
            made[f"{prefix}A_log"] = f"{place}mixer.rates"
    return made


def initial_factor(layer: int) -> float:
    """Of the second attention in a layer of differential attention, counted among all from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def _place(config: Phi4FlashConfig, layer: int) -> str:
    """Where the model has a layer."""
    behind = layer - config.memory_layer
    if behind < 0:
        return f"{('mamba', 'window')[layer % 2]}_layers.{layer // 2}."
    if behind < 2:
        return f"{('memory', 'cache')[layer % 2]}_layer."
    return f"{('unit', 'cross')[layer % 2]}_layers.{behind // 2 - 1}."


def _mixer(config: Phi4FlashConfig, layer: int) -> str:
    """Where a layer has what mixes."""
    return "mixer.attention." if layer % 2 and layer < config.memory_layer else "mixer."


def _outside(config: Phi4FlashConfig) -> dict[str, _Weight]:
    """Weights that are of no layer."""
    embedding = (config.vocab_size, config.hidden_size)
    return {
        "model.embed_tokens.weight": _Weight(embedding, "embed_tokens.weight"),
        **_norm(config, "model.final_layernorm", "final_layernorm"),
    }


def _layer(config: Phi4FlashConfig, layer: int) -> dict[str, _Weight]:
    """Weights of a layer, but for those that its lambda is made of."""
    width, hidden, channels = config.hidden_size, config.intermediate_size, config.channels
    weights = {
        **_norm(config, "input_layernorm", "input_layernorm"),
        **_norm(config, "post_attention_layernorm", "post_attention_layernorm"),
        "mlp.fc1.weight": _Weight((2 * hidden, width), "fc1.weight"),
        "mlp.fc2.weight": _Weight((width, hidden), "fc2.weight"),
    }
    if layer % 2:
        mixer = _attention(config, layer)
    elif layer <= config.memory_layer:
        mixer = _mamba(config)
    else:
        mixer = {
            "in_proj.weight": _Weight((channels, width), "in_proj.weight"),
            "out_proj.weight": _Weight((width, channels), "out_proj.weight"),
        }
    place = _mixer(config, layer)
    for name, weight in mixer.items():
        weights[f"attn.{name}"] = weight._replace(parameter=place + weight.parameter)
    return weights


def _norm(config: Phi4FlashConfig, name: str, parameter: str) -> dict[str, _Weight]:
    return {
        f"{name}.{part}": _Weight((config.hidden_size,), f"{parameter}.{part}")
        for part in ("weight", "bias")
    }


def _mamba(config: Phi4FlashConfig) -> dict[str, _Weight]:
    width, channels, rank = config.hidden_size, config.channels, config.time_rank
    states, taps = config.mamba_d_state, config.mamba_d_conv
    return {
        "in_proj.weight": _Weight((2 * channels, width), "in_proj.weight"),
        "conv1d.weight": _Weight((channels, 1, taps), "taps", lambda weight: weight[:, 0].T),
        "conv1d.bias": _Weight((channels,), "tap_bias"),
        "x_proj.weight": _Weight((rank + 2 * states, channels), "x_proj.weight"),
        "dt_proj.weight": _Weight((channels, rank), "dt_proj.weight"),
        "dt_proj.bias": _Weight((channels,), "time_bias"),
        "A_log": _Weight((channels, states), "rates", lambda weight: -weight.double().exp().T),
        "D": _Weight((channels,), "skip"),
        "out_proj.weight": _Weight((width, channels), "out_proj.weight"),
    }


def _attention(config: Phi4FlashConfig, layer: int) -> dict[str, _Weight]:
    width, pair = config.hidden_size, 2 * config.head_dim
    own = layer <= config.memory_layer + 1
    rows = width + 2 * config.kv_width if own else width
    rest = 1 - initial_factor(layer)
    return {
        "Wqkv.weight": _Weight((rows, width), "projection.weight"),
        "Wqkv.bias": _Weight((rows,), "projection.bias"),
        "out_proj.weight": _Weight((width, width), "out_proj.weight"),
        "out_proj.bias": _Weight((width,), "out_proj.bias"),
        "inner_cross_attn.subln.weight": _Weight(
            (pair,), "norm", lambda weight: weight.double() * rest
        ),
    }
