"""Intervals and tests for shares of right answers, and what follows from them.

Each function is one textbook method; scipy computes what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95  # of intervals
LEVEL = 0.05  # of tests: how often one of a report may find a difference where there is none


class Interval(NamedTuple):
    """Bounds of a share, 0 to 1."""

    low: float
    high: float


def wilson(correct: int, total: int) -> Interval:
    """Wilson's 95 % score interval of a share.

    Raises ValueError: not 0 <= correct <= total, or total is below 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is no share")
    interval = stats.binomtest(correct, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test, two-sided, of paired answers.

    only_first, only_second: prompts that only the first and only the second one answered right.
    Prompts that both answered alike tell nothing. The test is exact at all counts.
    """
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def fisher(first: tuple[int, int], second: tuple[int, int]) -> float:
    """The p-value of Fisher's exact test, two-sided, of answers to different prompts.

    first, second: how many are right, of how many.
    """
    table = [[right, total - right] for right, total in (first, second)]
    return float(stats.fisher_exact(table).pvalue)


def z_test(first: tuple[float, float], second: tuple[float, float]) -> float:
    """The p-value, two-sided, of two independent means being equal, by their normal distribution.

    first, second: the mean and its standard error, above 0.
    """
    (a, error_a), (b, error_b) = first, second
    return float(2 * stats.norm.sf(abs(a - b) / np.hypot(error_a, error_b)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method, in the order given.

    Comparing each with a level bounds the chance of any false finding by that level, however the
    tests depend on each other.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    remaining = len(p) - np.arange(len(p))  # hypotheses that are not yet rejected
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(remaining * p[order]), 1)
    return corrected.tolist()


def effective_length(lower_bounds: Mapping[int, float], threshold: float) -> int | None:
    """The longest context length at which, and at all shorter ones, the bound is above `threshold`.

    lower_bounds: of the accuracy's interval, 0 to 1, by context length in tokens.
    None if that does not hold at the shortest.
    """
    effective = None
    for length in sorted(lower_bounds):
        if lower_bounds[length] <= threshold:
            break
        effective = length
    return effective


def prompts_needed(threshold: float) -> int:
    """How many prompts, all answered right, have an interval that lies above `threshold`.

    threshold: 0 or above, below 1.
    """
    z = stats.norm.isf((1 - CONFIDENCE) / 2)
    # The lower bound of n right answers of n is n / (n + z^2).
    return int(np.floor(z**2 * threshold / (1 - threshold))) + 1
