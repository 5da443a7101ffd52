"""The shape of Phi-4-mini-flash, as `config.json` states it, where it is supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from yoco_eval.printable import listed, shown

from .checks import check_count, check_known, check_multiple, check_number
from .folder import BOOKKEEPING

MODEL_TYPE = "phi4flash"
# Sizes up to far beyond any model's; a file that states more is damaged or made up.
_LARGEST = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "sliding_window": 2**32,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**40,
    "mamba_d_state": 2**8,
    "mamba_d_conv": 2**6,
    "mamba_expand": 2**6,
}
_LARGEST_HEAD = 256  # channels: a pair of heads is one of twice as many to the kernels
# Settings of which one value is what the published code does, some of them whatever a file says;
# it is also what holds where they are left out.
_ONLY = {
    "hidden_act": "silu",
    "lm_head_bias": False,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mb_per_layer": 2,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
# Settings that say nothing about the logits of a text. There are no positions but by the order of
# tokens, whatever `rope_theta` is.
_IGNORED = BOOKKEEPING | {
    "_attn_implementation", "attention_dropout", "embd_pdrop", "resid_pdrop", "rope_theta",
}  # fmt: skip


@dataclass(frozen=True)
class Phi4FlashConfig:
    """Shape of a Phi-4-mini-flash model; names as in `config.json`.

    Attributes:
        sliding_window: what a token sees in layers with windows, in tokens, its own included.
        max_position_embeddings: the context length in tokens, as the file has it; None where it
            does not say. The published file says 262144, its model card 64K: with no positional
            encoding nothing of the model depends on either, and cutting contexts where the file
            does not would hide what becomes of them beyond.
        mamba_d_state, mamba_d_conv, mamba_expand: states of each channel of a Mamba layer, tokens
            that its convolution weighs, and its channels in multiples of `hidden_size`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    sliding_window: int
    vocab_size: int
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int | None = None
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            if getattr(self, name) is not None or name != "max_position_embeddings":
                check_count(name, getattr(self, name), largest)
        check_number("layer_norm_eps", self.layer_norm_eps, 1e-30, 1)
        check_multiple("num_hidden_layers", self.num_hidden_layers, 4)
        check_multiple("num_key_value_heads", self.num_key_value_heads, 2)
        check_multiple("num_attention_heads", self.num_attention_heads, self.num_key_value_heads)
        check_multiple("hidden_size", self.hidden_size, self.num_attention_heads)
        if self.head_dim > _LARGEST_HEAD:
            raise ValueError(
                f"hidden_size = {self.hidden_size} makes {self.num_attention_heads} heads of "
                f"{self.head_dim} channels each; up to {_LARGEST_HEAD} are supported"
            )
        if self.mamba_d_conv == 1:
            raise ValueError("mamba_d_conv must be at least 2, not 1")

    @property
    def memory_layer(self) -> int:
        """The last Mamba layer, counted from 0, whose memory others take; the next one's keys and
        values are shared."""
        return self.num_hidden_layers // 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_pairs(self) -> int:
        """Pairs of neighbouring heads of keys and of values."""
        return self.num_key_value_heads // 2

    @property
    def kv_width(self) -> int:
        """Channels of a layer's keys, and of its values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of a Mamba layer."""
        return self.mamba_expand * self.hidden_size

    @property
    def time_rank(self) -> int:
        """Channels of which a Mamba layer makes its time steps."""
        return -(-self.hidden_size // 16)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Phi4FlashConfig:
        """The configuration in a `config.json`. Sizes of Mamba layers that it leaves out, as the
        published one does, have the defaults of the published code.

        Raises:
            ValueError: a setting is missing, out of range, unknown, or contradicts what the
                published code does.
        """
        given = {name: value for name, value in settings.items() if name not in _IGNORED}
        for name, only in _ONLY.items():
            if given.pop(name, only) != only:
                raise ValueError(
                    f"{name} = {shown(settings[name])} is not supported, only {shown(only)}"
                )
        rank = given.pop("mamba_dt_rank", "auto")
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := required - given.keys():
            raise ValueError(f"missing settings: {listed(sorted(missing))}")
        check_known(given.keys() - {field.name for field in fields(cls)})
        given["sliding_window"] = _window(given["sliding_window"], given["num_hidden_layers"])
        config = cls(**given)
        if rank not in ("auto", config.time_rank):
            raise ValueError(
                f"mamba_dt_rank = {shown(rank)} is not supported, only 'auto', a sixteenth of "
                f"hidden_size: {config.time_rank}"
            )
        return config


def _window(value: Any, layers: Any) -> Any:
    """A number of tokens; or of what saving a configuration again makes of it, a list with an entry
    for each layer, the number that it has for layers with windows."""
    if not isinstance(value, list):
        return value
    check_count("num_hidden_layers", layers, _LARGEST["num_hidden_layers"])
    window = value[1] if len(value) > 1 else None
    expected = [window if i % 2 and i < layers // 2 else None for i in range(layers)]
    if value != expected:
        raise ValueError(
            f"sliding_window {shown(value)} is neither a number nor a list of {layers} layers' "
            f"windows, with one number in every second of the first {layers // 2} and null else"
        )
    return window


def read_phi4flash(settings: Mapping[str, Any]) -> Phi4FlashConfig | None:
    """The configuration in what a `config.json` says; None where it is of another family.

    Raises:
        ValueError: as `Phi4FlashConfig.from_dict`.
    """
    alike = settings.get("model_type") == MODEL_TYPE
    return Phi4FlashConfig.from_dict(settings) if alike else None
