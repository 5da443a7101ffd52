"""Comparisons as data: the tables' contents, what is said of the setups, any contents survived."""

import json
from copy import deepcopy
from pathlib import Path
from random import Random

import pytest
from made_results import LENGTHS, needle_results, results, trained_to, write

from yoco_eval.reports.comparison import compare
from yoco_eval.reports.comparison_files import save_comparison
from yoco_eval.reports.results import ResultsError
from yoco_eval.reports.runs import load_checkpoints
from yoco_eval.reports.samples import NeedleSample
from yoco_eval.reports.statistics import wilson
from yoco_eval.reports.task_runs import Score

ZERO_SHOT = "arc_challenge arc_easy boolq hellaswag openbookqa piqa winogrande sciq".split()


def zero_shot(value, **parts):
    """As lm-eval writes it: both metrics of each task, and the group."""
    both = {"acc,none": value, "acc_stderr,none": 0.01, "acc_norm,none": value + 0.1}
    scores = {task: {"alias": task, **both} for task in ZERO_SHOT}
    scores["yoco_zero_shot"] = {"score,none": value, "score_stderr,none": 0.004}
    return results(scores, group_subtasks={"yoco_zero_shot": ZERO_SHOT}, **parts)


def compare_folders(*folders, **options):
    return compare(load_checkpoints(folders), **options)


def test_needles_by_length(family):
    (needles,) = compare_folders(*family).needles
    assert needles.context_lengths == LENGTHS and len(needles.depths) == 11
    one = needles.results[0].at(8192)
    assert (one.samples, one.accuracy) == (55, one.correct / 55)
    assert one.interval == wilson(one.correct, 55)
    assert needles.results[0].at(1000) is None
    assert compare_folders(*family, threshold=0.95).needles[0].results[3].effective_length is None


def test_intervals_widen_where_haystacks_differ(tmp_path):
    """Two haystacks of five are lost at 8K; at 4K as many prompts, of all haystacks alike."""
    data = needle_results(lambda *_: 1.0, lengths=[4096, 8192], depths=[0.0, 0.25, 0.5, 0.75, 1.0])
    for place, cell in enumerate(data["configs"]["yoco_needle"]["metadata"]["cells"]):
        wrong = {place % 5, (place + 1) % 5} if cell["context_length"] == 4096 else {1, 3}
        cell |= {"right": sorted(set(range(5)) - wrong), "wrong": sorted(wrong), "correct": 3}
    write(tmp_path / "a", data)
    for cell in data["configs"]["yoco_needle"]["metadata"]["cells"]:
        del cell["right"], cell["wrong"], cell["prompts"]
    write(tmp_path / "b", data)
    (needles,) = compare_folders(tmp_path / "a", tmp_path / "b").needles
    (alike, apart), unknown = (result.by_length for result in needles.results)
    assert alike.interval == wilson(15, 25) and (alike.haystacks, apart.haystacks) == (5, 5)
    assert apart.interval == pytest.approx(wilson(3, 5))  # 25 prompts are worth 5
    assert [(one.interval, one.haystacks) for one in unknown] == [(wilson(15, 25), None)] * 2


def test_too_few_prompts_are_told(tmp_path):
    write(tmp_path / "a", needle_results(trained_to(2**13), samples=2))
    write(tmp_path / "b", needle_results(lambda *_: 0.5, samples=2))
    (needles,) = compare_folders(tmp_path / "a", tmp_path / "b").needles
    a, b = needles.results
    assert a.effective_length is None and a.too_few_prompts  # 22 of 22 are above 0.85, no more
    assert b.effective_length is None and not b.too_few_prompts


def test_logged_samples_stand_with_their_cells(tmp_path):
    data = needle_results(trained_to(2**12), lengths=LENGTHS[:2], depths=[0.0, 1.0], answers=False)
    write(tmp_path, data, "results_2025.json")
    cells = data["configs"]["yoco_needle"]["metadata"]["cells"]
    lines = []
    for cell in cells:
        for sample in range(5):
            doc = {
                **cell, "sample": sample, "question": "?", "number": "1", "needle": "n",
                "excerpt": "e", "prompt_tokens": 4000,
            }  # fmt: skip
            right = float(sample < cell["correct"])
            lines.append(json.dumps({"doc": doc, "filtered_resps": [" 1"], "acc": right}))
    log = tmp_path / "samples_yoco_needle_2025.jsonl"
    log.write_text("\n".join(lines))
    other = write(tmp_path / "b", needle_results(lambda *_: 1.0, lengths=LENGTHS[:2])).parent
    first = tmp_path / "a"
    first.mkdir()
    for file in tmp_path.glob("*2025.json*"):
        file.rename(first / file.name)
    comparison = compare_folders(first, other)
    samples = comparison.needles[0].results[0].samples
    assert set(samples) == {(length, depth) for length in LENGTHS[:2] for depth in (0.0, 1.0)}
    assert samples[4096, 1.0][4] == NeedleSample(4096, 1.0, 4, "?", "1", " 1", "n", "e", 4000, True)
    # They tell which prompts were right, which this file's cells do not, but not the prompts.
    told = "not paired: an older results file does not tell its prompts"
    assert told in [caveat.reason for caveat in comparison.caveats]
    assert comparison.needles[0].results[0].by_length[0].haystacks == 5
    (first / log.name).write_text("\n".join(lines[1:]) + "\n{")
    comparison = compare_folders(first, other)
    told = "an older results file does not tell which prompts were right"
    assert any(told in caveat.reason for caveat in comparison.caveats)
    assert comparison.needles[0].results[0].by_length[0].haystacks is None
    (skip,) = comparison.checkpoints[0].skipped
    assert (skip.path.name, skip.reason) == (
        log.name,
        "19 of 20 samples of yoco_needle in it; lines that are no samples of yoco_needle: 1",
    )  # fmt: skip


def test_benchmarks_count_as_in_the_groups(tmp_path):
    write(tmp_path / "a", zero_shot(0.5))
    write(tmp_path / "b", zero_shot(0.6))
    # Plain lm-eval, another backend, some of the tasks and one more, a group with its members.
    scores = {
        name: {"acc,none": 0.4, "acc_norm,none": 0.45}
        for name in ("mmlu", "mmlu_anatomy", "hellaswag", "zeta")
    }
    config = {"model": "hf", "model_args": "pretrained=x", "model_dtype": "torch.bfloat16"}
    subtasks = {"mmlu": ["mmlu_anatomy"]}
    write(tmp_path / "c", results(scores, config=config, group_subtasks=subtasks))
    comparison = compare_folders(*(tmp_path / name for name in "abc"), published=True)
    shown = {benchmark.task: benchmark for benchmark in comparison.benchmarks}
    assert list(shown) == [*ZERO_SHOT, "yoco_zero_shot", "mmlu", "zeta"]
    assert shown["hellaswag"].metric == "acc_norm,none" and shown["hellaswag"].best == (1,)
    assert [score.value for score in shown["hellaswag"].scores] == [0.6, 0.7, 0.45]
    assert shown["arc_easy"].metric == "acc,none"
    assert shown["arc_easy"].scores == (Score(0.5, 0.01), Score(0.6, 0.01), None)
    assert shown["zeta"].metric == "acc,none" and shown["zeta"].best == ()
    assert shown["yoco_zero_shot"].scores[1] == Score(0.6, 0.004)
    paper = {model.model: model for model in comparison.published}["YOCO-3B-1M"]
    figures = (0.413, 0.747, 0.638, 0.705, 0.300, 0.773, 0.651, 0.932, 0.645)
    assert paper.scores == (*figures, None, None)
    found = {difference.setting: difference for difference in comparison.setup_differences}
    assert found["backend"].values == ("yoco", "yoco", "hf")
    assert found["dtype"].values == ("float32", "float32", "bfloat16")
    assert found["backend"].tasks == ("hellaswag",) and found["backend"].effect == "stated"


def test_equal_scores_are_none_the_best(tmp_path):
    for name in "ab":
        write(tmp_path / name, zero_shot(0.5))
    assert {b.best for b in compare_folders(tmp_path / "a", tmp_path / "b").benchmarks} == {()}


def test_examples_decide_the_metric_and_what_is_published(tmp_path):
    write(tmp_path, results({"arc_challenge": {"acc,none": 0.4, "acc_norm,none": 0.5}}, shots=25))
    comparison = compare_folders(tmp_path, published=True)
    assert [b.metric for b in comparison.benchmarks] == ["acc_norm,none"]
    assert comparison.published == ()


def test_curves(tmp_path):
    task = {"acc,none": 0.8, "acc@0004096,none": 0.9, "acc@0008192,none": 0.7}
    ours = {
        "niah_single_1": task,
        "yoco_ruler": task,
        "yoco_long_loss_book": {"loss,none": 3.0, "loss@0001024,none": 4.0,
                                "loss_to@0001024,none": 4.0},
    }  # fmt: skip
    write(tmp_path / "a", results(ours, group_subtasks={"yoco_ruler": ["niah_single_1"]}))
    plain = {"niah_single_1": {"4096,none": 0.9, "8192,none": -1}, "ruler": {"4096,none": 0.88}}
    write(tmp_path / "b", results(plain, group_subtasks={"ruler": ["niah_single_1"]}))
    comparison = compare_folders(tmp_path / "a", tmp_path / "b")
    curves = {(curve.task, curve.metric): curve for curve in comparison.curves}
    assert curves["yoco_ruler", "acc"].values == ({4096: 0.9, 8192: 0.7}, None)
    assert curves["yoco_ruler", "acc"].effective_lengths == (4096, None)
    assert curves["ruler", "acc"].effective_lengths == (None, 4096)
    member = curves["niah_single_1", "acc"]
    assert member.member and member.values == ({4096: 0.9, 8192: 0.7}, {4096: 0.9})
    assert curves["yoco_long_loss_book", "loss"].values == ({1024: 4.0}, None)
    assert curves["yoco_long_loss_book", "loss_to"].context_lengths == [1024]
    assert not comparison.benchmarks


def test_published_needles(tmp_path):
    write(tmp_path, needle_results(lambda *_: 1.0, lengths=[2**17], task="yoco_multi_needle_4"))
    (needles,) = compare_folders(tmp_path, published=True).needles
    paper = {row.model: row for row in needles.published}["YOCO-3B-1M"]
    assert (paper.context_length, paper.accuracy) == (2**17, 0.84)
    assert not compare_folders(tmp_path).needles[0].published


def test_setup_differences_of_tasks_stand_together(tmp_path):
    write(tmp_path / "a", zero_shot(0.5))
    write(tmp_path / "b", zero_shot(0.5, lm_eval_version="0.4.12", chat_template_sha="abc"))
    found = compare_folders(tmp_path / "a", tmp_path / "b").setup_differences
    assert {(d.setting, len(d.tasks), d.values) for d in found} == {
        ("lm-eval", 9, ("0.4.13", "0.4.12")), ("chat template", 9, ("none", "abc")),
    }  # fmt: skip


def test_what_models_and_prompts_are_made_with_is_told(tmp_path):
    generation = {"until": ["\n"], "do_sample": False}
    for name, length, until in (("a", 2048, ["\n"]), ("b", 2**16, [])):
        data = results({"gsm8k": {"acc,none": 0.5}}, max_length=length,
                       tokenizer_eos_token=["</s>", "2"])  # fmt: skip
        data["configs"]["gsm8k"]["generation_kwargs"] = generation | {"until": until}
        if name == "b":
            data["config"]["model_args"] = "pretrained=m,tokenizer=gpt2"
            data |= {
                "tokenizer_eos_token": ["<|endoftext|>", "50256"],
                "tokenizer_pad_token": ["<pad>", "1"],
                "chat_template_sha": "0123456789abcdef",
                "system_instruction": "Be brief.",
            }
        write(tmp_path / name, data)
    found = compare_folders(tmp_path / "a", tmp_path / "b").setup_differences
    assert {d.setting: d.values for d in found} == {
        "max_length": ("2K", "64K"),
        "tokenizer": ("the model's", "gpt2"),
        "special tokens": ("eos </s> 2", "eos <|endoftext|> 50256, pad <pad> 1"),
        "chat template": ("none", "0123456789ab"),
        "system instruction": ("none", "Be brief."),
        "generation until": ("['\\n']", "[]"),
    }
    assert {d.effect for d in found} == {"stated"}


ANYTHING = (None, 0, -1, 1.5, float("nan"), 1e999, "", "x,y", "a@1,none", [], [[]], {}, {"": {}},
            True, {"acc,none": "N/A"}, {"cells": [{}]}, 10**400)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))  # tests/faults damages more files in more ways
def test_damaged_results_are_no_traceback(tmp_path, seed):
    """Whatever stands in the place of something in a results file."""
    rng = Random(seed)
    needles = needle_results(lambda *_: 0.5, lengths=LENGTHS[:2], depths=[0.0, 1.0], samples=2)
    whole = zero_shot(0.5)
    whole["results"] |= needles["results"] | {"yoco_ruler": {"acc@0004096,none": 0.9}}
    whole["configs"] |= needles["configs"]
    write(tmp_path / "b", whole)
    read = 0
    for number in range(60):
        data = json.loads(json.dumps(whole))
        for _ in range(rng.randint(1, 3)):
            _damage(data, rng)
        write(tmp_path / "a", json.dumps(data))
        try:
            comparison = compare_folders(tmp_path / "a", tmp_path / "b", published=True)
            drawn = (".html", ".svg") if number % 10 == 0 else ()  # they take long
            for suffix in (".md", "card.md", ".csv", ".json", ".tex", *drawn):
                save_comparison(comparison, tmp_path / f"out{suffix}")
            save_comparison(compare_folders(tmp_path / "a"), tmp_path / "out.md")
            read += 1
        except ResultsError as error:
            assert "\n" not in str(error)
    assert read > 20


def _damage(data, rng):
    node = data
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
        else:
            node[key] = deepcopy(rng.choice(ANYTHING))
            return


def test_reports_need_no_model():
    folder = Path(compare.__code__.co_filename).parent
    for file in folder.glob("*.py"):
        text = file.read_text()
        assert "yoco_eval.model" not in text and "yoco_eval.kernels" not in text
