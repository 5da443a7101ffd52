"""The shape of Gemma 4's language model, as `config.json` states it, where it is supported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from yoco_eval.printable import listed, shown

from .checks import check_count, check_flag, check_known, check_multiple, check_number, check_only
from .folder import BOOKKEEPING
from .gemma_folder import text_settings
from .kv_sharing import FULL, SLIDING, Heads, Layout, check_layers
from .rotary import Rotary

MODEL_TYPE = "gemma4"
# What others of the same name are, and why they are refused: E2B and E4B alone share.
_OWN = "has layers that all own keys and values; evaluate it with --model hf"
_OTHERS = {
    "unified": _OWN,
    "unified_text": _OWN,
    "assistant": "drafts for another model, whose keys and values it reads; evaluate that one",
}
# Sizes up to far beyond any model's; a file that states more is damaged or made up.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "num_global_key_value_heads": 2**12,
    "head_dim": 512,  # as far as the kernels go
    "global_head_dim": 512,
    "sliding_window": 2**32,
    "vocab_size_per_layer_input": 2**24,
    "hidden_size_per_layer_input": 2**16,
    "max_position_embeddings": 2**40,
}
_MOST_LAYERS = 2**10
# Settings of which one value is supported, the one that holds where they are left out.
_ONLY = {
    "attention_bias": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
# Settings that say nothing about the logits of a text where those above are as they have to be.
_IGNORED = BOOKKEEPING | {
    "attention_dropout", "cache_implementation", "expert_intermediate_size",
    "moe_intermediate_size", "num_experts", "top_k_experts",
}  # fmt: skip
# Settings that are not left to their default by null.
_NEVER_NULL = (_LARGEST.keys() - {"num_global_key_value_heads"}) | {
    "num_hidden_layers", "num_kv_shared_layers", "rms_norm_eps", "use_double_wide_mlp",
}  # fmt: skip
_ROPE_PARAMETERS = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True)
class Gemma4Config:
    """Shape of the language model; names as in `config.json`, where it has them.

    Attributes:
        layer_types: of each layer, FULL or SLIDING.
        num_kv_shared_layers: how many layers share keys and values, the last ones.
        use_double_wide_mlp: whether their MLPs are twice as wide as `intermediate_size`.
        num_key_value_heads, head_dim, rope_theta, partial_rotary_factor: of the layers with sliding
            windows. The part of a head's channels that the rotary embedding turns is the factor.
        num_global_key_value_heads, global_head_dim, global_rope_theta,
            global_partial_rotary_factor: of the layers with full attention.
        sliding_window: in tokens, a token's own position included.
        hidden_size_per_layer_input: channels of the input that each layer makes of a token.
        vocab_size_per_layer_input: rows of the embedding that it takes for that.
        final_logit_softcapping: the bound of all logits; None: there is none.
    """

    layer_types: tuple[str, ...]
    num_kv_shared_layers: int
    vocab_size: int = 262144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    use_double_wide_mlp: bool = False
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rope_theta: float = 1e4
    partial_rotary_factor: float = 1.0
    num_global_key_value_heads: int = 4
    global_head_dim: int = 512
    global_rope_theta: float = 1e6
    global_partial_rotary_factor: float = 0.25
    sliding_window: int = 512
    hidden_size_per_layer_input: int = 256
    vocab_size_per_layer_input: int = 262144
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = None
    max_position_embeddings: int = 131072

    def __post_init__(self) -> None:
        check_layers(self.layer_types, len(self.layer_types), self.num_kv_shared_layers)
        for name, largest in _LARGEST.items():
            check_count(name, getattr(self, name), largest)
        check_flag("use_double_wide_mlp", self.use_double_wide_mlp)
        # Beyond these, norms, angles and caps are infinite or not a number in float32.
        check_number("rms_norm_eps", self.rms_norm_eps, 1e-30, 1)
        if self.final_logit_softcapping is not None:
            check_number("final_logit_softcapping", self.final_logit_softcapping, 1e-30, 1e30)
        for prefix in ("", "global_"):
            for name, least, most in (
                ("rope_theta", 1, 1e30),
                ("partial_rotary_factor", 1e-30, 1),
            ):
                check_number(prefix + name, getattr(self, prefix + name), least, most)
            check_multiple(f"{prefix}head_dim", getattr(self, f"{prefix}head_dim"), 2)
        for kv_heads in (self.num_key_value_heads, self.num_global_key_value_heads):
            check_multiple("num_attention_heads", self.num_attention_heads, kv_heads)
        if self.vocab_size > self.vocab_size_per_layer_input:
            raise ValueError(
                f"vocab_size = {self.vocab_size} is more than vocab_size_per_layer_input = "
                f"{self.vocab_size_per_layer_input}"
            )

    @property
    def layout(self) -> Layout:
        return Layout(
            self.layer_types,
            self.num_kv_shared_layers,
            self.sliding_window,
            full=_heads(
                self.num_global_key_value_heads,
                self.global_head_dim,
                self.global_rope_theta,
                self.global_partial_rotary_factor,
            ),
            sliding=_heads(
                self.num_key_value_heads, self.head_dim, self.rope_theta, self.partial_rotary_factor
            ),
        )

    def hidden(self, layer: int) -> int:
        """Channels of a layer's MLP."""
        shares = layer >= len(self.layer_types) - self.num_kv_shared_layers
        return self.intermediate_size * (2 if shares and self.use_double_wide_mlp else 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layer_types": ", ".join(self.layer_types)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Gemma4Config:
        """The configuration in what a `config.json` says of the language model. What it leaves out
        has the default of transformers.

        Raises:
            ValueError: a setting is out of range, unknown, or of a part that is not supported.
        """
        given = {k: v for k, v in settings.items() if v is not None or k in _NEVER_NULL}
        kinds = _layer_types(given)
        shared = given.pop("num_kv_shared_layers", 0)
        check_layers(kinds, len(kinds), shared)
        check_only(given, _ONLY)
        if given.pop("use_bidirectional_attention", "vision") != "vision":  # that is, of images
            raise ValueError(
                f"use_bidirectional_attention = {shown(settings['use_bidirectional_attention'])} "
                "is not supported; evaluate this model with --model hf"
            )
        own = _taken(given, *_LARGEST, "use_double_wide_mlp", "rms_norm_eps")
        own |= _taken(given, "final_logit_softcapping") | _head_sizes(given, own, kinds)
        own |= _rope_parameters(given.pop("rope_parameters", _ROPE_PARAMETERS))
        check_known(given.keys() - _ONLY.keys() - _IGNORED)
        return cls(tuple(kinds), shared, **own)


def _heads(kv_heads: int, dim: int, theta: float, factor: float) -> Heads:
    turned = int(factor * dim // 2)
    return Heads(kv_heads, dim, Rotary(dim, theta, endpoint=False, turned=turned))


def _taken(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of the settings that there are, taken out."""
    return {name: settings.pop(name) for name in names if name in settings}


def _layer_types(settings: dict[str, Any]) -> list[Any]:
    """Taken out of the settings; the last layer attends fully whatever they say, as there."""
    layers = settings.pop("num_hidden_layers", 30)
    check_count("num_hidden_layers", layers, _MOST_LAYERS)
    every_sixth = [SLIDING if (i + 1) % 6 else FULL for i in range(layers)]
    kinds = settings.pop("layer_types", every_sixth)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"layer_types {shown(kinds)} is no list of {layers} layers' kinds")
    return [*kinds[:-1], FULL]


def _head_sizes(
    settings: dict[str, Any], own: Mapping[str, Any], kinds: Sequence[str]
) -> dict[str, Any]:
    """Sizes of heads of both kinds of layers. Some versions of transformers write down layer by
    layer what is not the same in all of them."""
    dim = own.get("head_dim", Gemma4Config.head_dim)
    kv_heads = own.get("num_key_value_heads", Gemma4Config.num_key_value_heads)
    apart = settings.pop("per_layer_config", None)
    if apart is None:
        return {"num_global_key_value_heads": kv_heads}
    if not isinstance(apart, Mapping):
        raise ValueError(f"per_layer_config is {shown(apart)}, not a table of layers")
    # Numbers of layers may have leading zeros.
    numbered = {int(name): own for name, own in apart.items() if re.fullmatch("[0-9]{1,9}", name)}
    if len(numbered) < len(apart) or not numbered.keys() <= set(range(len(kinds))):
        raise ValueError(f"per_layer_config is {shown(apart)}, not a table of layers")
    sizes: dict[str, list[tuple[Any, Any]]] = {FULL: [], SLIDING: []}
    for layer, kind in enumerate(kinds):
        other = numbered.get(layer, {})
        if not isinstance(other, Mapping) or other.keys() - {"head_dim", "num_key_value_heads"}:
            raise ValueError(f"per_layer_config of layer {layer} is {shown(other)}")
        sizes[kind].append((other.get("num_key_value_heads", kv_heads), other.get("head_dim", dim)))
    for kind, found in sizes.items():
        if any(size != found[0] for size in found):
            raise ValueError(f"per_layer_config has {kind} layers of several sizes")
    names = ("num_key_value_heads", "head_dim")
    named = ("num_global_key_value_heads", "global_head_dim")
    return dict(zip((*names, *named), (*sizes[SLIDING][0], *sizes[FULL][0]), strict=True))


def _rope_parameters(tables: Any) -> dict[str, Any]:
    if not isinstance(tables, Mapping) or tables.keys() != _ROPE_PARAMETERS.keys():
        raise ValueError(f"rope_parameters is {shown(tables)}, not a table of {SLIDING} and {FULL}")
    found = {}
    for kind, prefix in ((SLIDING, ""), (FULL, "global_")):
        table = tables[kind]
        if not isinstance(table, Mapping) or "rope_theta" not in table:
            raise ValueError(f"rope_parameters of {kind} is {shown(table)}, without rope_theta")
        name = table.get("rope_type", "default")
        if name not in ("default", "proportional") or table.get("factor", 1.0) != 1.0:
            raise ValueError(
                f"rope_parameters of {kind} is {shown(table)}; only rope_type 'default' and "
                "'proportional', without a factor, are supported"
            )
        known = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
        if unknown := table.keys() - known:
            raise ValueError(f"rope_parameters of {kind} has {listed(sorted(unknown))}, unknown")
        found[f"{prefix}rope_theta"] = table["rope_theta"]
        # Of rope_type "default", all channels are turned whatever the factor is.
        factor = table.get("partial_rotary_factor", 1.0) if name == "proportional" else 1.0
        found[f"{prefix}partial_rotary_factor"] = factor
    return found


def read_gemma4(settings: Mapping[str, Any]) -> Gemma4Config | None:
    """The configuration in what a `config.json` says; None where it is of another family.

    Raises:
        ValueError: it cannot be used, or is of a kind of Gemma 4 that is not supported.
    """
    kind = settings.get("model_type")
    for other, reason in _OTHERS.items():
        if kind in (f"{MODEL_TYPE}_{other}", f"{MODEL_TYPE}_unified_{other}"):
            raise ValueError(f"says model_type {shown(kind)}, which {reason}")
    text = text_settings(settings, MODEL_TYPE)
    return None if text is None else Gemma4Config.from_dict(text)
