"""YOCO's cache where each token reads but a few blocks of it: see `kernels.sparse_attention`.

The queries of the cross-decoder's first layer choose the blocks that all its layers read: they read
one cache, and one choice takes a fraction of the time of one for each. A choice for each layer does
with fewer blocks (on demo-1m, of 4 such layers, of 48 answers in texts of 32K tokens 37, 47, 48 and
48 are right with 1, 2, 4 and 8 blocks, in place of 13, 33, 42 and 48); but in a model of 13 such
layers, 13 choices from 1M tokens move more bytes than it takes to read what is chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from yoco_eval.kernels.relay import Relay
from yoco_eval.kernels.rotary import Angles
from yoco_eval.kernels.sequences import Spans, Step, to_device
from yoco_eval.kernels.sparse_attention import choose_blocks, listed_attention, summarise
from yoco_eval.kernels.text_blocks import BLOCK, Texts, block_ends, texts_of, texts_of_rows

from .cache import SelfState
from .states import Stretches
from .yoco_cache import YocoCache


class SparseCache(YocoCache):
    """Args: as `YocoCache`'s, and `most`, blocks that a token chooses.

    Texts have to be stored in whole blocks, as `interface.Model.block` says. Summaries are of the
    keys as they are read, in the model's dtype.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        state: SelfState,
        dtype: torch.dtype,
        device: torch.device,
        most: int,
        eight_bits: bool = False,
    ) -> None:
        heads, capacity, dim = shape
        blocks = -(-capacity // BLOCK)
        shape = heads, blocks * BLOCK, dim
        super().__init__(shape, state, dtype, device, eight_bits=eight_bits)
        self.capacity, self.room = capacity, ((0, capacity),)
        self.most = most
        self.summaries = torch.empty(heads, blocks, 2, dim, dtype=dtype, device=device)

    def store(
        self,
        keys: Tensor,
        values: Tensor,
        angles: Angles,
        stretches: Stretches,
        relay: Relay | None = None,
    ) -> None:
        super().store(keys, values, angles, stretches, relay)
        self._summarise(stretches)

    def _summarise(self, stretches: Stretches) -> None:
        ends = np.concatenate([block_ends(*stretch) for stretch in stretches])
        if len(ends):
            slots = to_device(torch.from_numpy(ends), self.keys.device)
            summarise(self.keys, self.summaries, slots)

    def store_step(self, keys: Tensor, values: Tensor, angles: Angles, step: Step) -> None:
        super().store_step(keys, values, angles, step)
        summarise(self.keys, self.summaries, step.slots)

    def fill_with_noise(self) -> None:
        super().fill_with_noise()
        self._summarise(((0, self.keys.shape[1]),))

    def attention(
        self, spans: Spans, positions: Tensor, angles: Angles
    ) -> Callable[[Tensor], Tensor]:
        return _Attention(self, texts_of(spans, positions), angles)

    def step_attention(self, step: Step, angles: Angles) -> Callable[[Tensor], Tensor]:
        return _Attention(self, texts_of_rows(step.readings, step.positions), angles)


class _Attention:
    """Of all layers of a pass; the first one's queries choose."""

    def __init__(self, cache: SparseCache, texts: Texts, angles: Angles) -> None:
        self._cache, self._texts, self._angles = cache, texts, angles
        self._chosen: Tensor | None = None

    def __call__(self, q: Tensor) -> Tensor:
        cache, texts, angles = self._cache, self._texts, self._angles
        if self._chosen is None:
            self._chosen = choose_blocks(q, cache.summaries, texts, cache.most, angles)
        return listed_attention(q, cache.keys, cache.values, self._chosen, texts.positions, angles)
