"""What Gemma 4 models take, from their configuration alone: bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from yoco_eval.kernels.dispatch import triton_takes

from .costs import OVERHEAD, Attention, logit_bytes
from .gemma4_config import Gemma4Config
from .kv_sharing import SLIDING


@dataclass(frozen=True)
class Gemma4Costs:
    """`interface.Costs` of a model."""

    config: Gemma4Config

    @property
    def typical_product(self) -> tuple[int, int]:
        return self.config.hidden_size, 2 * self.config.intermediate_size

    def weight_bytes(self, dtype: torch.dtype) -> int:
        config, layout = self.config, self.config.layout
        layers = range(len(config.layer_types))
        numbers = sum(self._maps(layer) for layer in layers) + self._inputs_map(len(layers))
        for layer in layers:  # norms, and the scalar
            owns = layer <= layout.exit
            numbers += 5 * config.hidden_size + layout.heads(layer).dim * (2 if owns else 1) + 1
        numbers += (config.vocab_size + 1) * config.hidden_size  # with the last norm
        numbers += self._inputs_table + config.hidden_size_per_layer_input
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
        """The widest point of a layer before the exit, or of one from there on, beside what all of
        them share: inputs of layers and rotary angles."""
        config, layout, fast = self.config, self.config.layout, triton_takes(device, dtype)
        peak, layers = 0, range(len(config.layer_types))
        for part in layers[: layout.exit], layers[layout.exit :]:
            inputs = len(part) * config.hidden_size_per_layer_input
            shared = 2 * config.hidden_size + inputs + layout.full.dim + layout.sliding.dim
            alike = {(config.layer_types[i], config.hidden(i)): i for i in part}
            widest = max(self._layer(i, dtype, length, chunk, fast) for i in alike.values())
            making = inputs * (_normed(dtype, fast) - 1) * chunk * dtype.itemsize
            peak = max(peak, shared * chunk * dtype.itemsize + max(widest, making))
        return max(peak, logit_bytes(dtype, logits)) + OVERHEAD

    def _layer(self, layer: int, dtype: torch.dtype, length: int, chunk: int, fast: bool) -> int:
        """Bytes that a chunk takes in a layer."""
        config, layout = self.config, self.config.layout
        heads, hidden = layout.heads(layer), config.hidden(layer)
        dim, size = self._dim(layer), config.hidden_size
        fed = 2 * hidden + max(hidden if fast else 2 * hidden, size * _normed(dtype, fast))
        projected = dim + (heads.numbers if layer < layout.exit else 0)
        projecting = size + 2 * projected + dim * _normed(dtype, fast)
        numbers, reading = max(fed, projecting), 0
        if layer < layout.exit and config.layer_types[layer] == SLIDING:
            wide = max(dtype.itemsize, 4) // dtype.itemsize
            copies = 3 * dim if fast else (11 * dim + dim * heads.dim // 32) * wide
            numbers = max(numbers, projected + dim + copies)
        else:
            attention = Attention(config.num_attention_heads, heads.count, heads.dim)
            reading = attention.bytes(dtype, length, chunk, fast)
            reading += projected * chunk * dtype.itemsize
        return max(numbers * chunk * dtype.itemsize, reading)

    def prefill_operations(self, length: int) -> int:
        """Of the matrix products with weights, and of attention, in the layers before the exit; and
        of those that make the exit's keys and values."""
        config, layout = self.config, self.config.layout
        maps = layout.full.numbers * config.hidden_size + self._inputs_map(layout.exit)
        attended = 0
        for layer in range(layout.exit):
            maps += self._maps(layer)
            attended += 4 * self._dim(layer) * layout.pairs(layer, length)
        return 2 * length * maps + attended

    def decode_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Every weight is read once but for the embedding of layers' inputs, of which one row is;
        keys and values by every layer that reads them."""
        table = self._inputs_table
        unread = table - table // self.config.vocab_size_per_layer_input
        read = self.config.layout.read_bytes(dtype, length)
        return self.weight_bytes(dtype) - unread * dtype.itemsize + read

    def _dim(self, layer: int) -> int:
        """Channels of a layer's queries."""
        return self.config.num_attention_heads * self.config.layout.heads(layer).dim

    def _maps(self, layer: int) -> int:
        """Numbers of a layer's linear maps."""
        config, layout = self.config, self.config.layout
        own = layout.heads(layer).numbers if layer <= layout.exit else 0
        width = 2 * self._dim(layer) + own + 3 * config.hidden(layer)
        return config.hidden_size * (width + 2 * config.hidden_size_per_layer_input)

    def _inputs_map(self, layers: int) -> int:
        """Numbers of the linear map that makes inputs of so many layers."""
        return layers * self.config.hidden_size_per_layer_input * self.config.hidden_size

    @property
    def _inputs_table(self) -> int:
        """Numbers of the embedding of layers' inputs."""
        width = len(self.config.layer_types) * self.config.hidden_size_per_layer_input
        return self.config.vocab_size_per_layer_input * width


def _normed(dtype: torch.dtype, fast: bool) -> int:
    """Rows of what is normed: itself and the result; without Triton, widened copies, too."""
    return 2 if fast else 3 + 2 * max(dtype.itemsize, 4) // dtype.itemsize
