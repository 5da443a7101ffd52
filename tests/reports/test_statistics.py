"""The statistics: equal to statsmodels' and scipy's on random tables, and right at the edges."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from yoco_eval.reports.statistics import (
    effective_length,
    fisher,
    holm,
    mcnemar,
    prompts_needed,
    wilson,
    z_test,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("total", [1, 2, 5, 55, 500, 20_000])
def test_wilson(total):
    for correct in {0, total, *RNG.integers(0, total + 1, 10).tolist()}:
        expected = proportion_confint(correct, total, 0.05, method="wilson")
        assert wilson(correct, total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(3, 2), (-1, 2), (0, 0)])
def test_no_share(correct, total):
    with pytest.raises(ValueError, match="no share"):
        wilson(correct, total)


@pytest.mark.parametrize("largest", [3, 30, 2000])
def test_mcnemar(largest):
    for both, first, second, neither in RNG.integers(0, largest + 1, (40, 4)).tolist():
        table = [[both, first], [second, neither]]
        expected = statsmodels_mcnemar(table, exact=True).pvalue
        assert mcnemar(first, second) == pytest.approx(min(1, expected), rel=1e-9)
    assert mcnemar(0, 0) == 1


def test_mcnemar_agrees_with_the_chi_square_of_large_counts():
    for first, second in RNG.integers(400, 600, (20, 2)).tolist():
        table = [[0, first], [second, 0]]
        expected = statsmodels_mcnemar(table, exact=False, correction=True).pvalue
        assert mcnemar(first, second) == pytest.approx(expected, abs=2e-3)


def test_fisher():
    for a, b in RNG.integers(1, 60, (40, 2)).tolist():
        right_a, right_b = RNG.integers(0, a + 1), RNG.integers(0, b + 1)
        table = np.array([[right_a, a - right_a], [right_b, b - right_b]])
        assert fisher((right_a, a), (right_b, b)) == pytest.approx(_fisher_by_hand(table))


def _fisher_by_hand(table):
    """The probability of all tables with these margins that are no likelier than this one."""
    row, columns = table.sum(axis=1), table.sum(axis=0)
    possible = stats.hypergeom(table.sum(), columns[0], row[0])
    chances = possible.pmf(np.arange(row[0] + 1))
    return chances[chances <= possible.pmf(table[0, 0]) * (1 + 1e-7)].sum()


def test_z_test():
    for _ in range(20):
        a, b = RNG.normal(0, 1, 50), RNG.normal(0.3, 2, 70)
        means = [(x.mean(), x.std(ddof=1) / np.sqrt(len(x))) for x in (a, b)]
        compared = CompareMeans(DescrStatsW(a), DescrStatsW(b))
        assert z_test(*means) == pytest.approx(compared.ztest_ind(usevar="unequal")[1])


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_holm(count):
    for _ in range(10):
        p = RNG.random(count) ** RNG.integers(1, 6)
        p[RNG.random(count) < 0.2] = p[0]  # ties
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_of_nothing():
    assert holm([]) == []


def test_effective_length():
    bounds = {4096: 0.95, 16384: 0.91, 8192: 0.93, 32768: 0.85, 65536: 0.99}
    assert effective_length(bounds, 0.9) == 16384
    assert effective_length(bounds, 0.91) == 8192  # above, not at
    assert effective_length(bounds, 0.5) == 65536
    assert effective_length(bounds, 0.95) is None
    assert effective_length({}, 0.9) is None


@pytest.mark.parametrize("threshold", [0, 0.5, 0.8, 0.9, 0.99])
def test_prompts_needed(threshold):
    needed = prompts_needed(threshold)
    assert wilson(needed, needed).low > threshold
    assert needed == 1 or wilson(needed - 1, needed - 1).low <= threshold
