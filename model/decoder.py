"""Decoding texts side by side, token by token, on a GPU as replays of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from yoco_eval.kernels.group import Group
from yoco_eval.kernels.sequences import Readings, Span, Step, to_device

from .states import Cache, S

# Rows that a graph runs: the next of these numbers, so that few graphs serve all.
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Decoder(Generic[S]):
    """Feeds one token after the other to each of up to `size` texts, whose memory stays in place.

    A text has a row from `join` until `leave`. Its tokens' keys and values go to slots of a cache
    that were given to it; which slots it reads is told by `read`. What happens to a row without a
    text does not matter: it writes to the cache's last slot, which is nobody's if there are several
    rows.

    Make it, and call it, under one setting of `torch.inference_mode` or `torch.no_grad`: what was
    made under the former cannot be written to outside of it. A graph reads the weights where they
    lie when it is captured; after replacing or moving them, make another decoder.

    Args:
        step: feeds tokens [B] (int64, on the device) as a `Step` says, to the first B rows of the
            memory, and returns the logits [B, vocab_size] of the next ones.
        begin: sets rows (int64 [n], on the device) of the memory to texts of a state: row i to its
            text `sources[i]`.
        memory: tensors with `size` rows, in whatever tuples and lists; the model's business.
        cache: the cache that `step` writes to and reads.
        size: of the memory.
        room: how many tokens a text may decode at most; None: all that the cache has room for.
        device, dtype: of the model.
        graph: whether to replay steps as CUDA graphs. For a `step` that launches the same work
            every time and reads nothing back to the host.
        group: of processes that decode the same texts together; None: this one is alone.

    Attributes:
        tokens: int64 [size], that the next step feeds. A step leaves the likeliest next tokens
            there; write others to decode otherwise.
        highest: [size], the largest logit of each row's last step.
        logits: [B, vocab_size], of the last step; the next one overwrites them.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Step, Any], Tensor],
        begin: Callable[[Tensor, S, Sequence[int]], None],
        memory: Any,
        cache: Cache[S],
        size: int,
        room: int | None,
        device: torch.device,
        dtype: torch.dtype,
        graph: bool,
        group: Group | None = None,
    ) -> None:
        self._step, self._begin, self._memory, self._cache = step, begin, memory, cache
        self._device = device
        self.size, self._graph, self._group = size, graph, group
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.highest = torch.zeros(size, dtype=dtype, device=device)
        self.logits: Tensor
        # Positions of each row's next token, of its first one, and of its last one.
        self._places = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._slots = torch.full((size, room or cache.capacity), cache.capacity - 1, device=device)
        self._readings = Readings()
        self._left: int | None = None
        # By rows and layout; None: a step has been taken, as has to be before one is captured.
        self._graphs: dict[Any, torch.cuda.CUDAGraph | None] = {}
        self._held: Tensor | None = None  # logits that graphs leave, for all rows
        if graph:
            self._pool = torch.cuda.graph_pool_handle()

    def join(
        self,
        rows: Sequence[int],
        state: S,
        sources: Sequence[int],
        tokens: Sequence[int],
        slots: Sequence[np.ndarray],
    ) -> None:
        """Texts enter rows.

        Args:
            state: of texts, which are continued, each by as many as like.
            sources: of each row, which text of the state it continues.
            tokens: of each, the token that is fed first.
            slots: of each, int64 [n], where the keys and values of its next n tokens go. Further
                ones overwrite the last.
        """
        index = self._on_device(rows)
        self._begin(index, state, sources)
        lengths = [state.lengths[source] for source in sources]
        width = max(map(len, slots))
        told = np.zeros((len(rows), 4 + width), dtype=np.int64)
        for row, token, length, own in zip(told, tokens, lengths, slots, strict=True):
            row[:4] = token, length, length, length + len(own) - 1
            row[4 : 4 + len(own)] = own
        table = to_device(torch.from_numpy(told), self._device)
        self.tokens.index_copy_(0, index, table[:, 0])
        self._places.index_copy_(1, index, table[:, 1:4].T)
        self._slots[:, :width].index_copy_(0, index, table[:, 4:])

    def leave(self, rows: Sequence[int]) -> None:
        """The texts in rows are done with; their slots of the cache may be given to others."""
        index = self._on_device(rows)
        self._places.index_fill_(1, index, 0)
        self._slots.index_fill_(0, index, self._cache.capacity - 1)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Texts go to other rows, none of which is a source, and leave theirs."""
        taken, given = self._on_device(sources), self._on_device(targets)
        places = (self.tokens, self.highest, *self._places, self._slots)
        for part in (*places, *_tensors(self._memory)):
            part.index_copy_(0, given, part.index_select(0, taken))
        self.leave(sources)

    def read(self, order: Sequence[int], spans: Sequence[Span]) -> None:
        """Which slots of the cache are read from now on, as `Readings` has it."""
        self._readings.set(order, spans)

    def start(self, token: int) -> None:
        """The text in the cache, filled from the front, enters row 0 alone; `token` is fed first.

        Raises:
            ValueError: the cache is full.
        """
        length, capacity = self._cache.state.length, self._cache.capacity
        self._left = min(capacity - length, self._slots.shape[1])
        self._check_room()
        slots = np.arange(length, length + self._left)
        self.join([0], self._cache.state, [0], [token], [slots])
        self.read([0], [Span(0, 1, 0, capacity, causal=False, start=0)])

    def step(self, count: int = 1) -> None:
        """Feeds `tokens` of the first `count` rows.

        Raises:
            ValueError: there is no slot left for a text that has the cache alone.
        """
        if self._left is not None:
            self._check_room()
            self._left -= 1
        if not self._graph:
            self._advance(count)
            return
        rows = min(self.size, next((n for n in _ROWS if n >= count), self.size))
        key = rows, self._readings.layout
        if key not in self._graphs:
            # The first time, kernels are compiled and tables made; there is no need to do it twice.
            self._advance(rows)
            self._graphs.setdefault((rows, self._readings.layout), None)
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(rows)
        graph.replay()
        assert self._held is not None
        self.logits = self._held[:rows]

    def agree(self, count: int = 1) -> None:
        """Has all processes of the group go on with the first one's `tokens` of the first `count`
        rows. It is for tokens that were written there: those of a step are everybody's already."""
        if self._group is not None:
            self._group.share(self.tokens[:count], 0)

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        """Records a step without taking it.

        `torch.cuda.graph` would empty PyTorch's cache of memory each time, which takes longer.
        """
        if not any(self._graphs.values()):
            # During a capture, PyTorch cannot give cached memory back to take it anew.
            torch.cuda.empty_cache()
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self._device)
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # NCCL's own thread may ask the device something meanwhile.
            mode = "global" if self._group is None else "thread_local"
            graph.capture_begin(pool=self._pool, capture_error_mode=mode)
            try:
                self._advance(rows)
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph

    def _check_room(self) -> None:
        if not self._left:
            capacity = self._cache.capacity
            raise ValueError(f"the cache has room for {capacity} tokens, not for one more")

    def _advance(self, rows: int) -> None:
        position, first, last = self._places[:, :rows]
        slots = self._slots[:rows].gather(1, (position - first)[:, None])[:, 0]
        step = Step(position, slots, self._readings)
        memory = _first_rows(self._memory, rows)
        self.logits = self._step(self.tokens[:rows], step, memory)
        if self._graph:
            # Else each graph would keep memory of its own for them.
            if self._held is None:
                self._held = self.logits.new_empty(self.size, self.logits.shape[1])
            self.logits = self._held[:rows].copy_(self.logits)
        torch.amax(self.logits, -1, out=self.highest[:rows])
        torch.argmax(self.logits, -1, out=self.tokens[:rows])
        position.copy_(torch.minimum(position + 1, last))

    def _on_device(self, rows: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(rows, dtype=torch.int64), self._device)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, since PyTorch's matrix library keeps memory for each stream."""
    return torch.cuda.Stream(device)


def _tensors(memory: Any) -> Iterator[Tensor]:
    """All tensors in tuples and lists of them."""
    if isinstance(memory, Tensor):
        yield memory
    else:
        for part in memory:
            yield from _tensors(part)


def _first_rows(memory: Any, rows: int) -> Any:
    """Views of the first rows of all tensors, in the same tuples and lists."""
    if isinstance(memory, Tensor):
        return memory[:rows]
    return type(memory)(_first_rows(part, rows) for part in memory)
