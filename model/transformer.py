"""A plain Transformer with YOCO's interface, as a yardstick: what caching once is compared with.

RMSNorm, rotary embedding, grouped queries and SwiGLU, in all layers alike, on YOCO's kernels where
YOCO has the same part. It keeps keys and values of every layer, and every prompt token passes
through all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention.bias import causal_lower_right

from yoco_eval.kernels.attention import cache_attention, decode_attention
from yoco_eval.kernels.cache import store_keys_values
from yoco_eval.kernels.dispatch import use_triton
from yoco_eval.kernels.matvec import linear_add, norm_linear
from yoco_eval.kernels.rotary import rotary_angles, rotate
from yoco_eval.kernels.sequences import Span, Spans

from .config import YocoConfig
from .decoder import Decoder
from .linear import Embedding, Stack, allocate, linear
from .yoco import Angles, DecoderLayer, RMSNorm

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

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

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
        )


class TransformerCache:
    """Keys and values of up to `capacity` tokens of one text, in every layer.

    Attributes:
        keys, values: [n_layers, n_kv_heads, capacity, head_dim], keys rotated; filled from the
            front.
        length: number of tokens in them.
    """

    def __init__(
        self, config: TransformerConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layers, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


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
    """A Transformer language model for evaluation, of the interface of `Yoco`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(config, Attention(config)) for _ in range(config.n_layers)
        )
        self.layer_norm = RMSNorm(config.dim)
        self.output_projection = linear(config.dim, config.vocab_size)
        self._angles = partial(rotary_angles, head_dim=config.head_dim, theta=config.rope_theta)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @classmethod
    def empty(
        cls, config: TransformerConfig, device: torch.device, dtype: torch.dtype
    ) -> Transformer:
        """A model for evaluation whose weights are allocated but not set."""
        with torch.device("meta"):
            model = cls(config)
        allocate(model, device, dtype)
        return model.requires_grad_(False).eval()

    def new_cache(self, capacity: int) -> TransformerCache:
        """An empty cache for a text of up to `capacity` tokens."""
        return TransformerCache(self.config, capacity, self.dtype, self.device)

    def prefill(self, input_ids: Tensor, cache: TransformerCache) -> Tensor:
        """Feeds tokens [T] that follow those in the cache.

        Returns:
            The last layer's output [T, dim].

        Raises:
            ValueError: the cache has no room for them.
        """
        first, end = cache.length, cache.length + len(input_ids)
        if end > cache.capacity:
            raise ValueError(f"the cache has room for {cache.capacity} tokens, not for {end}")
        x = self.embed_tokens(input_ids)
        angles = self._angles(torch.arange(first, end, device=x.device), dtype=x.dtype)
        spans = Spans((Span(0, end - first, 0, end, causal=True),))

        def attend(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store_keys_values(k, v, angles, keys, values, first)
            return _causal_attention(q, keys, values, spans, angles)

        x = self._run(x, cache, attend)
        cache.length = end
        return x

    def predict_last(self, x: Tensor, cache: TransformerCache) -> Tensor:
        """Logits [vocab_size] after the last token that was fed, whose output x [1, dim] is."""
        weight = self.output_projection.weight
        return norm_linear(x, self.layer_norm.weight, weight, self.config.norm_eps)[0]

    def decoder(self, cache: TransformerCache) -> Decoder:
        """Decodes after the text in the cache, in whose buffers the new keys and values go."""
        return Decoder(
            lambda: cache.length,
            partial(self._step, cache=cache),
            cache.capacity,
            self.device,
            graph=use_triton(cache.keys, self.embed_tokens.weight),
        )

    def _step(self, token: Tensor, position: Tensor, cache: TransformerCache) -> Tensor:
        """Logits [vocab_size] after a token [1] at a position [1] of the cache's text."""
        x = self.embed_tokens(token)
        angles = self._angles(position, dtype=x.dtype)
        length = position + 1

        def attend(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store_keys_values(k, v, angles, keys, values, position)
            return decode_attention(q, keys, values, length, angles)

        return self.predict_last(self._run(x, cache, attend), cache)

    def _run(self, x: Tensor, cache: TransformerCache, attend: Callable[..., Tensor]) -> Tensor:
        """x [T, dim] through all layers; `attend` takes a layer's keys and values, q, k and v."""
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer.feed_forward(layer.mix(x, partial(attend, keys, values)))
        return x


def _causal_attention(
    q: Tensor, keys: Tensor, values: Tensor, spans: Spans, angles: Angles
) -> Tensor:
    """`cache_attention` of the one causal span whose queries are the last tokens of a text.

    For many queries it is PyTorch's: on cuDNN where that is to be had, being the fastest there is
    on present cards, else on what PyTorch chooses.
    """
    (span,) = spans.spans
    many = len(q) >= _MANY_QUERIES and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if not many:
        return cache_attention(q, keys, values, spans, angles)
    # As PyTorch has it: [1, H, T, D]
    q = rotate(q, angles).transpose(0, 1)[None]
    keys, values = keys[None, :, : span.end_key], values[None, :, : span.end_key]
    own = (part[:, :, -q.shape[2] :] for part in (keys, values))
    if can_use_cudnn_attention(SDPAParams(q, *own, None, 0.0, True, True)):
        out = _cudnn_attention(q, keys, values)
    else:
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
