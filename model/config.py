"""The shape of a YOCO model, as `params.json` and `config.json` state it."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from yoco_eval.printable import listed, shown

from .checks import check_count, check_flag, check_multiple, check_number
from .mixers import KINDS, GatedRetentionSettings, Settings, SlidingWindowSettings

# Settings of the published code's runs, which say nothing about the model.
_RUN_SETTINGS = {"max_batch_size", "model_parallel_size", "load_checkpoint"}
# Sizes up to far beyond any model's; a file that states more is damaged or made up. All numbers
# that follow from them (bytes, operations) stay small enough to be computed.
_LARGEST = {
    "dim": 2**17,
    "n_layers": 2**12,
    "hidden_dim": 2**20,
    "n_attn_heads": 2**16,
    "n_attn_kv_heads": 2**16,
    "vocab_size": 2**24,
    "n_self_layers": 2**12,
    "max_position_embeddings": 2**40,
}
_OPTIONAL = ("n_self_layers", "max_position_embeddings")


@dataclass(frozen=True)
class YocoConfig:
    """Shape of a YOCO model; names as in the published `params.json`.

    Attributes:
        self_decoder: the kind of the self-decoder, with its settings. In files these stand beside
            the others, with `self_decoder` naming the kind: see `from_dict`.
        n_layers: of both decoders; the first `n_self_layers` of them are the self-decoder, half of
            them where that is None.
        rope_theta, rope_endpoint: of the cross-decoder's rotary embedding, as `rotary_angles` has
            them.
        query_norm_eps: of the norm of each head's query, before it is rotated; None: there is none.
        qkv_bias: whether the cross-decoder's projections to queries, keys and values add one.
        tied_embeddings: whether the output projection is the embedding.
        max_position_embeddings: the context length that the checkpoint was trained for, in tokens;
            None where it does not say.
    """

    dim: int
    n_layers: int
    hidden_dim: int
    n_attn_heads: int
    n_attn_kv_heads: int
    vocab_size: int
    self_decoder: Settings
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_position_embeddings: int | None = None
    n_self_layers: int | None = None
    rope_endpoint: bool = True
    query_norm_eps: float | None = None
    qkv_bias: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_count(name, getattr(self, name), largest)
        # Beyond these, angles and norms are infinite or not a number in float32.
        check_number("rope_theta", self.rope_theta, 1, 1e30)
        check_number("norm_eps", self.norm_eps, 1e-30, 1)
        if self.query_norm_eps is not None:
            check_number("query_norm_eps", self.query_norm_eps, 1e-30, 1)
        for name in ("rope_endpoint", "qkv_bias", "tied_embeddings"):
            check_flag(name, getattr(self, name))
        if self.n_self_layers is None:
            check_multiple("n_layers", self.n_layers, 2)
        elif self.n_self_layers >= self.n_layers:
            raise ValueError(
                f"n_self_layers = {self.n_self_layers} leaves none of {self.n_layers} layers to "
                "the cross-decoder"
            )
        check_multiple("n_attn_heads", self.n_attn_heads, self.n_attn_kv_heads)
        check_multiple("dim", self.dim, 2 * self.n_attn_heads)
        self.self_decoder.check(self.dim)

    @property
    def self_layers(self) -> int:
        return self.n_layers // 2 if self.n_self_layers is None else self.n_self_layers

    @property
    def cross_layers(self) -> int:
        return self.n_layers - self.self_layers

    @property
    def attn_head_dim(self) -> int:
        return self.dim // self.n_attn_heads

    def with_rope_theta(self, theta: float) -> YocoConfig:
        """The same with another base of the rotary embedding, in all layers."""
        mixer = self.self_decoder
        if hasattr(mixer, "self_rope_theta"):
            mixer = replace(mixer, **{"self_rope_theta": theta})
        return replace(self, rope_theta=theta, self_decoder=mixer)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> YocoConfig:
        """The configuration in a `params.json` or `config.json`.

        Where `self_decoder` does not name its kind, it is sliding-window attention if there is a
        `sliding_window`, else gated retention. Its rotary embedding has the base `rope_theta`, too,
        unless `self_rope_theta` says otherwise.

        Raises:
            ValueError: a setting is missing, unknown (ignoring it could change the model) or out
                of range.
        """
        settings = {k: v for k, v in settings.items() if k not in _RUN_SETTINGS}
        length = settings.pop("max_seq_len", None)  # the published code's word; -1 where unset
        if length not in (None, -1):
            settings.setdefault("max_position_embeddings", length)
        if settings.get("sliding_window") in (None, False):
            settings.pop("sliding_window", None)
        if settings.get("n_attn_kv_heads", 0) is None:
            settings["n_attn_kv_heads"] = settings.get("n_attn_heads")
        default = SlidingWindowSettings if "sliding_window" in settings else GatedRetentionSettings
        kind = settings.pop("self_decoder", default.kind)
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"self_decoder {shown(kind)} is none of {', '.join(sorted(KINDS))}")
        own, others = _known(KINDS[kind]), _known(cls)
        if "self_rope_theta" in own and "rope_theta" in settings:
            settings.setdefault("self_rope_theta", settings["rope_theta"])
        required = {name for name, needed in (own | others).items() if needed} - {"self_decoder"}
        if missing := required - settings.keys():
            raise ValueError(f"missing settings: {listed(sorted(missing))}")
        if unknown := settings.keys() - (own.keys() | others.keys()):
            raise ValueError(f"unknown settings: {listed(sorted(unknown))}")
        rest = {name: value for name, value in settings.items() if name in others}
        # What is wrong with the base of both decoders is told under the name that the file has.
        if "rope_theta" in rest:
            check_number("rope_theta", rest["rope_theta"], 1, 1e30)
        mixer = KINDS[kind](**{n: value for n, value in settings.items() if n in own})
        return cls(**rest, self_decoder=mixer)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads; without what it takes for granted."""
        settings = asdict(self) | asdict(self.self_decoder)
        settings["self_decoder"] = self.self_decoder.kind
        if settings.get("self_rope_theta") == self.rope_theta:
            del settings["self_rope_theta"]
        optional = {
            field.name
            for described in (self, self.self_decoder)
            for field in fields(described)
            if field.default is None
        }
        return {k: v for k, v in settings.items() if v is not None or k not in optional}


def _known(described: type) -> dict[str, bool]:
    """A class's settings, and whether each has to be given."""
    return {field.name: field.default is MISSING for field in fields(described)}


def known_settings() -> set[str]:
    """All names of settings that there are, whatever the kind of the self-decoder."""
    described: list[type] = [YocoConfig, *KINDS.values()]
    return {name for one in described for name in _known(one)}
