"""How texts, or parts of texts, lie on one token axis, and which keys of a cache they read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .relay import Relay


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x, from the host, without waiting for what a GPU is doing."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Packing:
    """What all layers of a pass need to know of the sequences that it feeds, and tables made of it.

    One object serves all layers of a pass, so that tables on the device are made once.
    """

    _tables: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def table(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The table `key`, made by `make` when it is first asked for."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]


@dataclass(frozen=True, eq=False)
class Sequences(Packing):
    """Parts of texts packed one behind the other on the token axis of [T, ...] tensors.

    Attributes:
        lengths: tokens of each, at least 1; T is their sum.
        starts: position, in its text, of each one's first token.
        device: of the tensors.
        sources: of each, the index of the state that it continues among the states that are passed
            with it; several may continue the same. None: sequence i continues state i.
        relay: where the only sequence is one of a text's parts, which are with several processes.
            The state that is passed with it is that before the first part, and the state asked for
            is that after the last one.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    device: torch.device
    sources: tuple[int, ...] | None = None
    relay: Relay | None = None

    @cached_property
    def total(self) -> int:
        """T, the tokens of all sequences."""
        return sum(self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        """Of each, how many tokens of its text there are with it."""
        return tuple(map(sum, zip(self.starts, self.lengths, strict=True)))

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T], position of each token in its text."""
        if len(self.lengths) == 1:
            first = self.starts[0]
            return torch.arange(first, first + self.total, device=self.device)
        lengths = torch.tensor(self.lengths)
        before = lengths.cumsum(0) - lengths
        shift = (torch.tensor(self.starts) - before).repeat_interleave(lengths)
        return to_device(torch.arange(self.total) + shift, self.device)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Of each sequence, the index of its first token in [T]; and T."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return tuple(ends)


def in_batches(
    run: Callable[..., tuple[Tensor, Tensor]],
    sequences: Sequences,
    states: Tensor | None,
    inputs: Iterable[Tensor],
) -> tuple[Tensor, Tensor]:
    """Runs what takes batches of sequences of one length over sequences of any lengths.

    Args:
        run: takes the states [n, ...] that n sequences continue, or None, and their inputs
            [n, T, ...]; returns their outputs [n, T, ...] and the states after them [n, ...].
        states: [m, ...], of which `sequences.sources` picks each sequence's; None stands for none.
        inputs: [T, ...] each, packed.

    Returns:
        The outputs [T, ...], and the states after the sequences [n, ...].
    """
    inputs = list(inputs)
    if states is not None and sequences.sources is not None:
        states = states[list(sequences.sources)]
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(sequences.lengths):
        by_length.setdefault(length, []).append(i)
    if len(by_length) == 1:  # one sequence, or n equal ones, are the common cases
        out, last = run(states, *(x.unflatten(0, (len(sequences.lengths), -1)) for x in inputs))
        return out.flatten(0, 1), last
    tokens, outputs, lasts, members = [], [], [], []
    offsets = torch.tensor(sequences.offsets[:-1], device=inputs[0].device)
    for length, group in by_length.items():
        rows = offsets[group][:, None] + torch.arange(length, device=offsets.device)
        starts = None if states is None else states[group]
        out, last = run(starts, *(x[rows] for x in inputs))
        tokens.append(rows.flatten())
        outputs.append(out.flatten(0, 1))
        lasts.append(last)
        members += group
    order = torch.tensor(members).argsort().to(offsets.device)
    return torch.cat(outputs)[torch.cat(tokens).argsort()], torch.cat(lasts)[order]


class Span(NamedTuple):
    """Queries `first_query` .. `end_query` - 1 read keys `first_key` .. `end_key` - 1.

    All of them, or where `causal`: the last query reads up to the last key, the one before it up to
    the last but one, and so on; there are at least as many keys as queries, then.

    `start` is the position in its text of the first key's token. It is asked for where a window
    limits what is read; and where a text is decoded, a query of a span that says it reads the keys
    of the tokens up to its own position, which only the device knows.
    """

    first_query: int
    end_query: int
    first_key: int
    end_key: int
    causal: bool
    start: int | None = None


@dataclass(frozen=True, eq=False)
class Spans(Packing):
    """Which keys of a cache each of T queries reads: those of all the spans that it lies in.

    The spans of a query do not overlap, and every query lies in one at least.
    """

    spans: tuple[Span, ...]


def query_runs(spans: Spans) -> list[tuple[int, int, list[Span]]]:
    """First and end of each maximal run of queries that lie in the same spans, and these spans."""
    return spans.table("query_runs", lambda: cells(spans.spans))


Interval = TypeVar("Interval", bound=tuple)


def cells(intervals: Iterable[Interval]) -> list[tuple[int, int, list[Interval]]]:
    """Cuts an axis wherever one of the intervals (first, end, ...) on it begins or ends.

    Returns:
        First and end of each piece, in order, and the intervals that it lies in.
    """
    beginning = defaultdict(list)
    bounds: set[int] = set()
    for interval in intervals:
        beginning[interval[0]].append(interval)
        bounds.update(interval[:2])
    pieces = []
    current: list[Interval] = []
    for first, end in pairwise(sorted(bounds)):
        current = [interval for interval in current if interval[1] > first] + beginning[first]
        pieces.append((first, end, current))
    return pieces


def cut_span(span: Span, first_query: int, end_query: int) -> Span:
    """The part of a span that some of its queries make, less the keys that none of them reads."""
    unread = span.end_query - end_query if span.causal else 0
    return span._replace(
        first_query=first_query, end_query=end_query, end_key=span.end_key - unread
    )


def window_shifts(spans: Sequence[Span]) -> list[int]:
    """Of each of the spans that a query lies in, `s` such that query t is at key t + s - 1 of it,
    or would be if the span went on.

    Raises:
        ValueError: not exactly one span is causal, or one does not say its `start`.
    """
    own = [span for span in spans if span.causal]
    starts = [span.start for span in spans if span.start is not None]
    if len(own) != 1 or len(starts) < len(spans):
        raise ValueError("a window needs spans that say their start, one of each query causal")
    start = starts[spans.index(own[0])]
    # Where in its text query t is, less t.
    position = start + own[0].end_key - own[0].first_key - own[0].end_query
    return [position + 1 + s.first_key - start for s, start in zip(spans, starts, strict=True)]


class DeviceTables(Protocol):
    """What kernels read of `Readings`, on the device.

    Attributes:
        layout: what a launch depends on, beside the tables' contents.
    """

    layout: Hashable

    def fill(self, order: Sequence[int], spans: Sequence[Span]) -> None:
        """Takes over what is read from now on."""


class Readings:
    """Which keys of a cache each of B texts reads while they are decoded token by token.

    All that read by it have the same shapes.

    Attributes:
        order: the texts' rows in [B, ...] tensors, in the order in which `spans` counts queries;
            what is read by rows that are not in it does not matter.
        spans: which keys each reads; none of them `causal`.
    """

    def __init__(self, order: Sequence[int] = (), spans: Sequence[Span] = ()) -> None:
        self.order, self.spans = order, spans
        self._tables: DeviceTables | None = None

    def set(self, order: Sequence[int], spans: Sequence[Span]) -> None:
        """Texts have come or gone. Tables stay where they are on the device if `layout` stays."""
        self.order, self.spans = order, spans
        if self._tables is not None:
            self._tables.fill(order, spans)

    def tables(self, make: Callable[[], Any]) -> Any:
        """The `DeviceTables`, made by `make` and filled when they are first asked for."""
        if self._tables is None:
            self._tables = make()
            self._tables.fill(self.order, self.spans)
        return self._tables

    @property
    def layout(self) -> Hashable:
        """A CUDA graph that reads the tables can be replayed as long as this is what it was."""
        return None if self._tables is None else self._tables.layout


@dataclass(frozen=True, eq=False)
class Step(Packing):
    """One token of each of B texts, as decoding feeds them; a CUDA graph's replays find other ones.

    Attributes:
        positions: int64 [B], of each token in its text, on the device.
        slots: int64 [B], where in the cache its keys and values go.
        readings: which keys of the cache it reads, its own among them.
    """

    positions: Tensor
    slots: Tensor
    readings: Readings
