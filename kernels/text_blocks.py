"""Where in a cache the blocks of texts lie, of which queries read some: see `sparse_attention`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sequences import Readings, Span, Spans, query_runs, to_device

BLOCK = 64  # tokens
ALWAYS = 3  # blocks that are read whatever they score: the first and the two last
SCORED = 1 << 25  # scores of blocks that kernels make at a time


@dataclass(frozen=True, eq=False)
class Texts:
    """Where the texts of T queries lie.

    Attributes:
        places: int32 [n, W], of each of n texts the blocks of the cache that its own are, in order,
            and anything from 0 on behind.
        numbers: int32 [T], of each query, which of the n texts it belongs to. Those of a text are
            neighbours.
        positions: int64 [T], of the queries in their texts.
        runs: of each text's queries, the first and their end; None: query i is the only one of text
            i, as where texts are decoded.
    """

    places: Tensor
    numbers: Tensor
    positions: Tensor
    runs: tuple[tuple[int, int], ...] | None


def block_ends(first: int, end: int) -> np.ndarray:
    """The last slots of the blocks of a cache that are full once slots `first` .. `end` - 1 are."""
    return np.arange(first // BLOCK * BLOCK + BLOCK - 1, end, BLOCK)


def texts_of(spans: Spans, positions: Tensor) -> Texts:
    """Of queries that are predicted.

    Args:
        spans: which keys each reads, all of its text. Each says its `start`.
        positions: int64 [T].

    Raises:
        ValueError: a span does not begin with a block.
    """

    def tables() -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
        runs = query_runs(spans)
        places = _places([members for *_, members in runs])
        numbers = np.repeat(np.arange(len(runs), dtype=np.int32), [end - i for i, end, _ in runs])
        on_device = [to_device(torch.from_numpy(x), positions.device) for x in (places, numbers)]
        return on_device[0], on_device[1], tuple((first, end) for first, end, _ in runs)

    places, numbers, runs = spans.table("sparse", tables)
    return Texts(places, numbers, positions, runs)


def _places(texts: list[list[Span]]) -> np.ndarray:
    """int32 [n, W], as `Texts` has them, of the spans that each text reads."""
    found = []
    for spans in texts:
        for first, end, start in ((s.first_key, s.end_key, s.start) for s in spans):
            if start is None or start % BLOCK or first % BLOCK:
                raise ValueError(f"the span from {start}, at slot {first}, begins with no block")
            found.append((start // BLOCK, first // BLOCK, -(-(end - first) // BLOCK)))
    places = np.zeros((len(texts), max(b + count for b, _, count in found)), dtype=np.int32)
    row = iter(found)
    for own, spans in zip(places, texts, strict=True):
        for _ in spans:
            block, place, count = next(row)
            own[block : block + count] = np.arange(place, place + count)
    return places


class ReadingsTables:
    """`Texts` of `Readings`, in memory that stays where it is as long as they have room in it.

    Attributes:
        places, numbers: as `Texts` has them, of a text for each row.
        layout: their shape.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.layout = 0, 0
        self.places: Tensor
        self.numbers: Tensor

    def fill(self, order: list[int], spans: list[Span]) -> None:
        texts: list[list[Span]] = [[] for _ in order]
        for span in spans:
            for query in range(span.first_query, span.end_query):
                texts[query].append(span)
        found = _places(texts)
        # Few layouts, each of which takes graphs of its own, should occur.
        (rows, width), count = self.layout, found.shape[1]
        rows = max(rows, _roomy(1 + max(order), 1))
        if not count <= width <= 2 * count:
            width = _roomy(count, 8)
        self.layout = rows, width
        if self.layout not in self._made:
            places = torch.zeros(rows, width, dtype=torch.int32, device=self._device)
            numbers = torch.arange(rows, dtype=torch.int32, device=self._device)
            self._made[self.layout] = places, numbers
        self.places, self.numbers = self._made[self.layout]
        filled = np.zeros((rows, width), dtype=np.int32)
        filled[list(order), :count] = found
        self.places.copy_(to_device(torch.from_numpy(filled), self._device))


def _roomy(number: int, steps: int) -> int:
    """The next of so many numbers between two powers of two that is not below."""
    unit = max(1, (1 << (number - 1).bit_length()) // (2 * steps))
    return -(-number // unit) * unit


def texts_of_rows(readings: Readings, positions: Tensor) -> Texts:
    """Of texts that are decoded, a query of each row; in a CUDA graph if need be.

    Args:
        readings: which keys each reads; all spans say their `start`.
        positions: int64 [B].

    Raises:
        ValueError: as `texts_of`.
    """
    tables = readings.tables(lambda: ReadingsTables(positions.device))
    return Texts(tables.places, tables.numbers[: len(positions)], positions, None)
