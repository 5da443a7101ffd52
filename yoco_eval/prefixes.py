"""Plans in which order to feed token sequences so that what they share is fed once.

The sequences' prefixes form a tree. It is walked from the front: what is small enough is fed whole,
as a packed batch of subtrees; of what is not, the shared tokens are fed first, and a snapshot after
them is where each branch resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

# Sharing fewer tokens than this does not pay for a branch of its own.
WORTHWHILE = 16
# Below so many branches on one path, branches close to each other, by this share of the longest
# sequence, are taken for one.
_DEPTH = 200
_SORTABLE = np.dtype(">u4")  # as bytes, these sort as the numbers do


@dataclass(frozen=True)
class Item:
    """A sequence to feed, on behalf of all requests that have it.

    `tokens` is int64 [n]; predictions are asked of the positions from `first` on, of all or some of
    them for each request. `requests` are the caller's indices.
    """

    tokens: np.ndarray
    first: int
    requests: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """Tokens to feed, leaves, and inner nodes."""

    tokens: int = 0
    leaves: int = 0
    inner: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.tokens + other.tokens, self.leaves + other.leaves, self.inner + other.inner
        )


@dataclass(frozen=True, eq=False)
class Node:
    """Tokens `start` .. `end` - 1 of `item`, and of all items below.

    A leaf holds the rest of its item, with all positions of which predictions are asked; an inner
    node has two children at least, and no such position.

    `size` is of this node and those below.
    """

    item: Item
    start: int
    end: int
    children: tuple[Node, ...]
    size: Size

    @classmethod
    def over(cls, item: Item, start: int, end: int, children: tuple[Node, ...] = ()) -> Node:
        sizes = [child.size for child in children]
        own = Size(end - start, 0, 1) if children else Size(end - start, 1, 0)
        return cls(item, start, end, children, sum(sizes, own))

    def leaves(self) -> Iterator[Node]:
        """The items' ends, in order."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


@dataclass(frozen=True)
class Limits:
    """Of a packed batch: `items` and `tokens` at most, and `room` bytes.

    An inner node takes `state` bytes, since its state is kept; and every node `passing` bytes while
    it is fed. `spare` slots may be lost behind each leaf, and count as tokens.
    """

    items: int = 1
    tokens: int = 1
    room: int = 0
    state: int = 0
    passing: int = 0
    spare: int = 0

    def allow(self, size: Size) -> bool:
        kept, fed = size.inner * self.state, (size.inner + size.leaves) * self.passing
        tokens = size.tokens + size.leaves * self.spare
        return size.leaves <= self.items and tokens <= self.tokens and kept + fed <= self.room


@dataclass(frozen=True)
class Step:
    """Go back to the snapshot after `resume` tokens (0: the empty text) and feed `nodes`.

    Either whole subtrees, side by side; or, where `snapshot`, one inner node's own tokens, after
    which a snapshot is kept for its children. A leaf that exceeds the limits stands alone. After
    the `last` step that goes back to a snapshot, nobody needs that one any more. That leaves
    `kept` of them, that of the empty text aside.
    """

    resume: int
    nodes: tuple[Node, ...]
    snapshot: bool
    last: bool
    kept: int

    @property
    def tokens(self) -> int:
        """How many tokens this step feeds."""
        if self.snapshot:
            return self.nodes[0].end - self.nodes[0].start
        return sum(node.size.tokens for node in self.nodes)

    @property
    def leaves(self) -> int:
        """How many sequences it completes."""
        return 0 if self.snapshot else sum(node.size.leaves for node in self.nodes)


def merge(sequences: Sequence[Sequence[int] | np.ndarray], firsts: Sequence[int]) -> list[Item]:
    """Items of the distinct (sequence, first) pairs, sorted by what comes before `first`."""
    merged: dict[tuple[bytes, bytes], list[int]] = {}
    for index, (sequence, first) in enumerate(zip(sequences, firsts, strict=True)):
        tokens = np.asarray(sequence, dtype=_SORTABLE)
        merged.setdefault((tokens[:first].tobytes(), tokens[first:].tobytes()), []).append(index)
    items = []
    for before, after in sorted(merged):
        tokens = np.frombuffer(before + after, dtype=_SORTABLE).astype(np.int64)
        items.append(Item(tokens, len(before) // _SORTABLE.itemsize, tuple(merged[before, after])))
    return items


def nest(items: Sequence[Item]) -> list[Item]:
    """The items (from `merge`), but what another one continues becomes part of that one.

    An item is continued by one that begins with all of its tokens and asks for the next position
    or an earlier one: no position is asked for that was not. The `first` of the two is the lower
    one, from which each request knows its own positions.
    """
    nested: list[tuple[bytes, Item]] = []
    # In this order, what an item is the beginning of comes just before it.
    keyed = ((item.tokens.astype(_SORTABLE).tobytes(), item) for item in items)
    for key, item in sorted(keyed, key=itemgetter(0), reverse=True):
        whole = key
        if nested and nested[-1][1].first <= len(item.tokens) and nested[-1][0].startswith(key):
            whole, longer = nested.pop()
            first = min(longer.first, item.first)
            item = Item(longer.tokens, first, item.requests + longer.requests)
        nested.append((whole, item))
    nested.sort(key=lambda one: (one[0][: _SORTABLE.itemsize * one[1].first], one[0]))
    return [item for _, item in nested]


def plan(items: Sequence[Item], limits: Limits, block: int = 1) -> list[Step]:
    """Steps that feed all `items` (from `merge`, perhaps `nest`), those that share a prefix one
    after the other. They share whole blocks of so many tokens."""
    shared = [count // block * block for count in overlaps(items)]
    return list(_steps(_grow(items, shared, 0, len(items), 0, 0), 0, 0, limits))


def overlaps(items: Sequence[Item]) -> list[int]:
    """How many tokens each item (from `merge`, perhaps `nest`) can share with the one before it."""
    return [0] * bool(items) + [_common(a, b) for a, b in zip(items, items[1:], strict=False)]


def _steps(nodes: Sequence[Node], resume: int, kept: int, limits: Limits) -> Iterator[Step]:
    # With the largest branch last, of a path's snapshots only those are needed at a time below
    # which at least half of the tokens are still to come: few, however deep the tree.
    batches: list[tuple[list[Node], Size]] = []
    for node in sorted(nodes, key=lambda node: node.size.tokens):
        if batches and limits.allow(batches[-1][1] + node.size):
            batch, size = batches[-1]
            batch.append(node)
            batches[-1] = batch, size + node.size
        else:
            batches.append(([node], node.size))
    for i, (batch, size) in enumerate(batches):
        (first, *_) = batch
        too_large = bool(first.children) and not limits.allow(size)
        last = i + 1 == len(batches)
        after = kept - (last and resume > 0) + too_large
        yield Step(resume, tuple(batch), too_large, last, after)
        if too_large:
            yield from _steps(first.children, first.end, after, limits)


def _grow(
    items: Sequence[Item], shared: Sequence[int], i: int, j: int, base: int, depth: int
) -> tuple[Node, ...]:
    """The nodes below `base` common tokens of the items i .. j - 1."""
    gap = WORTHWHILE
    if depth >= _DEPTH:
        gap = max(gap, max(len(item.tokens) for item in items[i:j]) // _DEPTH)
    nodes = []
    while i < j:
        end, branch = i + 1, None
        while end < j and shared[end] >= base + gap:
            branch = shared[end] if branch is None else min(branch, shared[end])
            end += 1
        if branch is None:
            nodes.append(Node.over(items[i], base, len(items[i].tokens)))
        else:
            children = _grow(items, shared, i, end, branch, depth + 1)
            nodes.append(Node.over(items[i], base, branch, children))
        i = end
    return tuple(nodes)


def _common(a: Item, b: Item) -> int:
    """Number of leading tokens that both have before their `first`."""
    length = min(a.first, b.first)
    differ = a.tokens[:length] != b.tokens[:length]
    return int(differ.argmax()) if differ.any() else length
