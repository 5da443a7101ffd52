"""Plans in which order to feed token sequences so that what they share is fed once.

The sequences' prefixes form a tree. In sorted order, each sequence resumes from the deepest
snapshot on its own path, and takes new ones where later sequences branch off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sharing fewer tokens than this past a snapshot does not pay for cutting a chunk in two.
_WORTHWHILE = 16
# A snapshot holds the self-decoder's whole state: as many as this are kept of one item's way.
_SNAPSHOTS = 64


@dataclass(frozen=True)
class Item:
    """A sequence to feed, on behalf of all requests that have it.

    `tokens` is int64 [n]; predictions are asked of the positions from `first` on. `requests` are
    the caller's indices.
    """

    tokens: np.ndarray
    first: int
    requests: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Feed `items`, which share their first `shared` tokens.

    Go back to the snapshot after `resume` tokens (0: the empty text), feed up to `shared`, then
    each item's own rest. Of the way of the first item, snapshots are kept after `snapshots`
    tokens (ascending, the last one at most `first`).
    """

    items: tuple[Item, ...]
    resume: int
    shared: int
    snapshots: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens this step feeds."""
        own = sum(len(item.tokens) - self.shared for item in self.items)
        return self.shared - self.resume + own


def merge(sequences: Sequence[Sequence[int] | np.ndarray], firsts: Sequence[int]) -> list[Item]:
    """Items of the distinct (sequence, first) pairs, sorted by what comes before `first`."""
    merged: dict[tuple[bytes, bytes], list[int]] = {}
    for index, (sequence, first) in enumerate(zip(sequences, firsts, strict=True)):
        tokens = np.asarray(sequence, dtype=">u4")  # big-endian bytes sort as the numbers do
        merged.setdefault((tokens[:first].tobytes(), tokens[first:].tobytes()), []).append(index)
    items = []
    for before, after in sorted(merged):
        tokens = np.frombuffer(before + after, dtype=">u4").astype(np.int64)
        items.append(Item(tokens, len(before) // 4, tuple(merged[before, after])))
    return items


def plan(items: Sequence[Item], max_items: int = 1, max_tokens: int = 0) -> list[Step]:
    """Steps that feed all `items` (from `merge`), those that share a prefix one after the other.

    Args:
        max_items: how many items may be fed as one step, side by side after what they share.
        max_tokens: how many tokens of their own they may then have, padded to the longest.
    """
    shared = [0] + [_common(a, b) for a, b in zip(items, items[1:], strict=False)]
    steps, snapshots, i = [], [0], 0
    while i < len(items):
        while snapshots[-1] > shared[i]:
            snapshots.pop()
        resume = snapshots[-1]
        j, branch = _side_by_side(items, shared, i, resume, max_items, max_tokens)
        if j == i + 1:
            points, branch = _branches(shared, i, resume), resume
        else:
            points = _branches(shared, i, resume, branch)
        steps.append(Step(tuple(items[i:j]), resume, branch, tuple(points)))
        snapshots += points
        i = j
    return steps


def _common(a: Item, b: Item) -> int:
    """Number of leading tokens that both have before their `first`."""
    length = min(a.first, b.first)
    differ = a.tokens[:length] != b.tokens[:length]
    return int(differ.argmax()) if differ.any() else length


def _branches(shared: Sequence[int], i: int, resume: int, limit: int | None = None) -> list[int]:
    """Lengths past `resume`, up to `limit`, at which items after `i` leave its path, ascending.

    Of lengths that lie close together the longest is taken; the items of the others go back to the
    one before.
    """
    points: list[int] = []
    lowest, j = max(shared) if limit is None else limit, i + 1
    while j < len(shared) and (lowest := min(lowest, shared[j])) >= resume + _WORTHWHILE:
        if not points or lowest < points[-1]:
            points.append(lowest)
        j += 1
    gap = max(_WORTHWHILE, (points[0] - resume) // _SNAPSHOTS) if points else 0
    kept: list[int] = []
    for point in points:
        if not kept or kept[-1] - point >= gap:
            kept.append(point)
    return kept[::-1]


def _side_by_side(
    items: Sequence[Item], shared: Sequence[int], i: int, resume: int, max_items: int,
    max_tokens: int,
) -> tuple[int, int]:
    """The end j of the items i..j-1 to feed side by side, and the length that they share."""
    if i + 1 == len(items):
        return i + 1, resume
    branch = shared[i + 1] if shared[i + 1] >= resume + _WORTHWHILE else resume
    longest, j = len(items[i].tokens) - branch, i + 1
    while j < min(len(items), i + max_items) and branch <= shared[j] < branch + _WORTHWHILE:
        longest = max(longest, len(items[j].tokens) - branch)
        if longest * (j + 1 - i) > max_tokens:
            break
        j += 1
    return j, branch
