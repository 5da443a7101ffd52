"""YOCO models of flash-linear-attention: their configuration and names in this project's terms.

Version 0.6.0 of that library has them as `fla.models.yoco`: Hugging Face folders that say
`model_type: "yoco"`, too, and `hidden_size` where this project's say `dim`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoco_eval.printable import listed, shown

from .checks import check_count, check_flag, check_number
from .config import YocoConfig
from .mixers import (
    GatedDeltaNetSettings,
    GatedRetentionSettings,
    Settings,
    SlidingWindowSettings,
)
from .rotary import neighbours

_QUERY_NORM_EPS = 1e-5  # that norm's own default, whatever `norm_eps` is
# All that version 0.6.0 writes; others' may change the model.
_SELF_DECODER = {
    "type", "mode", "use_gate", "expand_v", "use_short_conv", "allow_neg_eigval", "conv_size",
    "head_dim", "num_heads", "num_v_heads", "window_size", "qkv_bias", "rope_theta",
    "rope_inv_freq", "gate_logit_normalizer",
}  # fmt: skip
_CROSS_DECODER = {
    "num_heads", "num_kv_heads", "qkv_bias", "qk_norm", "rope_theta", "rope_inv_freq",
}  # fmt: skip
_THEIRS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_self_layers": "num_self_decoder_layers",
    "hidden_dim": "intermediate_size",
    "n_attn_heads": "cross_decoder_attn's num_heads",
    "n_attn_kv_heads": "num_kv_heads",
    "n_self_heads": "self_decoder_attn's num_heads",
    "n_self_kv_heads": "num_v_heads",
    "n_self_value_heads": "num_v_heads",
    "self_key_dim": "head_dim",
    "self_value_dim": "head_dim * expand_v",
    "self_rope_theta": "rope_theta",
    "sliding_window": "window_size",
    "convolution": "conv_size",
    "gate_temperature": "gate_logit_normalizer",
}
_OURS = re.compile(r"\b(" + "|".join(_THEIRS) + r")\b")
_NAMES = {
    "model.embeddings.": "embed_tokens.",
    "model.self_layers.": "self_decoder.layers.",
    "model.cross_layers.": "cross_decoder.layers.",
    "model.shared_kv_builder.kv_norm.": "cross_decoder.kv_layer_norm.",
    "model.shared_kv_builder.": "cross_decoder.",
    "model.norm.": "layer_norm.",
    "lm_head.": "output_projection.",
}
_LAYER_NAMES = {
    "attn_norm.": "mixer_layer_norm.",
    "mlp_norm.": "final_layer_norm.",
    "mlp.gate_proj.": "ffn.fc1.",
    "mlp.up_proj.": "ffn.gate.",
    "mlp.down_proj.": "ffn.fc2.",
    "attn.gk_proj.": "mixer.gt_proj.",
    "attn.o_proj.": "mixer.out_proj.",
    "attn.o_norm.": "mixer.out_norm.",
    "attn.A_log": "mixer.a_log",
    "attn.": "mixer.",
}
_LAYER = re.compile(r"((?:self|cross)_decoder\.layers\.\d+\.)(.+)")
_CONVOLUTION = re.compile(r"(.+\.mixer\.)([qkv])_conv1d\.weight")


def is_fla(settings: Mapping[str, Any]) -> bool:
    """Whether a `config.json` of model_type "yoco" is of that library."""
    return "hidden_size" in settings and "self_decoder_attn" in settings


def fla_config(settings: Mapping[str, Any]) -> YocoConfig:
    """The configuration in a `config.json`; what it leaves out has that library's defaults.

    Raises:
        ValueError: a setting is out of range, or unknown in one of the two tables, or of a part
            that is not supported.
    """
    if settings.get("attnres_block_size") is not None:
        raise ValueError(
            f"attnres_block_size = {shown(settings['attnres_block_size'])}: attention residuals "
            "are not supported; evaluate this model with flash-linear-attention"
        )
    if settings.get("hidden_act", "swish") not in ("swish", "silu"):
        raise ValueError(f"hidden_act {shown(settings['hidden_act'])} is not 'swish'")
    own = _table(settings, "self_decoder_attn", _SELF_DECODER)
    cross = _table(settings, "cross_decoder_attn", _CROSS_DECODER)
    dim, heads = settings["hidden_size"], cross.get("num_heads", 32)
    check_count("hidden_size", dim, 2**17)
    try:
        return YocoConfig(
            dim=dim,
            n_layers=settings.get("num_hidden_layers", 21),
            n_self_layers=settings.get("num_self_decoder_layers", 10),
            hidden_dim=_hidden(settings, dim),
            n_attn_heads=heads,
            n_attn_kv_heads=_given(cross, "num_kv_heads", heads),
            vocab_size=settings.get("vocab_size", 32000),
            self_decoder=_self_decoder(own),
            rope_theta=cross.get("rope_theta", 10000.0),
            rope_endpoint=_endpoint(cross),
            norm_eps=settings.get("norm_eps", 1e-6),
            query_norm_eps=_QUERY_NORM_EPS if _flag(cross, "qk_norm") else None,
            qkv_bias=_flag(cross, "qkv_bias"),
            tied_embeddings=_flag(settings, "tie_word_embeddings"),
            max_position_embeddings=settings.get("max_position_embeddings", 2048),
        )
    except ValueError as error:
        # As the file has the names.
        raise ValueError(_OURS.sub(lambda found: _THEIRS[found[0]], str(error))) from None


def fla_weights(config: YocoConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under this project's names; what is not known keeps its own.

    The three short convolutions of a layer become one, and the heads of sliding-window attention,
    whose rotary embedding turns channel j with channel j + D / 2, are put in the order in which
    neighbours are turned: no product of a query with a key changes.
    """
    renamed = {_renamed(name): weight for name, weight in weights.items()}
    if config.tied_embeddings:
        renamed.pop("output_projection.weight", None)
    taps: dict[str, dict[str, Tensor]] = {}
    for name in list(renamed):
        if found := _CONVOLUTION.fullmatch(name):
            taps.setdefault(found[1], {})[found[2]] = renamed.pop(name)
    for layer, parts in taps.items():
        alike = len({(part.dtype, part.shape[1:]) for part in parts.values()}) == 1
        if parts.keys() == {"q", "k", "v"} and alike and parts["q"].dim() == 3:
            stacked = torch.cat([parts[part] for part in "qkv"])  # [channels, 1, taps] each
            renamed[f"{layer}convolution"] = stacked.flatten(1).T.contiguous()
        else:
            renamed |= {f"{layer}{part}_conv1d.weight": tap for part, tap in parts.items()}
    if isinstance(config.self_decoder, SlidingWindowSettings):
        head_dim = config.self_decoder.head_dim(config.dim)
        for name in renamed:
            if re.fullmatch(r"self_decoder\.layers\.\d+\.mixer\.[qk]_proj\.(weight|bias)", name):
                renamed[name] = neighbours(renamed[name], head_dim)
    return renamed


def fla_name(name: str) -> str:
    """What that library calls a weight, given its name here."""
    if found := _LAYER.fullmatch(name):
        rest = found[2].replace("mixer.convolution", "mixer.{q,k,v}_conv1d.weight")
        name = found[1] + _translated(rest, {ours: theirs for theirs, ours in _LAYER_NAMES.items()})
    return _translated(name, {ours: theirs for theirs, ours in _NAMES.items()})


def _self_decoder(own: Mapping[str, Any]) -> Settings:
    kind, heads = own.get("type", "gated_deltanet"), own.get("num_heads", 6)
    theta = own.get("rope_theta", 10000.0)
    if kind == "gated_retention":
        return GatedRetentionSettings(
            n_self_heads=heads,
            self_rope_theta=theta,
            self_rope_endpoint=_endpoint(own),
            gate_temperature=own.get("gate_logit_normalizer", 16.0),
        )
    if kind == "swa":
        window: Any = own.get("window_size")  # the settings refuse None
        return SlidingWindowSettings(
            n_self_heads=heads,
            sliding_window=window,
            self_rope_theta=theta,
            self_rope_endpoint=False,
            n_self_kv_heads=_given(own, "num_v_heads", heads),
            self_qkv_bias=_flag(own, "qkv_bias"),
        )
    if kind != "gated_deltanet":
        raise ValueError(f"self_decoder_attn type {shown(kind)} is not known here")
    width, expansion = own.get("head_dim", 256), own.get("expand_v", 2.0)
    check_count("head_dim", width, 2**16)
    check_number("expand_v", expansion, 1e-3, 1e3)
    if not math.isclose(width * expansion, int(width * expansion), rel_tol=1e-5):
        raise ValueError(f"head_dim {width} times expand_v {expansion} is no whole number")
    return GatedDeltaNetSettings(
        n_self_heads=heads,
        n_self_value_heads=_given(own, "num_v_heads", heads),
        self_key_dim=width,
        self_value_dim=int(width * expansion),
        convolution=own.get("conv_size", 4) if _flag(own, "use_short_conv", True) else None,
        output_gate=_flag(own, "use_gate", True),
        negative_eigenvalues=_flag(own, "allow_neg_eigval"),
    )


def _table(settings: Mapping[str, Any], name: str, known: set[str]) -> Mapping[str, Any]:
    table = _given(settings, name, {})
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} is {shown(table)}, not an object")
    if unknown := table.keys() - known:
        raise ValueError(f"{name} has unknown settings: {listed(sorted(unknown))}")
    return table


def _flag(settings: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """null is false, as it is there."""
    value = settings.get(name, default)
    if value is not None:
        check_flag(name, value)
    return bool(value)


def _given(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting that may be null where it is left to the default."""
    value = settings.get(name)
    return default if value is None else value


def _endpoint(part: Mapping[str, Any]) -> bool:
    kind = part.get("rope_inv_freq", "fla")
    if kind not in ("fla", "yoco"):
        raise ValueError(f"rope_inv_freq {shown(kind)} is neither 'fla' nor 'yoco'")
    return kind == "yoco"


def _hidden(settings: Mapping[str, Any], dim: int) -> Any:
    """`intermediate_size`, or `hidden_ratio` * 2 / 3 of the width in multiples of 256."""
    if settings.get("intermediate_size") is not None:
        return settings["intermediate_size"]
    ratio = _given(settings, "hidden_ratio", 4)
    check_number("hidden_ratio", ratio, 1e-3, 1e3)
    return (int(dim * ratio * 2 / 3) + 255) // 256 * 256


def _renamed(name: str) -> str:
    name = _translated(name, _NAMES)
    found = _LAYER.fullmatch(name)
    return found[1] + _translated(found[2], _LAYER_NAMES) if found else name


def _translated(name: str, beginnings: Mapping[str, str]) -> str:
    """With another beginning, the first of those that it has."""
    for beginning, other in beginnings.items():
        if name.startswith(beginning):
            return other + name.removeprefix(beginning)
    return name
