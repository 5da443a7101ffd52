"""How well evaluations divide among up to 1024 processes: a simulation, no model is run.

    python benchmarks/schedule.py [--ranks 2 4 ... 1024] [--forests needles mmlu] [--output FOLDER]

Requests of random tokens, which share what those of real tasks share and are about as long
(`prompts.py`), are divided by the function that a run's first process calls, at YOCO-3B's costs. A
process's load is what it feeds, what its requests have in common once, and its predictions and new
tokens, in tokens fed (as `rounds.py` weighs them). For each number of processes:

- the largest load over a bound that none can be below. That is the largest of: all work of one
  process divided by the number of processes; the heaviest request alone, with all of its prompt;
  and, as one of m processes has k = ceil(n / m) of the n requests, what k of the (k - 1) m + 1
  heaviest take at the least: the parts that they share with nobody of the k lightest of these, and
  the least that one of them shares. No schedule need be able to reach it: where a tree has to be
  cut, what is shared is fed twice;
- the tokens that are fed more than once, in % of those that one process feeds;
- the seconds that the first process takes to sort all requests and divide them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import count, environment, report
from prompts import generated, gsm8k, mmlu, needle_grid, ruler, zero_shot

from yoco_eval.model.costs import YocoCosts
from yoco_eval.model.shapes import SHAPES
from yoco_eval.prefixes import WORTHWHILE, overlaps
from yoco_eval.rounds import Ask, divided, forest

SHAPE = SHAPES["3b"]
LENGTHS = [2**i for i in range(12, 21)]
NEW = 16  # tokens of an answer about a needle
WORDS = SHAPE.vocab_size


def needles(lengths: Sequence[int], samples: int) -> list[Ask]:
    return [generated([p], NEW) for p in needle_grid(lengths, 11, samples, WORDS)]


FORESTS: dict[str, tuple[str, Callable[[], list[Ask]]]] = {
    "needles": ("needles, 4K to 1M", lambda: needles(LENGTHS, 5)),
    "needles_1m": ("needles, 1M", lambda: needles([2**20], 2)),
    "ruler_4k": ("RULER, 4K", lambda: ruler(4096, 500, WORDS)),
    "ruler_32k": ("RULER, 32K", lambda: ruler(32768, 500, WORDS)),
    "zero_shot": ("zero-shot", lambda: zero_shot(WORDS)),
    "mmlu": ("MMLU", lambda: mmlu(WORDS)),
    "gsm8k": ("GSM8K", lambda: gsm8k(WORDS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    some = [2**i for i in range(1, 11)]
    parser.add_argument("--ranks", type=count, nargs="+", default=some, help=f"(default: {some})")
    parser.add_argument(
        "--forests", nargs="+", choices=FORESTS, default=[*FORESTS], help="(default: all)"
    )
    parser.add_argument("--output", type=Path, help="also write a .json file of each table there")
    args = parser.parse_args()
    # Rows, and digits behind the point.
    tables: dict[str, tuple[list[dict[str, str | float | None]], int]] = {
        "over": ([], 2),
        "twice": ([], 1),
        "seconds": ([], 1),
    }
    for name in args.forests:
        title, make = FORESTS[name]
        asks = make()
        work = Work(asks)
        fed = f"{len(asks)} requests, {work.fed / 1e6:.3g}M tokens to feed"
        print(f"{title}: {fed}", file=sys.stderr, flush=True)
        for rows, _ in tables.values():
            rows.append({"": title})
        for ranks in args.ranks:
            begin = time.perf_counter()
            shares = divided(asks, YocoCosts(SHAPE), ranks)
            seconds = time.perf_counter() - begin
            loads, again = work.loads(shares)
            figures = max(loads) / work.bound(ranks), 100 * again / work.fed, seconds
            for (rows, digits), figure in zip(tables.values(), figures, strict=True):
                rows[-1][str(ranks)] = round(figure, digits)
            print(ranks, *(f"{figure:.4g}" for figure in figures), file=sys.stderr, flush=True)
    titles = ("Largest load over bound", "Tokens fed twice, %", "Seconds to divide")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    for (name, (rows, _)), title in zip(tables.items(), titles, strict=True):
        path = None if args.output is None else args.output / f"schedule-{name}.json"
        report(f"{title}, by number of processes", rows, environment(), path)


class Work:
    """What requests take, alone and together.

    Attributes:
        fed: tokens that one process feeds, at YOCO-3B's costs.
    """

    def __init__(self, asks: Sequence[Ask]) -> None:
        items, feeding = forest(asks, YocoCosts(SHAPE))
        shared = np.array([*overlaps(items), 0])  # with the one before
        shared[shared < WORTHWHILE] = 0
        self._whole = np.array([feeding(len(item.tokens)) for item in items])
        self._shared = np.array([feeding(int(n)) for n in shared])
        self._asked = np.array([ask.cost for ask in asks])
        self._item = np.empty(len(asks), dtype=int)  # of each request
        for place, item in enumerate(items):
            self._item[list(item.requests)] = place
        everything = np.arange(len(asks))
        self.fed = self._feeds(everything)
        self._total = self.fed + self._asked.sum()
        # What is shared with a neighbour, and what with nobody, for each request.
        path = np.maximum(self._shared[:-1], self._shared[1:])
        own = self._whole - path
        several = np.array([len(item.requests) for item in items]) > 1
        path[several], own[several] = self._whole[several], 0
        self._path, self._own = path[self._item], own[self._item] + self._asked
        self._alone = float((self._whole[self._item] + self._asked).max())

    def _feeds(self, requests: np.ndarray) -> float:
        """Of a process that answers these."""
        places = np.unique(self._item[requests])
        if not len(places):
            return 0.0
        # Two share as much as any two neighbours between them do.
        between = np.stack((places[:-1] + 1, places[1:] + 1), 1).ravel()
        common = np.minimum.reduceat(self._shared, between)[::2] if len(between) else 0
        return float(self._whole[places].sum() - np.sum(common))

    def loads(self, shares: Sequence[Sequence[int]]) -> tuple[list[float], float]:
        """Of each process; and what they feed beside what one process would."""
        indices = [np.array(share, dtype=int) for share in shares]
        fed = [self._feeds(share) for share in indices]
        loads = [a + self._asked[share].sum() for a, share in zip(fed, indices, strict=True)]
        return loads, sum(fed) - self.fed

    def bound(self, processes: int) -> float:
        """Which no largest load is below."""
        each = -(-len(self._own) // processes)
        heaviest = np.argsort(-self._own, kind="stable")[: (each - 1) * processes + 1]
        crowd = self._own[heaviest[-each:]].sum() + self._path[heaviest].min()
        return max(self._total / processes, self._alone, float(crowd))


if __name__ == "__main__":
    main()
