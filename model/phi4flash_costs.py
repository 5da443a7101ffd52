"""What Phi-4-mini-flash takes, from its configuration alone: bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from yoco_eval.kernels.dispatch import triton_takes
from yoco_eval.kernels.fused_linear import MIN_TOKENS, fuses_swiglu

from .costs import OVERHEAD, Attention, logit_bytes
from .phi4flash_config import Phi4FlashConfig

# Bytes of the states after segments of a scan that fill the largest cards.
_SEGMENTS = 1200 * 2048 * 4


@dataclass(frozen=True)
class Phi4FlashCosts:
    """`interface.Costs` of a model."""

    config: Phi4FlashConfig

    @property
    def typical_product(self) -> tuple[int, int]:
        return self.config.hidden_size, 2 * self.config.intermediate_size

    def weight_bytes(self, dtype: torch.dtype) -> int:
        config = self.config
        layers, width, channels = config.num_hidden_layers, config.hidden_size, config.channels
        maps = sum(map(self._maps, range(layers)))
        vectors = 2 * width * (2 * layers + 1)  # of norms
        vectors += self._scans * (config.mamba_d_conv + 1) * channels
        vectors += layers // 2 * 2 * width + (self._windows + 1) * 2 * config.kv_width  # biases
        wide = self._scans * (config.mamba_d_state + 2) * channels
        wide += layers // 2 * (2 * config.head_dim + 1)
        numbers = maps + vectors + config.vocab_size * width
        return numbers * dtype.itemsize + wide * _wide(dtype)

    def cache_bytes(self, dtype: torch.dtype, length: int) -> int:
        """One layer's worth, whatever the number of layers."""
        return 2 * self.config.kv_width * length * dtype.itemsize

    def state_bytes(self, dtype: torch.dtype) -> int:
        return self._scans * self._scan_state(dtype) + self._windows * self._window(dtype)

    def passing_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """A layer's window before it, and the two together, in several orders; or what becomes of
        the states of its scan."""
        stages = 4 if triton_takes(device, dtype) else 10
        return stages * max(self._window(dtype), self._scan_state(dtype))

    def activation_bytes(
        self, dtype: torch.dtype, length: int, chunk: int, logits: int, device: torch.device
    ) -> int:
        """The widest point, beside the rows that are handed on to be predicted."""
        config, fast = self.config, triton_takes(device, dtype)
        rows = config.hidden_size * _wide(dtype) + config.channels * dtype.itemsize
        mlps = (self._mlp(tokens, dtype, device) for tokens in (chunk, min(chunk, MIN_TOKENS - 1)))
        mamba = chunk * self._mamba(dtype, fast) + (_SEGMENTS if fast else 0)
        windowed = chunk * self._windowed(dtype, fast) + (0 if fast else self._masks(dtype))
        # What this counts as its layer's input is as much as the norm's output and the queries.
        attention = Attention(config.num_attention_heads, config.kv_pairs, 2 * config.head_dim)
        reading = attention.bytes(dtype, length, chunk, fast)
        layers = chunk * rows + max(*mlps, mamba, windowed, reading)
        return max(layers, logit_bytes(dtype, logits)) + OVERHEAD

    def prefill_operations(self, length: int) -> int:
        """Every matrix of the layers up to M, and the rows of layer M + 1 that make keys and
        values, multiply every token; nothing else does."""
        maps = sum(map(self._maps, range(self.config.memory_layer + 1)))
        return 2 * length * (maps + 2 * self.config.hidden_size * self.config.kv_width)

    def decode_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Every weight is read once; the cache by every layer that attends to it; the windows are
        read, the states of scans read and written."""
        config = self.config
        readers = config.num_hidden_layers // 2 - self._windows
        cache = readers * self.cache_bytes(dtype, length)
        windows = self._windows * 2 * config.kv_width * min(length, config.sliding_window)
        scans = 2 * self._scans * self._scan_state(dtype)
        return self.weight_bytes(dtype) + cache + windows * dtype.itemsize + scans

    @property
    def _scans(self) -> int:
        """Mamba layers."""
        return self.config.memory_layer // 2 + 1

    @property
    def _windows(self) -> int:
        """Layers with windows."""
        return self.config.memory_layer // 2

    def _maps(self, layer: int) -> int:
        """Numbers of a layer's linear maps."""
        config = self.config
        width, channels, behind = config.hidden_size, config.channels, layer - config.memory_layer
        numbers = 3 * width * config.intermediate_size
        if layer % 2:
            return numbers + 2 * width * (width + (config.kv_width if behind < 2 else 0))
        if behind > 0:
            return numbers + 2 * width * channels
        return numbers + channels * (3 * width + 2 * (config.time_rank + config.mamba_d_state))

    def _scan_state(self, dtype: torch.dtype) -> int:
        """Bytes of a Mamba layer's state of one text."""
        config = self.config
        tail = (config.mamba_d_conv - 1) * dtype.itemsize
        return config.channels * (config.mamba_d_state * _wide(dtype) + tail)

    def _window(self, dtype: torch.dtype) -> int:
        """Bytes of a layer's window of one text."""
        return 2 * (self.config.sliding_window - 1) * self.config.kv_width * dtype.itemsize

    def _mlp(self, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes that tokens take in an MLP: what was added before it, its input, both halves, and
        what becomes of them."""
        width, hidden = self.config.hidden_size, self.config.intermediate_size
        hiddens = 3 if triton_takes(device, dtype) else 4
        if fuses_swiglu(tokens, width, hidden, dtype, device):
            hiddens = 1
        return tokens * (2 * width + hiddens * hidden) * dtype.itemsize

    def _mamba(self, dtype: torch.dtype, fast: bool) -> int:
        """Bytes that a token takes in a Mamba layer: its input, two projections of it, what the
        convolution gives, time steps and what they are made of, the output; without Triton, what
        the scan takes and gives widened."""
        config = self.config
        numbers = config.hidden_size + 4 * config.channels
        numbers += config.time_rank + 2 * config.mamba_d_state
        scan = config.channels * dtype.itemsize
        if not fast:
            scan = (4 if dtype.itemsize >= 4 else 5) * config.channels * _wide(dtype)
            scan += 8 * config.mamba_d_state * _wide(dtype)
        return numbers * dtype.itemsize + scan

    def _windowed(self, dtype: torch.dtype, fast: bool) -> int:
        """Bytes that a token takes in a layer with a window: its input, queries, keys and values,
        queries with zeros, outputs; keys and values behind the past ones, or copies in several
        orders."""
        width, keys_values = self.config.hidden_size, 2 * self.config.kv_width
        attended = 2 * width + keys_values if fast else 11 * width
        return (4 * width + keys_values + attended) * dtype.itemsize

    def _masks(self, dtype: torch.dtype) -> int:
        """Bytes of what of a window a block of tokens does not see, without Triton."""
        window = self.config.sliding_window
        block = max(128, min(window, 512))
        group = self.config.num_attention_heads // self.config.kv_pairs
        return group * block * (block + window) * (1 + dtype.itemsize)


def _wide(dtype: torch.dtype) -> int:
    """Bytes of a number that is float32 at least."""
    return max(dtype.itemsize, 4)
