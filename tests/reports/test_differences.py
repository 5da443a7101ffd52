"""Differences between checkpoints: found where they are, and not where they are not."""

from itertools import count

import pytest
from made_results import LENGTHS, log_samples, needle_results, results, trained_to, write

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.differences import INDEPENDENT, MEANS, PAIRED, TEXTS, UNPAIRED
from yoco_eval.reports.runs import load_checkpoints

SHORT = LENGTHS[:4]


def fading(length, depth):
    return 0.95 if length < 2**16 else 0.6


@pytest.fixture
def compared(tmp_path):
    """Compares the contents of results files, each of a checkpoint named by its number."""
    numbers = count()

    def run(*contents, **options):
        root = tmp_path / str(next(numbers))
        folders = [write(root / str(i), data).parent for i, data in enumerate(contents)]
        return compare(load_checkpoints(folders), **options)

    return run


def sentences(comparison):
    return [comparison.sentence(finding).partition(" (")[0] for finding in comparison.findings]


def test_family(family):
    comparison = compare(load_checkpoints(family))
    (needles,) = comparison.needles
    assert [result.effective_length for result in needles.results] == [
        2**12, 2**16, 2**18, 2**20,
    ]  # fmt: skip
    told = sentences(comparison)
    assert "yoco_needle: demo-1m is better than demo-4k from 32K to 1M" in told
    assert "yoco_needle: demo-1m is better than demo-256k at 512K and 1M, depth 0 to 50 %" in told
    assert not comparison.regressions
    # Nothing is told of lengths at which both are right.
    assert all(
        test.context_length > 2 ** (12, 16, 18)[finding.worse]
        for finding in comparison.findings
        for test in finding.tests
    )


def test_repetitions_with_another_seed_are_not_told_apart(compared):
    """At the 5 % level, one of 20 would be wrong on average; more than 3 hardly ever."""
    flagged = 0
    for repetition in range(20):
        runs = [needle_results(fading, seed=seed, draws=repetition) for seed in (0, 1)]
        comparison = compared(*runs)
        assert comparison.tests and {test.method for test in comparison.tests} == {UNPAIRED}
        assert "another seed" in comparison.caveats[0].reason
        flagged += bool(comparison.findings)
    assert flagged <= 3


def test_runs_of_equal_accuracy_on_the_same_prompts_are_not_told_apart(compared):
    flagged = 0
    for repetition in range(20):
        runs = [needle_results(fading, draws=(repetition, model)) for model in (0, 1)]
        comparison = compared(*runs)
        assert {test.method for test in comparison.tests} == {PAIRED}
        assert not comparison.caveats
        flagged += bool(comparison.findings)
    assert flagged <= 3


def test_true_differences_are_found_with_another_seed_too(compared):
    runs = [needle_results(trained_to(2**14), seed=0), needle_results(trained_to(2**20), seed=1)]
    assert sentences(compared(*runs))[-1] == "yoco_needle: 1 is better than 0 from 64K to 1M"


def test_pairs_tell_more_than_counts(compared):
    """A small difference in which all discordant prompts agree is found if they are paired."""

    def run(right, **options):
        return needle_results(
            lambda length, depth: right, lengths=[4096], depths=[0.5], samples=100, **options
        )  # fmt: skip

    # The same draws: whatever the worse one gets right, the better one does, too.
    (paired,) = compared(run(0.7), run(0.78)).tests
    (unpaired,) = compared(run(0.7, prompts="others"), run(0.78)).tests
    (unknown,) = compared(run(0.7, answers=False), run(0.78)).tests
    assert paired.scores == unpaired.scores == unknown.scores
    assert paired.significant and not unpaired.significant and not unknown.significant
    methods = (paired.method, unpaired.method, unknown.method)
    assert methods == (PAIRED, UNPAIRED, INDEPENDENT)


@pytest.mark.parametrize(
    ("worse_at", "where"),
    [
        (SHORT[:1], "at 4K"),
        (SHORT[:2], "at 4K and 8K"),
        (SHORT[1:], "from 8K to 32K"),
        (SHORT, "from 4K to 32K"),
        (SHORT[::2], "at 4K and 16K"),
    ],
)
@pytest.mark.parametrize(
    ("depths", "told"),
    [((0, 1), ""), ((0, 0.5), ", depth 0 to 50 %"), ((0.6, 1), ", depth 60 to 100 %")],
)
def test_where(compared, worse_at, where, depths, told):
    def accuracy(length, depth):
        return 0.0 if length in worse_at and depths[0] <= depth <= depths[1] else 1.0

    perfect = needle_results(lambda length, depth: 1.0, lengths=SHORT)
    comparison = compared(perfect, needle_results(accuracy, lengths=SHORT))
    claim = f"yoco_needle: 1 is worse than the earlier 0 {where}{told}"
    assert sentences(comparison) == [claim]
    (regression,) = comparison.regressions
    assert regression.scores == (1, 0)
    comparison = compared(needle_results(accuracy, lengths=SHORT), perfect)
    assert sentences(comparison) == [f"yoco_needle: 1 is better than 0 {where}{told}"]
    assert not comparison.regressions


def test_a_difference_over_all_lengths(compared):
    """Too little at each length by itself."""
    grid = {"depths": [0.0, 1.0], "samples": 2}
    runs = [needle_results(lambda length, depth, x=x: x, **grid) for x in (0.0, 1.0)]
    comparison = compared(*runs)
    assert len(comparison.tests) == 1  # 4 prompts of a length can never be significant
    assert sentences(comparison) == ["yoco_needle: 1 is better than 0 over 4K to 1M together"]


@pytest.mark.parametrize("left_out", ["too few prompts", "a gap"])
def test_a_finding_names_no_length_that_was_not_tested(compared, left_out):
    """At 8K all answers are equal, too few to be tested; or only one was evaluated there."""

    def run(right):
        data = needle_results(lambda *_: right, lengths=[4096, 8192, 16384, 65536], depths=[0.5],
                              samples=30)  # fmt: skip
        cells = data["configs"]["yoco_needle"]["metadata"]["cells"]
        if left_out == "too few prompts":
            cells[1] |= {"samples": 2, "correct": 2, "right": [0, 1], "wrong": []}
            cells[1]["prompts"] = cells[1]["prompts"][:2]
        elif right:
            del cells[1]
        return data

    comparison = compared(run(0.0), run(1.0))
    assert sentences(comparison) == ["yoco_needle: 1 is better than 0 at 4K, 16K and 64K"]
    told = {
        "too few prompts": "not tested at 8K: too few prompts",
        "a gap": "compared at the context lengths and depths that both have",
    }
    assert [caveat.reason for caveat in comparison.caveats] == [told[left_out]]


def test_lengths_at_which_prompts_were_cut_are_not_tested(compared):
    """The one that is worse there was not asked what the other was."""
    runs = [needle_results(lambda *_, x=x: x, lengths=SHORT, depths=[0.5], samples=30)
            for x in (0.0, 1.0)]  # fmt: skip
    runs[0]["max_length"] = SHORT[1]
    comparison = compared(*runs)
    assert sentences(comparison) == ["yoco_needle: 1 is better than 0 at 4K and 8K"]
    assert reasons(comparison) == ["not tested at 16K and 32K: prompts were cut"]
    assert {test.context_lengths for test in comparison.tests} == {(4096,), (8192,), (4096, 8192)}
    runs[0]["max_length"] = 2000
    comparison = compared(*runs)
    assert not comparison.tests
    assert reasons(comparison) == ["not tested from 4K to 32K: prompts were cut"]


def test_halves_are_named_by_the_depths_that_were_tested(compared):
    def run(right):
        data = needle_results(lambda _, depth: right if depth <= 0.5 else 1.0, samples=12,
                              lengths=[4096, 8192], depths=[0.0, 0.2, 0.5, 0.6, 1.0])  # fmt: skip
        cells = data["configs"]["yoco_needle"]["metadata"]["cells"]
        del cells[7]  # 8K at 50 %
        return data

    assert sentences(compared(run(0.0), run(1.0))) == [
        "yoco_needle: 1 is better than 0 at 4K, depth 0 to 50 %",
        "yoco_needle: 1 is better than 0 at 8K, depth 0 to 20 %",
    ]


def test_prompts_of_lengths_taken_together_are_named(compared):
    runs = [needle_results(lambda *_, x=x: x, lengths=SHORT[::2], depths=[0.5], samples=4)
            for x in (0.0, 1.0)]  # fmt: skip
    between = needle_results(lambda *_: 0.0, lengths=SHORT[:3], depths=[0.5], samples=4)
    for first in (runs[0], between):
        told = sentences(compared(first, runs[1]))
        assert told == ["yoco_needle: 1 is better than 0 over 4K and 16K together"]


def run_of(*lengths, **options):
    options = {"depths": [0.0, 1.0], "samples": 8} | options
    return needle_results(lambda *_: 0.5, lengths=lengths, **options)


def reasons(comparison):
    return [caveat.reason for caveat in comparison.caveats]


def test_what_was_not_asked_alike_is_not_paired(compared):
    """Settings may be equal, and prompts are not: other tokenizers cut other texts."""
    one = run_of(4096, 8192)
    other = run_of(4096, 8192, prompts="another tokenizer's")
    comparison = compared(one, other)
    assert {test.method for test in comparison.tests} == {UNPAIRED}
    assert reasons(comparison) == ["not paired: other prompts"]
    other["tokenizer_eos_token"] = ["</s>", "2"]
    one["tokenizer_eos_token"] = ["<|endoftext|>", "50256"]
    assert reasons(compared(one, other)) == ["not paired: other prompts (another tokenizer)"]
    # At one length alone.
    mixed = run_of(4096, 8192)
    cells = mixed["configs"]["yoco_needle"]["metadata"]["cells"]
    cells[2:] = other["configs"]["yoco_needle"]["metadata"]["cells"][2:]
    comparison = compared(run_of(4096, 8192), mixed)
    assert reasons(comparison) == ["not paired at 8K: other prompts"]
    methods = {test.context_length: test.method for test in comparison.tests}
    assert methods == {4096: PAIRED, 8192: UNPAIRED, None: UNPAIRED}


def test_what_is_not_known_to_be_asked_alike_is_not_paired(compared):
    comparison = compared(run_of(4096), run_of(4096, prompts=None))
    assert {test.method for test in comparison.tests} == {UNPAIRED}
    assert reasons(comparison) == ["not paired: an older results file does not tell its prompts"]


def test_logged_samples_tell_prompts_that_cells_do_not(tmp_path):
    folders = []
    for name, options in {"a": {"prompts": None}, "b": {"answers": False}}.items():
        path = write(tmp_path / name, run_of(4096, **options))
        log_samples(path)
        folders.append(path.parent)
    comparison = compare(load_checkpoints(folders))
    assert {test.method for test in comparison.tests} == {PAIRED} and not comparison.caveats


def test_more_samples_of_one_are_paired_as_far_as_both_go(compared):
    comparison = compared(run_of(4096), run_of(4096, samples=12))
    assert {(test.method, test.prompts) for test in comparison.tests} == {
        (PAIRED, (16, 16)), (PAIRED, (8, 8)),
    }  # fmt: skip


def test_differences_of_few_haystacks_are_not_claimed(compared):
    """One is at a loss with two haystacks of five, the other with two others: 22 against 11."""

    def run(lost):
        data = run_of(4096, depths=[i / 10 for i in range(11)], samples=5)
        for cell in data["configs"]["yoco_needle"]["metadata"]["cells"]:
            cell["right"] = [sample for sample in range(5) if sample not in lost]
            cell |= {"wrong": list(lost), "correct": 5 - len(lost)}
        return data

    comparison = compared(run([0, 1, 2]), run([3]))
    assert all(test.method == PAIRED for test in comparison.tests) and not comparison.findings
    comparison = compared(run([0, 1, 2, 3, 4]), run([]))
    assert sentences(comparison) == ["yoco_needle: 1 is better than 0 at 4K"]


def test_corrected_for_all_tests(compared):
    """The more is compared, the more it takes."""

    def run(right, **grid):
        return needle_results(lambda length, depth: right(length), samples=6, depths=[0.5], **grid)

    def at_4k(length):
        return float(length > 4096)

    alone = compared(run(at_4k, lengths=[4096]), run(lambda _: 1.0, lengths=[4096]))
    assert sentences(alone) == ["yoco_needle: 1 is better than 0 at 4K"]
    among = compared(run(at_4k), run(lambda _: 1.0))
    assert among.tests[0].p == alone.tests[0].p and not among.findings


def test_what_is_not_compared(compared):
    run = needle_results(fading)
    for change, reason in [
        ({"haystack": "essays"}, "not compared: another haystack"),
        ({"needles": 4}, "not compared: another needles"),
        ({"protocol": "paper"}, "not compared: another protocol"),
        ({"lengths": [1000]}, "not compared: no context length and depth in common"),
    ]:
        comparison = compared(run, needle_results(lambda *_: 0.0, **change))
        assert not comparison.tests
        (caveat,) = comparison.caveats
        assert caveat.refused and caveat.reason == reason
    later = needle_results(lambda *_: 0.0)
    later["versions"]["yoco_needle"] = 2
    (caveat,) = compared(run, later).caveats
    assert caveat.reason == "not compared: another task version"


def test_what_both_have_is_compared(compared):
    few = needle_results(lambda *_: 1.0, lengths=SHORT, samples=3, depths=[0.0, 0.5, 1.0])
    more = needle_results(lambda *_: 0.0, lengths=LENGTHS[2:])
    comparison = compared(few, more)
    assert {test.context_length for test in comparison.tests} == {*SHORT[2:], None}
    assert {test.prompts for test in comparison.tests} == {(9, 9), (6, 6), (18, 18)}
    (caveat,) = comparison.caveats
    assert not caveat.refused and "that both have" in caveat.reason
    found = {difference.setting: difference for difference in comparison.setup_differences}
    assert set(found) == {"context lengths", "depths", "samples"}
    assert found["depths"].values[0] == "0, 50, 100 %"
    assert found["context lengths"].values[0] == "4K, 8K, 16K, 32K"


TASK = "yoco_multi_needle_4"


def every_needle(value, error=None, seed=0, **options):
    """Of a checkpoint that is right at the needles of `acc`: 200 texts, at two lengths."""
    grid = {"lengths": SHORT[:2], "depths": [0, 0.25, 0.5, 0.75, 1], "samples": 20}
    data = needle_results(lambda *_: 1.0, seed=seed, task=TASK, **grid | options)
    data["results"][TASK] |= {"acc_all,none": value, "acc_all_stderr,none": error}
    return data


def of_every_needle(comparison):
    return [test for test in comparison.tests if test.every_needle]


@pytest.mark.parametrize("errors", [(0.0, 0.038), (0.001, 0.038), (0.0, 0.0)])
def test_every_needle_by_standard_errors(compared, errors):
    comparison = compared(every_needle(1.0, errors[0]), every_needle(0.77, errors[1]))
    [test] = of_every_needle(comparison)
    assert (test.method, test.scores, test.context_lengths) == (MEANS, (1.0, 0.77), (4096, 8192))
    assert 0 < test.p < test.corrected and len(comparison.tests) == 8
    name = f"{TASK} (every needle)"
    [finding] = comparison.findings
    told = comparison.sentence(finding)
    start = f"{name}: 1 is worse than the earlier 0 over 4K and 8K together (1 against 0.77, p < "
    assert told.startswith(start) and finding.regression


def test_every_needle_without_an_error_of_one(compared):
    """Four of 50 texts tell too little, whatever an error of 0 makes of them."""
    few = {"lengths": SHORT[:1], "samples": 10}
    found = compared(every_needle(1.0, 0.0, **few), every_needle(0.92, 0.038, **few))
    for one in found.runs:
        one.needle_task(TASK).file.data["n-samples"][TASK]["effective"] = 50
    [test] = of_every_needle(compare(found.runs))
    assert test.p == pytest.approx(2 / 2**4) and test.depths == (0, 1)


def test_every_needle_that_is_not_tested(compared):
    def reason(*contents):
        comparison = compared(*contents)
        assert not of_every_needle(comparison)
        return [one.reason for one in comparison.caveats if "(every needle)" in one.task]

    both = every_needle(0.5, 0.01), every_needle(0.9, 0.01)
    assert reason(every_needle(1.0, 0.0), every_needle(1.0, 0.0)) == [
        "not tested: without a standard error above 0"
    ]
    assert reason(both[0], every_needle(0.9)) == ["not tested: without a standard error above 0"]
    assert reason(both[0], every_needle(0.9, 0.01, seed=1)) == [
        "not tested: other prompts (another seed)"
    ]
    assert reason(both[0], every_needle(0.9, 0.01, lengths=SHORT[:1])) == [
        "not tested: the standard errors are of other context lengths or depths"
    ]
    assert reason(*(data | {"max_length": 2048} for data in both)) == [
        "not tested: prompts were cut"
    ]
    both[1]["n-samples"][TASK]["effective"] = 29
    assert reason(*both) == ["not tested: fewer than 30 documents"]
    assert not reason(every_needle(0.5, 0.01), needle_results(lambda *_: 1.0, task=TASK))


def test_every_needle_text_by_text(tmp_path):
    """What logged samples tell is paired: the same loss in few haystacks is not claimed."""

    def test_of(name, share, **options):
        for place, of in enumerate((lambda *_: 1.0, share)):
            file = write(tmp_path / name / f"{place}", every_needle(0.5, 0.4, **options))
            log_samples(file, acc_all=of)
        folders = [tmp_path / name / place for place in "01"]
        [test] = of_every_needle(compare(load_checkpoints(folders)))
        assert (test.method, test.prompts) == (TEXTS, (200, 200))
        return test

    spread = test_of("a", lambda length, depth, sample: 0.5 if depth == 1 else 1.0)
    assert spread.scores == (1.0, 0.9) and spread.p == pytest.approx(2 / 2**40)
    few = test_of("b", lambda length, depth, sample: 0.5 if sample < 4 else 1.0)
    assert few.scores == (1.0, 0.9) and 0.03 < few.p < 0.05  # Student's t of 20 samples


def benchmark(value, error=0.01, **parts):
    return results({"arc_easy": {"acc,none": value, "acc_stderr,none": error}}, **parts)


def test_benchmarks(compared):
    assert sentences(compared(benchmark(0.6), benchmark(0.7))) == [
        "arc_easy: 1 is better than 0"
    ]  # fmt: skip
    assert sentences(compared(benchmark(0.7), benchmark(0.6))) == [
        "arc_easy: 1 is worse than the earlier 0"
    ]  # fmt: skip
    assert not compared(benchmark(0.60), benchmark(0.62)).findings
    lower = {"higher_is_better": {"arc_easy": {"acc": False}}}
    (finding,) = compared(benchmark(0.6, **lower), benchmark(0.7, **lower)).findings
    assert finding.better == 0 and finding.scores == (0.6, 0.7)


def test_benchmarks_that_are_not_tested(compared):
    few = {"n-samples": {"arc_easy": {"original": 1000, "effective": 10}}}
    comparison = compared(benchmark(0.6, **few), benchmark(0.9))
    assert not comparison.tests
    assert [caveat.reason for caveat in comparison.caveats] == [
        "not of the same documents", "not tested: fewer than 30 documents",
    ]  # fmt: skip
    for error in ("N/A", 0.0):
        comparison = compared(benchmark(0.6, error=error), benchmark(0.9))
        assert not comparison.tests
        reasons = [caveat.reason for caveat in comparison.caveats]
        assert reasons == ["not tested: without a standard error above 0"]
    comparison = compared(benchmark(0.6, versions={"arc_easy": 2}), benchmark(0.9))
    assert not comparison.tests and comparison.caveats[0].refused
    assert comparison.benchmarks[0].best == ()


def test_means_by_length_that_are_not_tested(tmp_path):
    """lm-eval tells an error of 0 where all answers are right."""
    for name, value in (("a", 0.5), ("b", 1.0)):
        for length, score in (("0k", value), ("16k", 0.9), ("32k", value)):
            error = 0.0 if score == 1 else 0.01
            config = {"babilong_qa1": {"metadata": {"max_seq_lengths": length}}}
            scores = {"babilong_qa1": {"acc,none": score, "acc_stderr,none": error}}
            write(tmp_path / name, results(scores, configs=config), f"results_{length}.json")
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    assert [test.context_lengths for test in comparison.tests] == [(16384,)]
    assert reasons(comparison) == ["not tested at 0 and 32K: without a standard error above 0"]
