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

from yoco_eval.model import Cache, SelfState, Yoco

from .prefixes import Item, Step, merge, plan

_LOGITS = 1 << 25  # at most this many logits exist at a time
_CHUNK = {"cpu": 1024, "cuda": 16384}

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
        batch_size: how many continuations of one prefix are scored side by side at most.
        prefill_chunk: how many tokens are fed at a time. Changes cost and memory, not results.
    """

    def __init__(
        self, model: Yoco, batch_size: int = 1, prefill_chunk: int | None = None
    ) -> None:
        self.model = model
        self.chunk = prefill_chunk or _CHUNK.get(model.device.type, _CHUNK["cpu"])
        self.batch_size = batch_size

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
        steps = plan(items, self.batch_size, self.chunk)
        begin(sum(step.tokens for step in steps))
        for step, walk in self._walk(steps, progress):
            if len(step.items) == 1:
                outputs = self._outputs_one(step, walk, progress)
            else:
                outputs = self._outputs_side_by_side(step, walk, progress)
            targets = [
                [requests[asked[r]].continuation for r in item.requests] for item in step.items
            ]
            for item, scores in zip(step.items, self._scores(outputs, targets), strict=True):
                yield from zip((asked[r] for r in item.requests), scores, strict=True)

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
        steps = plan(items)
        begin(sum(step.tokens for step in steps))
        for step, walk in self._walk(steps, progress, room):
            (item,) = step.items
            prompt = walk.feed(item, len(item.tokens) - 1)
            for index in item.requests:
                walk.cache.restore(prompt)
                yield index, self._decode(requests[index], walk.cache)
            progress(1)

    def _walk(
        self, steps: Sequence[Step], progress: Progress, room: int = 0
    ) -> Iterator[tuple[Step, _Walk]]:
        """Feeds each step's shared tokens, then hands it over."""
        longest = max((len(item.tokens) for step in steps for item in step.items), default=0)
        walk = _Walk(self.model, longest + max(room, self.chunk), self.chunk, progress)
        for step in steps:
            walk.go_back(step.resume)
            walk.keep = list(step.snapshots)
            walk.feed(step.items[0], step.shared)
            yield step, walk

    def _outputs_one(self, step: Step, walk: _Walk, progress: Progress) -> Iterator[Tensor]:
        """The model's output for the asked positions of a step's only item: [T, dim] at a time."""
        (item,) = step.items
        walk.feed(item, item.first)
        for start in range(item.first, len(item.tokens), self.chunk):
            ids = walk.ids(item.tokens[start : start + self.chunk])
            x = self.model.prefill(ids, walk.cache)
            count = len(ids)
            positions = torch.arange(start, start + count, device=x.device)
            causal = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
            yield self.model.predict(x, positions, walk.cache, causal)
            progress(count)

    def _outputs_side_by_side(
        self, step: Step, walk: _Walk, progress: Progress
    ) -> Iterator[Tensor]:
        """The model's output for the asked positions of all items: one [positions, dim].

        The self-decoder takes the items' own tokens as a padded batch, all from the same state.
        Their keys and values are packed behind the shared cache, where each item sees its own.
        """
        model, cache, device = self.model, walk.cache, self.model.device
        rests = [item.tokens[step.shared :] for item in step.items]
        lengths = torch.tensor([len(rest) for rest in rests], device=device)
        ids = torch.nn.utils.rnn.pad_sequence([walk.ids(rest) for rest in rests], batch_first=True)
        offsets = torch.arange(ids.shape[1], device=device)
        fed = offsets < lengths[:, None]
        firsts = torch.tensor([item.first - step.shared for item in step.items], device=device)
        asked = fed & (offsets >= firsts[:, None])

        x, _ = model.self_decode(ids, cache.state.expand(len(rests)))
        keys, values = model.cross_decoder.keys_values(x, step.shared + offsets)
        cache.append(*(part.transpose(1, 2)[fed].transpose(0, 1)[None] for part in (keys, values)))
        rows, columns = fed.nonzero(as_tuple=True)
        own = rows[asked[fed]][:, None] == rows
        visible = own & (columns <= columns[asked[fed]][:, None])
        yield model.predict(x[asked][None], step.shared + columns[asked[fed]], cache, visible)
        progress(int(lengths.sum()))

    def _scores(
        self, outputs: Iterator[Tensor], targets: Sequence[Sequence[TokenIds]]
    ) -> list[list[Score]]:
        """Scores per item and request: the items' asked positions follow each other in `outputs`.

        Log-probabilities are gathered block by block, so that no [T, vocabulary] tensor of a long
        text ever exists.
        """
        device, widest = self.model.device, max(map(len, targets))
        columns = torch.zeros(
            widest, sum(len(item[0]) for item in targets), dtype=torch.long, device=device
        )
        spans, start = [], 0
        for item in targets:
            for row, continuation in enumerate(item):
                columns[row, start : start + len(continuation)] = torch.as_tensor(continuation)
            spans.append((start, start := start + len(item[0])))
        logprobs, greedy, start = [], [], 0
        rows = max(1, _LOGITS // self.model.config.vocab_size)
        for output in outputs:
            for block in output.split(rows):
                logits = self.model.output_projection(block)
                logits = logits if logits.dtype == torch.float64 else logits.float()
                wanted = columns[:, start : start + len(block)]
                logprobs.append(logits.log_softmax(-1).gather(1, wanted.T).T.double())
                greedy.append(logits.argmax(-1) == wanted)
                start += len(block)
        logprobs, greedy = torch.cat(logprobs, 1), torch.cat(greedy, 1)
        return [
            [
                Score(logprobs[row, a:b].sum().item(), bool(greedy[row, a:b].all()))
                for row in range(len(item))
            ]
            for item, (a, b) in zip(targets, spans, strict=True)
        ]

    def _decode(self, request: GenerateRequest, cache: Cache) -> list[int]:
        """Generates after the cached tokens and the last one of the context."""
        model, new, token = self.model, [], int(request.context[-1])
        sees_itself = torch.ones(1, 1, dtype=torch.bool, device=model.device)
        while len(new) < request.max_tokens:
            position = torch.tensor([cache.state.length], device=model.device)
            x = model.prefill(torch.tensor([token], device=model.device), cache)
            output = model.predict(x, position, cache, sees_itself)
            token = _next_token(model.output_projection(output)[0], request.sampling)
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
        self.keep: list[int] = []  # lengths at which to take the next snapshots
        self._model, self._chunk, self._progress = model, chunk, progress
        self._snapshots = [self.cache.state]

    def ids(self, tokens) -> Tensor:
        return torch.from_numpy(tokens).to(self._model.device)

    def go_back(self, length: int) -> None:
        """Back to the snapshot after `length` tokens; deeper ones are dropped."""
        while self._snapshots[-1].length > length:
            self._snapshots.pop()
        self.cache.restore(self._snapshots[-1])

    def feed(self, item: Item, end: int) -> SelfState:
        """Prefills the item's tokens up to `end`, taking snapshots on the way."""
        while (start := self.cache.state.length) < end:
            stop = min(end, start + self._chunk, *(p for p in self.keep if p > start))
            self._model.prefill(self.ids(item.tokens[start:stop]), self.cache)
            if stop in self.keep:
                self._snapshots.append(self.cache.state)
            self._progress(stop - start)
        return self.cache.state


def _next_token(logits: Tensor, sampling: Sampling) -> int:
    """Draws from logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
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
