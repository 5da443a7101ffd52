"""Collecting results: what counts for a checkpoint, what it is called, what is passed over."""

import json
import os

import pytest
from made_results import needle_results, results, write

from yoco_eval.reports.profile import Profile, ProfileRow
from yoco_eval.reports.profile_files import save_profile
from yoco_eval.reports.results import ResultsError
from yoco_eval.reports.runs import load_checkpoints, load_needle_run
from yoco_eval.reports.samples import NeedleSample, read_samples
from yoco_eval.reports.task_runs import Score


def load(path):
    (checkpoint,) = load_checkpoints([path])
    return checkpoint


def skipped(checkpoint):
    return {skip.path.name: skip.reason for skip in checkpoint.skipped}


def half(length, depth):
    return 0.5


def profile(length=1024):
    row = ProfileRow("YOCO", length, "measured", 2**30, 2**20, 2**31, 1.5, 20.0)
    return Profile("tiny", {"YOCO": {}}, "float32", "CPU", None, {}, 64, 16, 120.0, 0, (row,))


def test_newest_result_of_each_task(tmp_path):
    old = {"arc_easy": {"acc,none": 0.1}, "sciq": {"acc,none": 0.5, "acc_stderr,none": 0.02}}
    write(tmp_path / "a", results(old, date=1), "results_1.json")
    write(tmp_path / "b", results({"arc_easy": {"acc,none": 0.3}}, date=2), "results_2.json")
    write(tmp_path / "b", needle_results(half, date=3), "results_3.json")
    save_profile(profile(), tmp_path / "cost.json")
    checkpoint = load(tmp_path)
    assert checkpoint.name == tmp_path.name
    scores = {task: run.scores["acc,none"] for (task, _), run in checkpoint.tasks.items()}
    assert scores["arc_easy"] == Score(0.3) and scores["sciq"] == Score(0.5, 0.02)
    assert checkpoint.needles["yoco_needle"].prompts == 9 * 11 * 5
    assert checkpoint.profile == profile()
    assert not checkpoint.skipped


def test_a_newer_result_without_cells_counts(tmp_path):
    write(tmp_path, needle_results(half, date=1), "results_1.json")
    write(tmp_path, results({"yoco_needle": {"acc,none": 0.3}}, date=2), "results_2.json")
    checkpoint = load(tmp_path)
    assert checkpoint.tasks["yoco_needle", 0].scores["acc,none"].value == 0.3
    assert not checkpoint.needles
    assert skipped(checkpoint) == {
        "results_1.json": "yoco_needle: not united with results_2.json: nothing is by context "
        "length there"
    }


def test_numbers_of_examples_are_told_apart(tmp_path):
    write(tmp_path, results({"arc_easy": {"acc,none": 0.1}}, shots=0), "results_1.json")
    write(tmp_path, results({"arc_easy": {"acc,none": 0.2}}, shots=25, date=2e9), "results_2.json")
    runs = load(tmp_path).tasks
    assert {key: run.scores["acc,none"].value for key, run in runs.items()} == {
        ("arc_easy", 0): 0.1, ("arc_easy", 25): 0.2,
    }  # fmt: skip


def test_groups(tmp_path):
    scores = {name: {"acc,none": 0.5} for name in ("mmlu", "mmlu_stem", "mmlu_anatomy", "other")}
    shots = {"mmlu_anatomy": 5, "other": 0}
    subtasks = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy", "mmlu"], "all": ["mmlu"]}
    write(tmp_path, results(scores, **{"n-shot": shots, "group_subtasks": subtasks}))
    runs = load(tmp_path).tasks
    assert runs["mmlu", 5].members == ("mmlu_stem", "mmlu_anatomy")
    assert {"mmlu_stem", "mmlu_anatomy", "other"} == {task for task, _ in runs} - {"mmlu"}


def test_what_is_passed_over_is_named(tmp_path):
    write(tmp_path, needle_results(half))
    for name, text in {
        "half.json": '{"results": {"yoco_ne', "results_0.json": "", "list.json": "[1]",
        "deep.json": "[" * 100_000, "config.json": '{"model_type": "yoco"}',
        "profile.json": '{"kind": "yoco-eval profile", "rows": 3}',
    }.items():  # fmt: skip
        write(tmp_path / "x", text, name)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    write(tmp_path, results({}, date=1), "results_1.json")
    write(tmp_path, needle_results(half, date=2), "results_2.json")
    write(tmp_path, needle_results(half, "another", date=3), "results_3.json")
    bad = needle_results(half, date=4e9)
    bad["configs"]["yoco_needle"]["metadata"]["cells"][0]["correct"] = 99
    write(tmp_path, bad, "results_4.json")
    checkpoint = load(tmp_path)
    assert checkpoint.needles["yoco_needle"].date.year == 2023
    found = skipped(checkpoint)
    assert found.pop("half.json").startswith("not readable as JSON")
    assert found.pop("deep.json").startswith("not readable as JSON")
    assert found.pop("bytes.json").startswith("not readable as JSON")
    assert found.pop("results_3.json").startswith("of another model, another, than results_4.json")
    assert "correct 99 is outside 0..5" in found.pop("results_4.json")
    assert found.pop("profile.json").startswith("a damaged profile (")
    assert found == {
        "results_0.json": "empty",
        "list.json": "not a results file of lm-eval",
        "config.json": "not a results file of lm-eval",
        "results_1.json": "has no results",
        "results_2.json": "its results are all in newer files",
    }


def test_nothing_to_read(tmp_path):
    with pytest.raises(ResultsError, match="none: no such file or folder; give what lm_eval got"):
        load_checkpoints([tmp_path / "none"])
    write(tmp_path / "empty", "{", "results_1.json")
    with pytest.raises(ResultsError, match=r"empty: no results in it \(results_1.json: not read"):
        load_checkpoints([tmp_path / "empty"])
    with pytest.raises(ResultsError, match=r"no needle results \(results_1.json: not readable"):
        load_needle_run(tmp_path / "empty")


def test_a_name_that_lm_eval_puts_a_date_into(tmp_path):
    write(tmp_path, results({}), "mine_2026-01-02T03-04-05.678.json")
    told = r"mine.json: no such file; there is .*mine_2026-01-02T03-04-05.678.json$"
    for load in (load_needle_run, lambda path: load_checkpoints([path])):
        with pytest.raises(ResultsError, match=told):
            load(tmp_path / "mine.json")


def test_predictions_that_nobody_scored_are_no_results(tmp_path):
    write(tmp_path / "a", results({"yoco_needle": {"bypass,none": 999}}))
    with pytest.raises(ResultsError, match="has no scores: run without --predict_only"):
        load_checkpoints([tmp_path / "a"])
    with pytest.raises(ResultsError, match="no needle results .results.*: has no scores: run with"):
        load_needle_run(tmp_path / "a")
    write(tmp_path / "a", results({"arc_easy": {"acc,none": 0.5, "bypass,none": 999}}), "b.json")
    (checkpoint,) = load_checkpoints([tmp_path / "a"])
    assert [list(run.scores) for run in checkpoint.tasks.values()] == [["acc,none"]]


def test_names(tmp_path):
    for name in ("a/4k/last", "a/64k/last", "b/4k/last", "c"):
        write(tmp_path / name, needle_results(half))
    paths = [tmp_path / name for name in ("a/4k/last", "a/64k/last", "b/4k/last", "c")]

    def names(paths, *given):
        return [checkpoint.name for checkpoint in load_checkpoints(paths, *given)]

    assert names(paths) == ["a/4k/last", "64k/last", "b/4k/last", "c"]
    assert names([paths[0], paths[3] / ".." / "c"]) == ["last", "c"]
    file = write(tmp_path / "c", needle_results(half), "results_2.json")
    assert names([file]) == ["c"]
    assert names([file, next(paths[3].glob("results_2025*"))])[0] == "results_2.json"
    for step in (1, 2):
        data = needle_results(half, "org/ckpts")
        data["config"]["model_args"]["revision"] = f"step{step}"
        write(tmp_path / "d", data, f"results_{step}.json")
    files = sorted((tmp_path / "d").iterdir())
    assert names(files) == ["ckpts revision=step1", "ckpts revision=step2"]
    assert names(paths[:2], ["x", "y"]) == ["x", "y"]
    for given, several, message in [
        (["x"], paths, "--names: 1 given for 4 results"),
        (["x", "x"], paths[:2], "two are named x; give different names"),
        (["x", " "], paths[:2], "one is empty"),
        (None, [paths[3], paths[3]], "c: given twice; give each folder once"),
    ]:
        with pytest.raises(ResultsError, match=message):
            load_checkpoints(several, given)


def test_a_folder_of_several_models_is_told(tmp_path, caplog):
    """As lm-eval makes it of two evaluations with one --output_path."""
    for date, name in enumerate(("old", "new")):
        write(tmp_path / name, needle_results(half, name, date=1e9 + date))
    assert load(tmp_path).needles["yoco_needle"].path.parent.name == "new"
    assert f"{tmp_path} holds results of several models; only those of new count" in caplog.text
    with pytest.raises(ResultsError, match="both hold results_2025.*; give each checkpoint's own"):
        load_checkpoints([tmp_path, tmp_path / "new"])


def test_logged_samples(tmp_path):
    write(tmp_path, needle_results(half), "results_2025.json")
    doc = {
        "context_length": 4096, "depth": 0.1 + 0.2, "sample": 1, "question": "What?",
        "number": "123", "needle": "It is 123.", "excerpt": "... It is 123. ...",
        "prompt_tokens": 4090,
    }  # fmt: skip
    line = {"doc": doc, "arguments": {"arg_0": "x" * 10_000}, "filtered_resps": [" 7"], "acc": 0.0}
    lines = [json.dumps(line), "{", "3", '{"doc": {}}', json.dumps({**line, "filtered_resps": []})]
    lines.append(json.dumps({**line, "doc": doc | {"context_length": float("inf")}}))
    (tmp_path / "samples_yoco_needle_2025.jsonl").write_text("\n".join(lines))
    (path,) = load(tmp_path).samples["yoco_needle"].values()
    sample = NeedleSample(
        4096, 0.3, 1, "What?", "123", " 7", "It is 123.", doc["excerpt"], 4090, False
    )
    assert read_samples(path) == ([sample], 5)
    with pytest.raises(ResultsError, match="gone: cannot be read"):
        read_samples(tmp_path / "gone")
    path.unlink()
    os.mkfifo(path)
    assert not load(tmp_path).samples["yoco_needle"]
