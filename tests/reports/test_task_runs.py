"""What is by context length in results files of this project and of lm-eval's own tasks."""

import pytest
from made_results import results, write

from yoco_eval.reports.results import read_results
from yoco_eval.reports.task_runs import task_runs

TASKS = ["babilong_qa1", "babilong_qa2", "babilong_qa11"]


def read(tmp_path, *content, **parts):
    runs, damaged = task_runs(read_results(write(tmp_path, results(*content, **parts))))
    assert not damaged
    return {run.task: run for run in runs}


def values(run):
    return {m: {n: one.value for n, one in found.items()} for m, found in run.by_length.items()}


def one_length(tasks, length):
    given = {} if length is None else {"max_seq_lengths": length}
    return {task: {"metadata": {"version": 0.0, "pretrained": "x", **given}} for task in tasks}


def test_metrics_with_an_at_are_by_length_only_where_the_task_says_so(tmp_path):
    code = {"pass@1,create_test": 0.5, "pass@1_stderr,create_test": 0.1, "pass@10,create_test": 0.7}
    loss = {"loss,none": 3.0, "loss@0001024,none": 4.0, "loss_to@0001024,none": 4.0}
    runs = read(tmp_path, {"humaneval": code, "yoco_long_loss_book": loss})
    assert not runs["humaneval"].by_length
    assert runs["humaneval"].scores["pass@1,create_test"].error == 0.1
    assert list(runs["humaneval"].scores) == ["pass@1,create_test", "pass@10,create_test"]
    assert values(runs["yoco_long_loss_book"]) == {"loss": {1024: 4.0}, "loss_to": {1024: 4.0}}
    assert list(runs["yoco_long_loss_book"].scores) == ["loss,none"]


def test_files_older_than_what_tasks_say_are_read_by_their_context_lengths(tmp_path):
    scores = {"acc,none": 0.8, "acc@0004096,none": 0.9, "pass@1,none": 0.5}
    old = {"metadata": {"context_lengths": [4096]}}
    group = {"yoco_ruler": scores, "niah_single_1": scores}
    runs = read(
        tmp_path, group, configs={"niah_single_1": old},
        group_subtasks={"yoco_ruler": ["niah_single_1"]},
    )  # fmt: skip
    for run in runs.values():
        assert values(run) == {"acc": {4096: 0.9}}
        assert list(run.scores) == ["acc,none", "pass@1,none"]


@pytest.mark.parametrize(("given", "length"), [("16k", 16384), ("0k", 0), (None, 0), ("1M", 2**20)])
def test_babilong_of_lm_eval_is_at_the_length_that_was_set(tmp_path, given, length):
    score = {"acc,none": 0.95, "acc_stderr,none": 0.01}
    scores = {task: score for task in (*TASKS[:2], "babilong_longctx")}
    subtasks = {"babilong_longctx": TASKS[:2]}
    runs = read(tmp_path, scores, configs=one_length(TASKS[:2], given), group_subtasks=subtasks)
    for run in runs.values():
        assert values(run) == {"acc": {length: 0.95}} and not run.scores
        assert run.by_length["acc"][length].error == 0.01


def test_a_mean_over_babilong_tasks_of_several_lengths_is_left_out(tmp_path):
    """lm-eval runs questions 11 to 20 at 0K, whatever length is set."""
    scores = {task: {"acc,none": 0.5} for task in (*TASKS, "babilong")}
    configs = one_length(TASKS, "16k")
    runs = read(tmp_path, scores, configs=configs, group_subtasks={"babilong": TASKS})
    assert {task: values(run) for task, run in runs.items()} == {
        "babilong_qa1": {"acc": {16384: 0.5}}, "babilong_qa2": {"acc": {16384: 0.5}},
        "babilong_qa11": {"acc": {0: 0.5}},
    }  # fmt: skip


def test_ruler_of_lm_eval_has_values_where_it_was_run(tmp_path):
    members = ["niah_single_1", "ruler_vt"]
    scores = {
        "ruler": {"4096,none": -1, "4096_stderr,none": "N/A"},
        "niah_single_1": {"4096,none": -1, "8192,none": 0.9},
        "ruler_vt": {"4096,none": -1, "8192,none": 0.5},
    }
    runs = read(tmp_path, scores, group_subtasks={"ruler": members})
    assert values(runs["ruler"]) == {"acc": {8192: 0.7}} and not runs["ruler"].scores
    assert values(runs["ruler_vt"]) == {"acc": {8192: 0.5}}
    # At lengths that lm-eval's task does not report nothing is left.
    assert not read(tmp_path, {"niah_single_1": {"4096,none": -1}})
    other = read(tmp_path, {"mine": {"4096,none": 0.5}})["mine"]
    assert not other.by_length and other.scores["4096,none"].value == 0.5
