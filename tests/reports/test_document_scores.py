"""Tasks by context length from their logged documents: what is read, shown and tested."""

import json
import re
from random import Random

import pytest
from made_results import results, write

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_text import markdown
from yoco_eval.reports.document_scores import logged_scores
from yoco_eval.reports.document_tests import OTHER_DOCUMENTS, PAIRED_DOCUMENTS
from yoco_eval.reports.runs import load_checkpoints
from yoco_eval.tasks.by_length import metric_at

LENGTHS = [4096, 16384]
RULER = {"niah_single_1": 1.0, "ruler_vt": 0.9}  # tasks, and how much of the accuracy they have
LONGBENCH = ("longbench2_table", "longbench2_graph", "longbench2_code")


def draw(*what):
    return Random("/".join(map(str, what))).random()


def log(file, task, lines):
    """As --log_samples leaves them beside a results file."""
    path = file.parent / f"samples_{task}_{file.stem.rpartition('_')[2]}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def line(prompt, doc, text="", **scores):
    return {
        "doc": doc, "prompt_hash": str(prompt), "filter": "none",
        "arguments": {"gen_args_0": {"arg_0": text, "arg_1": {}}}, **scores,
    }  # fmt: skip


def ruler(folder, model, accuracy, prompts="p", samples=40):
    """lm-eval's: metrics are bare lengths, of the group one at 4096 alone."""
    lines = {
        task: [
            line(
                f"{prompts}/{length}/{n}", {"max_length": length, "outputs": ["7"]},
                **{str(n): -1.0 for n in LENGTHS},
            ) | {str(length): float(draw(model, task, length, n) < share * accuracy[length])}
            for length in LENGTHS
            for n in range(samples)
        ]
        for task, share in RULER.items()
    }  # fmt: skip
    scores = {
        task: {
            f"{length},none": sum(one[str(length)] for one in of if one[str(length)] >= 0) / samples
            for length in LENGTHS
        }
        for task, of in lines.items()
    }
    scores["ruler"] = {"4096,none": 0.5}
    data = results(scores, model, group_subtasks={"ruler": [*RULER]})
    file = write(folder, data | {"configs": {task: data["configs"][task] for task in RULER}})
    for task, of in lines.items():
        log(file, task, of)
    return folder


def longbench(folder, model, accuracy, logged=True):
    """A group over sub-groups, whose documents say nothing of their lengths."""
    lines = {
        task: [
            line(
                f"{task}/{n}", {"question": "?"}, "word " * (size // 5),
                acc=float(draw(model, task, n) < accuracy),
            )
            for n, size in enumerate([4 * 60_000] * 60 + [4 * 100_000] * 60)
        ]
        for task in LONGBENCH
    }  # fmt: skip
    means = {t: sum(one["acc"] for one in of) / len(of) for t, of in lines.items()}
    scores = {t: {"acc,none": mean, "acc_stderr,none": 0.05} for t, mean in means.items()}
    whole = sum(means.values()) / len(means)
    for group in ("longbench2", "longbench2_structured"):
        scores[group] = {"acc,none": whole, "acc_stderr,none": 0.03}
    below = {
        "longbench2": ["longbench2_structured", "longbench2_code"],
        "longbench2_structured": ["longbench2_table", "longbench2_graph"],
    }
    data = results(scores, model, group_subtasks=below)
    data["configs"] = {task: data["configs"][task] for task in lines}
    file = write(folder, data)
    for task, of in lines.items() if logged else ():
        log(file, task, of)
    return folder


def compared(*folders):
    return compare(load_checkpoints(folders))


def of_task(comparison, task):
    return {test.context_lengths: test for test in comparison.tests if test.task == task}


def test_a_group_at_each_length_and_its_tasks_over_all(tmp_path):
    good, bad = {4096: 0.95, 16384: 0.9}, {4096: 0.95, 16384: 0.3}
    comparison = compared(ruler(tmp_path / "a", "a", good), ruler(tmp_path / "b", "b", bad))
    tests = of_task(comparison, "ruler")
    assert [*tests] == [(4096,), (16384,)]
    assert not tests[4096,].significant
    assert tests[16384,].significant
    assert tests[16384,].better == 0
    assert {test.method for test in tests.values()} == {PAIRED_DOCUMENTS}
    assert tests[16384,].prompts == (80, 80)
    curves = next(one for one in comparison.curves if one.task == "ruler")
    assert tests[16384,].scores == pytest.approx([of[16384] for of in curves.values])
    for task in RULER:
        assert [*of_task(comparison, task)] == [(4096, 16384)]
    text = markdown(comparison)
    assert "\n- REGRESSION: ruler: b is worse than the earlier a at 16K (0." in text
    [together] = re.findall(r"\n- .*REGRESSION.* over 4K and 16K together in (.*), p", text)
    assert [task for task in RULER if task.replace("_", "\\_") in together] == [*RULER]
    assert "<summary>ruler: its tasks</summary>" in text
    assert "| niah\\_single\\_1 | 16K |" in text
    assert "Comparisons restricted" not in text


def test_other_prompts_are_not_paired(tmp_path):
    good, bad = dict.fromkeys(LENGTHS, 0.95), dict.fromkeys(LENGTHS, 0.3)
    folders = ruler(tmp_path / "a", "a", good), ruler(tmp_path / "b", "b", bad, prompts="q")
    tests = of_task(compared(*folders), "ruler")
    assert {test.method for test in tests.values()} == {OTHER_DOCUMENTS}
    assert all(test.significant for test in tests.values())


def test_means_of_few_documents_are_not_of_task(tmp_path):
    good, bad = dict.fromkeys(LENGTHS, 0.95), dict.fromkeys(LENGTHS, 0.3)
    folders = [
        ruler(tmp_path / name, name, accuracy, samples=10)
        for name, accuracy in (("a", good), ("b", bad))
    ]
    assert not of_task(compared(*folders), "ruler")


def test_prompts_of_longbench_are_put_into_bins(tmp_path):
    folders = longbench(tmp_path / "a", "a", 0.8), longbench(tmp_path / "b", "b", 0.4)
    comparison = compared(*folders)
    tests = of_task(comparison, "longbench2")
    assert [*tests] == [(), (65536,), (131072,)]  # of all, by lm-eval's standard errors
    assert all(test.significant and test.better == 0 for test in tests.values())
    assert tests[65536,].prompts == (180, 180)
    for task in LONGBENCH:
        [test] = of_task(comparison, task).values()
        assert (test.method, test.prompts) == (PAIRED_DOCUMENTS, (120, 120))
    [benchmark] = [one for one in comparison.benchmarks if one.task == "longbench2"]
    [curves] = [one for one in comparison.curves if one.task == "longbench2"]
    for score, values in zip(benchmark.scores, curves.values, strict=True):
        assert score.value == pytest.approx(sum(values.values()) / 2)
    text = markdown(comparison)
    assert text.count("with 4 characters for a token") >= 1
    for row in ("| longbench2\\_table | 64K |", "| longbench2\\_table | all |"):
        assert row in text


def test_members_are_shown_and_tested_without_samples(tmp_path):
    folders = [
        longbench(tmp_path / name, name, accuracy, logged=False)
        for name, accuracy in (("a", 0.9), ("b", 0.3))
    ]
    comparison = compared(*folders)
    assert not comparison.curves
    shown = [one.task for one in comparison.members["longbench2"]]
    assert sorted(shown) == sorted([*LONGBENCH, "longbench2_structured"])
    assert all(test.significant for test in of_task(comparison, LONGBENCH[0]).values())
    assert "| longbench2\\_code | all |" in markdown(comparison)
    [alone] = [compared(folders[0])]
    assert "| longbench2\\_code | all |" in markdown(alone)


def test_this_projects_tasks_at_each_length(tmp_path):
    """Grades between 0 and 1, of runs with other numbers of samples."""

    def mrcr(name, grade, samples):
        lines = [
            line(f"{length}/{n}", {"context_length": length}, acc=grade * draw(name, length, n))
            for length in LENGTHS
            for n in range(samples)
        ]
        scores = {
            f"{metric_at('acc', length)},none": sum(
                one["acc"] for one in lines if one["doc"]["context_length"] == length
            ) / samples
            for length in LENGTHS
        }  # fmt: skip
        file = write(tmp_path / name, results({"yoco_mrcr_synthetic_4": scores}, name))
        log(file, "yoco_mrcr_synthetic_4", [*lines, {"doc": None}, {"doc": {}, "acc": 1}])
        return tmp_path / name

    tests = of_task(compared(mrcr("a", 1, 60), mrcr("b", 0.4, 50)), "yoco_mrcr_synthetic_4")
    assert [*tests] == [(4096,), (16384,)]
    assert all(test.significant and test.prompts == (50, 50) for test in tests.values())


def test_files_that_are_damaged_are_named(tmp_path):
    folder = longbench(tmp_path / "a", "a", 0.5)
    log_file = next(folder.glob("samples_longbench2_table_*"))
    log_file.write_text('{"doc"\n[]\n' + log_file.read_text())
    [checkpoint] = load_checkpoints([folder])
    run = checkpoint.tasks["longbench2_table", 0]
    logged, unread = logged_scores(run)
    assert sum(map(len, logged.scores.values())) == 120
    assert not unread
    log_file.unlink()
    log_file.mkdir()
    assert logged_scores(run) == (None, [])
