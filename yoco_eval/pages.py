"""Who has which slots of a cache: pages, given to stretches of texts and taken back.

Texts of any lengths come and go, so free slots end up scattered. In pages of 64 slots any free ones
serve, and nothing is ever moved: what is lost is half a page for each stretch of tokens, 32 of
them, 128 KiB of YOCO-3B's cache beside some 20 MiB of state that a text has there. Neighbouring
pages are given where there are enough, so that attention reads long runs.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import torch

from yoco_eval.model import Stretches


def page_size(device: torch.device, block: int = 1) -> int:
    """Slots of a page: as many keys as kernels read at a time; one where there are none, so that
    what is stored one behind the other stays without gaps. In each case whole blocks of so many."""
    return rounded(64 if device.type == "cuda" else 1, block)


def rounded(tokens: int, page: int) -> int:
    """Slots of whole pages that so many tokens take."""
    return -(-tokens // page) * page


class Pages:
    """Account of a cache of `slots` slots, in pages of `page`.

    Attributes:
        page: as above.
        free: how many slots are in pages that are not given away.
    """

    def __init__(self, slots: int, page: int) -> None:
        self.page, self.free = page, slots // page * page
        # Free runs (first page, end), in order and apart; and the same by length.
        self._runs: list[tuple[int, int]] = []
        self._by_length: list[tuple[int, int]] = []
        if slots >= page:
            self._keep(0, slots // page)

    def take(self, tokens: int) -> Stretches:
        """Slots for that many tokens, in as few stretches as may be.

        Raises:
            ValueError: there are fewer.
        """
        size = rounded(tokens, self.page)
        if size > self.free:
            raise ValueError(f"{size} slots of a cache are asked for, and {self.free} are free")
        self.free -= size
        wanted, taken = size // self.page, []
        while wanted:
            # The shortest run that is long enough, else the longest.
            at = min(bisect_left(self._by_length, (wanted, 0)), len(self._by_length) - 1)
            length, first = self._by_length[at]
            count = min(length, wanted)
            self._drop(first, first + length)
            if count < length:
                self._keep(first + count, first + length)
            taken.append((first * self.page, (first + count) * self.page))
            wanted -= count
        return tuple(sorted(taken))

    def give_back(self, stretches: Stretches) -> None:
        """All of what `take` has given at a time."""
        for start, stop in stretches:
            first, end = start // self.page, stop // self.page
            self.free += stop - start
            at = bisect_left(self._runs, (first, end))
            if at < len(self._runs) and self._runs[at][0] == end:
                end = self._runs[at][1]
                self._drop(*self._runs[at])
            if at and self._runs[at - 1][1] == first:
                first = self._runs[at - 1][0]
                self._drop(*self._runs[at - 1])
            self._keep(first, end)

    def _keep(self, first: int, end: int) -> None:
        insort(self._runs, (first, end))
        insort(self._by_length, (end - first, first))

    def _drop(self, first: int, end: int) -> None:
        self._runs.pop(bisect_left(self._runs, (first, end)))
        self._by_length.pop(bisect_left(self._by_length, (end - first, first)))
