"""Gemma 3n: its configuration, its model and its costs; folders of it, whose text model is read.

A token has several streams (AltUp, arXiv:2301.13310): a layer predicts all of them from each other,
computes the first, and corrects the others by what that changed. Beside its feed-forward part it
has a residual of low rank (LAuReL, arXiv:2411.07501) and an input of its own for each token of the
vocabulary. All of that is done token by token. The last layers share keys and values of earlier
ones (`kv_sharing`): a token whose prediction nobody asks for leaves at the last layer that owns
some. Parameters have the published names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, partial
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_eval.kernels.dispatch import triton_takes, use_triton
from yoco_eval.kernels.matvec import norm_linear
from yoco_eval.kernels.norm import rms_norm
from yoco_eval.kernels.sequences import Sequences, Spans, Step
from yoco_eval.printable import listed, shown

from .checks import check_count, check_multiple, check_number
from .costs import OVERHEAD, logit_bytes
from .costs import Attention as CacheAttention
from .decoder import Decoder
from .errors import CheckpointError
from .folder import (
    BOOKKEEPING,
    CONFIG,
    check_names,
    check_numbers,
    is_folder,
    read_json,
    read_weights,
)
from .interface import Blueprint
from .kv_sharing import (
    FULL,
    SLIDING,
    Decoding,
    Feeding,
    Heads,
    Layout,
    Predicting,
    Rings,
    SharedCache,
    SharedState,
    begin_rings,
    check_layers,
    new_rings,
)
from .layers import RMSNorm
from .linear import Embedding, Stack, allocate, linear
from .rotary import Rotary, neighbours

# Of folders with vision and audio beside the text model, and of those of the text model alone: what
# the names of the text model's weights begin with.
_WHOLE, _TEXT = "gemma3n", "gemma3n_text"
_PREFIXES = {_WHOLE: "model.language_model.", _TEXT: "model."}
# All that a whole folder's configuration says beside what is in `text_config`.
_BESIDE_TEXT = {
    "text_config", "vision_config", "audio_config", "vision_soft_tokens_per_image",
    "audio_soft_tokens_per_image", "boi_token_id", "eoi_token_id", "image_token_id",
    "boa_token_id", "eoa_token_id", "audio_token_id", "tie_word_embeddings",
}  # fmt: skip
# What concerns training alone, and what the published code does not read.
_UNREAD = {
    "altup_coef_clip", "altup_lr_multiplier", "attention_dropout", "cache_implementation",
    "query_pre_attn_scalar",
}  # fmt: skip
# What all published models have alike; nothing else is supported.
_FIXED = {
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
_LEAST_SQUARE = 1e-5  # of a stream that is brought to the magnitude of the first


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
        """The configuration in a `config.json`, of the text model or with it as `text_config`.

        Raises:
            ValueError: a setting is unknown (ignoring it could change the model), out of range, or
                asks for what is not supported.
        """
        if settings.get("model_type") == _WHOLE:
            _check_fixed(settings)
            _check_known(settings, _BESIDE_TEXT)
            settings = settings.get("text_config", {})
            if not isinstance(settings, Mapping):
                raise ValueError(f"text_config is {shown(settings)}, not an object")
            if settings.get("model_type", _TEXT) != _TEXT:
                raise ValueError(
                    f"text_config has model_type {shown(settings['model_type'])}, not {_TEXT!r}"
                )
        known = {field.name: field.default for field in fields(cls)}
        _check_fixed(settings)
        _check_known(settings, {*known, *_FIXED, *_UNREAD, "rope_parameters", "rope_scaling"})
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
        return asdict(self)

    @property
    def layout(self) -> Layout:
        """Of keys and values."""
        full, sliding = (
            Heads(self.num_key_value_heads, self.head_dim, Rotary(self.head_dim, theta, False))
            for theta in (self.rope_theta, self.rope_local_base_freq)
        )
        shared, window = self.num_kv_shared_layers, self.sliding_window
        return Layout(self.layer_types, shared, window, full, sliding)


def _check_fixed(settings: Mapping[str, Any]) -> None:
    for name, only in _FIXED.items():
        if settings.get(name, only) != only:
            raise ValueError(
                f"{name} = {shown(settings[name])} is not supported, only {only!r}; evaluate this "
                "model with --model hf"
            )


def _check_known(settings: Mapping[str, Any], known: set[str]) -> None:
    if unknown := settings.keys() - known - BOOKKEEPING:
        raise ValueError(f"unknown settings: {listed(sorted(unknown))}")


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


class AltUp(nn.Module):
    """The streams of tokens before and after what a layer computes of the first of them."""

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__()
        self.streams, self.dim = config.altup_num_inputs, config.hidden_size
        self.eps = config.rms_norm_eps
        self.router_norm = RMSNorm(self.dim)
        self.modality_router = linear(self.dim, self.streams)
        self.prediction_coefs = linear(self.streams, self.streams**2)
        self.correction_coefs = linear(self.streams, self.streams)
        self.correct_output_scale = nn.Parameter(torch.ones(self.dim))

    def predict(self, streams: Tensor, first: int | None = None) -> Tensor:
        """Each of the streams [T, n, dim], or the first ones alone, plus a mixture of all."""
        weight = self.prediction_coefs.weight[: None if first is None else first * self.streams]
        mixture = F.linear(self._routes(streams[:, 0]), weight).unflatten(-1, (-1, self.streams))
        return torch.baddbmm(streams[:, :first], mixture, streams)

    def correct(self, predicted: Tensor, activated: Tensor) -> Tensor:
        """Moves streams [T, n, dim] in place, in which the first should be `activated` [T, dim]."""
        steps = F.linear(self._routes(activated), self.correction_coefs.weight) + 1
        innovation = activated - predicted[:, 0]
        return predicted.addcmul_(innovation[:, None], steps[..., None])

    def _routes(self, x: Tensor) -> Tensor:
        """x [T, dim] to [T, n]"""
        routes = norm_linear(x, self.router_norm.weight, self.modality_router.weight, self.eps)
        return torch.tanh(routes / self.dim)


class Laurel(nn.Module):
    """x plus the norm of a map of low rank."""

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.linear_left = linear(config.hidden_size, config.laurel_rank)
        self.linear_right = linear(config.laurel_rank, config.hidden_size)
        self.post_laurel_norm = RMSNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        mapped = self.linear_right(self.linear_left(x))
        return rms_norm(mapped, self.post_laurel_norm.weight, self.eps).add_(x)


class Attention(nn.Module):
    """Queries, keys and values with norms for each head; a layer that shares has queries alone."""

    def __init__(self, config: Gemma3nConfig, shares: bool) -> None:
        super().__init__()
        self.shares, self.head_dim, self.eps = shares, config.head_dim, config.rms_norm_eps
        dim, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = linear(dim, width)
        self.q_norm = RMSNorm(config.head_dim)
        self.o_proj = linear(width, dim)
        if not shares:
            kv_width = config.num_key_value_heads * config.head_dim
            self.k_proj = linear(dim, kv_width)
            self.v_proj = linear(dim, kv_width)
            self.k_norm = RMSNorm(config.head_dim)
            self.stack = Stack(self, "q_proj", "k_proj", "v_proj")

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, dim] to q, k and v [T, heads, head_dim], not rotated, or of a layer that shares, to
        q alone."""
        if self.shares:
            return (self.queries(x),)
        q, k, v = self.stack.split(F.linear(x, self.stack.weight))
        return self._heads(q, self.q_norm), *self._keys_values(k, v)

    def queries(self, x: Tensor) -> Tensor:
        return self._heads(F.linear(x, self.q_proj.weight), self.q_norm)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of `project` without the queries."""
        weight = self.stack.weight[len(self.q_proj.weight) :]
        return self._keys_values(*self.stack.split(F.linear(x, weight), first=1))

    def _keys_values(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(k, self.k_norm), self._heads(v)

    def _heads(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        return rms_norm(x, None if norm is None else norm.weight, self.eps)


class FeedForward(nn.Module):
    """down( gelu(gate z) * up(z) ); of sparse ones, gates that are not far above a token's mean are
    closed."""

    def __init__(self, config: Gemma3nConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        dim, hidden = config.hidden_size, config.intermediate_size[layer]
        self.gate_proj = linear(dim, hidden)
        self.up_proj = linear(dim, hidden)
        self.down_proj = linear(hidden, dim)
        self.stack = Stack(self, "gate_proj", "up_proj", alignment=1)
        closed = config.activation_sparsity_pattern[layer]
        # In standard deviations above the mean.
        self.threshold = NormalDist().inv_cdf(closed) if closed else None

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        gate, up = self.stack.split(norm_linear(x, norm, self.stack.weight, self.eps))
        if self.threshold is not None:
            deviation, mean = torch.std_mean(gate, -1, correction=0, keepdim=True)
            gate = F.relu(gate - (mean + deviation * _rounded(self.threshold, x.dtype)))
        return self.down_proj(F.gelu(gate, approximate="tanh").mul_(up))


class Layer(nn.Module):
    def __init__(self, config: Gemma3nConfig, layer: int) -> None:
        super().__init__()
        dim, own = config.hidden_size, config.hidden_size_per_layer_input
        self.eps = config.rms_norm_eps
        self.altup = AltUp(config)
        self.input_layernorm = RMSNorm(dim)
        self.laurel = Laurel(config)
        self.self_attn = Attention(config, shares=layer > config.layout.exit)
        self.post_attention_layernorm = RMSNorm(dim)
        self.pre_feedforward_layernorm = RMSNorm(dim)
        self.mlp = FeedForward(config, layer)
        self.post_feedforward_layernorm = RMSNorm(dim)
        self.per_layer_input_gate = linear(dim, own)
        self.per_layer_projection = linear(own, dim)
        self.post_per_layer_input_norm = RMSNorm(dim)

    def forward(
        self,
        streams: Tensor,
        inputs: Tensor,
        attend: Callable[..., Tensor],
        stored: bool = False,
    ) -> Tensor:
        """The layer of T tokens.

        Args:
            streams: [T, n, dim].
            inputs: [T, own], the layer's own of each token.
            attend: takes what `Attention.project` returns to outputs [T, heads, head_dim].
            stored: whether the tokens' keys and values are stored already: `attend` takes q, then.

        Returns:
            [T, n, dim].
        """
        streams = self.altup.predict(streams)
        x = streams[:, 0]
        z = self._norm(x, self.input_layernorm)
        out = attend(self.self_attn.queries(z)) if stored else attend(*self.self_attn.project(z))
        attended = self._norm(self.self_attn.o_proj(out.flatten(-2)), self.post_attention_layernorm)
        x = attended.add_(x).add_(self.laurel(z)).div_(sqrt(2))
        mapped = self.mlp(x, self.pre_feedforward_layernorm.weight)
        x = self._norm(mapped, self.post_feedforward_layernorm).add_(x)
        self.altup.correct(streams, x)
        gate = self.per_layer_input_gate(streams[:, 0] * self.altup.correct_output_scale)
        mapped = self.per_layer_projection(F.gelu(gate, approximate="tanh").mul_(inputs))
        streams[:, 1:].add_(self._norm(mapped, self.post_per_layer_input_norm)[:, None])
        return streams

    def keys_values(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' keys and values [T, heads, head_dim], not rotated, and nothing else."""
        x = self.altup.predict(streams, first=1)[:, 0]
        return self.self_attn.keys_values(self._norm(x, self.input_layernorm))

    def _norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return rms_norm(x, norm.weight, self.eps)


class Gemma3n(nn.Module):
    """A Gemma 3n text model for evaluation, as `interface.Model` has it.

    Its rows are tokens' streams [T, n, dim] before the exit, and the tokens [T]: the inputs of the
    layers from there on are made for the tokens that are asked for.
    """

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__()
        self.config, self.layout = config, config.layout
        dim, own = config.hidden_size, config.hidden_size_per_layer_input
        inputs = config.num_hidden_layers * own
        self.embed_tokens = Embedding(config.vocab_size, dim)
        self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, inputs)
        self.per_layer_model_projection = linear(dim, inputs)
        self.per_layer_projection_norm = RMSNorm(own)
        others = range(1, config.altup_num_inputs)
        self.altup_projections = nn.ModuleList(linear(dim, dim) for _ in others)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.altup_unembed_projections = nn.ModuleList(linear(dim, dim) for _ in others)
        self.norm = RMSNorm(dim)

    @staticmethod
    def costs_of(config: Gemma3nConfig) -> Gemma3nCosts:
        return Gemma3nCosts(config)

    @property
    def costs(self) -> Gemma3nCosts:
        return self.costs_of(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @classmethod
    def empty(cls, config: Gemma3nConfig, device: torch.device, dtype: torch.dtype) -> Gemma3n:
        """A model for evaluation whose weights are allocated but not set."""
        with torch.device("meta"):
            model = cls(config)
        allocate(model, device, dtype)
        return model.requires_grad_(False).eval()

    def new_cache(self, capacity: int) -> SharedCache:
        return SharedCache(self.layout, capacity, self.dtype, self.device)

    def feed(
        self,
        input_ids: Tensor,
        sequences: Sequences,
        state: SharedState,
        cache: SharedCache,
        keep: bool = True,
    ) -> tuple[tuple[Tensor, Tensor], SharedState | None]:
        """Runs packed tokens [T] up to the last layer that owns keys and values, and adds those."""
        feeding = Feeding(self.layout, cache, state, sequences, keep)
        x, leaving = self._embedded(input_ids), self.layout.exit
        inputs = self._layer_inputs(input_ids, x, 0, leaving)
        streams = self._widened(x)
        for i in range(leaving):
            streams = self._layer(i)(streams, inputs[:, i], partial(feeding.attend, i))
        feeding.store(leaving, *self._layer(leaving).keys_values(streams))
        return (streams, input_ids), feeding.after()

    def prefill(self, input_ids: Tensor, cache: SharedCache) -> tuple[Tensor, Tensor]:
        """Feeds tokens [T] that follow those of the cache's text, whose state it keeps."""
        sequences = Sequences((len(input_ids),), (cache.state.length,), input_ids.device)
        rows, state = self.feed(input_ids, sequences, cache.state, cache)
        assert state is not None
        cache.state = state
        return rows

    def predict(
        self, rows: tuple[Tensor, Tensor], positions: Tensor, cache: SharedCache, spans: Spans
    ) -> Tensor:
        """Runs the rows of some cached tokens through the other layers, to the normalised output
        [T, dim]."""
        streams, ids = rows
        predicting = Predicting(self.layout, cache, positions, spans)
        first, end = self.layout.exit, self.config.num_hidden_layers
        inputs = self._layer_inputs(ids, self._embedded(ids), first, end)
        for i in range(first, end):
            attend = partial(predicting.attend, i)
            streams = self._layer(i)(streams, inputs[:, i - first], attend, stored=True)
        return self._narrowed(streams)

    def logits(self, output: Tensor) -> Tensor:
        """[T, vocab_size], none beyond the cap."""
        cap = self.config.final_logit_softcapping
        return F.linear(output, self.embed_tokens.weight).div_(cap).tanh_().mul_(cap)

    def decoder(
        self, cache: SharedCache, size: int = 1, room: int | None = None
    ) -> Decoder[SharedState]:
        """Decodes up to `size` texts side by side, whose keys and values are in the cache."""
        rings = new_rings(self.layout, size, self.dtype, self.device)
        return Decoder(
            partial(self._step, cache=cache),
            partial(begin_rings, rings),
            rings,
            cache,
            size,
            room,
            self.device,
            self.dtype,
            graph=use_triton(cache.keys, self.embed_tokens.weight),
        )

    def _step(self, tokens: Tensor, step: Step, rings: Rings, cache: SharedCache) -> Tensor:
        """Logits [B, vocab_size] after tokens [B]."""
        decoding = Decoding(self.layout, cache, rings, step)
        x = self._embedded(tokens)
        inputs = self._layer_inputs(tokens, x, 0, self.config.num_hidden_layers)
        streams = self._widened(x)
        for i in range(self.config.num_hidden_layers):
            streams = self._layer(i)(streams, inputs[:, i], partial(decoding.attend, i))
        return self.logits(self._narrowed(streams))

    def _layer(self, i: int) -> Layer:
        layer = self.layers[i]
        assert isinstance(layer, Layer)
        return layer

    def _embedded(self, ids: Tensor) -> Tensor:
        """ids [T] to x [T, dim]"""
        return self.embed_tokens(ids) * _rounded(sqrt(self.config.hidden_size), self.dtype)

    def _layer_inputs(self, ids: Tensor, x: Tensor, first: int, end: int) -> Tensor:
        """Of tokens and their embeddings x [T, dim], the inputs [T, end - first, own] of layers
        `first` .. `end` - 1."""
        config, dtype = self.config, x.dtype
        own = config.hidden_size_per_layer_input
        part = slice(first * own, end * own)
        projected = F.linear(x, self.per_layer_model_projection.weight[part])
        projected = projected.mul_(_rounded(config.hidden_size**-0.5, dtype)).unflatten(
            -1, (-1, own)
        )
        projected = rms_norm(projected, self.per_layer_projection_norm.weight, config.rms_norm_eps)
        ids = torch.where(ids < config.vocab_size_per_layer_input, ids, 0)
        embedded = self.embed_tokens_per_layer.weight[:, part].index_select(0, ids)
        embedded = embedded.mul_(_rounded(sqrt(own), dtype)).view_as(projected)
        return projected.add_(embedded).mul_(_rounded(sqrt(0.5), dtype))

    def _widened(self, x: Tensor) -> Tensor:
        """Embeddings x [T, dim] to streams [T, n, dim], all as large as the first, which is x."""
        others = torch.stack([project(x) for project in self.altup_projections], 1)
        return torch.cat((x[:, None], _as_large(others, x)), 1)

    def _narrowed(self, streams: Tensor) -> Tensor:
        """Streams [T, n, dim] to the normalised output [T, dim]"""
        x, *others = streams.unbind(1)
        projections = zip(self.altup_unembed_projections, others, strict=True)
        mapped = torch.stack([project(other) for project, other in projections], 1)
        x = torch.cat((x[:, None], _as_large(mapped, x)), 1).mean(1)
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps)


def _as_large(streams: Tensor, x: Tensor) -> Tensor:
    """Streams [T, n, dim] with the magnitude, the root of the mean square, of x [T, dim]."""
    target = x.square().mean(-1, keepdim=True).sqrt()[:, None]
    square = streams.square().mean(-1, keepdim=True)
    return streams * target / square.clamp(min=_LEAST_SQUARE).sqrt()


def _rounded(constant: float, dtype: torch.dtype) -> float:
    """A constant as the published code multiplies with it, in the model's dtype: in bfloat16 that
    is up to 0.4 % another."""
    return torch.tensor(constant, dtype=dtype).item()


@dataclass(frozen=True)
class Gemma3nCosts:
    """`interface.Costs` of a Gemma 3n text model."""

    config: Gemma3nConfig

    @property
    def typical_product(self) -> tuple[int, int]:
        return self.config.hidden_size, 2 * max(self.config.intermediate_size)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return sum(shape.numel() for shape in _shapes(self.config).values()) * dtype.itemsize

    def cache_bytes(self, dtype: torch.dtype, length: int) -> int:
        return self.config.layout.cache_bytes(dtype, length)

    def state_bytes(self, dtype: torch.dtype) -> int:
        return self.config.layout.state_bytes(dtype)

    def passing_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """One layer's window several times over: before, with the tokens, and after."""
        windows = self.config.layer_types[: self.config.layout.exit].count(SLIDING)
        return (4 if triton_takes(device, dtype) else 10) * self.state_bytes(dtype) // windows

    def activation_bytes(
        self, dtype: torch.dtype, length: int, chunk: int, logits: int, device: torch.device
    ) -> int:
        config, fast = self.config, triton_takes(device, dtype)
        wide = max(dtype.itemsize, 4) // dtype.itemsize
        dim, hidden = config.hidden_size, max(config.intermediate_size)
        streams, leaving = config.altup_num_inputs * dim, config.layout.exit
        inputs = max(leaving, config.num_hidden_layers - leaving)
        inputs *= config.hidden_size_per_layer_input
        queries = config.num_attention_heads * config.head_dim
        projected = queries + 2 * config.num_key_value_heads * config.head_dim
        attention = CacheAttention(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        # Rows that are waiting, a layer's streams and those it predicts, and vectors beside them.
        held = 3 * streams + inputs + 4 * dim + queries + 2 * config.head_dim
        # Projections before and after their norms; in windows, packed copies or wide ones.
        window = 3 * queries if fast else (11 + config.head_dim // 32) * queries * wide
        mixing = 2 * projected + max(attention.numbers(dtype), window)
        feed_forward = dim + 4 * hidden
        norms = 0 if fast else 4 * wide * max(dim, inputs)
        layers = chunk * (held + max(mixing, feed_forward, norms, 2 * streams)) * dtype.itemsize
        reading = chunk * held * dtype.itemsize + attention.bytes(dtype, length, chunk, fast)
        return max(layers, reading, logit_bytes(dtype, logits)) + OVERHEAD

    def prefill_operations(self, length: int) -> int:
        """Of all layers before the exit, and the exit's keys and values."""
        config, leaving = self.config, self.config.layout.exit
        dim, streams = config.hidden_size, config.altup_num_inputs
        queries = config.num_attention_heads * config.head_dim
        pairs = 2 * config.num_key_value_heads * config.head_dim
        own = config.hidden_size_per_layer_input
        altup = 2 * dim * streams + streams**3 + streams**2 + streams**2 * dim
        layer = altup + dim * (2 * queries + pairs + 2 * config.laurel_rank + 2 * own)
        hidden = sum(config.intermediate_size[:leaving])
        token = leaving * (layer + dim * own) + 3 * dim * hidden + (streams - 1) * dim**2
        token += dim * streams + streams**2 + streams * dim + dim * pairs
        read = {FULL: length, SLIDING: min(length, config.sliding_window)}
        seen = sum(
            read[kind] * (read[kind] + 1) // 2 + (length - read[kind]) * read[kind]
            for kind in config.layer_types[:leaving]
        )
        return 2 * length * token + 4 * queries * seen

    def decode_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Every weight is read once, but of the layers' own inputs those of one token; the layers
        that share read keys and values once more."""
        config = self.config
        unread = config.vocab_size_per_layer_input - 1
        unread *= config.num_hidden_layers * config.hidden_size_per_layer_input
        weights = self.weight_bytes(dtype) - unread * dtype.itemsize
        return weights + config.layout.read_bytes(dtype, length)


@cache
def _shapes(config: Gemma3nConfig) -> dict[str, torch.Size]:
    """Of all parameters."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Gemma3n(config).named_parameters()}


def open_gemma3n(path: Path) -> Blueprint | None:
    """The text model in a folder of Gemma 3n, whose weights are read when it is made.

    Returns:
        None where it is no such folder.

    Raises:
        CheckpointError: its configuration is damaged or not supported; and when it is made, its
            weights are missing, damaged or do not fit the configuration.
    """
    if not is_folder(path):
        return None
    settings = read_json(path / CONFIG)
    kind = settings.get("model_type")
    if kind not in (_WHOLE, _TEXT):
        return None
    try:
        config = Gemma3nConfig.from_dict(settings)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error

    def make(device: torch.device, dtype: torch.dtype) -> Gemma3n:
        weights = _read(path, config, _PREFIXES[kind], dtype)
        model = Gemma3n.empty(config, device, dtype)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        return model

    return Blueprint(config, Gemma3n.costs_of(config), make)


def _read(path: Path, config: Gemma3nConfig, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by name; heads' channels in the order in which neighbours are turned."""
    # Published files have keys and values for layers that share, too, which nothing reads.
    shared = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight")

    def wanted(name: str) -> bool:
        found = shared.fullmatch(name.removeprefix(prefix))
        return name.startswith(prefix) and not (found and int(found[1]) > config.layout.exit)

    stored = read_weights(path, wanted)
    weights = {name.removeprefix(prefix): weight for name, weight in stored.items()}
    check_names(path, _shapes(config), weights, lambda name: prefix + name)
    check_numbers(path, stored, dtype)
    for name in weights:
        if re.fullmatch(r"layers\.\d+\.self_attn\.[qk]_(proj|norm)\.weight", name):
            weights[name] = neighbours(weights[name], config.head_dim)
    return weights
