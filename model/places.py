"""Where in a cache the tokens of texts lie, for models whose tokens read it while they are fed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from yoco_eval.kernels.sequences import Sequences, Span, Spans

from .cache import TextState, cut
from .states import Stretches


@dataclass(frozen=True)
class Places(TextState):
    """Of n texts, the stretches of the cache where their tokens lie, in the tokens' order."""

    spans: tuple[Stretches, ...]

    def after(self, sequences: Sequences, stretches: Stretches) -> Places:
        """With sequences that continue texts, whose tokens lie in `stretches`, in their order."""
        sources = sequences.sources or range(len(sequences.lengths))
        places, rest = [], stretches
        for source, length in zip(sources, sequences.lengths, strict=True):
            own, rest = cut(rest, length)
            places.append(_joined((*self.spans[source], *own)))
        return Places(sequences.ends, tuple(places))

    def readings(self, sequences: Sequences) -> Spans:
        """What the sequences' tokens read, which are the texts' last ones: these and all before."""
        return Spans(tuple(_readings(self.spans, sequences.offsets)))


def _joined(spans: Iterable[tuple[int, int]]) -> Stretches:
    """Stretches that lie one behind the other as one."""
    joined: list[tuple[int, int]] = []
    for first, end in spans:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, end))
    return tuple(joined)


def _readings(places: Sequence[Stretches], offsets: Sequence[int]) -> Iterator[Span]:
    """Who reads what: of each text, the queries are its last tokens."""
    for spans, (query, end_query) in zip(places, pairwise(offsets), strict=True):
        asking = end_query
        start = sum(end - first for first, end in spans)
        for first, end in reversed(spans):
            start -= end - first
            own = min(end - first, asking - query)  # of the stretch's tokens, those that ask
            if own:
                yield Span(asking - own, asking, first, end, causal=True, start=start)
            if asking < end_query:
                yield Span(asking, end_query, first, end, causal=False, start=start)
            asking -= own
