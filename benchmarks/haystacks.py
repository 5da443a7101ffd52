"""How far intervals and tests of needle tasks hold where haystacks differ: a simulation, no model.

    python benchmarks/haystacks.py [--samples 5 10 20] [--draws 2000]

A model finds a needle with a probability whose log-odds are normal numbers around a base, one for
each haystack, that is, for each sample. Answers are drawn for grids of 11 depths, and given to the
functions with which `yoco-eval compare` makes intervals and tests:

- coverage: how often the 95 % interval at one context length holds the mean over all haystacks;
- false alarms: how often two models with equal means differ significantly anywhere in a grid of
  three context lengths, corrected for the number of its tests. On the same prompts each model has
  haystacks of its own that it finds hard;
- power: how often 0.95 against 0.85 is found where it is so at one of nine context lengths.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from yoco_eval.reports.differences import regions
from yoco_eval.reports.statistics import (
    LEVEL,
    holm,
    interval,
    paired_test,
    unpaired_test,
    wilson,
)

DEPTHS = 11
BASES = (0.5, 0.7, 0.85, 0.9, 0.95, 0.98, 0.99)
DEVIATIONS = (0.0, 0.5, 1.0, 2.0)  # between haystacks, of log-odds
ALARM_BASES, ALARM_LENGTHS = (0.5, 0.85, 0.95), 3
BETTER, WORSE, POWER_LENGTHS, POWER_SAMPLES = 0.95, 0.85, 9, (5, 10, 20, 50)
POWER_DEVIATIONS = DEVIATIONS[:3]
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[5, 10, 20], help="haystacks")
    parser.add_argument(
        "--draws", type=int, default=2000, help="of each figure; of grids a quarter (2000)"
    )
    args = parser.parse_args()
    if min(args.samples) < 2 or args.draws < 4:
        parser.error("give 2 samples or more, and 4 draws or more")
    rng, grids = np.random.default_rng(SEED), args.draws // 4
    console = Console()
    header = ["samples", "deviation", *(f"{base:g}" for base in BASES)]
    of_wilson, of_interval = [], []
    for samples in args.samples:
        for deviation in DEVIATIONS:
            found = [coverage(rng, base, deviation, samples, args.draws) for base in BASES]
            where = [str(samples), f"{deviation:g}"]
            of_interval.append([*where, *(_percent(ours) for ours, _ in found)])
            of_wilson.append([*where, *(_percent(plain) for _, plain in found)])
    _print(console, "coverage of the intervals, by base accuracy", header, of_interval)
    _print(console, "for comparison: of Wilson's alone", header, of_wilson)
    header = ["samples", "deviation"]
    header += [f"{kind}\n{base:g}" for kind in ("paired", "unpaired") for base in ALARM_BASES]
    rows = [
        [
            str(samples), f"{deviation:g}",
            *(
                _percent(false_alarms(rng, base, deviation, samples, grids, paired))
                for paired in (True, False)
                for base in ALARM_BASES
            ),
        ]
        for samples in args.samples
        for deviation in DEVIATIONS
    ]  # fmt: skip
    _print(console, "false alarms, by base accuracy", header, rows)
    header = ["samples", *(f"deviation {deviation:g}" for deviation in POWER_DEVIATIONS)]
    rows = [
        [str(samples), *(_percent(power(rng, d, samples, grids)) for d in POWER_DEVIATIONS)]
        for samples in POWER_SAMPLES
    ]
    _print(console, f"{BETTER} against {WORSE} found", header, rows)


def coverage(
    rng: np.random.Generator, base: float, deviation: float, samples: int, draws: int
) -> tuple[float, float]:
    """How often the interval, and Wilson's alone, holds the mean accuracy over haystacks."""
    accuracy = _accuracies(rng, np.array([base]), deviation, samples, draws)[..., 0]
    right = np.sort(rng.binomial(DEPTHS, accuracy), axis=1)  # their order does not matter
    outcomes, times = np.unique(right, axis=0, return_counts=True)
    mean, total = mean_accuracy(base, deviation), [DEPTHS] * samples
    held = np.zeros(2)
    for outcome, count in zip(outcomes.tolist(), times, strict=True):
        bounds = interval(outcome, total), wilson(sum(outcome), sum(total))
        held += [count * (low <= mean <= high) for low, high in bounds]
    return tuple(held / draws)


def false_alarms(
    rng: np.random.Generator, base: float, deviation: float, samples: int, draws: int, paired: bool
) -> float:
    """How often models of equal mean accuracy are told apart in a grid.

    paired: whether they get the same prompts.
    """
    first, second = (
        _answers(rng, np.full(ALARM_LENGTHS, base), deviation, samples, draws) for _ in range(2)
    )
    p_values = _p_values(first, second, paired)
    return float(np.mean([min(holm(p)) < LEVEL for p in p_values]))


def power(rng: np.random.Generator, deviation: float, samples: int, draws: int) -> float:
    """How often a difference at one context length is found there, on the same prompts."""
    bases = np.full(POWER_LENGTHS, BETTER)
    first = _answers(rng, bases, deviation, samples, draws)
    bases[0] = WORSE
    second = _answers(rng, bases, deviation, samples, draws)
    p_values = _p_values(first, second, paired=True)
    here = [set(r.context_lengths) == {0} for r in regions(_cells(POWER_LENGTHS))]
    return float(np.mean([min(np.asarray(holm(p))[here]) < LEVEL for p in p_values]))


def mean_accuracy(base: float, deviation: float) -> float:
    """The accuracy over all haystacks there are, by quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    odds = np.log(base / (1 - base)) + deviation * points
    return float(np.sum(weights / (1 + np.exp(-odds))) / np.sum(weights))


def _accuracies(
    rng: np.random.Generator, bases: np.ndarray, deviation: float, samples: int, draws: int
) -> np.ndarray:
    """Of each haystack by context length, [draws, samples, lengths]; it is as hard at each."""
    odds = np.log(bases / (1 - bases)) + deviation * rng.standard_normal((draws, samples, 1))
    return 1 / (1 + np.exp(-odds))


def _cells(lengths: int) -> list[tuple[int, float]]:
    """Of a grid whose context lengths are numbered."""
    return [(length, place / (DEPTHS - 1)) for length in range(lengths) for place in range(DEPTHS)]


def _answers(
    rng: np.random.Generator, bases: np.ndarray, deviation: float, samples: int, draws: int
) -> np.ndarray:
    """Whether each prompt is answered right: bool [draws, samples, cells].

    bases: accuracies by context length.
    """
    accuracies = _accuracies(rng, bases, deviation, samples, draws)
    return rng.random((draws, samples, len(bases) * DEPTHS)) < np.repeat(accuracies, DEPTHS, axis=2)


def _p_values(first: np.ndarray, second: np.ndarray, paired: bool) -> list[list[float]]:
    """Of each draw, the p-values of all parts of the grid that a comparison tests."""
    cells = _cells(first.shape[2] // DEPTHS)
    p_values: list[list[float]] = [[] for _ in first]
    for region in regions(cells):
        places = [cells.index(cell) for cell in region.cells]
        a, b = first[..., places], second[..., places]
        total = [len(places)] * first.shape[1]
        if paired:
            counts = zip((a & ~b).sum(2).tolist(), (b & ~a).sum(2).tolist(), strict=True)
            found = [paired_test(*only) for only in counts]
        else:
            counts = zip(a.sum(2).tolist(), b.sum(2).tolist(), strict=True)
            found = [unpaired_test((x, total), (y, total)) for x, y in counts]
        for of_draw, p in zip(p_values, found, strict=True):
            of_draw.append(p)
    return p_values


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _print(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(*header, title=title, box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


if __name__ == "__main__":
    main()
