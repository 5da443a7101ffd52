"""The YOCO model: a self-decoder that fills one shared cache, a cross-decoder that reads it.

Tokens lie on one axis: x is [T, dim], with the texts of a batch packed one behind the other.
Parameter names are those of the published checkpoints. Equations: "You Only Cache Once:
Decoder-Decoder Architectures for Language Models", arXiv:2405.05254.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_eval.kernels.attention import (
    cache_attention,
    decode_attention,
    ring_from_past,
    sliding_window_attention,
    window_step,
)
from yoco_eval.kernels.cache import store_keys_values
from yoco_eval.kernels.dispatch import use_triton
from yoco_eval.kernels.fused_linear import rotary_linear
from yoco_eval.kernels.matvec import linear_add, norm_linear, norm_swiglu_linear
from yoco_eval.kernels.norm import rms_norm
from yoco_eval.kernels.retention import gated_retention, gated_retention_step
from yoco_eval.kernels.rotary import rotary_angles, rotate
from yoco_eval.kernels.sequences import Sequences, Span, Spans

from .cache import Cache, SelfState
from .config import YocoConfig
from .decoder import Decoder
from .linear import Embedding, Stack, allocate, linear

Angles = tuple[Tensor, Tensor]


def default_dtype(device: torch.device) -> torch.dtype:
    """What models are evaluated in on a device: bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class RMSNorm(nn.Module):
    """Holds the weight; whoever reads the normed input applies the norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class FeedForward(nn.Module):
    """fc2( silu(fc1 z) * gate(z) )"""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.fc1 = linear(config.dim, config.hidden_dim)
        self.gate = linear(config.dim, config.hidden_dim)
        self.fc2 = linear(config.hidden_dim, config.dim)
        # Two equal halves, as SwiGLU cuts them: no padding behind the second.
        self.stack = Stack(self, "fc1", "gate", alignment=1)

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        hidden = norm_swiglu_linear(x, norm, self.stack.weight, self.eps)
        return linear_add(hidden, self.fc2.weight, x)


class GatedRetention(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_self_heads, config.self_head_dim
        self.eps = config.norm_eps
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.dim)
        self.v_proj = linear(config.dim, config.dim)
        self.g_proj = linear(config.dim, config.dim)
        self.gt_proj = linear(config.dim, config.n_self_heads)
        self.out_proj = linear(config.dim, config.dim)
        # First what is rotated.
        self.stack = Stack(self, "q_proj", "k_proj", "v_proj", "g_proj", "gt_proj")

    def forward(
        self,
        x: Tensor,
        norm: Tensor,
        angles: Angles,
        sequences: Sequences,
        state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rotated, rest = rotary_linear(
            rms_norm(x, norm, self.eps), self.stack.weight, angles, 2 * self.heads * self.head_dim
        )
        q, k = rotated.chunk(2, dim=1)
        *parts, gate = self.stack.split(rest, first=2)
        v, swish = (self._heads(part) for part in parts)
        out, state = gated_retention(q, k, v, gate, sequences, state, swish, self.eps, keep)
        return linear_add(out.flatten(-2), self.out_proj.weight, x), state

    def step(self, x: Tensor, norm: Tensor, angles: Angles, state: Tensor) -> Tensor:
        *parts, gate = self.stack.split(norm_linear(x, norm, self.stack.weight, self.eps))
        q, k, v, swish = (self._heads(part) for part in parts)
        out = gated_retention_step(q, k, v, gate, state, angles, swish, self.eps)
        return linear_add(out.flatten(-2), self.out_proj.weight, x)

    def _heads(self, part: Tensor) -> Tensor:
        return part.unflatten(-1, (self.heads, self.head_dim))


class SlidingWindowAttention(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_self_heads, config.self_head_dim
        self.eps, self.window = config.norm_eps, config.sliding_window
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.dim)
        self.v_proj = linear(config.dim, config.dim)
        self.out_proj = linear(config.dim, config.dim)
        self.stack = Stack(self, "q_proj", "k_proj", "v_proj")

    def project(self, x: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
        parts = self.stack.split(norm_linear(x, norm, self.stack.weight, self.eps))
        return tuple(part.unflatten(-1, (self.heads, self.head_dim)) for part in parts)

    def forward(
        self,
        x: Tensor,
        norm: Tensor,
        angles: Angles,
        sequences: Sequences,
        state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(x, norm)
        out, state = sliding_window_attention(q, k, v, self.window, sequences, state, angles, keep)
        return linear_add(out.flatten(-2), self.out_proj.weight, x), state

    def step(
        self,
        x: Tensor,
        norm: Tensor,
        angles: Angles,
        ring: tuple[Tensor, Tensor],
        position: Tensor,
    ) -> Tensor:
        q, k, v = self.project(x, norm)
        out = window_step(q, k, v, *ring, position, angles)
        return linear_add(out.flatten(-2), self.out_proj.weight, x)


class CrossAttention(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_attn_heads, config.attn_head_dim
        self.eps = config.norm_eps
        self.q_proj = linear(config.dim, config.dim)
        self.out_proj = linear(config.dim, config.dim)

    def forward(self, x: Tensor, norm: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """`attend` takes queries [T, heads, head_dim], not rotated, to outputs of that shape."""
        q = norm_linear(x, norm, self.q_proj.weight, self.eps)
        out = attend(q.unflatten(-1, (self.heads, self.head_dim)))
        return linear_add(out.flatten(-2), self.out_proj.weight, x)


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); both parts take the norm's weight and x itself."""

    def __init__(self, config: YocoConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm = RMSNorm(config.dim)
        self.ffn = FeedForward(config)
        self.final_layer_norm = RMSNorm(config.dim)

    def mix(self, x: Tensor, *args) -> Tensor | tuple[Tensor, Tensor | None]:
        return self.mixer(x, self.mixer_layer_norm.weight, *args)

    def step(self, x: Tensor, *args) -> Tensor:
        return self.feed_forward(self.mixer.step(x, self.mixer_layer_norm.weight, *args))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(x, self.final_layer_norm.weight)


class SelfDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        mixer = SlidingWindowAttention if config.sliding_window else GatedRetention
        self.layers = nn.ModuleList(
            DecoderLayer(config, mixer(config)) for _ in range(config.n_layers // 2)
        )
        self.head_dim, self.theta = config.self_head_dim, config.rope_theta

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        return rotary_angles(positions, self.head_dim, self.theta, dtype)

    def forward(
        self, x: Tensor, sequences: Sequences, state: SelfState, keep: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """x: [T, dim], tokens that follow `state`. Returns the output and the layers' states."""
        angles = self.angles(sequences.positions, x.dtype)
        states = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x, layer_state = layer.mix(x, angles, sequences, layer_state, keep)
            x = layer.feed_forward(x)
            states.append(layer_state)
        return x, states

    def step(self, x: Tensor, position: Tensor, memory: list) -> Tensor:
        """One token, x [1, dim]; `memory` as `Yoco.decoder` makes it, changed in place."""
        angles = self.angles(position, x.dtype)
        for layer, part in zip(self.layers, memory, strict=True):
            rest = (part, position) if isinstance(part, tuple) else (part,)
            x = layer.step(x, angles, *rest)
        return x


class CrossDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = config.n_attn_kv_heads, config.attn_head_dim
        self.eps = config.norm_eps
        self.k_proj = linear(config.dim, config.n_attn_kv_heads * config.attn_head_dim)
        self.v_proj = linear(config.dim, config.n_attn_kv_heads * config.attn_head_dim)
        self.kv_layer_norm = RMSNorm(config.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(config, CrossAttention(config)) for _ in range(config.n_layers // 2)
        )
        self.stack = Stack(self, "k_proj", "v_proj")
        self.theta = config.rope_theta

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        return rotary_angles(positions, self.head_dim, self.theta, dtype)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shared keys (not rotated yet) and values [T, kv_heads, head_dim] of x [T, dim]."""
        y = norm_linear(x, self.kv_layer_norm.weight, self.stack.weight, self.eps)
        keys, values = self.stack.split(y)
        shape = (self.kv_heads, self.head_dim)
        return keys.unflatten(-1, shape), values.unflatten(-1, shape)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x: [T, dim]; `attend` as in `CrossAttention`."""
        for layer in self.layers:
            x = layer.feed_forward(layer.mix(x, attend))
        return x


class Yoco(nn.Module):
    """A YOCO language model. `model(input_ids)` gives logits; evaluation goes through a `Cache`."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.self_decoder = SelfDecoder(config)
        self.cross_decoder = CrossDecoder(config)
        self.layer_norm = RMSNorm(config.dim)
        self.output_projection = linear(config.dim, config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @classmethod
    def empty(cls, config: YocoConfig, device: torch.device, dtype: torch.dtype) -> Yoco:
        """A model for evaluation whose weights are allocated but not set."""
        with torch.device("meta"):
            model = cls(config)
        allocate(model, device, dtype)
        return model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Yoco:
        """Loads a checkpoint of any layout that `load_checkpoint` reads; no code in it is run.

        Args:
            path: folder or file of the checkpoint.
            device: default: the GPU if there is one, else the CPU.
            dtype: default: that of `default_dtype`.

        Raises:
            CheckpointError: nothing there, or not a YOCO checkpoint, or an unsafe or damaged one.
        """
        from .checkpoint import load_checkpoint  # which needs this module for the expected shapes

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or default_dtype(device)
        config, weights = load_checkpoint(path, dtype)
        model = cls.empty(config, device, dtype)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the native layout's `config.json` and `model.safetensors` to the folder `path`."""
        from .checkpoint import save_checkpoint

        save_checkpoint(path, self.config, self.state_dict())

    def forward(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Logits of a batch of whole texts, with gradients where they are asked for.

        Args:
            input_ids: [B, T], integers.
            first: position of the first prediction asked for. Tokens before it leave after the
                self-decoder (early exit) and have no logits.

        Returns:
            [B, T - first, vocab_size].

        Raises:
            ValueError: there is no token, or `first` is not from 0 to T.
        """
        batch, length = input_ids.shape
        if not input_ids.numel():
            raise ValueError(f"input_ids [{batch}, {length}] holds no token; give one at least")
        if not 0 <= first <= length:
            raise ValueError(f"first {first} is not from 0 to the number of tokens, {length}")
        sequences = Sequences((length,) * batch, (0,) * batch, input_ids.device)
        initial = SelfState.initial(self.config)
        x, _ = self.self_decode(input_ids.flatten(), sequences, initial, keep=False)
        keys, values = self.cross_decoder.keys_values(x)
        angles = self.cross_decoder.angles(sequences.positions, x.dtype)
        asked = (sequences.positions >= first).nonzero().squeeze(-1)
        asked_angles = tuple(part[asked] for part in angles)
        keys, values = (
            part.unflatten(0, (batch, length)).transpose(1, 2)
            for part in (rotate(keys, angles), values)
        )
        visible = torch.ones(length - first, length, dtype=torch.bool, device=x.device)
        visible = visible.tril(first)

        def attend(q: Tensor) -> Tensor:
            q = rotate(q, asked_angles).unflatten(0, (batch, -1)).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=visible, enable_gqa=keys.shape[1] < q.shape[1]
            )
            return out.transpose(1, 2).flatten(0, 1)

        x = self.cross_decoder(x[asked], attend)
        return self.output_projection(self.normed(x)).unflatten(0, (batch, -1))

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for up to `capacity` tokens."""
        return Cache(self.config, capacity, self.dtype, self.device)

    def normed(self, x: Tensor) -> Tensor:
        """The cross-decoder's output [T, dim], ready for `output_projection`."""
        return rms_norm(x, self.layer_norm.weight, self.config.norm_eps)

    def self_decode(
        self, input_ids: Tensor, sequences: Sequences, state: SelfState, keep: bool = True
    ) -> tuple[Tensor, SelfState | None]:
        """Embeds packed tokens [T] that follow `state` and runs the self-decoder.

        Returns:
            Its output [T, dim], and the state after each sequence, or None unless `keep`.
        """
        x = math.sqrt(self.config.dim) * self.embed_tokens(input_ids)
        x, states = self.self_decoder(x, sequences, state, keep)
        if not keep:
            return x, None
        ends = zip(sequences.starts, sequences.lengths, strict=True)
        return x, SelfState(tuple(start + length for start, length in ends), tuple(states))

    def feed(
        self,
        input_ids: Tensor,
        sequences: Sequences,
        state: SelfState,
        cache: Cache,
        keep: bool = True,
    ) -> tuple[Tensor, SelfState | None]:
        """`self_decode`, with the tokens' keys and values added to the cache in the same order."""
        first = cache.extend(len(input_ids))
        x, state = self.self_decode(input_ids, sequences, state, keep)
        keys, values = self.cross_decoder.keys_values(x)
        angles = self.cross_decoder.angles(sequences.positions, x.dtype)
        store_keys_values(keys, values, angles, cache.keys, cache.values, first)
        return x, state

    def prefill(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Feeds tokens [T] of the cache's text, keeping their state: no cross-decoder, no logits.

        Returns:
            The self-decoder's output [T, dim], for those who ask a prediction of some of them.
        """
        sequences = Sequences((len(input_ids),), (cache.state.length,), input_ids.device)
        x, cache.state = self.feed(input_ids, sequences, cache.state, cache)
        return x

    def predict(self, x: Tensor, positions: Tensor, cache: Cache, spans: Spans) -> Tensor:
        """Runs the self-decoder's output of some cached tokens through the cross-decoder.

        Args:
            x: [T, dim]. Its memory may be used for something else.
            positions: int64 [T], of these tokens in their texts.
            cache: whose keys and values they read.
            spans: which of them.

        Returns:
            The normalised output [T, dim], ready for `output_projection`.
        """
        angles = self.cross_decoder.angles(positions, x.dtype)
        x = self.cross_decoder(
            x, lambda q: cache_attention(q, cache.keys, cache.values, spans, angles)
        )
        return self.normed(x)

    def predict_last(self, x: Tensor, cache: Cache) -> Tensor:
        """Logits [vocab_size] after the last token that was fed, whose output x [1, dim] is."""
        length = cache.state.length
        positions = torch.full((1,), length - 1, device=x.device)
        # `predict` may write to its input, which here is still the caller's.
        output = self.predict(x.clone(), positions, cache, Spans((Span(0, 1, 0, length, True),)))
        return self.output_projection(output)[0]

    def decoder(self, cache: Cache) -> Decoder:
        """Decodes after the text in the cache, in whose buffers the new keys and values go."""
        config = self.config
        heads, dim = config.n_self_heads, config.self_head_dim
        if config.sliding_window:
            shape = (heads, config.sliding_window, dim)
            memory = [
                tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
                for _ in self.self_decoder.layers
            ]
        else:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            memory = [
                torch.zeros(1, heads, dim, dim, dtype=wide, device=self.device)
                for _ in self.self_decoder.layers
            ]

        def begin() -> int:
            for part, state in zip(memory, cache.state.layers, strict=True):
                if not config.sliding_window:
                    part.zero_() if state is None else part.copy_(state)
                elif state is not None:
                    filled = ring_from_past(state[0], cache.state.length)
                    for ring, content in zip(part, filled, strict=True):
                        ring.copy_(content)
            return cache.state.length

        return Decoder(
            begin,
            partial(self._step, cache=cache, memory=memory),
            cache.capacity,
            self.device,
            graph=use_triton(cache.keys, self.embed_tokens.weight),
        )

    def _step(self, token: Tensor, position: Tensor, cache: Cache, memory: list) -> Tensor:
        """Logits [vocab_size] after a token [1] at a position [1] of the cache's text."""
        x = math.sqrt(self.config.dim) * self.embed_tokens(token)
        x = self.self_decoder.step(x, position, memory)
        angles = self.cross_decoder.angles(position, x.dtype)
        keys, values = self.cross_decoder.keys_values(x)
        store_keys_values(keys, values, angles, cache.keys, cache.values, position)
        length = position + 1
        x = self.cross_decoder(
            x, lambda q: decode_attention(q, cache.keys, cache.values, length, angles)
        )
        return norm_linear(
            x, self.layer_norm.weight, self.output_projection.weight, self.config.norm_eps
        )[0]
