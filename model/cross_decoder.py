"""The cross-decoder: one projection to keys and values, and layers that all read these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from yoco_eval.kernels.matvec import linear_add, norm_linear
from yoco_eval.kernels.norm import rms_norm
from yoco_eval.kernels.rotary import Angles

from .config import YocoConfig
from .layers import DecoderLayer, Layers, RMSNorm
from .linear import Stack, linear
from .rotary import Rotary


class CrossAttention(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_attn_heads, config.attn_head_dim
        self.eps = config.norm_eps
        self.q_proj = linear(config.dim, config.dim, config.qkv_bias)
        self.out_proj = linear(config.dim, config.dim)
        self.query_eps = config.query_norm_eps
        self.q_norm = None if self.query_eps is None else RMSNorm(config.attn_head_dim)

    def forward(self, x: Tensor, norm: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """`attend` takes queries [T, heads, head_dim], not rotated, to outputs of that shape."""
        q = norm_linear(x, norm, self.q_proj.weight, self.eps)
        if self.q_proj.bias is not None:
            q = q + self.q_proj.bias
        q = q.unflatten(-1, (self.heads, self.head_dim))
        if self.q_norm is not None and self.query_eps is not None:
            q = rms_norm(q.flatten(0, 1), self.q_norm.weight, self.query_eps).view(q.shape)
        out = attend(q)
        return linear_add(out.flatten(-2), self.out_proj.weight, x)


class CrossDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = config.n_attn_kv_heads, config.attn_head_dim
        self.eps = config.norm_eps
        width = self.kv_heads * self.head_dim
        self.k_proj = linear(config.dim, width, config.qkv_bias)
        self.v_proj = linear(config.dim, width, config.qkv_bias)
        self.kv_layer_norm = RMSNorm(config.dim)
        layers = (cross_layer(config) for _ in range(config.cross_layers))
        self.layers: Layers[CrossAttention] = Layers(layers)
        self.stack = Stack(self, "k_proj", "v_proj")
        self.rotary = Rotary(self.head_dim, config.rope_theta, config.rope_endpoint)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        return self.rotary.at(positions, dtype)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shared keys (not rotated yet) and values [T, kv_heads, head_dim] of x [T, dim]."""
        y = norm_linear(x, self.kv_layer_norm.weight, self.stack.weight, self.eps)
        keys, values = self.stack.split(y)
        if self.k_proj.bias is not None:
            keys, values = keys + self.k_proj.bias, values + self.v_proj.bias
        shape = (self.kv_heads, self.head_dim)
        return keys.unflatten(-1, shape), values.unflatten(-1, shape)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x: [T, dim]; `attend` as in `CrossAttention`."""
        for layer in self.layers:
            x = layer.feed_forward(layer.mix(x, attend))
        return x


def cross_layer(config: YocoConfig) -> DecoderLayer[CrossAttention]:
    attention = CrossAttention(config)
    return DecoderLayer(config.dim, config.hidden_dim, config.norm_eps, attention)
