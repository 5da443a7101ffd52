"""One model's runs at several context lengths: one grid, of what can be one."""

import pytest
from made_results import log_samples, needle_results, results, trained_to, write

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.runs import load_checkpoints, load_needle_run
from yoco_eval.reports.sections import panels, sections
from yoco_eval.reports.setups import setup

SHORT, LONG = [2**12, 2**13, 2**14, 2**15], [2**16]


def right(*_):
    return 1.0


def wrong(*_):
    return 0.0


def load(folder):
    (checkpoint,) = load_checkpoints([folder])
    return checkpoint


def skipped(checkpoint):
    return {skip.path.name: skip.reason for skip in checkpoint.skipped}


def save(folder, *contents):
    """The contents of results files, the oldest first."""
    return [
        write(folder, {**data, "date": 1.7e9 + number}, f"results_{number}.json")
        for number, data in enumerate(contents, 1)
    ]


def curve(comparison, task, metric="acc"):
    (found,) = (one for one in comparison.curves if (one.task, one.metric) == (task, metric))
    return found


def ruler(values, effective=0):
    """As yoco_ruler leaves it, by context length, with a member."""
    scores = {"acc,none": sum(values.values()) / len(values)}
    scores |= {f"acc@{length:07d},none": value for length, value in values.items()}
    data = {"niah_single_1": scores, "yoco_ruler": scores | {"effective_length,none": effective}}
    return results(data, group_subtasks={"yoco_ruler": ["niah_single_1"]})


def babilong(value, length, error=0.01):
    """As lm-eval's own task leaves it."""
    config = {"babilong_qa1": {"metadata": {"version": 0.0, "max_seq_lengths": length}}}
    return results({"babilong_qa1": {"acc,none": value, "acc_stderr,none": error}}, configs=config)


def test_lengths_of_two_runs_are_one_grid(tmp_path):
    """32K scores 0: what comes later at 64K does not make the effective length 64K."""
    until_16k = needle_results(trained_to(2**14), lengths=SHORT, draws=1)
    until_16k["configs"]["yoco_needle"]["metadata"] |= {"max_length": 2**15}
    until_16k["config"]["model_args"] |= {"max_length": 2**15, "batch_size": 4}
    save(tmp_path, until_16k, needle_results(right, lengths=LONG))
    checkpoint = load(tmp_path)
    assert not checkpoint.skipped
    (needles,) = compare([checkpoint]).needles
    (result,) = needles.results
    assert result.run.context_lengths == SHORT + LONG and len(result.run.depths) == 11
    assert result.effective_length == 2**14 and not result.gaps
    assert load_needle_run(tmp_path).cells == result.run.cells
    (task,) = checkpoint.tasks.values()
    assert task.scores == {} and set(task.by_length["acc"]) == {*SHORT, *LONG}
    assert setup(task)["context lengths"] == "4K, 8K, 16K, 32K, 64K"


def test_the_newest_counts_where_runs_overlap(tmp_path):
    save(
        tmp_path,
        needle_results(right, lengths=SHORT[:1]),
        needle_results(right, lengths=SHORT[1:], depths=[0.0, 0.5]),
        needle_results(wrong, lengths=SHORT[:2], depths=[0.0, 1.0]),
    )
    run = load_needle_run(tmp_path)
    found = {(cell.context_length, cell.depth): cell.accuracy for cell in run.cells}
    assert {found[n, depth] for n in SHORT[:2] for depth in (0.0, 1.0)} == {0.0}
    assert found[SHORT[0], 0.5] == found[SHORT[1], 0.5] == 1.0
    assert len(found) == 11 + 3 + 2 + 2  # at 8K three depths, of which the newest has one, too
    assert len(run.sources) == 3


def test_answers_to_cut_prompts_do_not_take_the_place_of_others(tmp_path):
    whole, cut = needle_results(right, lengths=SHORT), needle_results(wrong, lengths=SHORT + LONG)
    cut["max_length"] = SHORT[1]
    save(tmp_path / "needles", whole, cut)
    run = load_needle_run(tmp_path / "needles")
    assert {cell.context_length for cell in run.cells if not cell.correct} == {*SHORT[:2], *LONG}
    assert run.cut == {LONG[0]: SHORT[1]}
    save(tmp_path / "ruler", ruler({8192: 0.9}), ruler({8192: 0.1}) | {"max_length": 4096})
    checkpoint = load(tmp_path / "ruler")
    assert curve(compare([checkpoint]), "yoco_ruler").values == ({8192: 0.9},)
    told = "niah_single_1 and 1 more: its prompts were cut, those of another run were not"
    assert skipped(checkpoint) == {"results_2.json": told}


def test_the_newest_counts_also_where_a_file_does_not_tell_the_number_of_examples(tmp_path):
    told, untold = (needle_results(accuracy, lengths=SHORT) for accuracy in (right, wrong))
    save(tmp_path, told, untold | {"n-shot": {}}, told)
    assert load_needle_run(tmp_path).accuracy == 1
    checkpoint = load(tmp_path)
    assert checkpoint.needles["yoco_needle"].accuracy == 1
    assert checkpoint.needle_task("yoco_needle").n_shot == 0
    other = "yoco_needle: not united with results_3.json: another number of examples"
    superseded = "its results are all in newer files"
    assert skipped(checkpoint) == {"results_1.json": superseded, "results_2.json": other}


def test_what_is_all_in_newer_files_is_said_to_be(tmp_path):
    save(
        tmp_path,
        needle_results(right, lengths=SHORT[:2]),
        needle_results(right, lengths=SHORT[:1]),
        needle_results(wrong, lengths=SHORT[1:2]),
    )
    assert skipped(load(tmp_path)) == {"results_1.json": "its results are all in newer files"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data["configs"]["yoco_needle"]["metadata"].update(seed=3), "seed 3, not 0"),
        (lambda data: data["configs"]["yoco_needle"]["metadata"].update(protocol="paper"),
         "protocol paper, not None"),
        (lambda data: data["configs"]["yoco_needle"].update(generation_kwargs={"until": []}),
         "generation until [], not None"),
        (lambda data: data["config"].update(gen_kwargs={"temperature": 1}), "generation"),
        (lambda data: data["config"].update(model_dtype="bfloat16"), "dtype bfloat16, not float32"),
        (lambda data: data["config"].update(model="vllm"), "backend vllm, not yoco"),
        (lambda data: data.update(chat_template_sha="0a" * 32), "chat template 0a0a0a0a0a0a, not"),
        (lambda data: data.update(system_instruction="Rhyme"), "system instruction Rhyme, not"),
        (lambda data: data.update(versions={"yoco_needle": 7}), "task version 7, not 1"),
        (lambda data: (data["config"].update(limit=10),
                       data["n-samples"]["yoco_needle"].update(effective=10)), "limit 10, not Non"),
    ],
)  # fmt: skip
def test_runs_of_another_setup_are_not_united_and_named(tmp_path, caplog, change, told):
    other, newest = (needle_results(right, lengths=lengths) for lengths in (SHORT, LONG))
    change(other)
    save(tmp_path, other, newest)
    checkpoint = load(tmp_path)
    assert checkpoint.needles["yoco_needle"].context_lengths == LONG
    reason = skipped(checkpoint)["results_1.json"]
    assert reason.startswith(f"yoco_needle: not united with results_2.json: {told}")
    assert load_needle_run(tmp_path).context_lengths == LONG
    assert f"results_1.json: {reason}" in caplog.text


@pytest.mark.parametrize("samples", [3, {"1024": 3}])
def test_each_length_has_its_number_of_samples(tmp_path, samples):
    def of(lengths, count, told):
        data = needle_results(right, lengths=lengths, samples=count)
        data["configs"]["yoco_needle"]["metadata"]["samples"] = told
        return data

    few = of([1024], 3, samples)
    save(tmp_path, few, of([2048, 4096], 5, {"1024": 9, "2048": 5, "4096": 5}))
    checkpoint = load(tmp_path)
    assert checkpoint.needles["yoco_needle"].context_lengths == [1024, 2048, 4096]
    told = setup(checkpoint.needle_task("yoco_needle"))["samples"]
    assert told == "3 at 1K, 5 at 2K, 5 at 4K"
    save(tmp_path, few, of([1024, 2048], 5, 5))
    told = "yoco_needle: not united with results_2.json: samples 3 at 1K, not 5 at 1K"
    assert skipped(load(tmp_path)) == {"results_1.json": told}
    # Nor with one that is not the newest.
    save(tmp_path, few, of([1024], 5, 5), of([2048], 5, 5))
    assert skipped(load(tmp_path)) == {"results_1.json": told}


def test_samples_differ_only_at_common_lengths(tmp_path):
    counts = {"1024": 3, "2048": 3, "4096": 2}
    for name, lengths, told in (
        ("a", [1024, 2048], counts), ("b", [1024, 2048, 4096], counts), ("c", [1024], 3),
        ("d", [2048, 4096], 2),
    ):  # fmt: skip
        data = needle_results(right, lengths=lengths, samples=3)
        data["configs"]["yoco_needle"]["metadata"]["samples"] = told
        write(tmp_path / name, data)

    def differing(*names):
        comparison = compare(load_checkpoints([tmp_path / name for name in names]))
        return {one.setting: one.values for one in comparison.setup_differences}

    assert "samples" not in differing("a", "b") | differing("b", "c") | differing("c", "d")
    assert differing("b", "d")["samples"] == ("3 at 1K, 3 at 2K, 2 at 4K", "2")


def test_a_tokenizer_that_was_changed_in_its_place_makes_another_setup(tmp_path):
    old, newest = (needle_results(right, lengths=lengths) for lengths in (SHORT, LONG))
    save(tmp_path, old | {"tokenizer_eos_token": ["</s>", "2"]}, newest)
    assert load_needle_run(tmp_path).context_lengths == SHORT + LONG  # the newest does not tell
    save(tmp_path, old | {"tokenizer_eos_token": ["</s>", "2"]},
         newest | {"tokenizer_eos_token": ["<|end|>", "7"]})  # fmt: skip
    told = "special tokens eos </s> 2, not eos <|end|> 7"
    assert skipped(load(tmp_path))["results_1.json"].endswith(f"results_2.json: {told}")


def test_a_limit_that_cuts_nothing_is_no_other_setup(tmp_path):
    limited, newest = (needle_results(right, lengths=lengths) for lengths in (SHORT, LONG))
    limited["config"]["limit"] = 10_000
    save(tmp_path, limited, newest)
    assert load_needle_run(tmp_path).context_lengths == SHORT + LONG


def test_samples_of_all_runs_are_found(tmp_path):
    short = needle_results(right, lengths=SHORT, depths=[0.0, 1.0])
    long = needle_results(wrong, lengths=[*SHORT[:1], *LONG], depths=[0.0, 1.0])
    for file in save(tmp_path, short, long):
        log_samples(file)
    (needles,) = compare([load(tmp_path)]).needles
    (result,) = needles.results
    assert set(result.samples) == {(n, depth) for n in SHORT + LONG for depth in (0.0, 1.0)}
    assert {sample.right for sample in result.samples[SHORT[0], 0.0]} == {False}
    assert all(len(samples) == 5 for samples in result.samples.values())


def test_groups_by_length_are_united_and_their_effective_length_is_of_all(tmp_path):
    save(tmp_path / "a", ruler({4096: 0.95, 8192: 0.9}, 8192), ruler({16384: 0.87}, 16384))
    save(tmp_path / "b", ruler({16384: 0.5}), ruler({4096: 0.95, 8192: 0.6}, 4096))
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    found = curve(comparison, "yoco_ruler")
    assert found.values == (
        {4096: 0.95, 8192: 0.9, 16384: 0.87}, {4096: 0.95, 8192: 0.6, 16384: 0.5},
    )  # fmt: skip
    assert found.effective_lengths == (16384, 4096)
    assert not comparison.setup_differences


def test_other_prompts_at_a_common_length_are_not_united(tmp_path):
    """As those of a tokenizer that was changed in its place."""
    old, new = ruler({4096: 0.9, 8192: 0.9}), ruler({8192: 0.9, 16384: 0.9})
    for data, prompt in ((old, "0a1b2c3d"), (new, "4e5f6a7b")):
        data["configs"]["niah_single_1"]["metadata"]["prompts"] = {"8192": prompt}
    save(tmp_path, old, new)
    checkpoint = load(tmp_path)
    assert curve(compare([checkpoint]), "yoco_ruler").context_lengths == [8192, 16384]
    assert skipped(checkpoint) == {
        "results_1.json": "niah_single_1 and 1 more: not united with results_2.json: other prompts"
    }


def test_needles_of_other_prompts_in_a_common_cell_are_not_united(tmp_path):
    """Also where it is not the newest run that has the cell."""
    save(
        tmp_path,
        needle_results(right, lengths=SHORT, prompts="another tokenizer's"),
        needle_results(right, lengths=SHORT[-1:], depths=[0.5]),
        needle_results(right, lengths=LONG),
    )
    checkpoint = load(tmp_path)
    assert checkpoint.needles["yoco_needle"].context_lengths == [SHORT[-1], *LONG]
    assert skipped(checkpoint)["results_1.json"].endswith("results_2.json: other prompts")


def test_one_length_runs_are_compared_like_with_like(tmp_path):
    save(tmp_path / "a", babilong(0.95, "0k"), babilong(0.40, "16k"))
    save(tmp_path / "b", babilong(0.60, "16k"), babilong(0.93, "0k"))
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    assert not comparison.benchmarks
    assert curve(comparison, "babilong_qa1").values == (
        {0: 0.95, 16384: 0.40}, {0: 0.93, 16384: 0.60},
    )  # fmt: skip
    assert not comparison.setup_differences and not comparison.caveats
    (finding,) = comparison.findings
    assert comparison.sentence(finding).startswith(
        "babilong_qa1: b is better than a at 16K (0.6 against 0.4, p < 0.001"
    )
    assert [test.context_lengths for test in comparison.tests] == [(0,), (16384,)]


def test_what_is_of_0k_alone_is_a_table_without_a_figure(tmp_path):
    """lm-eval's default, which has no place on an axis of lengths."""
    save(tmp_path, babilong(0.95, "0k"))
    comparison = compare([load(tmp_path)])
    assert curve(comparison, "babilong_qa1").context_lengths == [0]
    assert not panels(comparison)


def test_losses_of_other_buckets_are_not_set_side_by_side(tmp_path):
    """A loss at 64K is of the tokens since the length before, whichever was run."""

    def losses(**values):
        found = {f"{name}@{n:07d},none": value for name, of in values.items() for n, value in of}
        return results({"yoco_long_loss_book": found})

    first = losses(loss=[(1024, 4.0), (4096, 3.0)], loss_to=[(1024, 4.0), (4096, 3.2)])
    from_4k = losses(loss=[(4096, 3.2), (16384, 2.9)], loss_to=[(4096, 3.2), (16384, 3.0)])
    alone = losses(loss=[(16384, 3.0)], loss_to=[(16384, 3.0)])
    save(tmp_path / "a", first, from_4k)
    save(tmp_path / "b", alone)
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    assert curve(comparison, "yoco_long_loss_book", "loss_to").values == (
        {1024: 4.0, 4096: 3.2, 16384: 3.0}, {16384: 3.0},
    )  # fmt: skip
    assert curve(comparison, "yoco_long_loss_book", "loss").values == (
        {1024: 4.0, 4096: 3.0, 16384: 2.9}, {},
    )  # fmt: skip
    left_out = {one.metric: one.left_out for one in comparison.curves}
    assert left_out == {"loss": ((), (16384,)), "loss_to": ((), ())}
    told = "Left out, since their tokens begin at another length: b 16K."
    assert told in [note for section in sections(comparison) for table in section.tables
                    for note in table.notes]  # fmt: skip


def test_benchmarks_are_not_united(tmp_path):
    both = {"arc_easy": {"acc,none": 0.5}, "sciq": {"acc,none": 0.6}}
    save(tmp_path, results(both), results({"sciq": {"acc,none": 0.7}}))
    scores = {task: run.scores["acc,none"].value for (task, _), run in load(tmp_path).tasks.items()}
    assert scores == {"arc_easy": 0.5, "sciq": 0.7}


def test_united_runs_are_pairs_of_the_same_prompts(tmp_path):
    for name, accuracy in (("a", wrong), ("b", right)):
        save(
            tmp_path / name,
            needle_results(accuracy, lengths=SHORT),
            needle_results(accuracy, lengths=LONG),
        )
    comparison = compare(load_checkpoints([tmp_path / "a", tmp_path / "b"]))
    assert not comparison.caveats
    assert {test.context_length for test in comparison.tests} == {*SHORT, *LONG, None}
    assert len(comparison.checkpoints[0].files) == 2
