"""Intervals and tests for shares of right answers, and what follows from them.

Prompts of one sample have one haystack in common, and a model may fare better with one haystack
than with another: answers come in clusters, one for each sample. What is exact for independent
prompts is widened where answers vary between samples more than independent ones would;
benchmarks/haystacks.py simulates how far that holds. scipy computes what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import special, stats

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
    return _score_interval(correct / total, total, _quantile() ** 2)


def interval(right: Sequence[int], total: Sequence[int]) -> Interval:
    """The 95 % interval of a share of right answers to prompts in clusters.

    Wilson's, with the number of prompts divided by the design effect where that is above 1: how
    many times the share's variance, as the clusters show it, is that of independent prompts.
    Student's t then stands for the normal quantile, since few clusters show it roughly; but no
    interval is wider than if each cluster were one prompt.

    right, total: how many answers are right, of how many, in each cluster.
    Raises ValueError: these are no shares.
    """
    correct, count = sum(right), sum(total)
    plain = wilson(correct, count)
    if not 0 < correct < count or len(total) < 2:
        return plain
    share, variance = _share(right, total)
    effect = variance * (count - 1) / (share * (1 - share))
    if effect <= 1 + 1e-9:
        return plain
    widest = _quantile() ** 2 * sum(n * n for n in total) / count
    return _score_interval(share, count, min(_quantile(len(total) - 1) ** 2 * effect, widest))


def _quantile(freedom: float = np.inf) -> float:
    """How many standard errors an interval reaches: Student's; the normal one by default."""
    return special.stdtrit(freedom, (1 + CONFIDENCE) / 2)


def _score_interval(share: float, count: int, squared: float) -> Interval:
    """Wilson's: the shares from which the observed one is `squared` or fewer variances away."""
    return Interval(_low(share, count, squared), 1 - _low(1 - share, count, squared))


def _low(share: float, count: int, squared: float) -> float:
    middle = share + squared / (2 * count)
    half = np.sqrt(squared * (share * (1 - share) / count + squared / (4 * count**2)))
    return float(max(0, middle - half) / (1 + squared / count))


def paired_test(only_first: Sequence[int], only_second: Sequence[int]) -> float:
    """The p-value, two-sided, of two models being right equally often on the same prompts.

    The larger one of two: McNemar's exact test, as if all prompts were independent, and Student's
    t test of the clusters' differences, in which those of a cluster may depend in any way.

    only_first, only_second: prompts in each cluster that only the first and only the second one
        answered right.
    """
    p = mcnemar(sum(only_first), sum(only_second))
    if len(only_first) < 2:
        return p
    differences = np.subtract(only_first, only_second)
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return max(p, _t_test(differences.mean(), error, len(differences) - 1))


def unpaired_test(
    first: tuple[Sequence[int], Sequence[int]], second: tuple[Sequence[int], Sequence[int]]
) -> float:
    """As `paired_test`, of models that were given different prompts: Fisher's and Welch's tests.

    first, second: how many answers are right, of how many, in each cluster.
    """
    p = fisher(*((sum(right), sum(total)) for right, total in (first, second)))
    freedoms = len(first[1]) - 1, len(second[1]) - 1
    if not all(freedoms):
        return p
    (a, variance_a), (b, variance_b) = _share(*first), _share(*second)
    if not (variance := variance_a + variance_b):
        return p
    freedom = variance**2 / (variance_a**2 / freedoms[0] + variance_b**2 / freedoms[1])
    return max(p, _t_test(a - b, np.sqrt(variance), freedom))


def _share(right: Sequence[int], total: Sequence[int]) -> tuple[float, float]:
    """A share of right answers and its variance, as two or more clusters show it."""
    hits, sizes = np.asarray(right, dtype=float), np.asarray(total, dtype=float)
    share, clusters = hits.sum() / sizes.sum(), len(sizes)
    squares = np.sum((hits - sizes * share) ** 2)
    return float(share), float(clusters / (clusters - 1) * squares / sizes.sum() ** 2)


def _t_test(difference: float, error: float, freedom: float) -> float:
    if not error:
        return float(not difference)
    return float(2 * special.stdtr(freedom, -abs(difference) / error))


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test, two-sided, of paired answers.

    only_first, only_second: prompts that only the first and only the second one answered right.
    Prompts that both answered alike tell nothing. The test is exact at all counts.
    """
    fewer, discordant = min(only_first, only_second), only_first + only_second
    return min(1.0, 2 * float(special.bdtr(fewer, discordant, 0.5))) if discordant else 1.0


@cache
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
    # The lower bound of n right answers of n is n / (n + z^2).
    return int(np.floor(_quantile() ** 2 * threshold / (1 - threshold))) + 1
