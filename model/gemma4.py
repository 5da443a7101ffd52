"""Gemma 4 with shared keys and values, E2B and E4B: layers and model.

Equations and the weights' names: `modeling_gemma4.py` of transformers 5.23. Beside what
`kv_sharing` describes, each part of a layer has a norm before and after it; queries, keys and
values are normed, and scores are not scaled; a layer ends with a gated input that it makes of the
token itself, whatever came before it; logits are capped.

This is the language model alone. What else a multimodal checkpoint holds, for images and sounds, is
not read: the texts of evaluations have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from .gemma4_config import Gemma4Config
from .gemma4_costs import Gemma4Costs
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


class Attention(nn.Module):
    """Projections and norms of queries and, in a layer that owns them, of keys and values."""

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        heads = config.layout.heads(layer)
        self.head_dim, self.eps = heads.dim, config.rms_norm_eps
        self.q_proj = linear(config.hidden_size, config.num_attention_heads * heads.dim)
        self.o_proj = linear(config.num_attention_heads * heads.dim, config.hidden_size)
        self.q_norm = RMSNorm(heads.dim)
        if layer <= config.layout.exit:
            self.k_proj = linear(config.hidden_size, heads.count * heads.dim)
            self.v_proj = linear(config.hidden_size, heads.count * heads.dim)
            self.k_norm = RMSNorm(heads.dim)
            self.stack = Stack(self, "q_proj", "k_proj", "v_proj")

    def queries(self, x: Tensor, norm: Tensor) -> Tensor:
        """[T, heads, head_dim], not rotated, of x [T, hidden_size] that is not normed yet."""
        y = norm_linear(x, norm, self.q_proj.weight, self.eps)
        return self._normed(y, self.q_norm.weight)

    def keys_values(self, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not rotated, and values [T, kv_heads, head_dim] likewise."""
        weight = self.stack.weight[self.q_proj.out_features :]
        k, v = self.stack.split(norm_linear(x, norm, weight, self.eps), first=1)
        return self._normed(k, self.k_norm.weight), self._normed(v)

    def all(self, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        q, k, v = self.stack.split(norm_linear(x, norm, self.stack.weight, self.eps))
        q, k = self._normed(q, self.q_norm.weight), self._normed(k, self.k_norm.weight)
        return q, k, self._normed(v)

    def _normed(self, y: Tensor, weight: Tensor | None = None) -> Tensor:
        return rms_norm(y.unflatten(-1, (-1, self.head_dim)), weight, self.eps)


class MLP(nn.Module):
    """down_proj( gelu(gate_proj z) * up_proj z )"""

    def __init__(self, dim: int, hidden_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gate_proj = linear(dim, hidden_dim)
        self.up_proj = linear(dim, hidden_dim)
        self.down_proj = linear(hidden_dim, dim)
        self.stack = Stack(self, "gate_proj", "up_proj", alignment=1)

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        return self.down_proj(geglu(norm_linear(x, norm, self.stack.weight, self.eps)))


class Layer(nn.Module):
    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        dim, inputs = config.hidden_size, config.hidden_size_per_layer_input
        self.eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(dim)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(dim)
        self.pre_feedforward_layernorm = RMSNorm(dim)
        self.mlp = MLP(dim, config.hidden(layer), self.eps)
        self.post_feedforward_layernorm = RMSNorm(dim)
        self.per_layer_input_gate = linear(dim, inputs)
        self.per_layer_projection = linear(inputs, dim)
        self.post_per_layer_input_norm = RMSNorm(dim)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(
        self, x: Tensor, inputs: Tensor, attend: Callable[..., Tensor], own: bool
    ) -> Tensor:
        """x [T, hidden_size], which stays as it is, to the next layer's.

        Args:
            inputs: [T, hidden_size_per_layer_input], of this layer.
            attend: takes queries, and where `own`, keys and values, to outputs shaped as queries.
        """
        x = self._plus(x, self.post_attention_layernorm, self._mixed(x, attend, own))
        fed = self.mlp(x, self.pre_feedforward_layernorm.weight)
        x = self._plus(x, self.post_feedforward_layernorm, fed)
        x = self._plus(x, self.post_per_layer_input_norm, self._added(x, inputs))
        return x.mul_(self.layer_scalar)

    def _mixed(self, x: Tensor, attend: Callable[..., Tensor], own: bool) -> Tensor:
        attention, norm = self.self_attn, self.input_layernorm.weight
        out = attend(*attention.all(x, norm)) if own else attend(attention.queries(x, norm))
        return attention.o_proj(out.flatten(-2))

    def _added(self, x: Tensor, inputs: Tensor) -> Tensor:
        return self.per_layer_projection(gelu(self.per_layer_input_gate(x)).mul_(inputs))

    def _plus(self, x: Tensor, norm: RMSNorm, made: Tensor) -> Tensor:
        return rms_norm_add(made, norm.weight, self.eps, x)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All that is made of a token that exits here."""
        return self.self_attn.keys_values(x, self.input_layernorm.weight)


# Of each token, what comes into the exit layer, and the token's id.
Rows = tuple[Tensor, Tensor]


class Gemma4(nn.Module):
    """The language model for evaluation, as `interface.Model` has it."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config, self.layout = config, config.layout
        dim, inputs = config.hidden_size, config.hidden_size_per_layer_input
        layers = len(config.layer_types)
        self.embed_tokens = Embedding(config.vocab_size, dim)
        self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, layers * inputs)
        self.per_layer_model_projection = linear(dim, layers * inputs)
        self.per_layer_projection_norm = RMSNorm(inputs)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(layers))
        self.norm = RMSNorm(dim)

    @staticmethod
    def costs_of(config: Gemma4Config) -> Gemma4Costs:
        return Gemma4Costs(config)

    @property
    def costs(self) -> Gemma4Costs:
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
    def empty(cls, config: Gemma4Config, device: torch.device, dtype: torch.dtype) -> Gemma4:
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
            What comes into the exit layer [T, hidden_size], with the ids; and the state.
        """
        feeding = Feeding(self.layout, cache, state, sequences, keep)
        x, inputs = self._embedded(input_ids, range(self.layout.exit))
        for i in range(self.layout.exit):
            x = self.layers[i](x, inputs[:, i], partial(feeding.attend, i), own=True)
        last = self.layers[self.layout.exit]
        assert isinstance(last, Layer)
        feeding.store(self.layout.exit, *last.keys_values(x))
        return (x, input_ids), feeding.after()

    def prefill(self, input_ids: Tensor, cache: SharedCache, asked: bool = True) -> Rows:
        """Feeds tokens [T] of the cache's text, keeping their state."""
        sequences = Sequences((len(input_ids),), (cache.state.length,), input_ids.device)
        rows, state = self.feed(input_ids, sequences, cache.state, cache)
        assert state is not None
        cache.state = state
        return rows

    def predict(self, rows: Rows, positions: Tensor, cache: SharedCache, spans: Spans) -> Tensor:
        """Runs some cached tokens through the exit layer, and those that share behind it.

        Returns:
            The normalised output [T, hidden_size], of which `logits` makes predictions.
        """
        x, input_ids = rows
        layers = range(self.layout.exit, len(self.layers))
        inputs = self._embedded(input_ids, layers)[1]
        predicting = Predicting(self.layout, cache, positions, spans)
        for i in layers:
            own = inputs[:, i - layers.start]
            x = self.layers[i](x, own, partial(predicting.attend, i), own=False)
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps)

    def logits(self, output: Tensor) -> Tensor:
        """[T, vocab_size]"""
        return self._capped(F.linear(output, self.embed_tokens.weight))

    def decoder(
        self, cache: SharedCache, size: int = 1, room: int | None = None
    ) -> Decoder[SharedState]:
        """Decodes up to `size` texts side by side, whose keys and values are in the cache."""
        graph = use_triton(cache.keys, self.embed_tokens.weight)
        return new_decoder(self.layout, self._step, cache, size, room, graph)

    def _step(self, tokens: Tensor, step: Step, rings: Rings, cache: SharedCache) -> Tensor:
        """Logits [B, vocab_size] after tokens [B]."""
        decoding = Decoding(self.layout, cache, rings, step)
        x, inputs = self._embedded(tokens, range(len(self.layers)))
        for i, layer in enumerate(self.layers):
            own = i <= self.layout.exit
            x = layer(x, inputs[:, i], partial(decoding.attend, i), own=own)
        eps = self.config.rms_norm_eps
        return self._capped(norm_linear(x, self.norm.weight, self.embed_tokens.weight, eps))

    def _embedded(self, input_ids: Tensor, layers: range) -> tuple[Tensor, Tensor]:
        """Of tokens [T], what comes into the first layer [T, hidden_size], and the inputs of some
        layers [T, len(layers), hidden_size_per_layer_input]."""
        config, size = self.config, self.config.hidden_size_per_layer_input
        x = self.embed_tokens(input_ids).mul_(rounded(math.sqrt(config.hidden_size), self.dtype))
        inputs = layer_inputs(
            input_ids,
            x,
            layers,
            self.embed_tokens_per_layer.weight,
            self.per_layer_model_projection.weight,
            self.per_layer_projection_norm.weight,
            config.rms_norm_eps,
            (rounded(math.sqrt(size), self.dtype), config.hidden_size**-0.5, 2**-0.5),
        )
        return x, inputs

    def _capped(self, logits: Tensor) -> Tensor:
        """In place."""
        cap = self.config.final_logit_softcapping
        return logits if cap is None else soft_cap(logits, cap)


def gemma4_weights(folder: Path, config: Gemma4Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `text_weights`."""
    with torch.device("meta"):
        model = Gemma4(config)
    return text_weights(folder, model, config.layout, dtype)
