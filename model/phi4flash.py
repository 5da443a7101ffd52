"""Phi-4-mini-flash (SambaY): layers and model.

Equations: "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning with Long Generation",
arXiv:2507.06607; where that leaves something open, the published code. Of N layers, counted from 0,
with M = N / 2:

- the first M are Mamba layers and attention in sliding windows, in turn;
- layer M is a Mamba layer that also hands out its memory of each token: what its scan gives;
- layer M + 1 is attention to all of a text, whose keys and values are the only ones in the cache;
- the others are gated memory units, which take a token's own memory, and attention to that cache.

No layer knows positions. A token whose prediction nobody asks for leaves once layer M + 1 has its
key and value; the others go on with what layer M made of them, and with their memory.

The stream that layers add to is float32, as there, whatever the weights' dtype; what comes into a
layer is rounded to that before its norm. Sums in bfloat16 would err as much as all that is rounded
within the layers, and by something else than the published code; they would save 12 bytes for each
of its numbers and layers, of which there are few beside the weights' products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoco_eval.kernels.attention import (
    batch_attention,
    cache_attention,
    rings_from_past,
    sliding_window_attention,
    window_step,
)
from yoco_eval.kernels.cache_writes import store_keys_values
from yoco_eval.kernels.differential import differential_norm
from yoco_eval.kernels.dispatch import use_triton
from yoco_eval.kernels.fused_linear import swiglu_linear
from yoco_eval.kernels.layer_norm import layer_norm
from yoco_eval.kernels.selective_scan import selective_scan, selective_scan_step
from yoco_eval.kernels.sequences import Sequences, Spans, Step, to_device
from yoco_eval.kernels.short_convolution import short_convolution, short_convolution_step

from .cache import KeyValueCache, SelfState, slots_of
from .decoder import Decoder
from .interface import take
from .linear import Embedding, allocate, linear
from .mixers.contract import set_rows
from .phi4flash_config import Phi4FlashConfig
from .phi4flash_costs import Phi4FlashCosts

_DIFFERENCE_EPS = 1e-5  # of the norm of differences, whatever `layer_norm_eps` is

Cache = KeyValueCache[SelfState]
Rows = tuple[Tensor, Tensor]  # the stream after layer M [T, hidden_size], memory [T, channels]
MambaState = tuple[Tensor, Tensor]  # tails of the convolution, states of the scan
Rings = tuple[Tensor, Tensor]
Attend = Callable[[Tensor], Tensor]


class LayerNorm(nn.Module):
    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Of the stream x [T, hidden_size], to which `add` is added in place before."""
        return layer_norm(x, self.weight, self.bias, self.eps, add)


class Mamba(nn.Module):
    """A Mamba layer's mixing (arXiv:2312.00752), and the memory that the scan gives of each token.

    The rates of its states are kept as they are used, -exp(A_log), in float32 at least, as are the
    weights of the skip and the biases of time steps.
    """

    wide = ("rates", "skip", "time_bias")

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        channels, self.rank, self.states = config.channels, config.time_rank, config.mamba_d_state
        self.in_proj = linear(config.hidden_size, 2 * channels)
        # Channels side by side, here and in the rates, as the kernels read them.
        self.taps = nn.Parameter(torch.zeros(config.mamba_d_conv, channels))
        self.tap_bias = nn.Parameter(torch.zeros(channels))
        self.x_proj = linear(channels, self.rank + 2 * self.states)
        self.dt_proj = linear(self.rank, channels)
        self.time_bias = nn.Parameter(torch.zeros(channels))
        self.rates = nn.Parameter(-torch.ones(self.states, channels))
        self.skip = nn.Parameter(torch.ones(channels))
        self.out_proj = linear(channels, config.hidden_size)

    def draw(self, generator: torch.Generator) -> None:
        """Sets rates and time steps as training begins with them: states last up to 1000 tokens."""
        states = torch.arange(1, self.states + 1, device=self.rates.device)
        self.rates.copy_(-states[:, None])
        self.time_bias.uniform_(-7, -2, generator=generator)

    def forward(
        self, x: Tensor, sequences: Sequences, state: MambaState | None, keep: bool
    ) -> tuple[Tensor, MambaState | None]:
        """Of x [T, hidden_size], with the state after each sequence."""
        y, _, after = self._scan(x, sequences, state, keep, gated=True)
        return self.out_proj(y), after

    def remember(
        self, x: Tensor, sequences: Sequences, state: MambaState | None, keep: bool
    ) -> tuple[Tensor, Tensor, MambaState | None]:
        """`forward`, with the tokens' memory [T, channels]: what the scan gives, not gated yet."""
        y, gate, after = self._scan(x, sequences, state, keep, gated=False)
        return self.out_proj(F.silu(gate).mul_(y)), y, after

    def memory(self, size: int, device: torch.device, dtype: torch.dtype) -> MambaState:
        taps, channels = self.taps.shape
        wide = torch.promote_types(dtype, torch.float32)
        return (
            torch.zeros(size, taps - 1, channels, dtype=dtype, device=device),
            torch.zeros(size, self.states, channels, dtype=wide, device=device),
        )

    def begin(
        self, memory: MambaState, rows: Tensor, state: MambaState | None, lengths: Sequence[int]
    ) -> None:
        """Sets rows (int64 [n], on the device) of the memory to n texts' states."""
        for part, content in zip(memory, state or (None, None), strict=True):
            set_rows(part, rows, content)

    def step(self, x: Tensor, memory: MambaState) -> Tensor:
        """`forward` of one token of each of B texts; what `memory` made is changed in place."""
        y, _ = self._scan_step(x, memory, gated=True)
        return self.out_proj(y)

    def remember_step(self, x: Tensor, memory: MambaState) -> tuple[Tensor, Tensor]:
        """`remember` of one token of each of B texts, as `step`."""
        y, gate = self._scan_step(x, memory, gated=False)
        return self.out_proj(F.silu(gate).mul_(y)), y

    def _scan(
        self, x: Tensor, sequences: Sequences, state: MambaState | None, keep: bool, gated: bool
    ) -> tuple[Tensor, Tensor, MambaState | None]:
        """Its output, the gate, and the state after."""
        tails, states = state or (None, None)
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        v, tails = short_convolution(u, self.taps.T, sequences, tails, keep, self.tap_bias)
        inside = gate if gated else None
        y, states = selective_scan(*self._scanned(v), sequences, states, inside, keep)
        return y, gate, None if tails is None or states is None else (tails, states)

    def _scan_step(self, x: Tensor, memory: MambaState, gated: bool) -> tuple[Tensor, Tensor]:
        tails, states = memory
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        v = short_convolution_step(u, self.taps.T, tails, self.tap_bias)
        return selective_scan_step(*self._scanned(v), states, gate if gated else None), gate

    def _scanned(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the scan takes, of v [T, channels]."""
        p, b, c = self.x_proj(v).split([self.rank, self.states, self.states], dim=-1)
        return v, self.dt_proj(p), self.rates, b, c, self.skip, self.time_bias


class DifferentialAttention(nn.Module):
    """The difference of two attentions (arXiv:2410.05258), of pairs of neighbouring heads.

    The queries of a pair read keys of their own, and the values of both of these. So a pair of
    key-value heads is one head of twice the width to the kernels, and a query has zeros where the
    other's key is: keys and values are read once, and weights computed once, as two runs over heads
    of single width would not, for the same number of operations.

    The factor of the second attention and the weight of the norm behind are kept as they are used,
    in float32 at least: lambda, and the weight times 1 - lambda's initial value.

    Args:
        own: whether the layer makes keys and values.
    """

    wide = ("factor", "norm")

    def __init__(self, config: Phi4FlashConfig, own: bool = True) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5
        self.width = width = config.hidden_size
        self.projection = linear(width, width + 2 * own * config.kv_width, bias=True)
        self.factor = nn.Parameter(torch.zeros(1))
        self.norm = nn.Parameter(torch.ones(2 * self.head_dim))
        self.out_proj = linear(width, width, bias=True)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Of x [T, hidden_size]; `attend` takes queries [T, heads, 2 * head_dim] to outputs of that
        shape, with scores scaled by `scale`."""
        rows = slice(self.width)
        q = F.linear(x, self.projection.weight[rows], self.projection.bias[rows])
        return self.output(attend(self._queries(q)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each [T, pairs, 2 * head_dim]."""
        rows = slice(self.width, None)
        y = F.linear(x, self.projection.weight[rows], self.projection.bias[rows])
        keys, values = self._pairs(y).chunk(2, dim=1)
        return keys, values

    def all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        q, y = self.projection(x).tensor_split([self.width], dim=-1)
        keys, values = self._pairs(y).chunk(2, dim=1)
        return self._queries(q), keys, values

    def output(self, out: Tensor) -> Tensor:
        """[T, hidden_size] of what `attend` gave."""
        difference = differential_norm(out, self.factor, self.norm, _DIFFERENCE_EPS)
        return self.out_proj(difference.flatten(1))

    def _queries(self, q: Tensor) -> Tensor:
        """Of q [T, hidden_size] the first of each pair in front of zeros, the second behind."""
        pairs = self._pairs(q).unflatten(2, (2, -1))
        return torch.diag_embed(pairs.mT, dim1=2, dim2=3).flatten(3).flatten(1, 2)

    def _pairs(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2 * self.head_dim))


class WindowAttention(nn.Module):
    """Differential attention in a sliding window, which is the state: see
    `sliding_window_attention`."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.attention = DifferentialAttention(config)
        self.window, self.pairs = config.sliding_window, config.kv_pairs

    def forward(
        self, x: Tensor, sequences: Sequences, state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, after = sliding_window_attention(
            *self.attention.all(x), self.window, sequences, state, keep=keep,
            scale=self.attention.scale,
        )  # fmt: skip
        return self.attention.output(out), after

    def memory(self, size: int, device: torch.device, dtype: torch.dtype) -> Rings:
        shape = (size, self.pairs, self.window, 2 * self.attention.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return keys, values

    def begin(
        self, memory: Rings, rows: Tensor, state: Tensor | None, lengths: Sequence[int]
    ) -> None:
        """Sets rows (int64 [n], on the device) of the memory to n texts' states."""
        if state is not None:  # else no slot is read before it is written
            rings = rings_from_past(state, lengths)
            for part, content in zip(memory, rings.unbind(1), strict=True):
                set_rows(part, rows, content)

    def step(self, x: Tensor, memory: Rings, positions: Tensor) -> Tensor:
        """`forward` of one token of each of B texts; what `memory` made is changed in place."""
        out = window_step(*self.attention.all(x), *memory, positions, scale=self.attention.scale)
        return self.attention.output(out)


class GatedMemoryUnit(nn.Module):
    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.in_proj = linear(config.hidden_size, config.channels)
        self.out_proj = linear(config.channels, config.hidden_size)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Of x [T, hidden_size], and the same tokens' memory [T, channels]."""
        return self.out_proj(F.silu(self.in_proj(x)).mul_(memory))


M = TypeVar("M", bound=nn.Module)


class Layer(nn.Module, Generic[M]):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Phi4FlashConfig, mixer: M) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config)
        self.mixer = mixer
        self.post_attention_layernorm = LayerNorm(config)
        self.fc1 = linear(config.hidden_size, 2 * config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)

    def normed(self, x: Tensor) -> Tensor:
        """What the mixer takes."""
        return self.input_layernorm(x)

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Adds to x [T, hidden_size], in place, what the mixer gave, then what the MLP does."""
        z = self.post_attention_layernorm(x, mixed)
        x += self.fc2(swiglu_linear(z, self.fc1.weight))
        return x


class Layers(nn.ModuleList, Generic[M]):
    """Layers with mixers of one class."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Layer[M]]: ...


class Phi4Flash(nn.Module):
    """A Phi-4-mini-flash language model for evaluation, as `interface.Model` has it."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        before = range(config.memory_layer // 2)
        behind = range(config.memory_layer // 2 - 1)
        self.mamba_layers: Layers[Mamba] = Layers(Layer(config, Mamba(config)) for _ in before)
        self.window_layers: Layers[WindowAttention] = Layers(
            Layer(config, WindowAttention(config)) for _ in before
        )
        self.memory_layer = Layer(config, Mamba(config))
        self.cache_layer = Layer(config, DifferentialAttention(config))
        self.unit_layers: Layers[GatedMemoryUnit] = Layers(
            Layer(config, GatedMemoryUnit(config)) for _ in behind
        )
        self.cross_layers: Layers[DifferentialAttention] = Layers(
            Layer(config, DifferentialAttention(config, own=False)) for _ in behind
        )
        self.final_layernorm = LayerNorm(config)

    @staticmethod
    def costs_of(config: Phi4FlashConfig) -> Phi4FlashCosts:
        return Phi4FlashCosts(config)

    @property
    def costs(self) -> Phi4FlashCosts:
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
    def empty(cls, config: Phi4FlashConfig, device: torch.device, dtype: torch.dtype) -> Phi4Flash:
        """A model for evaluation whose weights are allocated but not set."""
        with torch.device("meta"):
            model = cls(config)
        allocate(model, device, dtype)
        for module in model.modules():
            for name in getattr(module, "wide", ()):
                wide = getattr(module, name).to(torch.promote_types(dtype, torch.float32))
                setattr(module, name, nn.Parameter(wide, requires_grad=False))
        return model.requires_grad_(False).eval()

    def new_cache(self, capacity: int) -> Cache:
        """Of layer M + 1 alone, pairs of heads as one."""
        shape = (self.config.kv_pairs, capacity, 2 * self.config.head_dim)
        initial = SelfState((0,), (None,) * (self.config.memory_layer + 1))
        return KeyValueCache(shape, initial, self.dtype, self.device)

    def feed(
        self,
        input_ids: Tensor,
        sequences: Sequences,
        state: SelfState,
        cache: Cache,
        keep: bool = True,
    ) -> tuple[Rows, SelfState | None]:
        """Runs packed tokens [T] through the layers up to M, and adds their keys and values."""
        slots = slots_of(cache.extend(len(input_ids)), self.device)
        x, after = self._embedded(input_ids), []
        states: tuple[Any, ...] = state.layers
        for mamba, window, scanned, past in zip(
            self.mamba_layers, self.window_layers, states[:-1:2], states[1::2], strict=True
        ):
            mixed, scanned = mamba.mixer(mamba.normed(x), sequences, scanned, keep)
            x = mamba.add(x, mixed)
            mixed, past = window.mixer(window.normed(x), sequences, past, keep)
            x = window.add(x, mixed)
            after += [scanned, past]
        layer = self.memory_layer
        mixed, memory, scanned = layer.mixer.remember(layer.normed(x), sequences, states[-1], keep)
        x = layer.add(x, mixed)
        after.append(scanned)
        keys, values = self.cache_layer.mixer.keys_values(self.cache_layer.normed(x))
        store_keys_values(keys, values, None, cache.keys, cache.values, slots)
        return (x, memory), SelfState(sequences.ends, tuple(after)) if keep else None

    def prefill(self, input_ids: Tensor, cache: Cache, asked: bool = True) -> Rows:
        """Feeds tokens [T] of the cache's text, keeping their state."""
        sequences = Sequences((len(input_ids),), (cache.state.length,), input_ids.device)
        rows, state = self.feed(input_ids, sequences, cache.state, cache)
        assert state is not None
        cache.state = state
        return rows

    def predict(self, rows: Rows, positions: Tensor, cache: Cache, spans: Spans) -> Tensor:
        """Runs some cached tokens through the layers behind M.

        Args:
            rows: of these T tokens. Their memory may be used for something else.
            positions: of no interest.
            cache: whose keys and values they read.
            spans: which of them.

        Returns:
            The normalised output [T, hidden_size], of which `logits` makes predictions.
        """
        scale = self.cache_layer.mixer.scale

        def attend(q: Tensor) -> Tensor:
            return cache_attention(q, cache.keys, cache.values, spans, scale=scale)

        return self.final_layernorm(self._cross_decoded(*rows, attend))

    def logits(self, output: Tensor) -> Tensor:
        """[T, vocab_size]"""
        return F.linear(output, self.embed_tokens.weight)

    def decoder(self, cache: Cache, size: int = 1, room: int | None = None) -> Decoder[SelfState]:
        """Decodes up to `size` texts side by side, whose keys and values are in the cache."""
        pairs = zip(self.mamba_layers, self.window_layers, strict=True)
        mixers: list[Any] = [layer.mixer for pair in pairs for layer in pair]
        mixers.append(self.memory_layer.mixer)
        memory = [mixer.memory(size, self.device, self.dtype) for mixer in mixers]

        def begin(rows: Tensor, state: SelfState, sources: Sequence[int]) -> None:
            index = to_device(torch.tensor(sources), self.device)
            lengths = [state.lengths[source] for source in sources]
            for mixer, part, layer in zip(mixers, memory, state.layers, strict=True):
                mixer.begin(part, rows, None if layer is None else take(layer, index), lengths)

        return Decoder(
            partial(self._step, cache=cache),
            begin,
            memory,
            cache,
            size,
            room,
            self.device,
            self.dtype,
            graph=use_triton(cache.keys, self.embed_tokens.weight),
        )

    def _step(self, tokens: Tensor, step: Step, memory: list[Any], cache: Cache) -> Tensor:
        """Logits [B, vocab_size] after tokens [B]."""
        x = self._embedded(tokens)
        for mamba, window, scanned, rings in zip(
            self.mamba_layers, self.window_layers, memory[:-1:2], memory[1::2], strict=True
        ):
            x = mamba.add(x, mamba.mixer.step(mamba.normed(x), scanned))
            x = window.add(x, window.mixer.step(window.normed(x), rings, step.positions))
        layer = self.memory_layer
        mixed, remembered = layer.mixer.remember_step(layer.normed(x), memory[-1])
        x = layer.add(x, mixed)
        keys, values = self.cache_layer.mixer.keys_values(self.cache_layer.normed(x))
        store_keys_values(keys, values, None, cache.keys, cache.values, step.slots)
        scale = self.cache_layer.mixer.scale

        def attend(q: Tensor) -> Tensor:
            return batch_attention(
                q, cache.keys, cache.values, step.positions, step.readings, scale=scale
            )

        return self.logits(self.final_layernorm(self._cross_decoded(x, remembered, attend)))

    def _embedded(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids).to(torch.promote_types(self.dtype, torch.float32))

    def _cross_decoded(self, x: Tensor, memory: Tensor, attend: Attend) -> Tensor:
        """Layers M + 1 and on, in x's memory."""
        layer = self.cache_layer
        x = layer.add(x, layer.mixer(layer.normed(x), attend))
        for unit, cross in zip(self.unit_layers, self.cross_layers, strict=True):
            x = unit.add(x, unit.mixer(unit.normed(x), memory))
            x = cross.add(x, cross.mixer(cross.normed(x), attend))
        return x
