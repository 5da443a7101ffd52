"""A plain Transformer, as a yardstick: what caching once is compared with.

RMSNorm, rotary embedding, grouped queries and SwiGLU, in all layers alike, on YOCO's kernels where
YOCO has the same part. It keeps keys and values of every layer, and every prompt token passes
through all of them: only the output projection is left to the tokens whose prediction is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from yoco_eval.kernels.attention import batch_attention, cache_attention
from yoco_eval.kernels.cache_writes import store_keys_values
from yoco_eval.kernels.dispatch import triton_takes, use_triton
from yoco_eval.kernels.matvec import linear_add, norm_linear
from yoco_eval.kernels.norm import rms_norm
from yoco_eval.kernels.rotary import Angles, rotate
from yoco_eval.kernels.sequences import Sequences, Spans, Step

from . import costs
from .cache import KeyValueCache, slots_of
from .config import YocoConfig
from .decoder import Decoder
from .interface import count
from .layers import DecoderLayer, Layers, RMSNorm
from .linear import Embedding, Stack, allocate, linear
from .places import Places
from .rotary import Rotary

_MANY_QUERIES = 1024  # from here on the library's attention is the faster one
# Past keys are read in pieces of one size: cuDNN prepares anew, for about 0.1 s, for every shape.
_PIECE = 32768


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Transformer; `n_kv_heads` divides `n_heads`, and 2 * `n_heads` divides `dim`."""

    dim: int
    n_layers: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_position_embeddings: int | None = None
    tied_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def like(cls, config: YocoConfig) -> TransformerConfig:
        """As wide and as deep as a YOCO model, with the heads of its cross-decoder."""
        return cls(
            dim=config.dim,
            n_layers=config.n_layers,
            hidden_dim=config.hidden_dim,
            n_heads=config.n_attn_heads,
            n_kv_heads=config.n_attn_kv_heads,
            vocab_size=config.vocab_size,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tied_embeddings=config.tied_embeddings,
        )


@dataclass(frozen=True)
class TransformerCosts:
    """`interface.Costs` of a Transformer."""

    config: TransformerConfig

    @property
    def typical_product(self) -> tuple[int, int]:
        return self.config.dim, 2 * self.config.hidden_dim

    def weight_bytes(self, dtype: torch.dtype) -> int:
        embeddings = self.config.vocab_size * self.config.dim
        embeddings *= 1 if self.config.tied_embeddings else 2
        layers = self.config.n_layers * _layer_numbers(self.config)
        return (layers + embeddings + self.config.dim) * dtype.itemsize

    def cache_bytes(self, dtype: torch.dtype, length: int) -> int:
        return 2 * self.config.n_layers * self._width * length * dtype.itemsize

    def state_bytes(self, dtype: torch.dtype) -> int:
        return 0  # all that it remembers is in the cache

    def passing_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        return 0

    def activation_bytes(
        self, dtype: torch.dtype, length: int, chunk: int, logits: int, device: torch.device
    ) -> int:
        config, fast = self.config, triton_takes(device, dtype)
        attention = costs.Attention(config.n_heads, config.n_kv_heads, config.head_dim)
        # Beside what the attention takes, the projections that it reads.
        mixing = attention.numbers(dtype) + config.dim + 2 * self._width
        layers = costs.layer_bytes(
            config.dim, config.hidden_dim, mixing, config.head_dim, dtype, chunk, device
        )
        reading = attention.bytes(dtype, length, chunk, fast)
        reading += chunk * (config.dim + 2 * self._width) * dtype.itemsize
        return max(layers, reading, costs.logit_bytes(dtype, logits)) + costs.OVERHEAD

    def prefill_operations(self, length: int) -> int:
        """Of the matrix products with weights, and of attention: every token to those before it."""
        config = self.config
        layer = 2 * config.dim * (config.dim + self._width) + 3 * config.dim * config.hidden_dim
        return config.n_layers * (2 * length * layer + 2 * length * (length + 1) * config.dim)

    def decode_bytes(self, dtype: torch.dtype, length: int) -> int:
        unread = 0 if self.config.tied_embeddings else self.config.vocab_size - 1
        embedding = unread * self.config.dim * dtype.itemsize
        return self.weight_bytes(dtype) - embedding + self.cache_bytes(dtype, length)

    @property
    def _width(self) -> int:
        """Channels of a layer's keys, and of its values."""
        return self.config.n_kv_heads * self.config.head_dim


Cache = KeyValueCache[Places]


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.n_kv_heads * config.head_dim)
        self.v_proj = linear(config.dim, config.n_kv_heads * config.head_dim)
        self.out_proj = linear(config.dim, config.dim)
        self.stack = Stack(self, "q_proj", "k_proj", "v_proj")

    def forward(
        self, x: Tensor, norm: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """`attend` takes q, k and v [T, heads, head_dim], not rotated, to outputs shaped as q."""
        parts = self.stack.split(norm_linear(x, norm, self.stack.weight, self.eps))
        out = attend(*(part.unflatten(-1, (-1, self.head_dim)) for part in parts))
        return linear_add(out.flatten(-2), self.out_proj.weight, x)


class Transformer(nn.Module):
    """A Transformer language model for evaluation, as `interface.Model` has it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        layers = (_layer(config) for _ in range(config.n_layers))
        self.layers: Layers[Attention] = Layers(layers)
        self.layer_norm = RMSNorm(config.dim)
        self.output_projection = linear(config.dim, config.vocab_size)
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self._tie()

    def _tie(self) -> None:
        if self.config.tied_embeddings:
            self.output_projection.weight = self.embed_tokens.weight

    @staticmethod
    def costs_of(config: TransformerConfig) -> TransformerCosts:
        return TransformerCosts(config)

    @property
    def costs(self) -> TransformerCosts:
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
    def empty(
        cls, config: TransformerConfig, device: torch.device, dtype: torch.dtype
    ) -> Transformer:
        """A model for evaluation whose weights are allocated but not set."""
        with torch.device("meta"):
            model = cls(config)
        allocate(model, device, dtype)
        model._tie()
        return model.requires_grad_(False).eval()

    def new_cache(self, capacity: int) -> Cache:
        """Keys and values of every layer: [n_layers, n_kv_heads, capacity, head_dim] each."""
        shape = (self.config.n_layers, self.config.n_kv_heads, capacity, self.config.head_dim)
        return KeyValueCache(shape, Places((0,), ((),)), self.dtype, self.device)

    def feed(
        self,
        input_ids: Tensor,
        sequences: Sequences,
        state: Places,
        cache: Cache,
        keep: bool = True,
    ) -> tuple[Tensor, Places | None]:
        """Runs packed tokens [T] through all layers, to the last one's output [T, dim]."""
        stretches = cache.extend(len(input_ids))
        slots = slots_of(stretches, self.device)
        places = state.after(sequences, stretches)
        spans = places.readings(sequences)
        x = self.embed_tokens(input_ids)
        angles = self.rotary.of(sequences, x.dtype)

        def attend(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store_keys_values(k, v, angles, keys, values, slots)
            return _attention(q, keys, values, spans, angles)

        x = self._run(x, cache, attend)
        return x, places if keep else None

    def prefill(self, input_ids: Tensor, cache: Cache, asked: bool = True) -> Tensor:
        """Feeds tokens [T] that follow those in the cache, to the last layer's output [T, dim]."""
        sequences = Sequences((len(input_ids),), (cache.state.length,), input_ids.device)
        x, state = self.feed(input_ids, sequences, cache.state, cache)
        assert state is not None
        cache.state = state
        return x

    def predict(self, x: Tensor, positions: Tensor, cache: Cache, spans: Spans) -> Tensor:
        """The normalised output [T, dim]; what there is to read has been read."""
        return rms_norm(x, self.layer_norm.weight, self.config.norm_eps)

    def logits(self, output: Tensor) -> Tensor:
        """[T, vocab_size]"""
        return self.output_projection(output)

    def decoder(self, cache: Cache, size: int = 1, room: int | None = None) -> Decoder[Places]:
        """Decodes up to `size` texts side by side, whose keys and values are in the cache."""
        return Decoder(
            partial(self._step, cache=cache),
            lambda rows, state, sources: None,  # all that is remembered is in the cache
            (),
            cache,
            size,
            room,
            self.device,
            self.dtype,
            graph=use_triton(cache.keys, self.embed_tokens.weight),
        )

    def _step(self, tokens: Tensor, step: Step, memory: tuple, cache: Cache) -> Tensor:
        """Logits [B, vocab_size] after tokens [B]."""
        x = self.embed_tokens(tokens)
        angles = self.rotary.of(step, x.dtype)

        def attend(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store_keys_values(k, v, angles, keys, values, step.slots)
            return batch_attention(q, keys, values, step.positions, step.readings, angles)

        x = self._run(x, cache, attend)
        return norm_linear(
            x, self.layer_norm.weight, self.output_projection.weight, self.config.norm_eps
        )

    def _run(self, x: Tensor, cache: Cache, attend: Callable[..., Tensor]) -> Tensor:
        """x [T, dim] through all layers; `attend` takes a layer's keys and values, q, k and v."""
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer.feed_forward(layer.mix(x, partial(attend, keys, values)))
        return x


def _layer(config: TransformerConfig) -> DecoderLayer[Attention]:
    return DecoderLayer(config.dim, config.hidden_dim, config.norm_eps, Attention(config))


@cache
def _layer_numbers(config: TransformerConfig) -> int:
    """In all weights of a layer; a plan asks for them again and again."""
    with torch.device("meta"):
        return count(_layer(config))


def _attention(q: Tensor, keys: Tensor, values: Tensor, spans: Spans, angles: Angles) -> Tensor:
    """`cache_attention`. Many queries that are the last tokens of the one text in a cache are left
    to PyTorch: on cuDNN where that is to be had, being the fastest there is on present cards, else
    on what PyTorch chooses.
    """
    span = spans.spans[0]
    alone = len(spans.spans) == 1 and span.first_key == 0
    many = len(q) >= _MANY_QUERIES and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if not (alone and many):
        return cache_attention(q, keys, values, spans, angles)
    # As PyTorch has it: [1, H, T, D]
    q = rotate(q, angles).transpose(0, 1)[None]
    keys, values = keys[None, :, : span.end_key], values[None, :, : span.end_key]
    k, v = (part[:, :, -q.shape[2] :] for part in (keys, values))
    if can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, True)):
        out = _cudnn_attention(q, keys, values)
    else:
        from torch.nn.attention.bias import causal_lower_right  # which imports PyTorch's compiler

        mask = causal_lower_right(q.shape[2], span.end_key)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def _cudnn_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [1, Hq, T, D], the last tokens, over keys and values [1, Hkv, N, D]: causal.

    cuDNN aligns a causal mask with the first key. So the queries' own keys, masked, and the past
    ones, in pieces without a mask, are attended to apart and weighed by their sums of exponentials.
    """

    def attend(first: int, end: int, causal: bool) -> tuple[Tensor, Tensor]:
        out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, keys[:, :, first:end], values[:, :, first:end], None, True, 0.0, causal
        )
        return out, logsumexp.reshape(q.shape[:3])

    end = keys.shape[2]
    past = end - q.shape[2]
    out, logsumexp = attend(past, end, causal=True)
    for first in range(0, past, _PIECE):
        piece, piece_logsumexp = attend(first, min(first + _PIECE, past), causal=False)
        share = torch.sigmoid(piece_logsumexp - logsumexp)
        out.lerp_(piece, share[..., None].to(out.dtype))
        logsumexp = torch.logaddexp(logsumexp, piece_logsumexp)
    return out
