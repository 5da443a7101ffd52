"""What YOCO models take, from their configuration alone: bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from yoco_eval.kernels.attention import FEW, KEYS, SCORES
from yoco_eval.kernels.dispatch import triton_takes
from yoco_eval.kernels.eight_bits import NUMBER, SCALE
from yoco_eval.kernels.fused_linear import MIN_TOKENS, fuses_swiglu
from yoco_eval.kernels.group import rows_each
from yoco_eval.kernels.sparse_attention import NUMBERS
from yoco_eval.kernels.striped_attention import GATHERED
from yoco_eval.kernels.text_blocks import ALWAYS, BLOCK, SCORED

from .config import YocoConfig
from .cross_decoder import cross_layer
from .interface import count
from .self_decoder import self_layer
from .traffic import Traffic, gathered, handed_on

# What PyTorch's matrix library keeps for itself on a GPU, and small tensors.
OVERHEAD = 64 << 20


@dataclass(frozen=True)
class YocoCosts:
    """`interface.PartCosts` of a YOCO model, as one of `parts` processes has them that hold texts
    together: tokens fed in a row are divided among them, and so is the cache; weights and states
    are not, nor is what each of several texts takes while they are fed side by side. Where each
    token chooses `sparse` blocks of the cache, these have summaries; and with `eight_bits` the
    cache's keys and values have so many."""

    config: YocoConfig
    parts: int = 1
    sparse: int | None = None
    eight_bits: bool = False

    @property
    def typical_product(self) -> tuple[int, int]:
        return self.config.dim, 2 * self.config.hidden_dim

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return _parameters(self.config) * dtype.itemsize

    def cache_bytes(self, dtype: torch.dtype, length: int) -> int:
        """One layer's worth, whatever the number of layers."""
        total = self._token_bytes(dtype) * length
        if self.sparse is not None:
            total += -(-2 * self._width * length // BLOCK) * dtype.itemsize
        return -(-total // self.parts)

    def state_bytes(self, dtype: torch.dtype) -> int:
        return self.config.self_layers * self._layer_state(dtype)

    def passing_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """That is the window before it and the two together, or what becomes of its state."""
        fast, slow = self.config.self_decoder.stages
        return (fast if triton_takes(device, dtype) else slow) * self._layer_state(dtype)

    def activation_bytes(
        self, dtype: torch.dtype, length: int, chunk: int, logits: int, device: torch.device
    ) -> int:
        """The widest point of a layer, beside its input."""
        config, fast = self.config, triton_takes(device, dtype)
        handed, merged = self._together_bytes(dtype, chunk) if self.parts > 1 else (0, 0)
        fed = self._own_part(chunk)
        chunk, length = -(-chunk // self.parts), -(-length // self.parts)
        mixer = config.self_decoder.activations(config.dim, dtype, fast)
        angles = config.self_decoder.shared(config.dim) + config.attn_head_dim
        attention = Attention(config.n_attn_heads, config.n_attn_kv_heads, config.attn_head_dim)
        mixing = max(mixer, attention.numbers(dtype))
        layers = layer_bytes(config.dim, config.hidden_dim, mixing, angles, dtype, fed, device)
        if self.sparse is None:
            cross = attention.bytes(dtype, length, chunk, fast, self.eight_bits)
        else:
            cross = self._sparse_bytes(dtype, length, chunk, fast)
        layers += config.self_decoder.workspace_bytes(config.dim, fast)
        return max(layers + handed, cross + merged, logit_bytes(dtype, logits)) + OVERHEAD

    def _sparse_bytes(self, dtype: torch.dtype, length: int, chunk: int, fast: bool) -> int:
        """Of a chunk's tokens after a layer's input, while they choose, and read what they have
        chosen."""
        assert self.sparse is not None
        config, wide = self.config, max(dtype.itemsize, 4)
        heads, dim = config.n_attn_kv_heads, config.attn_head_dim
        blocks = -(-length // BLOCK)
        read = min(self.sparse + ALWAYS, blocks)
        # Queries, outputs; and, of each key-value head, the chosen blocks.
        total = chunk * (4 * config.n_attn_heads * dim * wide + heads * read * 4)
        # Scores, and while PyTorch sorts them, the chosen ones.
        scores = max(SCORED, heads * blocks * BLOCK) if fast else NUMBERS
        chosen = min(scores, chunk * heads * read) * 3 * torch.int64.itemsize
        choosing = min(scores, chunk * config.n_attn_heads * blocks) * 3 * wide + chosen
        if not fast:
            choosing += 4 * heads * blocks * dim * wide  # a text's summaries, widened
            # Keys and values of what some queries read, widened, and without what they do not.
            copied = min(
                max(NUMBERS, heads * dim * BLOCK * read), chunk * heads * dim * BLOCK * read
            )
            choosing = max(choosing, 6 * copied * wide)
        return total + choosing

    def _together_bytes(self, dtype: torch.dtype, chunk: int) -> tuple[int, int]:
        """What goes to other processes and comes from them, while a chunk is fed, and while
        tokens are predicted."""
        config, one, handed = self.config, -(-chunk // self.parts), 0
        if config.self_decoder.relays:
            # All parts' rows, as they come and in a row; keys and values in both orders, and
            # received; and what everyone does to the states of a layer, this one's twice.
            handed = 2 * chunk * config.dim * dtype.itemsize + 3 * one * self._handed_bytes(dtype)
            relayed = config.self_decoder.relayed(config.dim, dtype, self.parts).received
            handed += -(-relayed * (self.parts + 1) // (self.parts - 1))
        # Outputs of a part of the keys, with their norms; everyone's, and weighted.
        outputs = config.n_attn_heads * (config.attn_head_dim + 1)
        merged = (one * outputs + 3 * min(GATHERED, chunk * outputs)) * max(dtype.itemsize, 4)
        return handed, merged

    def prefill_operations(self, length: int) -> int:
        """Every matrix of the self-decoder and of the shared keys' and values' projection
        multiplies every token; nothing of the cross-decoder does. Of all processes together."""
        config = self.config
        layer = config.self_decoder.operations(config.dim) + 6 * config.dim * config.hidden_dim
        return length * (config.self_layers * layer + 4 * config.dim * self._width)

    def decode_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Every weight is read once but the embedding, of which one row is unless it is tied, and
        the other parts' rows of the output projection; the shared cache is read once for each
        layer of the cross-decoder; the states are moved. Of a sparse one, all summaries are read
        once, and so many blocks by each layer."""
        config = self.config
        unread = 0 if config.tied_embeddings else (config.vocab_size - 1) * config.dim
        unread += (config.vocab_size - rows_each(config.vocab_size, self.parts)) * config.dim
        cache = self.cache_bytes(dtype, length) * config.cross_layers
        if self.sparse is not None:
            summary = 2 * self._width * dtype.itemsize
            read = min((self.sparse + ALWAYS) * BLOCK, length) * self._token_bytes(dtype)
            cache = -(-length // BLOCK) * summary + read * config.cross_layers
        states = self.state_bytes(dtype) * config.self_decoder.moves
        return self.weight_bytes(dtype) - unread * dtype.itemsize + cache + states

    def part_operations(self, length: int) -> int:
        return self._own_part(self.prefill_operations(length))

    def _own_part(self, whole: int) -> int:
        """Of what the self-decoder does with a chunk, which each process does alone unless parts of
        it can be put together."""
        return -(-whole // self.parts) if self.config.self_decoder.relays else whole

    def feeding(self, dtype: torch.dtype, chunk: int) -> Traffic:
        """States and windows go from part to part in each layer of the self-decoder; then keys and
        values go to where their slots are."""
        if self.parts == 1 or not self.config.self_decoder.relays:
            return Traffic()
        layer = self.config.self_decoder.relayed(self.config.dim, dtype, self.parts)
        others = (self.parts - 1) * self._handed_bytes(dtype)
        return layer * self.config.self_layers + handed_on(chunk * others // self.parts**2)

    def stepping(self, dtype: torch.dtype) -> Traffic:
        """Each layer of the cross-decoder merges everyone's outputs and their norms; at the end,
        all have everyone's logits, and thus the likeliest token."""
        if self.parts == 1:
            return Traffic()
        outputs = self.config.n_attn_heads * (self.config.attn_head_dim + 1)
        layer = gathered(outputs * max(dtype.itemsize, 4), self.parts)
        logits = rows_each(self.config.vocab_size, self.parts) * dtype.itemsize
        return layer * self.config.cross_layers + gathered(logits, self.parts)

    @property
    def _width(self) -> int:
        """Channels of the shared keys, and of the values."""
        return self.config.n_attn_kv_heads * self.config.attn_head_dim

    def _token_bytes(self, dtype: torch.dtype) -> int:
        """Of the keys and values of a token."""
        if self.eight_bits:
            return 2 * (
                self._width * NUMBER.itemsize + self.config.n_attn_kv_heads * SCALE.itemsize
            )
        return 2 * self._width * dtype.itemsize

    def _handed_bytes(self, dtype: torch.dtype) -> int:
        """Of a token's keys and values on their way to where its slot is."""
        return 2 * self._width * (max(dtype.itemsize, 4) if self.eight_bits else dtype.itemsize)

    def _layer_state(self, dtype: torch.dtype) -> int:
        return self.config.self_decoder.state_bytes(self.config.dim, dtype)


@cache
def _parameters(config: YocoConfig) -> int:
    """Numbers in all weights; of all layers alike, one is made."""
    width = config.n_attn_kv_heads * config.attn_head_dim
    with torch.device("meta"):
        layers = config.self_layers * count(self_layer(config))
        layers += config.cross_layers * count(cross_layer(config))
    shared = config.dim + 2 * width * (config.dim + config.qkv_bias)
    embeddings = config.vocab_size * config.dim * (1 if config.tied_embeddings else 2)
    return layers + shared + embeddings + config.dim


@dataclass(frozen=True)
class Attention:
    """Over a cache."""

    heads: int
    kv_heads: int
    head_dim: int

    def numbers(self, dtype: torch.dtype) -> int:
        """For each token: queries and outputs; and of two spans that a text reads, what is added
        up in float32."""
        dim = self.heads * self.head_dim
        return 2 * dim + 8 * dim // dtype.itemsize

    def bytes(
        self, dtype: torch.dtype, length: int, chunk: int, fast: bool, eight_bits: bool = False
    ) -> int:
        """Of a chunk's tokens after a layer's input, with a cache of `length`."""
        dim, wide = self.heads * self.head_dim, max(dtype.itemsize, 4)
        total = chunk * (dim + self.numbers(dtype)) * dtype.itemsize
        if not fast:
            # Copies of the queries and outputs, in other orders and widened; a block's keys or
            # values, widened, its scores, and which of them are hidden.
            keys, width = min(KEYS, length), self.kv_heads * self.head_dim
            total += chunk * (4 * dim * dtype.itemsize + 3 * dim * wide)
            total += width * keys * wide
            total += min(SCORES, self.heads * keys * chunk) * 2 * wide
            if not eight_bits:  # one text's are left to PyTorch: a few queries' mask
                total += (FEW + 1) * length * dtype.itemsize
                if dtype.itemsize < 4:  # keys and values in the order of bfloat16's products
                    total += 2 * width * length * dtype.itemsize
        return total


def layer_bytes(
    dim: int,
    hidden: int,
    mixing: int,
    angles: int,
    dtype: torch.dtype,
    chunk: int,
    device: torch.device,
) -> int:
    """Of a chunk in a layer whose mixer has `mixing` numbers a token; all layers share `angles`."""

    def layer(tokens: int) -> int:
        fused = fuses_swiglu(tokens, dim, hidden, dtype, device)
        feed_forward = dim + hidden if fused else 2 * hidden + max(dim, hidden)
        return tokens * (dim + angles + max(mixing, feed_forward)) * dtype.itemsize

    # A text's last tokens may be too few to be fused.
    return max(layer(chunk), layer(min(chunk, MIN_TOKENS - 1)))


def logit_bytes(dtype: torch.dtype, logits: int) -> int:
    """Of so many logits while they are turned into log-probabilities."""
    return logits * (dtype.itemsize + 3 * max(dtype.itemsize, 4))
