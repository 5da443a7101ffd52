"""Gemma 3n: layers and model.

A token has several streams (AltUp, arXiv:2301.13310): a layer predicts all of them from each other,
computes the first, and corrects the others by what that changed. Beside its feed-forward part it
has a residual of low rank (LAuReL, arXiv:2411.07501) and an input of its own for each token of the
vocabulary. All of that is done token by token. The last layers share keys and values of earlier
ones (`kv_sharing`): a token whose prediction nobody asks for leaves at the last layer that owns
some. Parameters have the published names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_eval.kernels.dispatch import use_triton
from yoco_eval.kernels.logits import soft_cap
from yoco_eval.kernels.matvec import norm_linear
from yoco_eval.kernels.norm import rms_norm, rms_norm_add
from yoco_eval.kernels.sequences import Sequences, Spans, Step
from yoco_eval.kernels.swiglu import geglu

from .decoder import Decoder
from .gemma3n_config import Gemma3nConfig
from .gemma3n_costs import Gemma3nCosts
from .gemma_folder import text_weights
from .gemma_parts import gelu, layer_inputs, rounded
from .kv_sharing import (
    Decoding,
    Feeding,
    Predicting,
    Rings,
    SharedCache,
    SharedState,
    new_decoder,
)
from .layers import RMSNorm
from .linear import Embedding, Stack, allocate, linear

_LEAST_SQUARE = 1e-5  # of a stream that is brought to the magnitude of the first


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
        return rms_norm_add(mapped, self.post_laurel_norm.weight, self.eps, x)


class Attention(nn.Module):
    """Projections and norms of queries and, in a layer that owns them, of keys and values."""

    def __init__(self, config: Gemma3nConfig, own: bool) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        dim, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = linear(dim, width)
        self.q_norm = RMSNorm(config.head_dim)
        self.o_proj = linear(width, dim)
        if own:
            kv_width = config.num_key_value_heads * config.head_dim
            self.k_proj = linear(dim, kv_width)
            self.v_proj = linear(dim, kv_width)
            self.k_norm = RMSNorm(config.head_dim)
            self.stack = Stack(self, "q_proj", "k_proj", "v_proj")

    def queries(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim], not rotated, of x [T, dim]."""
        return self._normed(self.q_proj(x), self.q_norm.weight)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not rotated, and values [T, kv_heads, head_dim] likewise."""
        weight = self.stack.weight[self.q_proj.out_features :]
        k, v = self.stack.split(F.linear(x, weight), first=1)
        return self._normed(k, self.k_norm.weight), self._normed(v)

    def all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        q, k, v = self.stack.split(F.linear(x, self.stack.weight))
        q, k = self._normed(q, self.q_norm.weight), self._normed(k, self.k_norm.weight)
        return q, k, self._normed(v)

    def _normed(self, y: Tensor, weight: Tensor | None = None) -> Tensor:
        return rms_norm(y.unflatten(-1, (-1, self.head_dim)), weight, self.eps)


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
        hidden = norm_linear(x, norm, self.stack.weight, self.eps)
        if self.threshold is not None:
            gate = self.stack.split(hidden)[0]
            deviation, mean = torch.std_mean(gate, -1, correction=0, keepdim=True)
            gate.sub_(mean + deviation * rounded(self.threshold, x.dtype)).relu_()
        return self.down_proj(geglu(hidden))


class Layer(nn.Module):
    def __init__(self, config: Gemma3nConfig, layer: int) -> None:
        super().__init__()
        dim, own = config.hidden_size, config.hidden_size_per_layer_input
        self.eps = config.rms_norm_eps
        self.altup = AltUp(config)
        self.input_layernorm = RMSNorm(dim)
        self.laurel = Laurel(config)
        self.self_attn = Attention(config, own=layer <= config.layout.exit)
        self.post_attention_layernorm = RMSNorm(dim)
        self.pre_feedforward_layernorm = RMSNorm(dim)
        self.mlp = FeedForward(config, layer)
        self.post_feedforward_layernorm = RMSNorm(dim)
        self.per_layer_input_gate = linear(dim, own)
        self.per_layer_projection = linear(own, dim)
        self.post_per_layer_input_norm = RMSNorm(dim)

    def forward(
        self, streams: Tensor, inputs: Tensor, attend: Callable[..., Tensor], own: bool
    ) -> Tensor:
        """Streams [T, n, dim] to the next layer's.

        Args:
            inputs: [T, channels], the layer's own of each token.
            attend: takes queries, and where `own`, keys and values, to outputs shaped as queries.
        """
        streams = self.altup.predict(streams)
        x = streams[:, 0]
        z = self._norm(x, self.input_layernorm)
        attention = self.self_attn
        out = attend(*attention.all(z)) if own else attend(attention.queries(z))
        attended = self._norm(attention.o_proj(out.flatten(-2)), self.post_attention_layernorm)
        x = attended.add_(x).add_(self.laurel(z)).div_(sqrt(2))
        mapped = self.mlp(x, self.pre_feedforward_layernorm.weight)
        x = rms_norm_add(mapped, self.post_feedforward_layernorm.weight, self.eps, x)
        self.altup.correct(streams, x)
        gate = self.per_layer_input_gate(streams[:, 0] * self.altup.correct_output_scale)
        mapped = self.per_layer_projection(gelu(gate).mul_(inputs))
        streams[:, 1:].add_(self._norm(mapped, self.post_per_layer_input_norm)[:, None])
        return streams

    def keys_values(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' keys and values [T, heads, head_dim], not rotated, and nothing else."""
        x = self.altup.predict(streams, first=1)[:, 0]
        return self.self_attn.keys_values(self._norm(x, self.input_layernorm))

    def _norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return rms_norm(x, norm.weight, self.eps)


# Of each token, the streams that come into the exit layer, and the token's id.
Rows = tuple[Tensor, Tensor]


class Gemma3n(nn.Module):
    """The text model for evaluation, as `interface.Model` has it."""

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

    @property
    def group(self) -> None:
        """Its texts are held by one process each."""

    @property
    def block(self) -> int:
        """Each token reads the whole of its text."""
        return 1

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
    ) -> tuple[Rows, SharedState | None]:
        """Runs packed tokens [T] through the layers before the exit, to the exit's keys and values.

        Returns:
            What comes into the exit layer [T, n, dim], with the ids; and the state.
        """
        feeding = Feeding(self.layout, cache, state, sequences, keep)
        streams, inputs = self._embedded(input_ids, range(self.layout.exit))
        for i in range(self.layout.exit):
            attend = partial(feeding.attend, i)
            streams = self.layers[i](streams, inputs[:, i], attend, own=True)
        last = self.layers[self.layout.exit]
        assert isinstance(last, Layer)
        feeding.store(self.layout.exit, *last.keys_values(streams))
        return (streams, input_ids), feeding.after()

    def prefill(self, input_ids: Tensor, cache: SharedCache, asked: bool = True) -> Rows:
        """Feeds tokens [T] that follow those of the cache's text, whose state it keeps."""
        sequences = Sequences((len(input_ids),), (cache.state.length,), input_ids.device)
        rows, state = self.feed(input_ids, sequences, cache.state, cache)
        assert state is not None
        cache.state = state
        return rows

    def predict(self, rows: Rows, positions: Tensor, cache: SharedCache, spans: Spans) -> Tensor:
        """Runs some cached tokens through the exit layer, and those that share behind it.

        Returns:
            The normalised output [T, dim], of which `logits` makes predictions.
        """
        streams, input_ids = rows
        layers = range(self.layout.exit, len(self.layers))
        predicting = Predicting(self.layout, cache, positions, spans)
        inputs = self._inputs(input_ids, self._first(input_ids), layers)
        for i in layers:
            attend = partial(predicting.attend, i)
            streams = self.layers[i](streams, inputs[:, i - layers.start], attend, own=False)
        return self._narrowed(streams)

    def logits(self, output: Tensor) -> Tensor:
        """[T, vocab_size]"""
        logits = F.linear(output, self.embed_tokens.weight)
        return soft_cap(logits, self.config.final_logit_softcapping)

    def decoder(
        self, cache: SharedCache, size: int = 1, room: int | None = None
    ) -> Decoder[SharedState]:
        """Decodes up to `size` texts side by side, whose keys and values are in the cache."""
        graph = use_triton(cache.keys, self.embed_tokens.weight)
        return new_decoder(self.layout, self._step, cache, size, room, graph)

    def _step(self, tokens: Tensor, step: Step, rings: Rings, cache: SharedCache) -> Tensor:
        """Logits [B, vocab_size] after tokens [B]."""
        decoding = Decoding(self.layout, cache, rings, step)
        streams, inputs = self._embedded(tokens, range(len(self.layers)))
        for i, layer in enumerate(self.layers):
            own = i <= self.layout.exit
            streams = layer(streams, inputs[:, i], partial(decoding.attend, i), own=own)
        return self.logits(self._narrowed(streams))

    def _embedded(self, ids: Tensor, layers: range) -> tuple[Tensor, Tensor]:
        """Of tokens [T], streams [T, n, dim] before the first layer, and the inputs of some
        layers."""
        x = self._first(ids)
        return self._widened(x), self._inputs(ids, x, layers)

    def _first(self, ids: Tensor) -> Tensor:
        """Of tokens [T], the first stream [T, dim] before the first layer."""
        return self.embed_tokens(ids).mul_(rounded(sqrt(self.config.hidden_size), self.dtype))

    def _inputs(self, ids: Tensor, x: Tensor, layers: range) -> Tensor:
        """Of tokens [T] and their first stream x [T, dim], the inputs of some layers
        [T, len(layers), channels]."""
        config = self.config
        scales = sqrt(config.hidden_size_per_layer_input), config.hidden_size**-0.5, sqrt(0.5)
        found, made, both = (rounded(scale, x.dtype) for scale in scales)
        return layer_inputs(
            torch.where(ids < config.vocab_size_per_layer_input, ids, 0),
            x,
            layers,
            self.embed_tokens_per_layer.weight,
            self.per_layer_model_projection.weight,
            self.per_layer_projection_norm.weight,
            config.rms_norm_eps,
            (found, made, both),
        )

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


def gemma3n_weights(folder: Path, config: Gemma3nConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `text_weights`."""
    with torch.device("meta"):
        model = Gemma3n(config)
    return text_weights(folder, model, config.layout, dtype)
