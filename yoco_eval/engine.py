"""The engine: token ids in, log-probabilities or new tokens out. It knows no text.

A prompt is fed in chunks through the self-decoder alone (early exit); only positions whose
prediction is asked for enter the cross-decoder and the output projection. Sequences that share a
prefix share its prefill, and so does a batch of them: its members read one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from yoco_eval.model import Decoder, SelfState, Sequences, Span, Spans, Yoco

from .memory import Budget, budget
from .prefixes import Item, Limits, Node, Step, merge, plan

TokenIds = Sequence[int] | np.ndarray
Progress = Callable[[int], object]


@dataclass(frozen=True)
class ScoreRequest:
    """Asks for the log-probability of `continuation` after `context` (at least one token)."""

    context: TokenIds
    continuation: TokenIds


@dataclass(frozen=True)
class Score:
    """Sum of the log-probabilities (natural), and whether greedy decoding would give the same."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the likeliest one at temperature 0, else from the `top_p`,
    `top_k` nucleus of the tempered distribution, with PyTorch's global generator.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is below 0; 0 decodes greedily")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside 0..1; 1 leaves every token in")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is below 0; 0 leaves every token in")


@dataclass(frozen=True)
class GenerateRequest:
    """Asks for up to `max_tokens` tokens after `context` (at least one token).

    Generation ends with a token of `end_tokens`, which is not part of the answer, or when
    `finished` says so of the tokens so far.
    """

    context: TokenIds
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()
    finished: Callable[[list[int]], bool] = lambda tokens: False
    sampling: Sampling = Sampling()


class Engine:
    """Scores and generates with a model.

    Args:
        model: the model, on its device.
        batch_size: how many sequences are fed side by side at most, within `prefill_chunk` tokens;
            None: as many as these and the memory for their states allow.
        prefill_chunk: how many tokens are fed at a time; None: as many as pay and fit in memory.
            Changes cost and memory, not results.

    Its methods raise ValueError, before anything is computed, where the memory does not suffice.
    """

    def __init__(
        self, model: Yoco, batch_size: int | None = 1, prefill_chunk: int | None = None
    ) -> None:
        self.model, self.batch_size, self.prefill_chunk = model, batch_size, prefill_chunk
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # Triton launches on the current device

    @torch.inference_mode()
    def score(
        self, requests: Sequence[ScoreRequest], begin: Progress, progress: Progress
    ) -> Iterator[tuple[int, Score]]:
        """Yields (index of the request, its score), each as soon as it is known.

        Args:
            begin: told once, before anything is computed, how many tokens will be fed.
            progress: told how many tokens have been fed since it was last told.
        """
        for index, request in enumerate(requests):
            if len(request.continuation) == 0:
                yield index, Score(0.0, True)
        asked = [index for index, request in enumerate(requests) if len(request.continuation)]
        sequences = [
            np.concatenate((requests[i].context, requests[i].continuation[:-1])) for i in asked
        ]
        items = merge(sequences, [len(requests[i].context) - 1 for i in asked])
        afford = self._afford(items)
        limits = Limits(self.batch_size or afford.chunk, afford.chunk, afford.states)
        steps = plan(items, limits)
        begin(sum(step.tokens for step in steps))
        # A step's scores are read when the next one has been launched, so that the device does not
        # wait for the host to prepare it.
        launched: _Scores | None = None
        for step, walk in self._walk(steps, afford.chunk, progress):
            targets = [
                (asked[r], requests[asked[r]].continuation)
                for leaf in _leaves(step.nodes)
                for r in leaf.item.requests
            ]
            (node, *others) = step.nodes
            if others or node.total <= afford.chunk:
                outputs = self._outputs_packed(step, walk, progress)
            else:
                outputs = self._outputs_long(node.item, walk, progress)
            counts = [len(leaf.item.requests) for leaf in _leaves(step.nodes)]
            scores = _Scores(self.model, targets, counts, outputs, afford.logits)
            if launched is not None:
                yield from launched.read()
            launched = scores
        if launched is not None:
            yield from launched.read()

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerateRequest], begin: Progress, progress: Progress
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of the request, new token ids), each as soon as it is complete.

        `begin` and `progress` as in `score`; they count prompt tokens.
        """
        contexts = [request.context for request in requests]
        items = merge(contexts, [len(context) - 1 for context in contexts])
        room = max((request.max_tokens for request in requests), default=0)
        chunk = self._afford(items, room).chunk
        steps = plan(items, Limits())
        begin(sum(step.tokens for step in steps))
        decoder = None
        for step, walk in self._walk(steps, chunk, progress, room):
            (leaf,) = step.nodes
            walk.feed(leaf.item, len(leaf.item.tokens) - 1)
            decoder = decoder or self.model.decoder(walk.cache)
            for index in leaf.item.requests:
                yield index, _decode(requests[index], decoder)
            progress(1)

    def _afford(self, items: Sequence[Item], room: int = 0) -> Budget:
        longest = max((len(item.tokens) for item in items), default=0)
        model = self.model
        return budget(model.config, model.dtype, model.device, longest + room, self.prefill_chunk)

    def _walk(
        self, steps: Sequence[Step], chunk: int, progress: Progress, room: int = 0
    ) -> Iterator[tuple[Step, _Walk]]:
        """Feeds what branches share, and hands over the steps that complete items."""
        longest = max((step.resume + step.tokens for step in steps), default=0)
        walk = _Walk(self.model, longest + room, chunk, progress)
        for step in steps:
            walk.go_back(step.resume, step.last)
            if step.snapshot:
                walk.feed(step.nodes[0].item, step.nodes[0].end)
                walk.keep()
            else:
                yield step, walk

    def _outputs_long(self, item: Item, walk: _Walk, progress: Progress) -> Iterator[Tensor]:
        """The model's output for the asked positions of an item: [T, dim] at a time."""
        walk.feed(item, item.first)
        for start in range(item.first, len(item.tokens), walk.chunk):
            ids = walk.ids(item.tokens[start : start + walk.chunk])
            x = self.model.prefill(ids, walk.cache)
            count = len(ids)
            positions = torch.arange(start, start + count, device=x.device)
            causal = Spans((Span(0, count, 0, start + count, causal=True),))
            yield self.model.predict(x, positions, walk.cache, causal)
            progress(count)

    def _outputs_packed(self, step: Step, walk: _Walk, progress: Progress) -> Iterator[Tensor]:
        """The model's output for the asked positions of all items of a step: one [T, dim].

        The trees are fed level by level: the inner nodes of a level as one packed batch, whose
        states the nodes below start from, and its leaves as another.
        """
        model, cache = self.model, walk.cache
        places: dict[Node, int] = {}  # of a node's first token in the cache
        rows: dict[Node, int] = {}  # of a leaf's first asked position in the outputs below
        outputs, count, state = [], 0, cache.state
        level = [(node, 0) for node in step.nodes]
        while level:
            inner = [pair for pair in level if pair[0].children]
            leaves = [pair for pair in level if not pair[0].children]
            if leaves:
                first = cache.filled
                x, _ = self._feed_packed(leaves, state, walk, keep=False)
                asked = []
                for node, _ in leaves:
                    places[node] = first
                    rows[node], n = count, node.end - node.item.first
                    first += node.end - node.start
                    asked.append(np.arange(first - n, first) - (cache.filled - len(x)))
                    count += n
                outputs.append(x[walk.ids(np.concatenate(asked))])
            if inner:
                first = cache.filled
                _, state = self._feed_packed(inner, state, walk, keep=True)
                for node, _ in inner:
                    places[node] = first
                    first += node.end - node.start
            level = [(child, i) for i, (node, _) in enumerate(inner) for child in node.children]

        order, positions, spans = [], [], []

        def read(nodes: Sequence[Node]) -> tuple[int, int]:
            """Queries of the leaves below, in order; and who of them reads what."""
            begin = len(order)
            for node in nodes:
                place, length = places[node], node.end - node.start
                if node.children:
                    spans.append(Span(*read(node.children), place, place + length, False))
                else:
                    n, query = node.end - node.item.first, len(order)
                    order.extend(range(rows[node], rows[node] + n))
                    positions.extend(range(node.item.first, node.end))
                    spans.append(Span(query, query + n, place, place + length, True))
            return begin, len(order)

        everyone = read(step.nodes)
        if step.resume:
            spans.append(Span(*everyone, 0, step.resume, False))
        x = torch.cat(outputs)[walk.ids(np.array(order))]
        yield model.predict(x, walk.ids(np.array(positions)), cache, Spans(tuple(spans)))
        progress(step.tokens)

    def _feed_packed(
        self, level: Sequence[tuple[Node, int]], state: SelfState, walk: _Walk, keep: bool
    ) -> tuple[Tensor, SelfState | None]:
        """Feeds nodes, each from the state whose index stands beside it."""
        nodes, sources = zip(*level, strict=True)
        sequences = Sequences(
            lengths=tuple(node.end - node.start for node in nodes),
            starts=tuple(node.start for node in nodes),
            device=self.model.device,
            sources=sources,
        )
        ids = np.concatenate([node.item.tokens[node.start : node.end] for node in nodes])
        return self.model.feed(walk.ids(ids), sequences, state, walk.cache, keep)


class _Scores:
    """Scores of requests on their way from the device.

    Args:
        targets: the requests' indices and continuations, those of one item behind each other.
        counts: of each item, how many requests it serves.
        outputs: the model's output [T, dim] at a time, for the items' asked positions in order.
        most: how many logits may exist at a time.
    """

    def __init__(
        self,
        model: Yoco,
        targets: Sequence[tuple[int, TokenIds]],
        counts: Sequence[int],
        outputs: Iterator[Tensor],
        most: int,
    ) -> None:
        self._indices = [index for index, _ in targets]
        # One row for each request of an item; the items' positions follow each other.
        lengths, request = [], 0
        for count in counts:
            lengths.append(len(targets[request][1]))
            request += count
        wanted = np.zeros((max(counts), sum(lengths)), dtype=np.int64)
        spans, start, request = [], 0, 0
        for count, length in zip(counts, lengths, strict=True):
            for row in range(count):
                wanted[row, start : start + length] = targets[request + row][1]
                spans.append((row, start, start + length))
            start, request = start + length, request + count
        wanted = torch.from_numpy(wanted).to(model.device)
        logprobs, missed = _gather(model, wanted, outputs, most)
        row, begin, end = torch.tensor(spans, device=model.device).T
        sums = torch.stack(
            [x[row, end] - x[row, begin] for x in map(_running, (logprobs, missed))]
        )
        self._ready = None
        if sums.is_cuda:
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._sums = sums

    def read(self) -> Iterator[tuple[int, Score]]:
        """(index of the request, its score) of each request, once they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        for index, logprob, missed in zip(self._indices, *self._sums.tolist(), strict=True):
            yield index, Score(logprob, missed == 0)


def _gather(
    model: Yoco, wanted: Tensor, outputs: Iterator[Tensor], most: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the `wanted` tokens, and 1 where another one is likelier.

    Block by block, so that no [T, vocabulary] tensor of a long text ever exists.

    Args:
        wanted: [rows, T], of each position several.
        outputs: the model's output, T positions in all.
        most: how many logits may exist at a time.

    Returns:
        float64 [rows, T] each.
    """
    logprobs, missed, start = [], [], 0
    rows = max(1, most // model.config.vocab_size)
    for output in outputs:
        for block in output.split(rows):
            logits = model.output_projection(block)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            tokens = wanted[:, start : start + len(block)]
            logprobs.append(logits.gather(1, tokens.T).T - logits.logsumexp(-1))
            missed.append(logits.argmax(-1) != tokens)
            start += len(block)
    return torch.cat(logprobs, 1).double(), torch.cat(missed, 1).double()


def _running(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, ... numbers of each row."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _leaves(nodes: Sequence[Node]) -> Iterator[Node]:
    for node in nodes:
        if node.children:
            yield from _leaves(node.children)
        else:
            yield node


def _decode(request: GenerateRequest, decoder: Decoder) -> list[int]:
    """Generates after the cached tokens and the last one of the context."""
    new: list[int] = []
    if request.max_tokens:
        decoder.start(int(request.context[-1]))
    while len(new) < request.max_tokens:
        decoder.step()
        if request.sampling.temperature:
            decoder.token.fill_(_draw(decoder.logits, request.sampling))
        token = int(decoder.token)
        if token in request.end_tokens:
            break
        new.append(token)
        if request.finished(new):
            break
    return new


class _Walk:
    """The cache on its way through the tree of prefixes, with snapshots along the present path."""

    def __init__(self, model: Yoco, capacity: int, chunk: int, progress: Progress) -> None:
        self.cache = model.new_cache(capacity)
        self.chunk = chunk
        self._model, self._progress = model, progress
        self._snapshots = [self.cache.state]

    def ids(self, tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(tokens).to(self._model.device)

    def go_back(self, length: int, last: bool) -> None:
        """Back to the snapshot after `length` tokens, which is dropped if this is the last time."""
        while self._snapshots[-1].length > length:
            self._snapshots.pop()
        self.cache.restore(self._snapshots[-1])
        if last:
            self._snapshots.pop()

    def keep(self) -> None:
        """Takes a snapshot."""
        self._snapshots.append(self.cache.state)

    def feed(self, item: Item, end: int) -> None:
        """Prefills the item's tokens up to `end`."""
        while (start := self.cache.state.length) < end:
            stop = min(end, start + self.chunk)
            self._model.prefill(self.ids(item.tokens[start:stop]), self.cache)
            self._progress(stop - start)


def _draw(logits: Tensor, sampling: Sampling) -> int:
    """Draws from logits [vocabulary], at a temperature above 0."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    ordered, tokens = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    # The smallest set of likeliest tokens whose probability reaches top_p, the first in any case.
    before = probabilities.cumsum(-1) - probabilities
    before[0] = -1.0
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1)])
