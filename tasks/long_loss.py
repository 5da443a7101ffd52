"""The tasks yoco_long_loss_*: loss by position in long documents.

A document is cut into buckets of positions. Each is asked for as the continuation of what is before
it, which any backend can score; where prefixes are shared, it costs one pass over the document.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import datasets
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from tqdm import tqdm

from . import documents
from .by_length import BY_LENGTH, digest, digests_by_length, metric_at
from .evaluated_model import check_positions, max_positions, token_counter
from .prompts import TokenCounter
from .settings import count, lengths, read_settings, setting, text, told

logger = logging.getLogger(__name__)

_UNSCORED = 8  # tokens, at most, at the beginning of a document: something must be read first
_SLACK = 32  # tokens by which a bucket may end early
_SHORTEST = 64  # tokens of a bucket, at least
# Tokens of the longest context by default: of a model that does not tell its positions, and of any,
# because few of the default documents are longer.
_UNKNOWN, _LONGEST = 2**14, 2**17


@dataclass(frozen=True)
class Settings:
    """What a user can set of the tasks.

    Attributes:
        context_lengths: where buckets end, in tokens, special ones before the text included;
            default: 1024 and its doubles up to the model's positions, 128K at most, 16K where
            nothing tells how many the model has.
        samples: documents.
        data: a folder with documents, or with data sets such as those on the hub.
    """

    context_lengths: list[int] | None = setting(lengths, None)
    samples: int = setting(count, 5)
    data: str | None = setting(text, None)


class Document(NamedTuple):
    """A text, the characters after which it is cut, and the tokens between one cut and the next."""

    name: str
    text: str
    cuts: list[int]
    tokens: list[int]


class LongLoss(ConfigurableTask):
    """lm-eval's task with documents, requests and metrics of its own; see the classes below.

    Attributes:
        ends: where buckets end, in tokens.
    """

    source: Callable[[str, str | None, int], Iterator[tuple[str, str]]]

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self.settings = read_settings(Settings, metadata)
        self.ends = ends = bucket_ends(
            self.settings.context_lengths, max_positions(metadata, scored=True)
        )
        check_positions(ends, metadata, scored=True)
        self.settings = replace(self.settings, context_lengths=ends)
        losses = ["loss", *(metric_at(name, end) for name in ("loss", "loss_to") for end in ends)]
        aggregations = {**dict.fromkeys(losses, nats_per_token), "bits_per_byte": "bits_per_byte"}
        own = {
            "metadata": {**told(metadata, self.settings), BY_LENGTH: ["loss", "loss_to"]},
            "metric_list": [
                {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
                for metric, aggregation in aggregations.items()
            ],
            # Says no more than that the metrics above are not to be looked up: see process_results.
            "process_results": "process_results",
        }
        super().__init__(config={k: v for k, v in config.items() if k != "class"} | own)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Reads documents and cuts them, until there are enough.

        Raises:
            ValueError: the source cannot be read, or holds too few long documents.
        """
        task, wanted = self.config.task, self.settings.samples
        ends, data = self.ends, self.settings.data
        counter = token_counter(self.config.metadata)
        self._documents: list[Document] = []
        too_short: list[int] = []
        with tqdm(desc=f"{task}: tokenising", total=wanted, leave=False, delay=1) as bar:
            for name, whole in type(self).source(task, data, ends[-1]):
                document = cut(name, whole, ends, counter)
                if isinstance(document, Document):
                    self._documents.append(document)
                    bar.update()
                else:
                    too_short.append(document)
                if len(self._documents) == wanted:
                    break
        if len(self._documents) < wanted:
            raise ValueError(
                _too_few(self.settings, self.ends[-1], len(self._documents), too_short)
            )
        self.dataset = {
            "test": datasets.Dataset.from_list(
                [
                    {
                        "document": index,
                        "name": document.name,
                        "tokens": document.tokens,
                        "bytes": len(document.text[document.cuts[0] :].encode()),
                    }
                    for index, document in enumerate(self._documents)
                ]
            )
        }
        logger.info("%s: %d documents of %d tokens", task, wanted, ends[-1])

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: None = None) -> str:
        return ""

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: None = None) -> str:
        return ""

    def build_all_requests(self, **options: Any) -> None:
        """As lm-eval's, but never cached: its cache does not tell one setting from another.

        The results file gets digests of the requests of each context length.
        """
        check_positions(self.ends, self.config.metadata, scored=True)
        super().build_all_requests(**{**options, "cache_requests": False})
        # Of the whole run, of which this process may have a share only.
        asked = self.doc_iterator(limit=options.get("limit"), samples=options.get("samples"))
        documents = [self._documents[doc["document"]] for _, doc in asked]
        self.config.metadata["prompts"] = digests_by_length(
            (end, digest(document.text[:begin], document.text[begin:stop]))
            for document in documents
            for end, (begin, stop) in zip(self.ends, pairwise(document.cuts), strict=True)
        )

    def construct_requests(
        self, doc: Mapping[str, Any], ctx: str, **options: Any
    ) -> list[Instance]:
        """A request for each bucket. Nothing comes before a document, no chat template either."""
        document = self._documents[doc["document"]]
        return [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(document.text[:begin], document.text[begin:end]),
                idx=index,
                metadata=options["metadata"],
            )
            for index, (begin, end) in enumerate(pairwise(document.cuts))
        ]

    def process_results(
        self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]
    ) -> dict[str, Any]:
        """Negative log-likelihood and tokens of each bucket, and of all up to it."""
        if "bypass" in self._metric_fn_list:  # --predict_only
            return super().process_results(doc, results)
        nats, tokens = [-logprob for logprob, _ in results], doc["tokens"]
        totals = list(zip(accumulate(nats), accumulate(tokens), strict=True))
        scores = {"loss": totals[-1], "bits_per_byte": (-totals[-1][0], doc["bytes"])}
        for i, end in enumerate(self.ends):
            scores[metric_at("loss", end)] = nats[i], tokens[i]
            scores[metric_at("loss_to", end)] = totals[i]
        return scores


class BookLoss(LongLoss):
    """Of books."""

    source = staticmethod(documents.books)


class CodeLoss(LongLoss):
    """Of repositories."""

    source = staticmethod(documents.code)


class LocalLoss(LongLoss):
    """Of texts that are there, without a network."""

    source = staticmethod(documents.local)


def nats_per_token(pairs: Iterable[tuple[float, int]]) -> float:
    """The mean over all tokens, not over documents."""
    nats, tokens = zip(*pairs, strict=True)
    return sum(nats) / sum(tokens)


def cut(name: str, whole: str, ends: Sequence[int], counter: TokenCounter) -> Document | int:
    """A text, cut where it has as many tokens as `ends` say, special ones included, or a few less.

    Blanks before it are left out: nothing could be cut off behind them.

    Up to each cut it has the same tokens by itself as in the whole, so that the buckets together
    have those of one pass. A text that is too short, or has no such places, is not cut; the number
    of its tokens is given.
    """
    whole = whole.lstrip()
    size = 4 * ends[-1]  # characters; books have about four per token
    while len(found := counter.ends(whole[:size])) <= ends[-1] and size < len(whole):
        size *= 2
    wanted = [_UNSCORED, *(end - counter.special for end in ends)]
    counts = [_separable(whole, found, most, counter) for most in wanted if most <= len(found)]
    if len(counts) < len(wanted) or not all(counts):
        return counter.special + len(found)
    cuts = [int(found[kept - 1]) for kept in counts]
    return Document(name, whole[: cuts[-1]], cuts, [b - a for a, b in pairwise(counts)])


def _separable(whole: str, ends: np.ndarray, most: int, counter: TokenCounter) -> int:
    """After how many tokens, `most` or up to `_SLACK` fewer, a text can be cut; 0 if nowhere.

    `ends` are the positions of the characters after its tokens.
    """
    for kept in range(most, max(0, most - _SLACK), -1):
        before = whole[: ends[kept - 1]]
        # lm-eval would move blanks at the end of a context to the continuation.
        if not before[-1:].isspace() and np.array_equal(counter.ends(before), ends[:kept]):
            return kept
    return 0


def bucket_ends(given: list[int] | None, positions: int | None) -> list[int]:
    """The lengths that were given, or those that suit a model of so many positions.

    Raises:
        ValueError: they are too close to each other.
    """
    if given is None:
        longest = min(positions or _UNKNOWN, _LONGEST)
        return [1024 << i for i in range(longest.bit_length()) if 1024 << i <= longest] or [longest]
    for begin, end in pairwise([0, *given]):
        if end - begin < _SHORTEST:
            raise ValueError(
                f"context_lengths: {end} is less than {_SHORTEST} tokens after {begin}; give "
                "lengths further apart"
            )
    return given


def _too_few(settings: Settings, longest: int, found: int, too_short: Sequence[int]) -> str:
    others = ""
    if too_short:
        most = max(too_short)
        others = f" and {len(too_short)} too short to be cut, the longest of {most} tokens"
    return (
        f"{settings.samples} documents of {longest} tokens are needed, and "
        f"{settings.data or 'the data set'} holds {found}{others}; give shorter context_lengths, "
        "fewer samples, or longer texts with --metadata data=FOLDER"
    )
