"""The statistics: equal to statsmodels' and scipy's on random tables, and right at the edges."""

import numpy as np
import pytest
from haystacks import coverage, false_alarms
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from yoco_eval.reports.statistics import (
    effective_length,
    fisher,
    holm,
    interval,
    mcnemar,
    paired_test,
    prompts_needed,
    unpaired_test,
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


@pytest.mark.parametrize(
    "right", [[11, 11, 11], [0, 0], [7], [10, 9, 10, 9], [11, 11, 10, 11], [10, 11, 10, 11]]
)
def test_intervals_of_answers_that_show_no_clusters_are_wilsons(right):
    total = [11] * len(right)
    assert interval(right, total) == wilson(sum(right), sum(total))


@pytest.mark.parametrize("right", [[11, 4, 9, 6, 11], [11, 9, 11, 11, 11, 11], [2, 0, 7, 4] * 5])
def test_intervals_of_clusters(right):
    """Wilson's for as many prompts as the design effect leaves, with Student's t."""
    clusters, prompts = len(right), 11 * len(right)
    share = sum(right) / prompts
    independent = share * (1 - share) / (prompts - 1)
    effect = np.var(np.divide(right, 11), ddof=1) / clusters / independent
    t, z = stats.t.ppf(0.975, clusters - 1), stats.norm.ppf(0.975)
    left = prompts / effect * z**2 / t**2
    expected = proportion_confint(share * left, left, 0.05, method="wilson")
    assert interval(right, [11] * clusters) == pytest.approx(expected, abs=1e-12)
    assert expected[0] < wilson(sum(right), prompts).low


def test_no_interval_is_wider_than_that_of_one_prompt_a_cluster():
    assert interval([11, 0], [11, 11]) == pytest.approx(wilson(1, 2))
    few = interval([11, 11, 0], [11, 11, 2])
    assert wilson(2, 3).low < few.low and few.high < 1


def test_intervals_hold_where_haystacks_differ():
    """The script's own figures are of more draws."""
    rng = np.random.default_rng(0)
    for base, deviation in ((0.5, 0.0), (0.5, 1.0), (0.85, 1.0), (0.95, 0.5), (0.98, 1.0)):
        ours, plain = coverage(rng, base, deviation, 10, 500)
        assert ours >= 0.93
        assert (plain < 0.85) == (base < 0.9 and deviation == 1)


@pytest.mark.parametrize(("paired", "draws"), [(True, 400), (False, 40)])  # Fisher's takes longer
def test_models_are_not_told_apart_by_their_haystacks(paired, draws):
    """With prompts taken for independent, it would be so in about 30 % of cases."""
    rng = np.random.default_rng(0)
    for samples in (5, 10):
        assert false_alarms(rng, 0.5, 1.0, samples, draws, paired) <= 0.05


def test_tests_of_clusters():
    total = [11] * 8
    for _ in range(20):
        a, b = RNG.integers(0, 12, (2, 8)).tolist()
        only = np.maximum(np.subtract(a, b), 0), np.maximum(np.subtract(b, a), 0)
        expected = max(mcnemar(*map(sum, only)), stats.ttest_rel(a, b).pvalue)
        assert paired_test(*only) == pytest.approx(expected)
        c = RNG.integers(0, 12, 5).tolist()
        apart = stats.ttest_ind(np.divide(a, 11), np.divide(c, 11), equal_var=False).pvalue
        expected = max(fisher((sum(a), 88), (sum(c), 55)), apart)
        assert unpaired_test((a, total), (c, total[:5])) == pytest.approx(expected)


def test_clusters_that_all_agree_are_as_good_as_independent_prompts():
    assert paired_test([9] * 5, [0] * 5) == mcnemar(45, 0)
    assert paired_test([9], [0]) == mcnemar(9, 0)
    all_right, none = ([11] * 4, [11] * 4), ([0] * 4, [11] * 4)
    assert unpaired_test(all_right, none) == fisher((44, 44), (0, 44))
    assert unpaired_test(([11], [11]), none) == fisher((11, 11), (0, 44))


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


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_holm(count):
    for _ in range(2):  # statsmodels collects garbage each time, which takes long
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
