"""Keys and values that several layers share, as Gemma 3n and Gemma 4 have them.

Layers are of two kinds, with full attention and with sliding windows. The first of them own keys
and values. The others share those of a source, which is the last owning layer of their kind; they
make queries alone. The last owning layer is one with full attention, and it is the exit: of a token
whose prediction nobody asks for, that layer's keys and values are needed, and nothing behind them.

What is remembered of a text: keys and values of the owning layers with full attention and of the
sliding source, for all tokens, in the cache; those in reach of the next token, of each owning layer
with a window, in the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from yoco_eval.kernels.attention import (
    batch_attention,
    cache_attention,
    ring_attention,
    rings_from_past,
    sliding_window_attention,
    window_step,
)
from yoco_eval.kernels.cache_writes import store_keys_values
from yoco_eval.kernels.dispatch import triton_takes
from yoco_eval.kernels.rotary import Angles
from yoco_eval.kernels.sequences import Sequences, Spans, Step, to_device
from yoco_eval.printable import shown

from .cache import KeyValueCache, slots_of
from .checks import check_count
from .decoder import Decoder
from .places import Places
from .rotary import Rotary

FULL, SLIDING = "full_attention", "sliding_attention"  # as configuration files call the kinds
_SCALE = 1.0  # of scores: the norms of queries and keys have weights

Rings = list[tuple[Tensor, Tensor]]


def check_layers(layer_types: Any, layers: int, shared: Any) -> None:
    """Refuses layers, the last `shared` of which share, that are not as described above.

    Raises:
        ValueError: naming the setting.
    """
    if not isinstance(layer_types, list | tuple) or len(layer_types) != layers:
        raise ValueError(f"layer_types {shown(layer_types)} is no list of {layers} layers' kinds")
    for kind in layer_types:
        if kind not in (FULL, SLIDING):
            raise ValueError(f"layer_types names {shown(kind)}, neither {FULL!r} nor {SLIDING!r}")
    if shared == 0:
        raise ValueError(
            "num_kv_shared_layers = 0: all layers own keys and values, so that no token could "
            "leave early; evaluate this model with --model hf"
        )
    check_count("num_kv_shared_layers", shared, layers - 1)
    owning = layer_types[: layers - shared]
    for kind in (FULL, SLIDING):
        if kind not in owning:
            raise ValueError(
                f"layer_types has no {kind} among the {len(owning)} layers that own keys and values"
            )
    if owning[-1] != FULL:
        raise ValueError(
            f"layer_types has {owning[-1]} for the last layer that owns keys and values; only "
            f"{FULL} is supported there"
        )


@dataclass(frozen=True)
class Heads:
    """Of the layers of one kind: heads of keys and values, channels of each, rotary embedding."""

    count: int
    dim: int
    rotary: Rotary

    @property
    def numbers(self) -> int:
        """Of a token's keys and values in a layer."""
        return 2 * self.count * self.dim


@dataclass(frozen=True)
class Layout:
    """Which layers own keys and values, and of what shape these are.

    Attributes:
        kinds: of all layers, as `check_layers` takes them.
        shared: how many of them, the last ones, share.
        window: what a token sees in layers with windows, in tokens, its own included.
        full, sliding: heads of the two kinds.
    """

    kinds: tuple[str, ...]
    shared: int
    window: int
    full: Heads
    sliding: Heads

    @property
    def exit(self) -> int:
        """The last layer that owns keys and values."""
        return len(self.kinds) - self.shared - 1

    def heads(self, layer: int) -> Heads:
        return self.sliding if self.kinds[layer] == SLIDING else self.full

    def index(self, layer: int) -> int:
        """Of the layer, or of its source, among the owning ones of its kind."""
        return self.owning(self.kinds[layer], layer) - 1

    def owning(self, kind: str, last: int | None = None) -> int:
        """How many layers of a kind own keys and values, of those up to `last`."""
        return self.kinds[: 1 + min(self.exit, self.exit if last is None else last)].count(kind)

    def is_source(self, layer: int) -> bool:
        """Of an owning layer with windows: whether it is the last one."""
        return self.index(layer) == self.owning(SLIDING) - 1

    def pairs(self, layer: int, length: int) -> int:
        """Of queries and keys that meet in a layer, each of `length` tokens with those it sees."""
        seen = min(length, self.window) if self.kinds[layer] == SLIDING else length
        return seen * (seen + 1) // 2 + (length - seen) * seen

    def cache_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Of the cache of `length` tokens."""
        numbers = self.owning(FULL) * self.full.numbers + self.sliding.numbers
        return numbers * length * dtype.itemsize

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Of the windows of one text."""
        window = self.sliding.numbers * (self.window - 1)
        return self.owning(SLIDING) * window * dtype.itemsize

    def passing_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Of each text, while it is fed: a layer's window before it, and the two together, in
        several orders."""
        window = self.sliding.numbers * self.window * dtype.itemsize
        return (4 if triton_takes(device, dtype) else 10) * window

    def read_bytes(self, dtype: torch.dtype, length: int) -> int:
        """Of keys and values that all layers read for a token after `length` tokens."""
        full = self.kinds.count(FULL) * self.full.numbers * length
        windows = self.kinds.count(SLIDING) * self.sliding.numbers * min(length, self.window)
        return (full + windows) * dtype.itemsize


@dataclass(frozen=True)
class SharedState:
    """Of n texts: where their tokens lie in the cache, and of each owning layer with windows, the
    keys and values of the last tokens, [n, 2, window - 1, heads, channels] as
    `sliding_window_attention` has them; None before the first token."""

    places: Places
    windows: tuple[Tensor | None, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.places.lengths

    @property
    def length(self) -> int:
        return self.places.length


class SharedCache(KeyValueCache[SharedState]):
    """Room for the keys and values of tokens.

    Attributes:
        keys, values: of the owning layers with full attention, [layers, heads, capacity, channels].
        window_keys, window_values: of the sliding source, [heads, capacity, channels]; all keys
            are rotated.
    """

    def __init__(
        self, layout: Layout, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        initial = SharedState(Places((0,), ((),)), (None,) * layout.owning(SLIDING))
        full, sliding = layout.full, layout.sliding
        whole = (layout.owning(FULL), full.count, capacity, full.dim)
        super().__init__(whole, initial, dtype, device)
        source = (sliding.count, capacity, sliding.dim)
        self.window_keys = torch.empty(source, dtype=dtype, device=device)
        self.window_values = torch.empty(source, dtype=dtype, device=device)

    def fill_with_noise(self) -> None:
        super().fill_with_noise()
        self.window_keys.normal_()
        self.window_values.normal_()


class Feeding:
    """Attention of the owning layers, one after the other, while packed tokens [T] are fed.

    Args:
        cache: to which their keys and values are added.
        state: of the texts that the sequences continue.
        keep: whether the state after them is asked for.

    Raises:
        ValueError: the cache has no room for them.
    """

    def __init__(
        self,
        layout: Layout,
        cache: SharedCache,
        state: SharedState,
        sequences: Sequences,
        keep: bool,
    ) -> None:
        self._layout, self._cache, self._state = layout, cache, state
        self._sequences, self._keep = sequences, keep
        stretches = cache.extend(sequences.total)
        self._slots = slots_of(stretches, sequences.device)
        self._places = state.places.after(sequences, stretches)
        self._spans = self._places.readings(sequences)
        self._windows: list[Tensor | None] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, query heads, channels], k and v [T, heads, channels], not rotated, to outputs like
        q."""
        layout, cache = self._layout, self._cache
        angles = self._angles(layer, q)
        if layout.kinds[layer] == SLIDING:
            if layout.is_source(layer):
                keys, values = cache.window_keys, cache.window_values
                store_keys_values(k, v, angles, keys, values, self._slots)
            past = self._state.windows[layout.index(layer)]
            out, window = sliding_window_attention(
                q, k, v, layout.window, self._sequences, past, angles, self._keep, scale=_SCALE
            )
            self._windows.append(window)
            return out
        self.store(layer, k, v)
        i = layout.index(layer)
        return cache_attention(q, cache.keys[i], cache.values[i], self._spans, angles, scale=_SCALE)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Of a layer with full attention: all that has to be done for tokens that exit there."""
        i = self._layout.index(layer)
        keys, values = self._cache.keys[i], self._cache.values[i]
        store_keys_values(k, v, self._angles(layer, k), keys, values, self._slots)

    def after(self) -> SharedState | None:
        """The state after all sequences, once all layers are through."""
        return SharedState(self._places, tuple(self._windows)) if self._keep else None

    def _angles(self, layer: int, x: Tensor) -> Angles:
        return self._layout.heads(layer).rotary.of(self._sequences, x.dtype)


class Predicting:
    """Attention of the exit and of the layers that share, for tokens whose keys are in the cache.

    Args:
        positions: int64 [T], of the tokens in their texts.
        spans: which part of the cache each reads.
    """

    def __init__(self, layout: Layout, cache: SharedCache, positions: Tensor, spans: Spans) -> None:
        self._layout, self._cache, self._spans = layout, cache, spans
        self._angles = {
            kind: heads.rotary.at(positions, cache.keys.dtype)
            for kind, heads in ((FULL, layout.full), (SLIDING, layout.sliding))
        }

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [T, query heads, channels], not rotated, to outputs like it."""
        layout, cache, kind = self._layout, self._cache, self._layout.kinds[layer]
        if kind == SLIDING:
            keys, values, window = cache.window_keys, cache.window_values, layout.window
        else:
            i = layout.index(layer)
            keys, values, window = cache.keys[i], cache.values[i], None
        return cache_attention(
            q, keys, values, self._spans, self._angles[kind], scale=_SCALE, window=window
        )


class Decoding:
    """Attention of all layers for one token of each of B texts, in a CUDA graph if need be.

    Args:
        rings: with B rows, as `_new_rings` makes them.
    """

    def __init__(self, layout: Layout, cache: SharedCache, rings: Rings, step: Step) -> None:
        self._layout, self._cache, self._rings, self._step = layout, cache, rings, step

    def attend(
        self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None
    ) -> Tensor:
        """q [B, query heads, channels], and of owning layers k and v [B, heads, channels], not
        rotated, to outputs like q."""
        layout, step, i = self._layout, self._step, self._layout.index(layer)
        angles = layout.heads(layer).rotary.of(step, q.dtype)
        if layout.kinds[layer] == SLIDING:
            ring = self._rings[i]
            if k is None or v is None:
                return ring_attention(q, *ring, step.positions, angles, scale=_SCALE)
            return window_step(q, k, v, *ring, step.positions, angles, scale=_SCALE)
        keys, values = self._cache.keys[i], self._cache.values[i]
        if k is not None and v is not None:
            store_keys_values(k, v, angles, keys, values, step.slots)
        return batch_attention(q, keys, values, step.positions, step.readings, angles, scale=_SCALE)


def new_decoder(
    layout: Layout,
    step: Callable[..., Tensor],
    cache: SharedCache,
    size: int,
    room: int | None,
    graph: bool,
) -> Decoder[SharedState]:
    """Decodes up to `size` texts side by side, whose keys and values are in the cache.

    Args:
        step: takes tokens [B], the `Step`, rings with B rows and the cache to logits.
        room, graph: as `Decoder` takes them.
    """
    dtype, device = cache.keys.dtype, cache.keys.device
    rings = _new_rings(layout, size, dtype, device)
    step, begin = partial(step, cache=cache), partial(_begin_rings, rings)
    return Decoder(step, begin, rings, cache, size, room, device, dtype, graph)


def _new_rings(layout: Layout, size: int, dtype: torch.dtype, device: torch.device) -> Rings:
    """Of each owning layer with windows: what it sees of each text that is decoded, keys and values
    [size, heads, window, channels] each, as `window_step` has them."""
    shape = (size, layout.sliding.count, layout.window, layout.sliding.dim)

    def ring() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [(ring(), ring()) for _ in range(layout.owning(SLIDING))]


def _begin_rings(rings: Rings, rows: Tensor, state: SharedState, sources: Sequence[int]) -> None:
    """Sets rows (int64 [n], on the device) to texts of a state: row i to its text `sources[i]`."""
    index = to_device(torch.tensor(sources), rows.device)
    lengths = [state.lengths[source] for source in sources]
    for ring, window in zip(rings, state.windows, strict=True):
        if window is not None:  # else no slot is read before it is written
            whole = rings_from_past(window.index_select(0, index), lengths)
            for part, content in zip(ring, whole.unbind(1), strict=True):
                part.index_copy_(0, rows, content)
