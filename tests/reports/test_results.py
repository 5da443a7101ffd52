"""Reading result files: which run is chosen, what it is called, what is refused."""

import json
import logging
import math
import os
from datetime import datetime

import pytest
from lm_eval.loggers import EvaluationTracker

from yoco_eval.reports.profile import load_profile
from yoco_eval.reports.results import NeedleCell, ResultsError, read_results
from yoco_eval.reports.runs import load_needle_run
from yoco_eval.reports.samples import read_samples

CELLS = [
    {"context_length": 8192, "depth": 0.0, "samples": 5, "correct": 2},
    {"context_length": 4096, "depth": 1.0, "samples": 5, "correct": 5},
    {"context_length": 4096, "depth": 0.0, "samples": 10, "correct": 7},
]


def results(cells=CELLS, task="yoco_needle", date=1.7e9, config=None, **tasks):
    """The contents of a results file whose needle tasks are `task` and those in `tasks`."""
    tasks = {task: cells, **tasks}
    return {
        "results": {},
        "config": config or {"model": "hf", "model_args": {"pretrained": "org/small"}},
        "configs": {
            name: {"task": name, "metadata": {"version": 1.0, "cells": value}}
            for name, value in tasks.items()
        },
        "date": date,
    }


def write(folder, data, name="results_2025-01-02T03-04-05.678901.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / name


def error(path, task=None):
    with pytest.raises(ResultsError) as caught:
        load_needle_run(path, task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("max_length", "cut"),
    [
        (2047, {4096: 2047, 2049: 2047}), (2048, {4096: 2048}), (4095, {}), (4096, {}),
        (None, {}), (True, {}), ("2048", {}), (0, {}), (math.inf, {}), (2**63 - 1, {}),
    ],
)  # fmt: skip
def test_prompts_longer_than_the_backend_takes_are_cut(tmp_path, max_length, cut):
    data = {"config": {}, "configs": {}, "date": 1, "max_length": max_length}
    file = read_results(write(tmp_path, data))
    lengths = (1024, 2048, 2049, 4096)
    assert {n: file.cut(n) for n in lengths if file.cut(n) is not None} == cut


def test_reads_what_lm_eval_writes(tmp_path):
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args("hf", "pretrained=org/small", "", "", False)
    tracker.save_results_aggregated(results(), samples={})
    run = load_needle_run(tmp_path)
    assert run.path.parent == tmp_path / "org__small"
    assert (run.model, run.task) == ("small", "yoco_needle")
    assert run.date == datetime.fromtimestamp(1.7e9).astimezone()
    assert run.cells == (
        NeedleCell(4096, 0.0, 10, 7),
        NeedleCell(4096, 1.0, 5, 5),
        NeedleCell(8192, 0.0, 5, 2),
    )
    assert (run.context_lengths, run.depths, run.prompts) == ([4096, 8192], [0.0, 1.0], 20)
    assert run.accuracy == 14 / 20
    assert load_needle_run(run.path) == run


@pytest.mark.parametrize(
    ("config", "top", "name"),
    [
        ({"model_args": {"pretrained": "runs/yoco-1m/"}, "pretrained": "demo"}, {}, "yoco-1m"),
        ({"model_args": "dtype=float32,pretrained=/ckpt/a=b"}, {}, "a=b"),
        ({"model_args": "", "pretrained": "/site/yoco-demo"}, {"model_name": "Xy12"}, "yoco-demo"),
        ({"model_args": {"model": "org/chat"}}, {"model_name": "other"}, "org/chat"),
        ({"model_args": None}, {"model_name": "somebody"}, "somebody"),
        ({"model_args": "", "model": "dummy"}, {}, "dummy"),
    ],
)
def test_model_name(tmp_path, config, top, name):
    write(tmp_path, results(config=config) | top)
    assert load_needle_run(tmp_path).model == name


def test_needle_tasks_are_known_by_their_cells(tmp_path):
    data = results(task="another_needle")
    data["configs"] |= {"hellaswag": {"metadata": {"version": 1.0}}, "old": {"metadata": None}}
    write(tmp_path, data)
    assert load_needle_run(tmp_path).task == "another_needle"


def test_several_tasks(tmp_path):
    write(tmp_path, results(yoco_multi_needle=CELLS[:1]))
    assert "--task: yoco_multi_needle, yoco_needle" in error(tmp_path)
    assert len(load_needle_run(tmp_path, "yoco_multi_needle").cells) == 1
    assert "'needle'; there is: yoco_multi_needle, yoco_needle" in error(tmp_path, "needle")


@pytest.mark.parametrize("dated", ["field", "name"])
def test_newest_run_of_a_model(tmp_path, caplog, dated):
    for day in (1, 3, 2):
        data = results(CELLS[: day - 1] or CELLS, date=86400.0 * day)
        data["configs"]["yoco_needle"]["metadata"]["seed"] = day  # so that they are not united
        if dated == "name":
            del data["date"]
        name = f"results_2025-01-0{day}T00-00-00.000001.json" if dated == "name" else None
        write(tmp_path / "org__small", data, name or f"results_{9 - day}.json")
    # A later run without needle results does not count.
    write(tmp_path, results() | {"configs": {}, "date": 9e9})
    with caplog.at_level(logging.WARNING):
        run = load_needle_run(tmp_path)
    assert len(run.cells) == 2
    assert f"yoco_needle: not united with {run.path.name}: seed 2, not 3" in caplog.text
    assert caplog.text.count("skipped") == 2


@pytest.mark.parametrize("name", ["results.json", "mine_2025-01-02T03-04-05.678901.json"])
def test_files_of_any_name_are_read(tmp_path, name):
    """As lm-eval calls them with --output_path mine.json, and as people do."""
    write(tmp_path, results(), name)
    write(tmp_path, '{"model_type": "yoco"}', "config.json")
    assert load_needle_run(tmp_path).prompts == 20


def test_models_of_equal_name_are_told_apart(tmp_path):
    for stage in ("4k", "64k"):
        config = {"model_args": {"pretrained": f"ckpt/{stage}/last"}}
        write(tmp_path / stage, results(config=config))
    a, b = tmp_path / "4k", tmp_path / "64k"
    assert f"several models; choose one of: {a} (4k/last), {b} (64k/last)" in error(tmp_path)
    assert load_needle_run(a).model == "last"


def test_models_in_one_folder_are_chosen_by_file(tmp_path):
    one = write(tmp_path, results(), "results_1.json")
    two = write(tmp_path, results(config={"model_args": "pretrained=other"}), "results_2.json")
    assert f"{one} (small), {two} (other)" in error(tmp_path)


def test_one_model_from_two_folders(tmp_path):
    """Also under the random folder names lm-eval invents where no argument names the model."""
    config = {"model_args": "", "pretrained": "yoco-demo"}
    write(tmp_path / "aa", results(config=config) | {"model_name": "aa"})
    write(tmp_path / "bb", results(config=config, date=1.8e9) | {"model_name": "bb"})
    assert load_needle_run(tmp_path).path.parent.name == "bb"


@pytest.mark.parametrize(
    "text", ["", '{"results": {"yoco_ne', "[1, 2]", '{"config": 3}', "\udcff", "[" * 100_000]
)
def test_foreign_files_are_skipped(tmp_path, caplog, text):
    (tmp_path / "results_0.json").write_bytes(text.encode(errors="surrogateescape"))
    write(tmp_path, results())
    assert load_needle_run(tmp_path).prompts == 20
    assert f"skipped {tmp_path / 'results_0.json'}: {'not ' if text else 'empty'}" in caplog.text
    assert f"{tmp_path / 'results_0.json'}: not " in error(tmp_path / "results_0.json")


@pytest.mark.parametrize("read", [read_results, load_profile, read_samples])
def test_pipes_and_devices_are_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(ResultsError, match=f"{tmp_path / name}: .*not an ordinary file"):
            read(tmp_path / name)


@pytest.mark.parametrize("read", [read_results, load_profile])
def test_files_without_end_are_not_read(tmp_path, read):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ResultsError, match=f"{tmp_path / 'large'}: .*far larger"):
        read(tmp_path / "large")


def test_nothing_to_read(tmp_path):
    assert f"{tmp_path / 'x'}: no such file or folder" in error(tmp_path / "x")
    mend = f"--tasks yoco_needle --output_path {tmp_path}"
    assert error(tmp_path).startswith(f"{tmp_path}: no needle results") and mend in error(tmp_path)
    write(tmp_path, results() | {"configs": {"hellaswag": {}}})
    assert mend in error(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"depth": 1.5}, "depth 1.5 is outside 0..1"),
        ({"depth": float("nan")}, "depth nan is outside 0..1"),
        ({"depth": "half"}, "depth 'half' is not a number"),
        ({"correct": 6}, "correct 6 is outside 0..5"),
        ({"correct": -1}, "correct -1 is outside 0..5"),
        ({"correct": 2.5}, "correct 2.5 is not a whole number"),
        ({"samples": 0, "correct": 0}, "samples 0 is outside 1..1000000"),
        ({"samples": 10**12}, "samples 1000000000000 is outside 1..1000000"),
        ({"context_length": 0}, "context_length 0 is outside 1..1073741824"),
        ({"context_length": 10**400}, "000 is outside 1..1073741824"),
        ({"context_length": "4k"}, "context_length '4k' is not a whole number"),
        ({"right": [0]}, "right and wrong must both be given"),
        ({"right": [0, 1], "wrong": [2, 3]}, "do not agree with correct and samples"),
        ({"right": [0, 1], "wrong": [1, 3, 4]}, "a sample is twice in right and wrong"),
        ({"right": [0, 1], "wrong": [2, 3, "4"]}, "something that is no whole number"),
        ({"right": 3, "wrong": 4}, "needs context_length"),
        ({"prompts": ["a"] * 5}, "prompts do not agree with right and wrong"),
        ({"right": [0, 1], "wrong": [2, 3, 4], "prompts": ["a"]}, "prompts do not agree"),
        ({"right": [0, 1], "wrong": [2, 3, 4], "prompts": [5] * 5}, "that is no digest"),
        ({"context_length": 4096}, "two cells for context length 4096 at depth 0.0"),
    ],
)
def test_malformed_cells(tmp_path, change, complaint):
    path = write(tmp_path, results([CELLS[2], CELLS[0] | change]))
    message = error(tmp_path)
    assert message.startswith(f"{path}: task yoco_needle: ") and complaint in message


@pytest.mark.parametrize("cells", [[], [3], [{"context_length": 4096}]])
def test_cells_of_another_form(tmp_path, cells):
    path = write(tmp_path, results(cells))
    assert error(tmp_path).startswith(f"{path}: task yoco_needle: ")


def test_depths_that_differ_by_rounding_are_one(tmp_path):
    cells = [CELLS[0] | {"depth": 0.1 + 0.2}, CELLS[1] | {"depth": 0.3}]
    write(tmp_path, results(cells))
    assert load_needle_run(tmp_path).depths == [0.3]


def test_additional_keys_of_a_cell_are_ignored(tmp_path):
    write(tmp_path, results([CELLS[0] | {"seconds": 1.5}]))
    assert load_needle_run(tmp_path).cells == (NeedleCell(8192, 0.0, 5, 2),)


def test_samples_of_a_cell(tmp_path):
    answers = {"right": [1, 4], "wrong": [0, 2, 3], "prompts": list("abcde")}
    write(tmp_path, results([CELLS[0] | answers, CELLS[1]]))
    old, new = load_needle_run(tmp_path).cells
    assert (new.right, new.wrong, new.prompts) == ((1, 4), (0, 2, 3), tuple("abcde"))
    assert (old.right, old.wrong, old.prompts) == (None, None, None)
