"""The shape of a YOCO model, as `params.json` and `config.json` state it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from yoco_eval.printable import listed, shown

# Settings of the published code's runs, which say nothing about the model.
_RUN_SETTINGS = {"max_batch_size", "model_parallel_size", "load_checkpoint"}
# Sizes up to far beyond any model's; a file that states more is damaged or made up. All numbers
# that follow from them (bytes, operations) stay small enough to be computed.
_LARGEST = {
    "dim": 2**17,
    "n_layers": 2**12,
    "hidden_dim": 2**20,
    "n_self_heads": 2**16,
    "n_attn_heads": 2**16,
    "n_attn_kv_heads": 2**16,
    "vocab_size": 2**24,
    "sliding_window": 2**32,
    "max_position_embeddings": 2**40,
}
_OPTIONAL = ("sliding_window", "max_position_embeddings")
# Beyond these, angles and norms are infinite or not a number in float32.
_RANGES = {"rope_theta": (1, 1e30), "norm_eps": (1e-30, 1)}


@dataclass(frozen=True)
class YocoConfig:
    """Shape of a YOCO model; names as in the published `params.json`.

    The first half of the `n_layers` layers is the self-decoder: gated retention, or sliding-window
    attention if `sliding_window` (in tokens) is set. `max_position_embeddings` is the context
    length that the checkpoint was trained for, in tokens; None where it does not say.
    """

    dim: int
    n_layers: int
    hidden_dim: int
    n_self_heads: int
    n_attn_heads: int
    n_attn_kv_heads: int
    vocab_size: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {shown(value)}")
            if value > largest:
                raise ValueError(f"{name} must be at most {largest}, not {shown(value)}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not value > 0:  # which NaN is not
                raise ValueError(f"{name} must be a positive number, not {shown(value)}")
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least:g} to {most:g}, not {shown(value)}")
        for multiple, of in (
            ("n_layers", 2),
            ("n_attn_heads", self.n_attn_kv_heads),
            ("dim", 2 * self.n_self_heads),
            ("dim", 2 * self.n_attn_heads),
        ):
            if getattr(self, multiple) % of:
                raise ValueError(f"{multiple} = {getattr(self, multiple)} is no multiple of {of}")

    @property
    def self_head_dim(self) -> int:
        return self.dim // self.n_self_heads

    @property
    def attn_head_dim(self) -> int:
        return self.dim // self.n_attn_heads

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> YocoConfig:
        """The configuration in a `params.json` or `config.json`.

        Raises:
            ValueError: a setting is missing, unknown (ignoring it could change the model) or out
                of range.
        """
        settings = {k: v for k, v in settings.items() if k not in _RUN_SETTINGS}
        length = settings.pop("max_seq_len", None)  # the published code's word; -1 where unset
        if length not in (None, -1):
            settings.setdefault("max_position_embeddings", length)
        if settings.get("sliding_window") is False:
            settings["sliding_window"] = None
        if settings.get("n_attn_kv_heads", 0) is None:
            settings["n_attn_kv_heads"] = settings.get("n_attn_heads")
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls)[:7]}
        if missing := required - settings.keys():
            raise ValueError(f"missing settings: {listed(sorted(missing))}")
        if unknown := settings.keys() - known:
            raise ValueError(f"unknown settings: {listed(sorted(unknown))}")
        return cls(**settings)
