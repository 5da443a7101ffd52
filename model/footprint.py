"""How much memory and work a YOCO model of a given shape needs, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from yoco_eval.kernels.attention import FEW, KEYS, SCORES
from yoco_eval.kernels.dispatch import triton_takes
from yoco_eval.kernels.fused_linear import MIN_TOKENS, fuses_swiglu

from .config import YocoConfig
from .yoco import Yoco

if TYPE_CHECKING:
    from .transformer import TransformerConfig

# What PyTorch's matrix library keeps for itself on a GPU, and small tensors.
OVERHEAD = 64 << 20
_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Footprint:
    """Memory in bytes at the peak of a run.

    Attributes:
        weights: all parameters.
        cache: shared keys and values.
        states: of the self-decoder: at a chunk's start, at its end, and while decoding.
        activations: intermediate results of one chunk, or of scoring.
    """

    weights: int
    cache: int
    states: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.states + self.activations


def footprint(
    config: YocoConfig,
    dtype: torch.dtype,
    length: int,
    chunk: int,
    logits: int = 0,
    device: torch.device = _GPU,
) -> Footprint:
    """The peak of feeding a text of `length` tokens, `chunk` at a time, and decoding after it.

    Args:
        config: the model's shape.
        dtype: of weights, cache and activations.
        length: tokens that the cache has room for.
        chunk: tokens fed at a time.
        logits: how many logits exist at a time where many positions are scored.
        device: on which it runs. Where Triton kernels do, less exists at a time.
    """
    return Footprint(
        weights=weight_bytes(config, dtype),
        cache=cache_bytes(config, dtype, length),
        states=3 * state_bytes(config, dtype),
        activations=_activation_bytes(config, dtype, length, min(chunk, length), logits, device),
    )


def weight_bytes(config: YocoConfig, dtype: torch.dtype) -> int:
    return count_parameters(Yoco, config) * dtype.itemsize


@cache
def count_parameters(model: type[nn.Module], config: YocoConfig | TransformerConfig) -> int:
    """Numbers in all parameters of a model of this class and shape.

    All layers of a kind are alike, so that two models of few layers tell of any number.
    """
    with torch.device("meta"):
        two, four = (
            sum(parameter.numel() for parameter in model(replace(config, n_layers=n)).parameters())
            for n in (2, 4)
        )
    return two + (config.n_layers - 2) * (four - two) // 2


def cache_bytes(config: YocoConfig, dtype: torch.dtype, length: int) -> int:
    """Of keys and values for `length` tokens; one layer's worth, whatever the number of layers."""
    return 2 * config.n_attn_kv_heads * config.attn_head_dim * length * dtype.itemsize


def state_bytes(config: YocoConfig, dtype: torch.dtype) -> int:
    """Of the self-decoder's state after one text; what a snapshot takes."""
    if config.sliding_window:
        layer = 2 * (config.sliding_window - 1) * config.dim * dtype.itemsize
    else:
        layer = config.dim * config.self_head_dim * max(dtype.itemsize, 4)
    return config.n_layers // 2 * layer


def passing_bytes(config: YocoConfig, dtype: torch.dtype, device: torch.device = _GPU) -> int:
    """What each sequence of a packed batch takes beside its tokens while it passes a layer.

    That is the window before it and the two together, or what becomes of its state; the references
    hold several stages of that at a time.
    """
    stages = 4 if triton_takes(device, dtype) else 10
    return stages * state_bytes(config, dtype) // (config.n_layers // 2)


def _activation_bytes(
    config: YocoConfig,
    dtype: torch.dtype,
    length: int,
    chunk: int,
    logits: int,
    device: torch.device,
) -> int:
    """The widest point of a layer, beside its input; numbers per token, unless said otherwise."""
    dim, hidden = config.dim, config.hidden_dim
    wide = max(dtype.itemsize, 4)
    fast = triton_takes(device, dtype)
    projected = 3 * dim if config.sliding_window else 4 * dim + config.n_self_heads
    mixer = projected + dim  # the norm's output before, the mixer's after it
    if not fast:
        # Rotated, widened and padded copies, and the states between chunks of 64 tokens.
        mixer += (11 * dim + dim * config.self_head_dim // 32) * wide // dtype.itemsize
    elif config.sliding_window:
        mixer += 3 * dim  # keys and values packed behind those before them, and rotated queries
    elif dtype == torch.float16:
        mixer += 8 * dim  # retention runs in float32
    # Queries and outputs; and of two spans that a text reads, what is added up in float32.
    cross = 2 * dim + 8 * dim // dtype.itemsize
    angles = config.self_head_dim + config.attn_head_dim

    def layer(tokens: int) -> int:
        fused = fuses_swiglu(tokens, dim, hidden, dtype, device)
        feed_forward = dim + hidden if fused else 2 * hidden + max(dim, hidden)
        return tokens * (dim + angles + max(mixer, cross, feed_forward)) * dtype.itemsize

    # A text's last tokens may be too few to be fused.
    layers = max(layer(chunk), layer(min(chunk, MIN_TOKENS - 1)))
    attention = chunk * (dim + cross) * dtype.itemsize
    if not fast:
        # Copies of the queries and outputs, in other orders and widened; a few queries' mask; a
        # block's keys or values, widened, its scores, and which of them are hidden.
        keys = min(KEYS, length)
        attention += chunk * (4 * dim * dtype.itemsize + 3 * dim * wide)
        attention += (FEW + 1) * length * dtype.itemsize
        if dtype.itemsize < 4:  # keys and values in the order of bfloat16's products
            attention += cache_bytes(config, dtype, length)
        attention += config.n_attn_kv_heads * config.attn_head_dim * keys * wide
        attention += min(SCORES, config.n_attn_heads * keys * chunk) * 2 * wide
    scoring = logits * (dtype.itemsize + 3 * wide)
    return max(layers, attention, scoring) + OVERHEAD


def prefill_operations(config: YocoConfig, length: int) -> int:
    """Floating-point operations of the matrix products that feed `length` tokens.

    Every weight of the self-decoder and of the shared keys' and values' projection multiplies
    every token; nothing of the cross-decoder does.
    """
    mixer = (4 if config.sliding_window else 5) * config.dim**2
    if not config.sliding_window:
        mixer += config.dim * config.n_self_heads
    layer = mixer + 3 * config.dim * config.hidden_dim
    keys_values = 2 * config.dim * config.n_attn_kv_heads * config.attn_head_dim
    return 2 * length * (config.n_layers // 2 * layer + keys_values)


def decode_bytes(config: YocoConfig, dtype: torch.dtype, length: int) -> int:
    """Bytes that decoding one token after `length` tokens moves at least.

    Every weight is read once but the embedding, of which one row is; the shared cache is read once
    for each layer of the cross-decoder; the states are read and written.
    """
    embedding = (config.vocab_size - 1) * config.dim * dtype.itemsize
    cache = cache_bytes(config, dtype, length) * (config.n_layers // 2)
    states = state_bytes(config, dtype) * (1 if config.sliding_window else 2)
    return weight_bytes(config, dtype) - embedding + cache + states
