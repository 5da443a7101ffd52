"""The engine: token ids in, log-probabilities or new tokens out. It knows no text.

A prompt is fed in chunks, without predictions (early exit: what a model computes for these alone is
left out); predictions are made of the positions that are asked for. Sequences that share a prefix
share its prefill, and so does a batch of them: its members read one cache. Which model it is, only
the model knows: what is asked of it is in `yoco_eval.model.interface`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from yoco_eval.kernels.logits import normaliser
from yoco_eval.model import Model, Rows, Sequences, Span, Spans, State, to_device
from yoco_eval.model.interface import concatenate, split, take

from .garbage import collecting_new_only
from .generation import Generation, stored
from .memory import Fit, fit, fit_batch, free_bytes
from .pages import page_size, rounded
from .prefixes import Item, Limits, Node, Step, merge, nest, plan
from .requests import GenerateRequest, Progress, Score, ScoreRequest, TokenIds, check_number

# Texts decoded side by side, unless fewer are asked for or fit: with more, their states and caches
# take far longer to read than the weights, which all share.
_MOST = 512


class Engine:
    """Scores and generates with a model.

    Args:
        model: the model, on its device.
        batch_size: how many sequences are fed side by side at most, within `prefill_chunk` tokens,
            and how many answers are decoded side by side; None: as many as these and the memory for
            their states allow.
        prefill_chunk: how many tokens are fed at a time; None: as many as pay and fit in memory.
            Changes cost and memory, not results.
        sharing: how many processes such as this one share the device's memory.

    Raises:
        ValueError: a number is below 1. Its methods raise it, before anything is computed, where
            the memory does not suffice, and `memory.OutOfMemory` where it turns out not to; and
            where what the model computes overflows.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int | None = 1,
        prefill_chunk: int | None = None,
        sharing: int = 1,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("prefill_chunk", prefill_chunk)):
            if number is not None and number < 1:
                raise ValueError(f"{name} {number} is below 1")
        self.model, self.batch_size, self.prefill_chunk = model, batch_size, prefill_chunk
        self._sharing = sharing

    @torch.inference_mode()
    def score(
        self, requests: Sequence[ScoreRequest], begin: Callable[[int], object], progress: Progress
    ) -> Iterator[tuple[int, Score]]:
        """Yields (index of the request, its score), each as soon as it is known.

        Args:
            begin: told once, before anything is computed, how many tokens will be fed.
            progress: told how it goes.
        """
        for index, request in enumerate(requests):
            if len(request.continuation) == 0:
                yield index, Score(0.0, True)
        asked = [(i, request) for i, request in enumerate(requests) if len(request.continuation)]
        sequences = [np.concatenate((r.context, r.continuation[:-1])) for _, r in asked]
        items = nest(merge(sequences, [len(request.context) - 1 for _, request in asked]))
        lengths = [len(item.tokens) for item in items]
        block = self.model.block
        spare = block - 1  # slots behind each text
        slots = sum(lengths) + spare * len(items)
        fitted = self._fit(max(lengths, default=0), slots, spare=spare)
        fitted.check()
        limits = fitted.limits(self.batch_size, self.model.costs, self.model.dtype, spare)
        steps = plan(items, limits, block)
        self._check_snapshots(steps, fitted, limits.room)
        begin(sum(step.tokens for step in steps))
        with fitted.watch(), collecting_new_only():
            yield from self._scores(steps, asked, fitted, limits, progress)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[GenerateRequest],
        begin: Callable[[int], object],
        progress: Progress,
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of the request, new token ids), each as soon as it is complete.

        `begin` and `progress` as in `score`; they count tokens of prompts and of answers, which are
        announced as many as may be.
        """
        indices = [index for index, request in enumerate(requests) if request.max_tokens]
        asked = [requests[index] for index in indices]
        run = self._generation(asked, progress) if asked else None
        begin(run.tokens if run else 0)
        for index, request in enumerate(requests):
            if not request.max_tokens:
                yield index, []
        if run:
            mends = ("lower batch_size",) if run.batch.size > 1 else ()
            watch = run.fitted.watch(run.batch.need, *mends)
            with watch, collecting_new_only():
                for i, tokens in run.answers():
                    yield indices[i], tokens

    def longest(self) -> int:
        """The longest text, in tokens, that the memory takes which is free now, where it is fed as
        many at a time as pay: smaller chunks would leave room for more, but for no snapshots."""
        return self._fit(1).longest

    def _generation(self, requests: Sequence[GenerateRequest], progress: Progress) -> Generation:
        """Refuses what does not fit, one text at a time at the least."""
        model, costs, dtype = self.model, self.model.costs, self.model.dtype
        items = merge(
            [request.context for request in requests],
            [len(request.context) - 1 for request in requests],
        )
        if model.block > 1:  # answers to one prompt share its whole blocks alone, too
            items = [replace(item, requests=(index,)) for item in items for index in item.requests]
        one_by_one = plan(items, Limits(), model.block)
        kept = stored(one_by_one, requests, page_size(model.device, model.block))
        lengths = [len(request.context) + request.max_tokens for request in requests]
        longest = max(lengths)
        beside = {"spare": kept.longest + kept.page - longest, "logits": 0}
        fitted = self._fit(longest, None if self.batch_size == 1 else sum(lengths), **beside)
        if fitted.need + kept.states * costs.state_bytes(dtype) > fitted.free:
            fitted = self._fit(longest, **beside)
        fitted.check()
        self._check_snapshots(one_by_one, fitted)
        batch = fit_batch(
            fitted, costs, dtype, model.config.vocab_size, kept, self.batch_size or _MOST
        )
        limits = batch.limits(fitted, costs, dtype)
        steps = plan(items, limits, model.block)
        return Generation(model, requests, steps, limits, batch, fitted, progress)

    def _scores(
        self,
        steps: Sequence[Step],
        asked: Sequence[tuple[int, ScoreRequest]],
        fitted: Fit,
        limits: Limits,
        progress: Progress,
    ) -> Iterator[tuple[int, Score]]:
        """`score`, of the steps that were planned for the (index, request)s of `asked`."""
        launched: _Scores | None = None
        try:
            for step, walk in self._walk(steps, fitted, progress):
                packed = not fitted.feeds_alone(step, limits)
                outputs = self._outputs_packed if packed else self._outputs_long
                scores = _Scores(
                    self.model,
                    list(_answers(step, asked)),
                    outputs(step, walk, progress),
                    fitted.logits,
                )
                # On a GPU, a batch's scores are read when the next one has been launched, so that
                # the device does not wait for the host to prepare it.
                waiting, launched = launched, scores
                if waiting is not None:
                    yield from waiting.read()
                if not (packed and self.model.device.type == "cuda"):
                    scores, launched = launched, None
                    yield from scores.read()
        except (Exception, KeyboardInterrupt):
            if launched is not None:
                yield from launched.read()  # nothing that was computed is lost
            raise
        if launched is not None:
            yield from launched.read()

    def _fit(self, length: int, tokens: int | None = None, **beside: int) -> Fit:
        """Of contexts of up to `length` tokens, of `tokens` in all; `beside` as in `memory.fit`."""
        model, chunk, group = self.model, self.prefill_chunk, self.model.group
        if group is None:
            beside["sharing"] = self._sharing
        else:  # all have to come to the same plan, and may share memory with more or fewer
            free = group.least(free_bytes(model.device) // self._sharing)
            beside |= {"parts": group.size, "free": free}
        return fit(model.costs, model.dtype, model.device, length, chunk, True, tokens, **beside)

    def _check_snapshots(self, steps: Sequence[Step], fitted: Fit, room: int = 0) -> None:
        """Refuses what branches so often that its snapshots do not fit."""
        kept = max((step.kept for step in steps), default=0)
        fitted.check_snapshots(kept * self.model.costs.state_bytes(self.model.dtype), room)

    def _walk(
        self, steps: Sequence[Step], fitted: Fit, progress: Progress
    ) -> Iterator[tuple[Step, _Walk]]:
        """Feeds what branches share, and hands over the steps that complete items."""
        spare = self.model.block - 1
        slots = (step.resume + step.tokens + step.leaves * spare for step in steps)
        longest = max(slots, default=0)
        walk = _Walk(self.model, longest, fitted, progress)
        for step in steps:
            walk.go_back(step.resume, step.last)
            if step.snapshot:
                walk.feed(step.nodes[0].item, step.nodes[0].end)
                walk.keep()
            else:
                yield step, walk

    def _outputs_long(self, step: Step, walk: _Walk, progress: Progress) -> Iterator[Tensor]:
        """The model's output for the asked positions of a step's only item: [T, ...] at a time."""
        item = step.nodes[0].item
        walk.feed(item, item.first)
        for start in range(item.first, len(item.tokens), walk.fitted.chunk):
            ids = walk.ids(item.tokens[start : start + walk.fitted.chunk])
            rows = self.model.prefill(ids, walk.cache)
            for first in range(0, len(ids), walk.fitted.packed):
                count = min(walk.fitted.packed, len(ids) - first)
                part = take(rows, slice(first, first + count))
                end = start + first + count
                positions = torch.arange(end - count, end, device=ids.device)
                causal = Spans((Span(0, count, 0, end, causal=True, start=0),))
                yield self.model.predict(part, positions, walk.cache, causal)
            progress(len(ids))

    def _outputs_packed(self, step: Step, walk: _Walk, progress: Progress) -> Iterator[Tensor]:
        """The model's output for the asked positions of all items of a step: one [T, ...]."""
        places, asked = self._feed_levels(step, walk)
        leaves = [leaf for node in step.nodes for leaf in node.leaves()]
        positions = np.concatenate([np.arange(leaf.item.first, leaf.end) for leaf in leaves])
        rows = concatenate([asked[leaf] for leaf in leaves])
        del asked
        spans = Spans(tuple(_spans(step, places)))
        yield self.model.predict(rows, walk.ids(positions), walk.cache, spans)
        progress(step.tokens)

    def _feed_levels(self, step: Step, walk: _Walk) -> tuple[dict[Node, int], dict[Node, Rows]]:
        """Feeds a step's trees level by level.

        The inner nodes of a level are one packed batch, whose states the nodes below start from;
        its leaves are another.

        Returns:
            Of each node, where its first token lies in the cache; and of each leaf, the rows of its
            asked positions.
        """
        places: dict[Node, int] = {}
        asked: dict[Node, Rows] = {}
        state, level = walk.cache.state, [(node, 0) for node in step.nodes]
        while level:
            inner = [pair for pair in level if pair[0].children]
            leaves = [pair for pair in level if not pair[0].children]
            if leaves:
                rows, _ = self._feed_packed(leaves, state, walk, places, keep=False)
                parts = split(rows, [leaf.end - leaf.start for leaf, _ in leaves])
                for (leaf, _), part in zip(leaves, parts, strict=True):
                    asked[leaf] = take(part, slice(leaf.item.first - leaf.start, None))
            if inner:
                _, state = self._feed_packed(inner, state, walk, places, keep=True)
            level = [(child, i) for i, (node, _) in enumerate(inner) for child in node.children]
        return places, asked

    def _feed_packed(
        self,
        level: Sequence[tuple[Node, int]],
        state: State,
        walk: _Walk,
        places: dict[Node, int],
        keep: bool,
    ) -> tuple[Rows, State | None]:
        """Feeds nodes, each from the state whose index stands beside it, and notes their places."""
        nodes, sources = zip(*level, strict=True)
        sequences = Sequences(
            lengths=tuple(node.end - node.start for node in nodes),
            starts=tuple(node.start for node in nodes),
            device=self.model.device,
            sources=sources,
        )
        for node, place in zip(nodes, walk.claim(sequences.lengths), strict=True):
            places[node] = place
        ids = np.concatenate([node.item.tokens[node.start : node.end] for node in nodes])
        return self.model.feed(walk.ids(ids), sequences, state, walk.cache, keep)


def _spans(step: Step, places: Mapping[Node, int]) -> Iterator[Span]:
    """Who reads what: queries are the asked positions of the step's leaves, in order."""
    query = 0

    def below(nodes: Sequence[Node]) -> Iterator[Span]:
        nonlocal query
        for node in nodes:
            place, first = places[node], query
            yield from below(node.children)
            if not node.children:
                query += node.end - node.item.first
            end = place + node.end - node.start
            yield Span(first, query, place, end, not node.children, node.start)

    yield from below(step.nodes)
    if step.resume:
        yield Span(0, query, 0, step.resume, causal=False, start=0)


def _answers(
    step: Step, asked: Sequence[tuple[int, ScoreRequest]]
) -> Iterator[tuple[int, int, TokenIds]]:
    """Of each request that a step serves: its index, where among the step's outputs the
    predictions of its continuation begin, and the continuation."""
    start = 0
    for node in step.nodes:
        for leaf in node.leaves():
            for index, request in map(asked.__getitem__, leaf.item.requests):
                skipped = len(request.context) - 1 - leaf.item.first
                yield index, start + skipped, request.continuation
            start += leaf.end - leaf.item.first


class _Scores:
    """Scores of requests on their way from the device.

    Args:
        answers: from `_answers`.
        outputs: the model's output [T, ...] at a time, for the items' asked positions in order.
        most: how many logits may exist at a time.
    """

    def __init__(
        self,
        model: Model,
        answers: Sequence[tuple[int, int, TokenIds]],
        outputs: Iterator[Tensor],
        most: int,
    ) -> None:
        self._indices, self._dtype = [index for index, _, _ in answers], model.dtype
        sizes = torch.tensor([len(tokens) for _, _, tokens in answers])
        positions = np.concatenate([start + np.arange(len(tokens)) for _, start, tokens in answers])
        tokens = np.concatenate([np.asarray(tokens, dtype=np.int64) for _, _, tokens in answers])
        order = np.argsort(positions, kind="stable")
        found = _gather(model, positions[order], tokens[order], outputs, most)
        # Back to the requests' order, in which each has its own stretch to sum.
        back = to_device(torch.from_numpy(np.argsort(order)), found.device)
        lengths = to_device(sizes, found.device)
        # Checked lengths would be read back from the device, and wait for it.
        sums = torch.segment_reduce(found[back], "sum", lengths=lengths, unsafe=True)
        self._ready, self._sums = None, sums
        if sums.is_cuda:
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(sums.device))

    def read(self) -> Iterator[tuple[int, Score]]:
        """(index of the request, its score) of each request, once they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        for index, (logprob, missed) in zip(self._indices, self._sums.tolist(), strict=True):
            check_number(logprob, self._dtype)
            yield index, Score(logprob, missed == 0)


def _gather(
    model: Model, positions: np.ndarray, tokens: np.ndarray, outputs: Iterator[Tensor], most: int
) -> Tensor:
    """Log-probabilities of tokens at positions, and 1 where another token is likelier.

    Block by block, so that no [T, vocabulary] tensor of a long text ever exists.

    Args:
        positions: [n], ascending, in the T positions of `outputs`.
        tokens: [n].
        most: how many logits may exist at a time.

    Returns:
        float64 [n, 2].
    """
    found, start = [], 0
    rows = max(1, most // model.config.vocab_size)
    pairs = to_device(torch.from_numpy(np.stack((positions, tokens))), model.device)
    for output in outputs:
        for block in output.split(rows):
            logits = model.logits(block)
            norms, likeliest = normaliser(logits)
            begin, end = np.searchsorted(positions, (start, start + len(block)))
            row, token = pairs[0, begin:end] - start, pairs[1, begin:end]
            total = norms[row]
            total.masked_fill_(total.isinf(), math.nan)  # beside infinity, others are no numbers
            logprobs = logits[row, token] - total
            missed = likeliest[row] != token
            found.append(torch.stack((logprobs.double(), missed.double()), -1))
            start += len(block)
    return torch.cat(found)


class _Walk:
    """The cache on its way through the tree of prefixes, with snapshots along the present path."""

    def __init__(self, model: Model, capacity: int, fitted: Fit, progress: Progress) -> None:
        self.cache = model.new_cache(capacity)
        self.fitted = fitted
        self._model, self._progress = model, progress
        self._snapshots = [self.cache.state]

    def ids(self, tokens: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(tokens), self._model.device)

    def claim(self, lengths: Sequence[int]) -> list[int]:
        """The first slots of sequences that are fed next, in blocks of their own."""
        place, block, places = self.cache.filled, self._model.block, []
        for length in lengths:
            places.append(place)
            place += rounded(length, block)
        if block > 1:
            own = zip(places, lengths, strict=True)
            taken = tuple((first, first + length) for first, length in own)
            self.cache.room = (*taken, (place, self.cache.capacity))
        return places

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
            stop = min(end, start + self.fitted.chunk)
            ids = self.ids(item.tokens[start:stop])
            self._model.prefill(ids, self.cache, asked=False)
            self._progress(stop - start)
