"""Divides token sequences among processes, so that what sequences share is fed by one of them.

In their order, sequences that share a prefix are neighbours. Those that have none in common with
others go to the processes together, the heaviest first, to the one that has least to do. Only where
that leaves one process with more than the mean, and less is found by trying, such a row is cut:
then the tokens that are shared across the cut are fed on both sides of it.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .prefixes import WORTHWHILE, Item, overlaps

_CLOSE = 1.02  # the busiest process may have so many times the mean
_STEP = 1.01  # of bounds to what each may have, so many times the last one is tried next
_SPAN = 1.1  # a part that is cut off leaves free up to this part of the room that it has
# What a part does itself must be this share, at the least, of what is fed once more for it.
_PAYS = 0.1
_CHEAP = 0.05  # share of a row's cost that cutting it at a place that all its parts share may add


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
    mean = sum(row.cost for row in rows) / count
    shares = _share(rows, count)
    if forest.busiest(shares) > _CLOSE * mean:
        rows = [part for row in rows for part in forest.branches(row, mean, count)]
        shares = _share(rows, count)
    most, busiest = max(_CLOSE * mean, forest.heaviest), forest.busiest(shares)
    while most < busiest:
        found = forest.pack(rows, most, count, even=False)
        found = found or forest.pack(rows, most, count, even=True)
        if found is not None:
            shares = found
            break
        most *= _STEP
    return [[i for row in share for i in requests[row.begin : row.end]] for share in shares]


class _Forest:
    """Requests in an order in which those that share a prefix are neighbours, and their costs.

    Attributes:
        heaviest: what the one that costs most does.
    """

    def __init__(
        self,
        items: Sequence[Item],
        feeding: Callable[[int], float],
        asking: Callable[[int], float],
    ) -> None:
        shared, added, self.heaviest = [], [0.0], 0.0
        for item, overlap in zip(items, overlaps(items), strict=True):
            before = feeding(overlap if overlap >= WORTHWHILE else 0)
            whole = feeding(len(item.tokens))
            for index in item.requests:
                asked = asking(index)
                shared.append(before)
                added.append(whole - before + asked)
                self.heaviest = max(self.heaviest, whole + asked)
                before = whole
        self._shared = np.array(shared)  # what is fed already for the one before
        self._ended = np.append(self._shared, 0.0)  # the same, and nothing behind the last one
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

    def busiest(self, shares: Sequence[Sequence[_Row]]) -> float:
        """What the process with the most has to do."""
        return max(map(self._load, shares))

    def _load(self, share: Sequence[_Row]) -> float:
        bounds = sorted((row.begin, row.end) for row in share)
        # Two rows share what all between them do, which one process feeds once.
        between = [i for (_, end), (begin, _) in pairwise(bounds) for i in (end, begin + 1)]
        shared = np.minimum.reduceat(self._ended, between)[::2].sum() if between else 0
        return sum(row.cost for row in share) - float(shared)

    def pack(
        self, rows: Sequence[_Row], most: float, count: int, even: bool
    ) -> list[list[_Row]] | None:
        """Shares of up to `most` for each process, with rows cut that fit nowhere; None: it does
        not come out like this.

        Args:
            even: whether a row is cut into parts that take about as much each, where each part
                feeds again what all have in common; else each takes what there is room for, and the
                last one is small.
        """
        shares: list[list[_Row]] = [[] for _ in range(count)]
        rooms = [(most, i) for i in range(count)]  # ascending
        waiting = sorted(rows, key=lambda row: row.cost)
        while waiting:
            row = waiting.pop()
            place = bisect_left(rooms, (row.cost, 0))
            if place == count:  # it fits nowhere
                place -= 1
                parts = self._cut(row, rooms[place][0], even)
                if parts is None:
                    return None
                row, rest = parts
                waiting.append(rest)
            room, i = rooms.pop(place)
            shares[i].append(row)
            insort(rooms, (room - row.cost, i))
        return shares

    def _cut(self, row: _Row, room: float, even: bool) -> tuple[_Row, _Row] | None:
        """What there is room for of a row, as `pack` says, and the rest; None if it does not
        pay."""
        begin, size = row.begin, room
        if even:
            inside = self._shared[begin + 1 : row.end]
            again = float(inside.min(initial=room))  # what each part feeds, at the least
            if again >= room:
                return None
            own = row.cost - again
            size = again + own / math.ceil(own / (room - again))
        bare = self._sums[begin] - self._shared[begin]
        bounds = bare + np.array([size / _SPAN, size, room])
        least, middle, end = np.searchsorted(self._sums, bounds, "right").tolist()
        least, end = max(least, begin + 1), min(end, row.end)
        if least >= end:
            least = end - 1
        if least <= begin:
            return None
        # Where the fewest tokens are shared across the cut; of such places, the last, or the first
        # behind `size`.
        across = self._shared[least:end]
        places = least + np.flatnonzero(across == across.min())
        place = int(places[min(int(np.searchsorted(places, middle)), len(places) - 1)])
        parts = part, rest = self._between([begin, place, row.end])
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
