"""Divides token sequences among processes, so that what sequences share is fed by one of them.

In their order, sequences that share a prefix are neighbours. Those that have none in common with
others go to the processes together, the heaviest first, to the one that has least to do. Only where
that leaves one process with far more than the mean, such a row is cut: then the tokens that are
shared across the cut are fed on both sides of it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .prefixes import WORTHWHILE, Item, overlaps

# The busiest process may have so many times the mean: less is not worth feeding tokens twice.
_TOLERATED = 1.1
# What a part does itself must be this share, at the least, of what is fed once more for it.
_PAYS = 0.1
_CHEAP = 0.05  # share of a row's cost that cutting it at a place that all its parts share may add
_EXACT = 0.01  # of the mean, to which the least possible load of the busiest process is found


@dataclass(frozen=True)
class _Row:
    """Neighbours: from `begin` to `end` - 1, and what all of it costs."""

    begin: int
    end: int
    cost: float


def divide(
    items: Sequence[Item],
    count: int,
    feeding: Callable[[int], float],
    asking: Callable[[int], float],
) -> list[list[int]]:
    """Which requests each of `count` processes is to answer.

    Args:
        items: from `prefixes.merge`, perhaps `nest`.
        feeding: what feeding the first so many tokens of a text costs.
        asking: what a request costs beside the tokens that are fed for it.

    Returns:
        Lists of requests' indices, some of them empty if there is too little to divide.
    """
    requests = [index for item in items for index in item.requests]
    forest = _Forest(items, feeding, asking)
    rows = forest.rows()
    shares = _share(rows, count)
    mean = sum(row.cost for row in rows) / count
    if _busiest(shares) > _TOLERATED * mean:
        rows = [part for row in rows for part in forest.branches(row, mean, count)]
        shares = _share(rows, count)
    low, most, high = mean, _TOLERATED * mean, _busiest(shares)
    while high > _TOLERATED * mean and high - low > _EXACT * mean:
        found = forest.pack(rows, most, count)
        if found is None:
            low = most
        else:
            shares, high = found, most
        most = (low + high) / 2
    return [[i for row in share for i in requests[row.begin : row.end]] for share in shares]


class _Forest:
    """Requests in an order in which those that share a prefix are neighbours, and their costs."""

    def __init__(
        self,
        items: Sequence[Item],
        feeding: Callable[[int], float],
        asking: Callable[[int], float],
    ) -> None:
        shared, added = [], [0.0]
        for item, overlap in zip(items, overlaps(items), strict=True):
            overlap = overlap if overlap >= WORTHWHILE else 0
            for index in item.requests:
                before = feeding(overlap)
                shared.append(before)
                added.append(feeding(len(item.tokens)) - before + asking(index))
                overlap = len(item.tokens)
        self._shared = np.array(shared)  # what is fed already for the one before
        self._sums = np.cumsum(added)  # what the first so many cost

    def rows(self) -> list[_Row]:
        """Those that share nothing with others."""
        return self._between([*np.flatnonzero(self._shared == 0).tolist(), len(self._shared)])

    def branches(self, row: _Row, mean: float, count: int) -> list[_Row]:
        """A row of more than `mean` in its branches, if what these have in common is little: say
        an introduction before different texts."""
        inside = self._shared[row.begin + 1 : row.end]
        if row.cost <= mean or not len(inside):
            return [row]
        cuts = row.begin + 1 + np.flatnonzero(inside == inside.min())
        if inside.min() * min(len(cuts), count - 1) > _CHEAP * row.cost:
            return [row]
        return self._between([row.begin, *cuts.tolist(), row.end])

    def pack(self, rows: Sequence[_Row], most: float, count: int) -> list[list[_Row]] | None:
        """Shares of up to `most` for each process, with rows cut that fit nowhere; None: they
        cannot be."""
        shares: list[list[_Row]] = [[] for _ in range(count)]
        rooms = [(most, i) for i in range(count)]  # ascending
        waiting = sorted(rows, key=lambda row: row.cost)
        while waiting:
            row = waiting.pop()
            place = bisect_left(rooms, (row.cost, 0))
            if place == count:  # it fits nowhere
                place -= 1
                parts = self._cut(row, rooms[place][0])
                if parts is None:
                    return None
                row, rest = parts
                waiting.append(rest)
            room, i = rooms.pop(place)
            shares[i].append(row)
            insort(rooms, (room - row.cost, i))
        return shares

    def _cut(self, row: _Row, room: float) -> tuple[_Row, _Row] | None:
        """About as much of a row as there is room for, and the rest; None if it does not pay."""
        begin = row.begin
        bare = self._sums[begin] - self._shared[begin]
        least, end = np.searchsorted(self._sums, [bare + room / _TOLERATED, bare + room], "right")
        least, end = max(int(least), begin + 1), min(int(end), row.end)
        if least >= end:
            least = end - 1
        if least <= begin:
            return None
        # Where the fewest tokens are shared across the cut; of such places, the last.
        end -= 1 + int(self._shared[least:end][::-1].argmin())
        parts = part, rest = self._between([begin, end, row.end])
        for one in parts:
            again = self._shared[one.begin]
            if one.cost - again < _PAYS * again:
                return None
        return part, rest

    def _between(self, cuts: Sequence[int]) -> list[_Row]:
        return [
            _Row(begin, end, float(self._sums[end] - self._sums[begin] + self._shared[begin]))
            for begin, end in zip(cuts, cuts[1:], strict=False)
        ]


def _share(rows: Sequence[_Row], count: int) -> list[list[_Row]]:
    """The heaviest first, each to whom has least."""
    shares: list[list[_Row]] = [[] for _ in range(count)]
    loads = [(0.0, i) for i in range(count)]
    for row in sorted(rows, key=lambda row: -row.cost):
        load, i = heapq.heappop(loads)
        shares[i].append(row)
        heapq.heappush(loads, (load + row.cost, i))
    return shares


def _busiest(shares: Sequence[Sequence[_Row]]) -> float:
    return max(sum(row.cost for row in share) for share in shares)
