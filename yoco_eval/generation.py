"""Generation of many answers side by side, with continuous batching.

Prompts are fed as their tree of prefixes says, what they share once; each then has a row of the
decoder, until its answer ends and makes room for the next. What several texts share is stored once,
as a branch, and read once a step for all of them.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from yoco_eval.model import Cache, Decoder, Model, Sequences, Span, State, Stretches, to_device
from yoco_eval.model.cache import cut

from .memory import Batch, Fit, Stored
from .pages import Pages, page_size, rounded
from .prefixes import Limits, Node, Step
from .requests import GenerateRequest, Progress, check_number
from .sampling import draw

# On a GPU, with more texts than this, a step is launched before the tokens of the one before it
# are read, so that the device does not wait for the host, nor, in a group of processes, one for the
# slowest host. Answers take a few steps too many, then.
_ALONE = 4
_STOP_EVERY = 8  # tokens of a text, after which it is looked at for stop strings, then
_CHUNKS = 4  # of short prompts, that are fed between two steps on a GPU
_DRAWN = 64  # texts, at most, whose tokens are drawn at a time


@dataclass(eq=False)
class _Branch:
    """Tokens that are stored once, for all texts that go on from them.

    `start` is the position of the first one. `users` are branches and texts that go on from it, and
    the walk as long as it may come back.
    """

    parent: _Branch | None
    start: int
    taken: Stretches
    stretches: Stretches
    users: int = 1

    def path(self) -> Iterator[_Branch]:
        """From here to the root."""
        branch: _Branch | None = self
        while branch is not None:
            yield branch
            branch = branch.parent


class _Place(NamedTuple):
    """Where a node's tokens are stored.

    Attributes:
        branch: that goes on from them; of a leaf with one request, the one above.
        taken: slots, of such a leaf also those of its answer; none if there is no token.
        stretches: of the tokens.
    """

    branch: _Branch | None
    taken: Stretches
    stretches: Stretches


@dataclass(eq=False)
class _Text:
    """A prompt and its answer so far.

    Attributes:
        index: of the request.
        place: among all texts, in the order of the tree, in which those of a branch are neighbours.
        branch: that it goes on from; None: from nothing.
        state, source: after all tokens of the prompt but the last, as long as it waits.
        own: how many of these are its own, not the branch's.
        taken: slots for them and for the tokens that are to come.
        tokens: of the answer, the first `seen` of which have been looked at for stop strings.
        launched, read: steps.
        row: of the decoder, while it is in flight.
        generator: that its tokens are drawn with, if they are.
    """

    index: int
    request: GenerateRequest
    place: int
    branch: _Branch | None
    state: State | None
    source: int
    own: int = 0
    taken: Stretches = ()
    tokens: list[int] = field(default_factory=list)
    seen: int = 0
    launched: int = 0
    read: int = 0
    row: int = -1
    generator: torch.Generator | None = None
    ended: bool = False

    @property
    def slots(self) -> np.ndarray:
        """Of the tokens that are to come, int64."""
        every = np.concatenate([np.arange(*stretch) for stretch in self.taken])
        return every[self.own :][: self.request.max_tokens]

    def take(self, token: int, every: int) -> bool:
        """Adds a token to the answer, and says whether that ends it.

        Args:
            every: how many tokens `stop` is to be asked about at a time, but for the last ones.
        """
        if token in self.request.end_tokens:
            self.ended = True
        else:
            self.tokens.append(token)
            self.ended = len(self.tokens) == self.request.max_tokens
        # Texts that have come together are not looked at together.
        if self.ended or (len(self.tokens) + self.index) % every == 0:
            self.look()
        return self.ended

    def look(self) -> bool:
        """Looks at the tokens since the last time for an end, and says whether there is one."""
        if self.request.stop is not None and self.seen < len(self.tokens):
            end = self.request.stop(self.tokens, self.seen)
            self.seen = len(self.tokens)
            if end is not None:
                del self.tokens[end:]
                self.ended = True
        return self.ended


class _Launched:
    """A step's tokens on their way from the device."""

    def __init__(self, texts: list[_Text], decoder: Decoder) -> None:
        self._texts = [(text.row, text) for text in texts]  # it may move meanwhile
        count = 1 + max(row for row, _ in self._texts)
        self._ready, self._parts = None, [decoder.tokens[:count], decoder.highest[:count]]
        on_gpu = decoder.tokens.is_cuda
        for i, part in enumerate(self._parts):  # the next step overwrites them
            self._parts[i] = torch.empty(part.shape, dtype=part.dtype, pin_memory=on_gpu)
            self._parts[i].copy_(part, non_blocking=True)
        if on_gpu:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(decoder.tokens.device))

    def read(self) -> Iterator[tuple[_Text, int, float]]:
        """Text, token and largest logit, once they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        tokens, highest = (part.tolist() for part in self._parts)
        for row, text in self._texts:
            yield text, tokens[row], highest[row]


class Generation:
    """One run over many requests.

    Args:
        model: the model.
        requests: each asks for a token at least.
        steps: of the prompts' tree, as `prefixes.plan` makes it within
        limits: which leave room for the states of all nodes of a step.
        batch: how many texts there may be, and how many slots.
        fitted: how the longest of them lies in memory.
        progress: told of prompt tokens and generated ones.

    Attributes:
        batch, fitted: as above.
        tokens: to feed, and to generate at most.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[GenerateRequest],
        steps: Sequence[Step],
        limits: Limits,
        batch: Batch,
        fitted: Fit,
        progress: Progress,
    ) -> None:
        self.batch, self.fitted = batch, fitted
        self._model, self._requests, self._limits = model, requests, limits
        self._steps, self._progress = deque(steps), progress
        self._on_gpu = model.device.type == "cuda"
        budgets = [request.max_tokens for request in requests]
        self.tokens = sum(step.tokens for step in steps) + sum(budgets)
        leaves = (leaf for step in steps if not step.snapshot for node in step.nodes
                  for leaf in node.leaves())  # fmt: skip
        self._places = {leaf: place for place, leaf in enumerate(leaves)}
        self._room = max(budgets)
        page = page_size(model.device, model.block)
        self._pages = Pages(batch.slots - page, page)  # the last one is the decoder's
        self._cache: Cache
        self._decoder: Decoder
        # The walk's snapshots along the present path: tokens before, branch, state after it.
        self._path: list[tuple[int, _Branch | None, State]] = []
        self._waiting: deque[_Text] = deque()
        self._flying: list[_Text] = []
        self._rows = list(range(batch.size))  # free ones, the lowest first
        self._launched: deque[_Launched] = deque()
        self._changed, self._count = False, 0  # whether other rows are read; rows of a step
        self._fed = 0  # tokens since the last step

    def answers(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of the request, new token ids), each as soon as it is complete."""
        self._cache = self._model.new_cache(self.batch.slots)
        self._decoder = self._model.decoder(self._cache, self.batch.size, self._room)
        self._path.append((0, None, self._cache.state))
        try:
            while self._steps or self._waiting or self._flying:
                self._admit()
                if self._steps and self._fits(self._steps[0]):
                    yield from self._feed(self._steps.popleft())
                    self._admit()
                    yield from self._decode_between()
                elif self._flying:
                    yield from self._decode()
                else:
                    raise RuntimeError("texts wait for slots of the cache that nobody has")
        except (Exception, KeyboardInterrupt):
            while self._launched:  # nothing that was computed is lost
                yield from self._read(self._launched.popleft(), 1)
            raise

    # -- prompts -----------------------------------------------------------------------------------

    def _fits(self, step: Step) -> bool:
        """Whether there are rows and slots for all texts of a step."""
        if self._waiting:
            return False
        texts, wanted = 0, 0
        nodes = list(step.nodes)
        while nodes:
            node = nodes.pop()
            wanted += self._slots_of(node)
            if not step.snapshot:
                nodes += node.children
                texts += len(node.item.requests) * (not node.children)
        # Of a prompt that is asked many times, some texts may wait.
        rows = min(texts, self.batch.items)
        return not self._flying or (wanted <= self._pages.free and rows <= len(self._rows))

    def _slots_of(self, node: Node) -> int:
        """That a node takes, and an answer after it."""
        if node.children:
            return rounded(_fed(node), self._pages.page)
        budgets = [self._requests[index].max_tokens for index in node.item.requests]
        if len(budgets) == 1:
            return rounded(_fed(node) + budgets[0], self._pages.page)
        return sum(rounded(tokens, self._pages.page) for tokens in (_fed(node), max(budgets)))

    def _feed(self, step: Step) -> Iterator[tuple[int, list[int]]]:
        """Feeds a step's prompts, whose texts wait then; yields answers that end meanwhile."""
        while self._path[-1][0] > step.resume:
            self._release(self._path.pop()[1])
        _, parent, state = self._path[-1]
        first = step.nodes[0]
        if step.snapshot or self.fitted.feeds_alone(step, self._limits):
            place = self._place(first, parent)
            state = yield from self._prefill(first, place.stretches, state)
            if step.last:
                self._release(self._path.pop()[1])
            if step.snapshot:
                self._path.append((first.end, place.branch, state))
            else:
                self._wait(first, place, state, 0)
        else:
            self._feed_packed(step, parent, state)
            if step.last:
                self._release(self._path.pop()[1])

    def _prefill(
        self, node: Node, room: Stretches, state: State
    ) -> Generator[tuple[int, list[int]], None, State]:
        """Feeds a node's own tokens chunk by chunk.

        Yields answers that end meanwhile; returns the state after the tokens.
        """
        stop = node.start + _fed(node)
        self._cache.state, self._cache.room = state, room
        for start in range(node.start, stop, self.fitted.chunk):
            if start > node.start:
                yield from self._decode_between(long=True)
            ids = self._ids(node.item.tokens[start : min(stop, start + self.fitted.chunk)])
            self._model.prefill(ids, self._cache, asked=False)
            self._fed += len(ids)
            self._progress(len(ids))
        self._progress(node.end - stop)
        return self._cache.state

    def _feed_packed(self, step: Step, parent: _Branch | None, state: State) -> None:
        """Feeds a step's trees level by level, each level as one packed batch."""
        level: list[tuple[Node, _Branch | None, int]] = [(node, parent, 0) for node in step.nodes]
        inner = []
        while level:
            places = [self._place(node, above) for node, above, _ in level]
            fed = [i for i, (node, _, _) in enumerate(level) if _fed(node)]
            after = state
            if fed:
                nodes, sources = zip(*((level[i][0], level[i][2]) for i in fed), strict=True)
                after = self._feed_level(nodes, sources, [places[i] for i in fed], state)
            numbers = {i: number for number, i in enumerate(fed)}
            below: list[tuple[Node, _Branch | None, int]] = []
            for i, (node, _, source) in enumerate(level):
                if node.children:  # which has tokens of its own
                    below += [(child, places[i].branch, numbers[i]) for child in node.children]
                    inner.append(places[i].branch)
                elif i in numbers:
                    self._wait(node, places[i], after, numbers[i])
                else:
                    self._wait(node, places[i], state, source)
                self._progress(node.end - node.start)
            level, state = below, after
        for branch in inner:
            self._release(branch)

    def _feed_level(
        self,
        nodes: Sequence[Node],
        sources: Sequence[int],
        places: Sequence[_Place],
        state: State,
    ) -> State:
        """Feeds nodes, each from one of the state's texts, and returns the state after them."""
        sequences = Sequences(
            lengths=tuple(map(_fed, nodes)),
            starts=tuple(node.start for node in nodes),
            device=self._model.device,
            sources=tuple(sources),
        )
        self._cache.room = tuple(chain.from_iterable(place.stretches for place in places))
        ids = np.concatenate([node.item.tokens[node.start :][: _fed(node)] for node in nodes])
        _, after = self._model.feed(self._ids(ids), sequences, state, self._cache)
        self._fed += len(ids)
        assert after is not None
        return after

    def _ids(self, tokens: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(tokens), self._model.device)

    def _place(self, node: Node, parent: _Branch | None) -> _Place:
        """Slots for a node's tokens, and a hold on the branch that goes on from them.

        A leaf of one request has room for the answer behind its tokens, and needs no branch.
        """
        tokens = _fed(node)
        if parent is not None:
            parent.users += 1
        alone = not node.children and len(node.item.requests) == 1
        if alone:
            tokens += self._requests[node.item.requests[0]].max_tokens
        if not tokens:
            return _Place(parent, (), ())
        taken = self._pages.take(tokens)
        stretches, _ = cut(taken, _fed(node))
        if alone:
            return _Place(parent, taken, stretches)
        return _Place(_Branch(parent, node.start, taken, stretches), taken, stretches)

    def _release(self, branch: _Branch | None) -> None:
        """One user less; what has none is given back."""
        while branch is not None:
            branch.users -= 1
            if branch.users:
                break
            self._pages.give_back(branch.taken)
            branch = branch.parent

    # -- answers -----------------------------------------------------------------------------------

    def _wait(self, leaf: Node, place: _Place, state: State, source: int) -> None:
        """The texts of a leaf's requests are ready to be decoded from a state's text on."""
        for index in leaf.item.requests:
            text = _Text(
                index, self._requests[index], self._places[leaf], place.branch, state, source
            )
            if len(leaf.item.requests) == 1:
                text.own, text.taken = _fed(leaf), place.taken
            elif place.branch is not None:
                place.branch.users += 1
            if text.request.sampling.temperature:
                text.generator = text.request.sampling.generator(self._model.device)
            self._waiting.append(text)
        if len(leaf.item.requests) > 1:
            self._release(place.branch)

    def _admit(self) -> None:
        """Gives rows to texts that wait, as far as rows and slots go."""
        admitted: list[_Text] = []
        while self._waiting and self._rows:
            text = self._waiting[0]
            if not text.taken:
                if text.request.max_tokens > self._pages.free:
                    break
                text.taken = self._pages.take(text.request.max_tokens)
            text.row = heapq.heappop(self._rows)
            admitted.append(self._waiting.popleft())
        for _, group in groupby(admitted, key=lambda text: id(text.state)):
            texts = list(group)
            state = texts[0].state
            assert state is not None
            self._decoder.join(
                [text.row for text in texts],
                state,
                [text.source for text in texts],
                [int(text.request.context[-1]) for text in texts],
                [text.slots for text in texts],
            )
            for text in texts:
                text.state = None
        self._flying += admitted
        self._changed = self._changed or bool(admitted)

    def _decode_between(self, long: bool = False) -> Iterator[tuple[int, list[int]]]:
        """A step after each chunk's worth of prompts, so that no text waits for longer.

        On a GPU, short prompts fill half of the rows first, and then come a few chunks at a time: a
        graph is captured for each of a few numbers of rows, and it is soon time for the next one.
        """
        wait, enough = self.fitted.chunk, True
        if self._on_gpu and not long:
            wait, enough = _CHUNKS * wait, 2 * len(self._flying) >= self.batch.size
        if self._flying and enough and self._fed >= wait:
            yield from self._decode()

    def _decode(self) -> Iterator[tuple[int, list[int]]]:
        """One step for all texts in flight; yields the answers that are complete."""
        self._fed = 0
        live = [text for text in self._flying if text.launched < text.request.max_tokens]
        if live:
            self._launch(live)
        ahead = self._on_gpu and (len(live) > _ALONE or self._model.group is not None)
        while len(self._launched) > (1 if live and ahead else 0):
            yield from self._read(self._launched.popleft(), _STOP_EVERY if ahead else 1)

    def _launch(self, live: list[_Text]) -> None:
        if self._changed:
            self._tell_what_is_read()
        self._decoder.step(self._count)
        sampled = [text for text in live if text.generator is not None]
        if sampled:
            self._draw(sampled)
            # Processors of another kind may draw other numbers from a seed.
            self._decoder.agree(self._count)
        for text in live:
            text.launched += 1
        self._launched.append(_Launched(live, self._decoder))

    def _tell_what_is_read(self) -> None:
        """Tells the decoder which slots the rows in flight read."""
        flying = sorted(self._flying, key=lambda text: text.place)
        ranges: dict[_Branch, list[int]] = {}  # first and last query below a branch
        spans = []
        for query, text in enumerate(flying):
            for branch in text.branch.path() if text.branch is not None else ():
                ranges.setdefault(branch, [query, query])[1] = query
            start = len(text.request.context) - 1 - text.own
            for first, end in text.taken:
                spans.append(Span(query, query + 1, first, end, causal=False, start=start))
                start += end - first
        for branch, (query, last) in ranges.items():
            # All of it is read; kernels that need not know where it lies do less.
            at = branch.start if self._model.block > 1 else None
            for first, end in branch.stretches:
                spans.append(Span(query, last + 1, first, end, causal=False, start=at))
                at = None if at is None else at + end - first
        rows = [text.row for text in flying]
        self._decoder.read(rows, spans)
        self._changed, self._count = False, 1 + max(rows)

    def _draw(self, sampled: list[_Text]) -> None:
        """Draws the next tokens of texts that are sampled."""
        device, dtype = self._model.device, self._model.dtype
        vocabulary = self._decoder.logits.shape[1]
        wide = torch.promote_types(dtype, torch.float32)
        for first in range(0, len(sampled), _DRAWN):  # their distributions take much memory
            some = sampled[first : first + _DRAWN]
            index = to_device(torch.tensor([text.row for text in some]), device)
            noise = torch.empty(len(some), vocabulary, dtype=wide, device=device)
            for row, text in zip(noise, some, strict=True):
                row.exponential_(generator=text.generator)
            logits = self._decoder.logits.index_select(0, index)
            drawn = draw(logits, [text.request.sampling for text in some], noise)
            self._decoder.tokens.index_copy_(0, index, drawn)

    def _read(self, launched: _Launched, every: int) -> Iterator[tuple[int, list[int]]]:
        """Takes a step's tokens; yields the answers that are complete with them."""
        ended: list[_Text] = []
        try:
            for text, token, highest in launched.read():
                if text.ended:  # in the step before, when this one was launched already
                    continue
                text.read += 1
                if not highest < math.inf and not text.look():
                    check_number(highest, self._model.dtype)
                if text.ended or text.take(token, every):
                    ended.append(text)
                self._progress(1, text.request.max_tokens - text.read if text.ended else 0)
            self._land(ended)
        except (Exception, KeyboardInterrupt):
            self._launched.clear()  # which would go on after tokens that were not taken
            yield from ((text.index, text.tokens) for text in ended)
            raise
        for text in ended:
            yield text.index, text.tokens

    def _land(self, ended: list[_Text]) -> None:
        """Takes back rows and slots of texts that are complete."""
        if not ended:
            return
        for text in ended:
            self._flying.remove(text)
            heapq.heappush(self._rows, text.row)
            self._pages.give_back(text.taken)
            self._release(text.branch)
        self._decoder.leave([text.row for text in ended])
        if self._flying:
            self._close_ranks()

    def _close_ranks(self) -> None:
        """Moves texts to lower rows where many are free that nobody waits for."""
        if not self._on_gpu:
            self._changed = True  # the references work for what they are told of only
        if self._steps or self._waiting or 2 * len(self._flying) > self._count:
            return
        self._changed = True
        high = [text for text in self._flying if text.row >= len(self._flying)]
        if high:
            low = [heapq.heappop(self._rows) for _ in high]
            self._decoder.move([text.row for text in high], low)
            for text, row in zip(high, low, strict=True):
                heapq.heappush(self._rows, text.row)
                text.row = row


def stored(steps: Sequence[Step], requests: Sequence[GenerateRequest], page: int) -> Stored:
    """What the texts of a run take in the cache, of steps of one node each."""
    path, own, shared, longest = [(0, 0)], [], 0, 0
    for step in steps:
        (node,) = step.nodes
        while path[-1][0] > step.resume:
            path.pop()
        fed = rounded(_fed(node), page)
        if step.snapshot:
            path.append((node.end, path[-1][1] + fed))
            shared += fed
            continue
        budgets = [requests[index].max_tokens for index in node.item.requests]
        if len(budgets) == 1:
            own.append(rounded(_fed(node) + budgets[0], page))
        else:
            own += [fed + rounded(budget, page) for budget in budgets]
        longest = max(longest, path[-1][1] + max(own[-len(budgets) :]))
    room = max(request.max_tokens for request in requests)
    return Stored(own, shared, longest, room, max(step.kept for step in steps), page)


def _fed(node: Node) -> int:
    """Tokens of a node that are fed as a prompt's: a leaf's last one is decoded."""
    return node.end - node.start - (not node.children)
