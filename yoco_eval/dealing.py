"""lm-eval's way with several processes, mended: what it finds is what one process would find.

It deals the documents of a task out in turn, and each process makes the prompts of its own. Three
things go wrong there: examples are drawn one prompt after the other, so that each process draws
others; a task with fewer documents than processes is refused; and what they have found comes back
process by process, not in the order of the documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import Any

_NOTHING = object()


def each_task(tasks: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Names and tasks of what lm-eval's `evaluate` takes, groups within it included."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from each_task(task)
        else:
            yield name, task


def deal(task: Any) -> None:
    """Has a task make the requests of one process of several as one process makes them.

    A process without a document of its own makes the requests of another's, as lm-eval needs some;
    their responses, which are known then, count nowhere.

    Args:
        task: lm-eval's, or a group, of which nothing is asked.
    """
    if "build_all_requests" in vars(task) or not hasattr(task, "build_all_requests"):
        return
    build: Callable[..., None] = task.build_all_requests

    def build_dealt(*, rank: int = 0, world_size: int = 1, **options: Any) -> None:
        asked = {name: options.get(name) for name in ("limit", "samples")}
        some = len(list(islice(task.doc_iterator(**asked), world_size)))
        if 0 < some <= rank:
            rank %= some
            options["cache_requests"] = False  # under another's name
        sampler = getattr(task, "sampler", None)
        if not hasattr(sampler, "sample"):
            return build(rank=rank, world_size=world_size, **options)
        documents = (document for _, document in task.doc_iterator(**asked))
        task.sampler = _InTurn(sampler, documents, rank, world_size)
        try:
            build(rank=rank, world_size=world_size, **options)
        finally:
            task.sampler = sampler

    task.build_all_requests = build_dealt


class _InTurn:
    """Draws a prompt's examples when those of all documents before it have been drawn.

    Args:
        sampler: lm-eval's.
        documents: of all processes, in order.
        rank, size: every `size`-th from `rank` on is this process's.
    """

    def __init__(self, sampler: Any, documents: Iterator[Any], rank: int, size: int) -> None:
        self._sampler, self._documents = sampler, documents
        self._others, self._size = rank, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample(self, n: int, eval_doc: Any = None, **options: Any) -> Any:
        for document in islice(self._documents, self._others):
            other = None if eval_doc is None else document
            self._sampler.sample(n=n, eval_doc=other, **options)
        next(self._documents, None)
        self._others = self._size - 1
        return self._sampler.sample(n=n, eval_doc=eval_doc, **options)


def put_together(parts: Sequence[Any]) -> Any:
    """What processes have found by task, as one process would have it.

    Args:
        parts: of each process; lm-eval's are the samples of each task, or their metrics by name.
    """
    if not all(isinstance(part, Mapping) for part in parts):
        return parts
    together: dict[Any, Any] = {}
    for task in dict.fromkeys(chain.from_iterable(parts)):
        found = [part.get(task, {}) for part in parts]
        if any(isinstance(one, Mapping) and one for one in found):
            together[task] = _in_turn(found)
        else:
            by_filter = [_by_filter(samples) for samples in found]
            together[task] = list(chain.from_iterable(_in_turn(by_filter).values()))
    return together


def _by_filter(samples: Sequence[Mapping[str, Any]]) -> dict[Any, list[Any]]:
    kinds: dict[Any, list[Any]] = {}
    for sample in samples:
        kinds.setdefault(sample.get("filter"), []).append(sample)
    return kinds


def _in_turn(parts: Sequence[Mapping[Any, Sequence[Any]]]) -> dict[Any, list[Any]]:
    """One of each process, and again, as documents were dealt."""
    names = dict.fromkeys(chain.from_iterable(parts))
    rounds = {name: zip_longest(*(p.get(name, ()) for p in parts), fillvalue=_NOTHING)
              for name in names}  # fmt: skip
    return {
        name: [one for one in chain.from_iterable(turns) if one is not _NOTHING]
        for name, turns in rounds.items()
    }
