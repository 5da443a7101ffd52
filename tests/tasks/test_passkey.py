"""yoco_passkey: the classic prompt, and its scores by depth and length."""

import hashlib
import re
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

import yoco_eval.tasks
from yoco_eval.lm import YocoLM
from yoco_eval.reports.heatmap import save_heatmap
from yoco_eval.reports.runs import load_needle_run

TASKS = Path(yoco_eval.tasks.__file__).parent
SMALL = {"context_lengths": [256, 512], "depths": [0, 0.5, 1], "samples": 2}


def task_manager(**metadata):
    named = {"pretrained": "demo-1m", **metadata}  # unless a test names another
    return TaskManager(include_path=TASKS, include_defaults=False, metadata=named)


def load(**metadata):
    return task_manager(**metadata).load(["yoco_passkey"])["tasks"]["yoco_passkey"]


def evaluate(model, metadata=SMALL, **options):
    return simple_evaluate(
        model=model, tasks=["yoco_passkey"], task_manager=task_manager(**metadata), **options
    )


def test_defaults():
    task = load()
    assert len(task.eval_docs) == 5 * 11 * 2
    metadata = task.config.metadata
    assert metadata["context_lengths"] == [1024, 2048, 4096, 8192, 16384]
    assert (metadata["samples"], metadata["seed"]) == (2, 0)


def test_prompts_are_those_of_the_landmark_attention_paper():
    """Its script joins these five with line breaks, each part of the filler from its beginning."""
    task = load(**SMALL)
    filler = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    endless = " ".join([filler] * 100)
    for doc in task.eval_docs:
        key, prompt = doc["number"], task.doc_to_text(doc)
        assert re.fullmatch(r"[1-9]\d{4}", key) and task.doc_to_target(doc) == key
        task_description, before, information, after, question = prompt.split("\n", 4)
        if doc["depth"] == 0:
            assert before == ""
        assert task_description == (
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there."
        )
        assert information == f"The pass key is {key}. Remember it. {key} is the pass key."
        assert question == "What is the pass key? The pass key is"
        assert endless.startswith(before) and endless.startswith(after)
        share = len(before) / (len(before) + len(after))
        assert abs(share - doc["depth"]) < len(filler) / (len(before) + len(after))


def test_same_prompts_on_every_machine():
    def prompts(**metadata):
        task = load(**SMALL, **metadata)
        return [task.doc_to_text(doc) for doc in task.eval_docs]

    texts = prompts(seed=5)
    assert len(set(texts)) == len(texts)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert digest == "9336caf2dccafc1f6626c828b386263f450d4d34f95f87331505e50a3c7bb08a"
    assert not set(texts) & set(prompts(seed=6))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"context_lengths": 60}, "60 is too short for introduction, needle, question and answer"),
        ({"context_lengths": "4k", "max_length": "2k"}, "4096 exceeds the model's 2048 positions"),
    ],
)
def test_bad_settings(metadata, message):
    with pytest.raises(ValueError, match=message):
        load(**metadata)


def test_too_short_context_tells_the_shortest_that_works():
    with pytest.raises(ValueError) as caught:
        load(context_lengths=60)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    docs = load(context_lengths=least, depths=3, samples=1).eval_docs
    assert all(doc["prompt_tokens"] + 16 <= least for doc in docs)


@pytest.mark.slow
def test_scores_and_heatmap(tmp_path, answerer):
    """Of a model that sees a third of the prompt."""

    def answer(prompt):
        key = re.search(r"(\d+)\. Remember", prompt[-len(prompt) // 3 :])
        return f" {key[1]}.\n" if key else " 5."

    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = evaluate(answerer(answer), evaluation_tracker=tracker)
    scores = results["results"]["yoco_passkey"]
    assert scores["acc,none"] == pytest.approx(1 / 3)
    assert scores["acc@0000256,none"] == scores["acc@0000512,none"] == pytest.approx(1 / 3)
    assert scores["acc_worst_cell,none"] == 0
    tracker.save_results_aggregated(results, samples=None)
    run = load_needle_run(tmp_path)
    assert [cell.accuracy for cell in run.cells] == [0, 0, 1] * 2
    save_heatmap(run, tmp_path / "passkey.svg")
    assert "<svg" in (tmp_path / "passkey.svg").read_text()


@pytest.mark.slow
def test_demo_checkpoint():
    grid = {"context_lengths": [1024, "16k"], "depths": 3, "samples": 1}
    scores = evaluate(YocoLM(device="cpu"), grid)["results"]["yoco_passkey"]
    assert scores["acc,none"] == 1
