"""YOCO's cache: the keys and values that all layers of the cross-decoder read.

A group of processes holds it together: its slots are dealt out to them as `Stripes` says, and each
has the keys and values of its own. What is asked of it speaks of the slots of the whole all the
same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from yoco_eval.kernels.attention import batch_attention, cache_attention
from yoco_eval.kernels.cache_writes import store_keys_values
from yoco_eval.kernels.eight_bits import EightBits, Held
from yoco_eval.kernels.group import Group
from yoco_eval.kernels.relay import Relay
from yoco_eval.kernels.rotary import Angles, rotate
from yoco_eval.kernels.sequences import Spans, Step, to_device
from yoco_eval.kernels.striped_attention import striped_batch_attention, striped_cache_attention
from yoco_eval.kernels.stripes import Stripes

from .cache import SelfState, SlotCache, slots_of
from .states import Stretches


class YocoCache(SlotCache[SelfState]):
    """Room for the keys and values of tokens.

    Args:
        shape: of the keys and of the values, [heads, capacity, head_dim].
        state: before the text's first token.
        dtype: of the model.
        group: of processes that hold it together; None: this one does alone.
        eight_bits: whether keys and values are held in eight bits, in place of `dtype`.

    Attributes:
        keys, values: of that shape, keys rotated.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        state: SelfState,
        dtype: torch.dtype,
        device: torch.device,
        group: Group | None = None,
        eight_bits: bool = False,
    ) -> None:
        heads, capacity, dim = shape
        super().__init__(capacity, state)
        if group is not None:
            # The last one is for what is not this process's to keep.
            shape = heads, group.stripes.capacity(capacity) + 1, dim
        self.keys: Held
        self.values: Held
        if eight_bits:
            self.keys, self.values = EightBits.pair(shape, device)
        else:
            self.keys, self.values = (
                torch.empty(shape, dtype=dtype, device=device) for _ in range(2)
            )
        self._group = group

    def fill_with_noise(self) -> None:
        """Writes random numbers to all slots."""
        self.keys.normal_()
        self.values.normal_()

    def store(
        self,
        keys: Tensor,
        values: Tensor,
        angles: Angles,
        stretches: Stretches,
        relay: Relay | None = None,
    ) -> None:
        """Keeps keys, which angles rotate first, and values [T, heads, head_dim] of tokens.

        Args:
            stretches: their slots.
            relay: where these tokens are this process's part of some; then the slots are those of
                all parts' tokens, in order.
        """
        device = keys.device
        if self._group is None:
            slots = slots_of(stretches, device)
            store_keys_values(keys, values, angles, self.keys, self.values, slots)
            return
        stripes = self._group.stripes
        every = np.concatenate([np.arange(*stretch) for stretch in stretches])
        owners = stripes.owners(every)
        own = np.flatnonzero(owners == stripes.rank)
        places = to_device(torch.from_numpy(stripes.places(every[own])), device)
        if relay is None:
            index = to_device(torch.from_numpy(own), device)
            keys, values, angles = keys[index], values[index], (angles[0][index], angles[1][index])
            rotated: Angles | None = angles
        else:
            if isinstance(self.keys, EightBits):  # to which they are rounded at once
                wide = torch.promote_types(keys.dtype, torch.float32)
                keys, values = keys.to(wide), values.to(wide)
                angles = angles[0].to(wide), angles[1].to(wide)
            keys, values = self._dealt(rotate(keys, angles), values, owners, relay, stripes)
            rotated = None
        if len(own):
            store_keys_values(keys, values, rotated, self.keys, self.values, places)

    def _dealt(
        self, keys: Tensor, values: Tensor, owners: np.ndarray, relay: Relay, stripes: Stripes
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of this process's slots, of the parts' tokens that have them in
        order, for those of this process's part."""
        assert self._group is not None
        here = owners[relay.own]
        sent = np.bincount(here, minlength=stripes.size).tolist()
        parts = np.split(owners, np.cumsum(relay.lengths)[:-1])
        received = [int((part == stripes.rank).sum()) for part in parts]
        order = to_device(torch.from_numpy(np.argsort(here, kind="stable")), keys.device)
        rows = torch.stack((keys, values), 1).index_select(0, order)
        new_keys, new_values = self._group.exchange(rows, sent, received).unbind(1)
        return new_keys, new_values

    def store_step(self, keys: Tensor, values: Tensor, angles: Angles, step: Step) -> None:
        """Keeps what one token of each of B texts has, [B, heads, head_dim]; in a CUDA graph if
        need be."""
        slots = step.slots
        if self._group is not None:
            slots = self._group.stripes.places_or(slots, self.keys.shape[1] - 1)
        store_keys_values(keys, values, angles, self.keys, self.values, slots)

    def attention(
        self, spans: Spans, positions: Tensor, angles: Angles
    ) -> Callable[[Tensor], Tensor]:
        """What takes queries [T, Hq, head_dim] of a layer to its outputs of that shape.

        Args:
            spans: which keys each reads.
            positions: int64 [T], of the queries in their texts.
            angles: by which they are rotated.
        """
        group = self._group
        if group is None:
            return lambda q: cache_attention(q, self.keys, self.values, spans, angles)
        return lambda q: striped_cache_attention(q, self.keys, self.values, spans, group, angles)

    def step_attention(self, step: Step, angles: Angles) -> Callable[[Tensor], Tensor]:
        """`attention` of one token of each of B texts; in a CUDA graph if need be."""
        keys, values, group = self.keys, self.values, self._group
        positions, readings = step.positions, step.readings
        if group is None:
            return lambda q: batch_attention(q, keys, values, positions, readings, angles)
        return lambda q: striped_batch_attention(
            q, keys, values, positions, readings, group, angles
        )
