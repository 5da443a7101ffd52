"""What Gemma 3n's text models take, from their configuration alone: bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from yoco_eval.kernels.dispatch import triton_takes

from .costs import OVERHEAD, Attention, logit_bytes
from .gemma3n_config import Gemma3nConfig


@dataclass(frozen=True)
class Gemma3nCosts:
    """`interface.Costs` of a Gemma 3n text model."""

    config: Gemma3nConfig

    @property
    def typical_product(self) -> tuple[int, int]:
        return self.config.hidden_size, 2 * max(self.config.intermediate_size)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        config, layout = self.config, self.config.layout
        layers, dim = config.num_hidden_layers, config.hidden_size
        own = config.hidden_size_per_layer_input
        numbers = sum(map(self._maps, range(layers)))
        # Norms of each layer, and the weight of its output; norms of queries, and of keys.
        numbers += layers * 8 * dim + (layers + layout.exit + 1) * config.head_dim
        numbers += 2 * (config.altup_num_inputs - 1) * dim**2
        numbers += (config.vocab_size + 1) * dim  # with the last norm
        numbers += layers * own * (config.vocab_size_per_layer_input + dim) + own
        return numbers * dtype.itemsize

    def cache_bytes(self, dtype: torch.dtype, length: int) -> int:
        return self.config.layout.cache_bytes(dtype, length)

    def state_bytes(self, dtype: torch.dtype) -> int:
        return self.config.layout.state_bytes(dtype)

    def passing_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        return self.config.layout.passing_bytes(dtype, device)

    def activation_bytes(
        self, dtype: torch.dtype, length: int, chunk: int, logits: int, device: torch.device
    ) -> int:
        config, fast = self.config, triton_takes(device, dtype)
        wide = max(dtype.itemsize, 4) // dtype.itemsize
        dim, hidden = config.hidden_size, max(config.intermediate_size)
        streams, before = config.altup_num_inputs * dim, config.layout.exit
        inputs = max(before, config.num_hidden_layers - before)
        inputs *= config.hidden_size_per_layer_input
        queries = config.num_attention_heads * config.head_dim
        projected = queries + 2 * config.num_key_value_heads * config.head_dim
        attention = Attention(
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
        """Of the matrix products, streams mixed with each other included, and of attention, in the
        layers before the exit; and of those that make the exit's keys and values."""
        config, layout = self.config, self.config.layout
        dim, streams, before = config.hidden_size, config.altup_num_inputs, range(layout.exit)
        routing = dim * streams + streams**2  # to the mixture that makes one stream
        maps = (streams - 1) * dim**2 + routing + streams * dim + dim * layout.full.numbers
        pairs = 0
        for layer in before:
            # Streams are routed twice.
            maps += self._maps(layer) + dim * (streams + streams**2)
            maps += dim * config.hidden_size_per_layer_input
            pairs += layout.pairs(layer, length)
        return 2 * length * maps + 4 * config.num_attention_heads * config.head_dim * pairs

    def decode_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Every weight is read once, but of the layers' own inputs those of one token; the layers
        that share read keys and values once more."""
        config = self.config
        unread = config.vocab_size_per_layer_input - 1
        unread *= config.num_hidden_layers * config.hidden_size_per_layer_input
        weights = self.weight_bytes(dtype) - unread * dtype.itemsize
        return weights + config.layout.read_bytes(dtype, length)

    def _maps(self, layer: int) -> int:
        """Numbers of a layer's linear maps."""
        config, layout = self.config, self.config.layout
        queries, streams = config.num_attention_heads * config.head_dim, config.altup_num_inputs
        own = layout.heads(layer).numbers if layer <= layout.exit else 0
        width = 2 * queries + own + 3 * config.intermediate_size[layer]
        width += 2 * (config.laurel_rank + config.hidden_size_per_layer_input) + streams
        return config.hidden_size * width + streams**3 + streams**2
