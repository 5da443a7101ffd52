"""Rounds in which all processes of a run answer all their requests together.

lm-eval deals documents out one by one, which tears apart prompts that share a text. So each process
says what it has to ask, the first one divides it all anew, and answers go back to who asked as they
become known. A process with nothing to ask takes part from the barrier that lm-eval has behind each
kind of request.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from yoco_eval.model import Costs

from .prefixes import Item, merge, nest
from .ranks import Lost, Ranks
from .requests import Progress
from .sampling import Sampling
from .shares import divide

_EVERY = 1.0  # seconds after which answers that became known are sent, and others' looked for
_SOON = 0.02  # seconds, where there is nothing else to do
# What a prediction costs, and a generated token, in tokens fed: they go through all layers, and the
# head; a generated one alone, or with few others. Answers are taken to be as long as they may be.
_PREDICTED, _GENERATED = 3, 4
_TYPICAL = 1024  # tokens whose feeding tells what one costs
_ANSWERS = 16  # that go together at most
_EVEN = 64  # bundles for each process, from which on they are divided as evenly as requests


class Generate(NamedTuple):
    """How an answer is generated.

    Attributes:
        max_tokens: that it has at most.
        until: stop strings.
        sampling: how its tokens are drawn.
    """

    max_tokens: int
    until: tuple[str, ...]
    sampling: Sampling


class Ask(NamedTuple):
    """A request as it goes from process to process: ids int32 [n], and what is asked of them.

    Attributes:
        ids: of the context and, where it is scored, of its continuation.
        first: how many are the context's.
        generate: how it is continued; None: it is scored.
    """

    ids: np.ndarray
    first: int
    generate: Generate | None = None

    @property
    def key(self) -> tuple[bytes, int, Generate | None]:
        """The same of requests with the same answer."""
        return self.ids.tobytes(), self.first, self.generate

    @property
    def fed(self) -> int:
        """How many of the ids are fed: of what is scored, the last one is not."""
        return max(self.first, len(self.ids) - 1)

    @property
    def cost(self) -> int:
        """Of predictions, in tokens fed."""
        if self.generate is not None:
            return _GENERATED * self.generate.max_tokens
        return _PREDICTED * (len(self.ids) - self.first)


@dataclass(frozen=True)
class Note:
    """A warning about `count` of `total` requests, of which the largest number is `most`.

    `text` has a place for each of the three.
    """

    text: str
    count: int
    total: int
    most: int = 0


def united(notes: Sequence[Note]) -> list[str]:
    """The warnings, those with one text as one; none where it is about no request."""
    texts: dict[str, Note] = {}
    for note in notes:
        so_far = texts.get(note.text, Note(note.text, 0, 0))
        texts[note.text] = Note(
            note.text,
            so_far.count + note.count,
            so_far.total + note.total,
            max(so_far.most, note.most),
        )
    return [
        note.text.format(count=note.count, total=note.total, most=note.most)
        for note in texts.values()
        if note.count
    ]


def divided(asks: Sequence[Ask], costs: Costs, count: int) -> list[list[int]]:
    """Which of all processes' requests, which are distinct, each of `count` is to answer."""
    bundles = _bundles(asks, count)
    items, feeding = forest([_what_all_share(asks, bundle) for bundle in bundles], costs)

    def asking(index: int) -> float:
        bundle = bundles[index]
        cost: float = sum([asks[i].cost for i in bundle])
        if len(bundle) > 1:
            cost += sum([feeding(asks[i].fed) - feeding(asks[i].first) for i in bundle])
        return cost

    shares = divide(items, count, feeding, asking)
    return [[i for index in share for i in bundles[index]] for share in shares]


def _bundles(asks: Sequence[Ask], count: int) -> list[list[int]]:
    """Requests that one process answers together: those of a question's answers, of which there are
    mostly few. They share all that is worth it, and are divided in less time than one by one; where
    there are too few bundles to divide evenly, each request is one by itself.
    """
    bundles: list[list[int]] = []
    latest: dict[bytes, list[int]] = {}  # by context
    for index, ask in enumerate(asks):
        answer = ask.generate is None and len(ask.ids) <= 2 * ask.first
        context = ask.ids[: ask.first].tobytes() if answer else b""
        known = latest.get(context) if answer else None
        if known is not None and len(known) < _ANSWERS:
            known.append(index)
            continue
        bundles.append([index])
        if answer:
            latest[context] = bundles[-1]
    even = len(bundles) >= _EVEN * count
    return bundles if even else [[index] for index in range(len(asks))]


def _what_all_share(asks: Sequence[Ask], bundle: Sequence[int]) -> Ask:
    ask = asks[bundle[0]]
    return ask if len(bundle) == 1 else Ask(ask.ids[: ask.first], ask.first)


def forest(asks: Sequence[Ask], costs: Costs) -> tuple[list[Item], Callable[[int], float]]:
    """What is fed for requests, and what feeding the first so many tokens of a text costs, in
    tokens of a text of typical length."""
    one = costs.prefill_operations(_TYPICAL) / _TYPICAL

    @lru_cache(maxsize=1 << 16)
    def feeding(length: int) -> float:
        return costs.prefill_operations(length) / one

    items = merge([ask.ids[: ask.fed] for ask in asks], [ask.first - 1 for ask in asks])
    return nest(items), feeding


class _Packed(NamedTuple):
    """Requests in few arrays."""

    ids: np.ndarray
    lengths: list[int]
    firsts: list[int]
    generates: list[Generate | None]

    @classmethod
    def of(cls, asks: Sequence[Ask]) -> _Packed:
        ids = np.concatenate([np.empty(0, np.int32), *(ask.ids for ask in asks)])
        lengths = [len(ask.ids) for ask in asks]
        return cls(ids, lengths, [ask.first for ask in asks], [ask.generate for ask in asks])

    def asks(self) -> list[Ask]:
        bounds = pairwise(accumulate(self.lengths, initial=0))
        parts = [self.ids[begin:end] for begin, end in bounds]
        return [Ask(*ask) for ask in zip(parts, self.firsts, self.generates, strict=True)]


class _Statement(NamedTuple):
    """What a process has to ask, of which kind; none at a barrier. And its warnings so far."""

    kind: str | None
    asks: _Packed
    notes: list[Note]


class _Share(NamedTuple):
    """What a process is to answer, and who asked each: (rank, index). No kind: a barrier."""

    kind: str | None
    asks: _Packed
    askers: list[list[tuple[int, int]]]


class Answering(Protocol):
    def __call__(
        self,
        kind: str,
        asks: Sequence[Ask],
        begin: Callable[[int], object],
        progress: Progress,
    ) -> Iterator[tuple[int, Any]]:
        """Yields (index of the request, its answer), as the engine does."""


class Rounds:
    """This process's part in them.

    Args:
        ranks: the processes.
        costs: of the model.
        answer: answers requests of one kind.
        bar: a progress bar by the kind of requests, which only the first process shows.
        warn: tells the user something; likewise.
        together: how many processes, neighbours by rank, answer the same requests in lockstep. The
            first of them hands the answers on.
    """

    def __init__(
        self,
        ranks: Ranks,
        costs: Costs,
        answer: Answering,
        bar: Callable[[str], AbstractContextManager[tqdm]],
        warn: Callable[[str], object],
        together: int = 1,
    ) -> None:
        self._ranks, self._costs, self._together = ranks, costs, together
        self._answer, self._bar, self._warn = answer, bar, warn
        self._number = 0
        self._notes: list[Note] = []

    def note(self, note: Note) -> None:
        """A warning, to be united with those of other processes, in the next round."""
        self._notes.append(note)

    def ask(self, kind: str, asks: Sequence[Ask], take: Callable[[int, Any], object]) -> None:
        """Has requests answered, by whomever; `take` is told (index, answer) as they are known."""
        places: dict[Any, list[int]] = {}
        distinct = []
        for index, ask in enumerate(asks):
            same = places.setdefault(ask.key, [])
            if not same:
                distinct.append(ask)
            same.append(index)
        indices = list(places.values())

        def take_all(which: int, answer: Any) -> None:
            for index in indices[which]:
                take(index, answer)

        while not self._round(kind, distinct, take_all):
            pass

    def barrier(self) -> None:
        """Takes part in rounds until all processes are here."""
        while not self._round(None, [], lambda index, answer: None):
            pass

    def _round(
        self, kind: str | None, asks: Sequence[Ask], take: Callable[[int, Any], object]
    ) -> bool:
        """One round, and whether it was of this process's kind."""
        self._ranks.working = True
        notes, self._notes = self._notes, []
        statements = self._ranks.gather(_Statement(kind, _Packed.of(asks), notes))
        share = self._ranks.scatter(None if statements is None else self._deal(statements))
        own = share.kind == kind
        if share.kind is not None:
            self._number += 1
            with self._bar(share.kind) as bar:
                expected, leads = len(asks) if own else 0, self._ranks.rank % self._together == 0
                part = _Part(self._ranks, self._number, share, expected, take, bar, leads)
                part.play(self._answer)
        self._ranks.working = False
        return own

    def _deal(self, statements: Sequence[_Statement]) -> list[_Share]:
        """What each process is to do, of all that they have of one kind."""
        for text in united([note for statement in statements for note in statement.notes]):
            self._warn(text)
        kinds = [statement.kind for statement in statements if statement.kind is not None]
        kind = kinds[0] if kinds else None
        asks: list[Ask] = []
        askers: dict[Any, list[tuple[int, int]]] = {}
        for rank, statement in enumerate(statements):
            if kind is not None and statement.kind == kind:
                for index, ask in enumerate(statement.asks.asks()):
                    known = askers.setdefault(ask.key, [])
                    if not known:
                        asks.append(ask)
                    known.append((rank, index))
        who = list(askers.values())
        shares = []
        groups = self._ranks.size // self._together
        for part in divided(asks, self._costs, groups):
            packed = _Packed.of([asks[i] for i in part])
            shares.append(_Share(kind, packed, [who[i] for i in part]))
            shares += (self._together - 1) * [_Share(kind, packed, [[] for _ in part])]
        return shares


class _Part:
    """This process's part in one round: its share, and answers of others to what it asked.

    Args:
        number: of the round.
        expected: how many answers there will be to what it asked.
        take: is told them.
        bar: of the first process, on which all show their progress.
        leads: whether it does so for those that answer together with it.
    """

    def __init__(
        self,
        ranks: Ranks,
        number: int,
        share: _Share,
        expected: int,
        take: Callable[[int, Any], object],
        bar: tqdm,
        leads: bool,
    ) -> None:
        self._ranks, self._number, self._share = ranks, number, share
        self._expected, self._take, self._bar, self._leads = expected, take, bar, leads
        self._outbox: dict[int, list[tuple[int, Any]]] = defaultdict(list)
        self._total = self._done = 0  # tokens since the others were last told
        self._last = time.monotonic()

    def play(self, answer: Answering) -> None:
        """Answers, and waits for answers."""
        kind, asks = self._share.kind, self._share.asks.asks()
        assert kind is not None
        try:
            if asks:
                for index, given in answer(kind, asks, self._begin, self._progress):
                    self._give(index, given)
            self._exchange()
            self._ranks.add(f"{self._number}/finished", 1)
            while self._expected or self._unfinished():
                time.sleep(min(_EVERY, _SOON * max(1, self._ranks.size // 16)))
                self._exchange()
            self._exchange()
        except BaseException:
            with suppress(Lost):  # what is known is not
                self._send()
                self._receive()
            raise

    def _unfinished(self) -> bool:
        """Whether this is the first process, which shows how it goes, and others still work."""
        if self._ranks.rank:
            return False
        return self._ranks.add(f"{self._number}/finished", 0) < self._ranks.size

    def _begin(self, tokens: int) -> None:
        self._total += tokens * self._leads

    def _progress(self, done: int, spared: int = 0) -> None:
        self._done += done * self._leads
        self._total -= spared * self._leads
        if time.monotonic() - self._last > _EVERY:
            self._exchange()

    def _give(self, index: int, answer: Any) -> None:
        for rank, which in self._share.askers[index]:
            if rank == self._ranks.rank:
                self._get(which, answer)
            else:
                self._outbox[rank].append((which, answer))

    def _get(self, index: int, answer: Any) -> None:
        self._expected -= 1
        self._take(index, answer)

    def _exchange(self) -> None:
        self._ranks.check()
        self._last = time.monotonic()
        self._send()
        self._receive()
        ranks, number = self._ranks, self._number
        total = ranks.add(f"{number}/total", self._total)
        done = ranks.add(f"{number}/done", self._done)
        self._total = self._done = 0
        if not ranks.rank:
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def _send(self) -> None:
        while self._outbox:
            rank, answers = self._outbox.popitem()
            self._ranks.post(rank, answers)

    def _receive(self) -> None:
        for index, answer in self._ranks.mail():
            self._get(index, answer)
