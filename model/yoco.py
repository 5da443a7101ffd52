"""The YOCO model: a self-decoder that fills one shared cache, a cross-decoder that reads it.

Parameter names are those of the published checkpoints. Equations: "You Only Cache Once:
Decoder-Decoder Architectures for Language Models", arXiv:2405.05254.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_eval.kernels.attention import cache_attention, sliding_window_attention
from yoco_eval.kernels.norm import rms_norm
from yoco_eval.kernels.retention import (
    retention_chunkwise,
    retention_log_gate,
    retention_recurrent,
)
from yoco_eval.kernels.rotary import rotary_angles, rotate

from .cache import Cache, SelfState
from .config import YocoConfig

Angles = tuple[Tensor, Tensor]


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, T, D] -> [B, T, heads * D]"""
    return x.transpose(1, 2).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """fc2( silu(fc1 z) * gate(z) )"""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.fc1 = linear(config.dim, config.hidden_dim)
        self.gate = linear(config.dim, config.hidden_dim)
        self.fc2 = linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.gate(x))


class GatedRetention(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.n_self_heads, config.norm_eps
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.dim)
        self.v_proj = linear(config.dim, config.dim)
        self.g_proj = linear(config.dim, config.dim)
        self.gt_proj = linear(config.dim, config.n_self_heads)
        self.out_proj = linear(config.dim, config.dim)

    def forward(self, x: Tensor, angles: Angles, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q = rotate(split_heads(self.q_proj(x), self.heads), angles)
        k = rotate(split_heads(self.k_proj(x), self.heads), angles) * q.shape[-1] ** -0.5
        v = split_heads(self.v_proj(x), self.heads)
        log_gate = retention_log_gate(self.gt_proj(x)).transpose(1, 2)
        retention = retention_recurrent if x.shape[1] == 1 else retention_chunkwise
        out, state = retention(q, k, v, log_gate, state)
        out = join_heads(rms_norm(out, eps=self.eps))
        return self.out_proj(F.silu(self.g_proj(x)) * out), state


class SlidingWindowAttention(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads, self.window = config.n_self_heads, config.sliding_window
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.dim)
        self.v_proj = linear(config.dim, config.dim)
        self.out_proj = linear(config.dim, config.dim)

    def forward(
        self, x: Tensor, angles: Angles, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = rotate(split_heads(self.q_proj(x), self.heads), angles)
        k = rotate(split_heads(self.k_proj(x), self.heads), angles)
        v = split_heads(self.v_proj(x), self.heads)
        out, state = sliding_window_attention(q, k, v, self.window, state)
        return self.out_proj(join_heads(out)), state


class CrossAttention(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads = config.n_attn_heads
        self.q_proj = linear(config.dim, config.dim)
        self.out_proj = linear(config.dim, config.dim)

    def forward(self, x: Tensor, angles: Angles, keys: Tensor, values: Tensor, tail: Tensor):
        q = rotate(split_heads(self.q_proj(x), self.heads), angles)
        return self.out_proj(join_heads(cache_attention(q, keys, values, tail)))


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)), around any of the three mixers."""

    def __init__(self, config: YocoConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.final_layer_norm = RMSNorm(config.dim, config.norm_eps)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.final_layer_norm(x))


class SelfDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        mixer = SlidingWindowAttention if config.sliding_window else GatedRetention
        self.head_dim, self.theta = config.self_head_dim, config.rope_theta
        self.layers = nn.ModuleList(
            DecoderLayer(config, mixer(config)) for _ in range(config.n_layers // 2)
        )

    def forward(self, x: Tensor, state: SelfState) -> tuple[Tensor, SelfState]:
        """x: [B, T, dim], the tokens after `state`. Returns the output and the state after them."""
        positions = torch.arange(state.length, state.length + x.shape[1], device=x.device)
        angles = rotary_angles(positions, self.head_dim, self.theta, x.dtype)
        states = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            mixed, layer_state = layer.mixer(layer.mixer_layer_norm(x), angles, layer_state)
            x = layer.feed_forward(x + mixed)
            states.append(layer_state)
        return x, SelfState(state.length + x.shape[1], tuple(states))


class CrossDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.kv_heads = config.n_attn_kv_heads
        self.head_dim, self.theta = config.attn_head_dim, config.rope_theta
        self.k_proj = linear(config.dim, config.n_attn_kv_heads * config.attn_head_dim)
        self.v_proj = linear(config.dim, config.n_attn_kv_heads * config.attn_head_dim)
        self.kv_layer_norm = RMSNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(
            DecoderLayer(config, CrossAttention(config)) for _ in range(config.n_layers // 2)
        )

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        return rotary_angles(positions, self.head_dim, self.theta, dtype)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Shared keys and values [B, kv_heads, T, head_dim] of the self-decoder's output."""
        normed = self.kv_layer_norm(x)
        keys = rotate(
            split_heads(self.k_proj(normed), self.kv_heads), self.angles(positions, x.dtype)
        )
        return keys, split_heads(self.v_proj(normed), self.kv_heads)

    def forward(
        self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, tail: Tensor
    ) -> Tensor:
        """x: [B, T, dim] at `positions` [T]; `tail` as in `cache_attention`."""
        angles = self.angles(positions, x.dtype)
        for layer in self.layers:
            mixed = layer.mixer(layer.mixer_layer_norm(x), angles, keys, values, tail)
            x = layer.feed_forward(x + mixed)
        return x


class Yoco(nn.Module):
    """A YOCO language model. `model(input_ids)` gives logits; evaluation goes through a `Cache`."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.self_decoder = SelfDecoder(config)
        self.cross_decoder = CrossDecoder(config)
        self.layer_norm = RMSNorm(config.dim, config.norm_eps)
        self.output_projection = linear(config.dim, config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

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
            dtype: default: bfloat16 on an NVIDIA or AMD GPU, float32 elsewhere.

        Raises:
            CheckpointError: nothing there, or not a YOCO checkpoint, or an unsafe or damaged one.
        """
        from .checkpoint import load_checkpoint  # which needs this module for the expected shapes

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        config, weights = load_checkpoint(path)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(
            {name: weight.to(device, dtype) for name, weight in weights.items()}, assign=True
        )
        return model.requires_grad_(False).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the native layout's `config.json` and `model.safetensors` to the folder `path`."""
        from .checkpoint import save_checkpoint

        save_checkpoint(path, self.config, self.state_dict())

    def forward(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Logits of a batch of whole texts.

        Args:
            input_ids: [B, T], integers.
            first: position of the first prediction asked for. Tokens before it leave after the
                self-decoder (early exit) and have no logits.

        Returns:
            [B, T - first, vocab_size].
        """
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        x, _ = self.self_decode(input_ids, self.initial_state())
        keys, values = self.cross_decoder.keys_values(x, positions)
        asked = length - first
        tail = torch.ones(asked, asked, dtype=torch.bool, device=x.device).tril()
        x = self.cross_decoder(x[:, first:], positions[first:], keys, values, tail)
        return self.output_projection(self.layer_norm(x))

    def initial_state(self) -> SelfState:
        return SelfState(0, (None,) * (self.config.n_layers // 2))

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for one text of up to `capacity` tokens."""
        return Cache(self.config, capacity, self.dtype, self.device)

    def self_decode(self, input_ids: Tensor, state: SelfState) -> tuple[Tensor, SelfState]:
        """Embeds tokens [B, T] that follow `state` and runs the self-decoder: [B, T, dim]."""
        x = math.sqrt(self.config.dim) * self.embed_tokens(input_ids)
        return self.self_decoder(x, state)

    def prefill(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Feeds tokens [T] and keeps only their state: no cross-decoder, no logits.

        Returns:
            The self-decoder's output [1, T, dim], for those who ask a prediction of some of them.
        """
        start = cache.state.length
        x, state = self.self_decode(input_ids[None], cache.state)
        positions = torch.arange(start, state.length, device=x.device)
        cache.append(*self.cross_decoder.keys_values(x, positions))
        cache.state = state
        return x

    def predict(self, x: Tensor, positions: Tensor, cache: Cache, tail: Tensor) -> Tensor:
        """Runs the self-decoder's output of some cached tokens through the cross-decoder.

        Args:
            x: [1, T, dim].
            positions: [T], of these tokens.
            cache: whose keys and values they read.
            tail: as in `cache_attention`.

        Returns:
            The normalised output [T, dim], ready for `output_projection`.
        """
        return self.layer_norm(
            self.cross_decoder(x, positions, cache.keys, cache.values, tail)
        )[0]
