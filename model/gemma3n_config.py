"""The shape of Gemma 3n's text model, as `config.json` states it, where it is supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from yoco_eval.printable import shown

from .checks import check_count, check_known, check_multiple, check_number, check_only
from .folder import BOOKKEEPING
from .gemma_folder import text_settings
from .kv_sharing import FULL, SLIDING, Heads, Layout, check_layers
from .rotary import Rotary

MODEL_TYPE = "gemma3n"
# What concerns training alone, and what the published code does not read.
_UNREAD = {
    "altup_coef_clip", "altup_lr_multiplier", "attention_dropout", "cache_implementation",
    "query_pre_attn_scalar",
}  # fmt: skip
# Settings of which one value is supported, that of all published models.
_ONLY = {
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
# Far beyond any model's; a file that states more is damaged or made up.
_LARGEST = {
    "num_hidden_layers": 2**10,
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 512,
    "sliding_window": 2**32,
    "vocab_size_per_layer_input": 2**24,
    "hidden_size_per_layer_input": 2**16,
    "altup_num_inputs": 2**6,
    "laurel_rank": 2**16,
    "max_position_embeddings": 2**40,
}


@dataclass(frozen=True)
class Gemma3nConfig:
    """Shape of a Gemma 3n text model; names and defaults are those of its configuration files.

    Attributes:
        layer_types: of each layer, "full_attention" or "sliding_attention".
        intermediate_size: of each layer, the width of its feed-forward part.
        activation_sparsity_pattern: of each layer, how many of that part's gates are closed: so
            large a part of them, were they normally distributed.
        num_kv_shared_layers: how many layers, the last ones, share keys and values.
        vocab_size_per_layer_input: tokens from here on have the layers' inputs of token 0.
        rope_theta, rope_local_base_freq: bases of the rotary embedding, in layers with full
            attention and in those with windows.
    """

    layer_types: tuple[str, ...]
    intermediate_size: tuple[int, ...]
    activation_sparsity_pattern: tuple[float, ...]
    vocab_size: int = 262_400
    hidden_size: int = 2048
    num_hidden_layers: int = 35
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 256
    max_position_embeddings: int = 32_768
    rms_norm_eps: float = 1e-6
    sliding_window: int = 512
    final_logit_softcapping: float = 30.0
    vocab_size_per_layer_input: int = 262_144
    hidden_size_per_layer_input: int = 256
    altup_num_inputs: int = 4
    num_kv_shared_layers: int = 15
    laurel_rank: int = 64
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            check_count(name, getattr(self, name), largest)
        check_number("rms_norm_eps", self.rms_norm_eps, 1e-30, 1)
        check_number("final_logit_softcapping", self.final_logit_softcapping, 1e-3, 1e30)
        for name in ("rope_theta", "rope_local_base_freq"):
            check_number(name, getattr(self, name), 1, 1e30)
        check_multiple("head_dim", self.head_dim, 2)
        check_multiple("num_attention_heads", self.num_attention_heads, self.num_key_value_heads)
        if self.altup_num_inputs < 2:
            raise ValueError("altup_num_inputs = 1 is not supported; models have 4")
        layers = self.num_hidden_layers
        check_layers(self.layer_types, layers, self.num_kv_shared_layers)
        for name in ("intermediate_size", "activation_sparsity_pattern"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != layers:
                raise ValueError(f"{name} {shown(values)} is no list of {layers} layers' values")
        for size in self.intermediate_size:
            check_count("intermediate_size", size, 2**20)
        for part in self.activation_sparsity_pattern:
            if part != 0:
                check_number("activation_sparsity_pattern", part, 1e-9, 1 - 1e-9)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Gemma3nConfig:
        """The configuration in what a `config.json` says of the text model.

        Raises:
            ValueError: a setting is unknown (ignoring it could change the model), out of range, or
                asks for what is not supported.
        """
        known = {field.name: field.default for field in fields(cls)}
        check_only(settings, _ONLY)
        read = {*known, *_ONLY, "rope_parameters", "rope_scaling"}
        check_known(settings.keys() - read - _UNREAD - BOOKKEEPING)
        single = {n: settings[n] for n in known if n in settings and known[n] is not MISSING}
        layers = single.get("num_hidden_layers", cls.num_hidden_layers)
        check_count("num_hidden_layers", layers, _LARGEST["num_hidden_layers"])
        lists: dict[str, Any] = {
            "layer_types": [FULL if i % 5 == 4 else SLIDING for i in range(layers)],
            "intermediate_size": [16_384] * layers,
            "activation_sparsity_pattern": [
                0.95 if layers > 10 > i else 0.0 for i in range(layers)
            ],
        }
        for name in lists:
            if (value := settings.get(name)) is not None:
                alike = name == "intermediate_size" and not isinstance(value, list)
                lists[name] = [value] * layers if alike else value
            if not isinstance(lists[name], list):
                raise ValueError(f"{name} is {shown(value)}, not a list")
        return cls(**single | _bases(settings) | {name: tuple(lists[name]) for name in lists})

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in asdict(self).items()}

    @property
    def layout(self) -> Layout:
        """Of keys and values."""
        full, sliding = (
            Heads(self.num_key_value_heads, self.head_dim, Rotary(self.head_dim, theta, False))
            for theta in (self.rope_theta, self.rope_local_base_freq)
        )
        shared, window = self.num_kv_shared_layers, self.sliding_window
        return Layout(self.layer_types, shared, window, full, sliding)


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _bases(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the rotary embedding, as files have them beside the others or, later, in a table."""
    tables = settings.get("rope_parameters") or {}
    scaling = {FULL: settings.get("rope_scaling")}
    bases = {n: settings[n] for n in ("rope_theta", "rope_local_base_freq") if n in settings}
    for part in (tables, scaling):
        if not isinstance(part, Mapping) or part.keys() - {FULL, SLIDING}:
            raise ValueError(
                f"rope_parameters {shown(part)} is no table of {FULL!r} and {SLIDING!r}"
            )
        for kind, name in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
            table = part.get(kind) or {}
            if not isinstance(table, Mapping):
                raise ValueError(f"the rotary embedding {shown(table)} is not an object")
            if "rope_theta" in table:
                bases[name] = table["rope_theta"]
            for other in table.keys() - {"rope_theta"}:
                if other not in ("rope_type", "type") or table[other] not in (None, "default"):
                    raise ValueError(
                        f"the rotary embedding's {shown(other)} = {shown(table[other])} is not "
                        "supported; evaluate this model with --model hf"
                    )
    return bases


def read_gemma3n(settings: Mapping[str, Any]) -> Gemma3nConfig | None:
    """The configuration in what a `config.json` says; None where it is of another family.

    Raises:
        ValueError: it cannot be used.
    """
    text = text_settings(settings, MODEL_TYPE)
    return None if text is None else Gemma3nConfig.from_dict(text)
