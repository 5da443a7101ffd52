"""yoco_needle in lm-eval: settings, documents, scores, the table, the results file."""

import hashlib
import json
import logging
import re
from collections import Counter
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

import yoco_eval.tasks
from yoco_eval.reports.runs import load_needle_run
from yoco_eval.tasks import evaluated_model
from yoco_eval.tasks.by_length import digest
from yoco_eval.tasks.needle import NeedleSettings
from yoco_eval.tasks.needle_grid import Hidden
from yoco_eval.tasks.settings import read_settings
from yoco_eval.tasks.wording import INTRODUCTION

TASKS = Path(yoco_eval.tasks.__file__).parent
ALONE = {"do_sample": False, "max_gen_toks": 16, "until": ["\n"]}  # what ends answers
IN_CHAT = {"do_sample": False, "max_gen_toks": 128, "until": []}
SMALL = {"context_lengths": [256, 512], "depths": [0, 0.5, 1], "samples": 2}


def task_manager(**metadata):
    named = {"pretrained": "demo-1m", **metadata}  # unless a test names another
    return TaskManager(include_path=TASKS, include_defaults=False, metadata=named)


def load(**metadata):
    return task_manager(**metadata).load(["yoco_needle"])["tasks"]["yoco_needle"]


def prompts(**metadata):
    """Every prompt of a grid, by context length, depth and sample."""
    task = load(**metadata)
    return {
        (doc["context_length"], doc["depth"], doc["sample"]): task.doc_to_text(doc)
        for doc in task.eval_docs
    }


class Reader(LM):
    """Answers from the last `window` characters of the prompt, and keeps what it was asked."""

    def __init__(self, window=10**9):
        super().__init__()
        self.window = window
        self.asked = []

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for request in requests:
            prompt, options = request.args
            self.asked.append(prompt)
            assert options == (IN_CHAT if prompt.endswith("<assistant>\n") else ALONE)
            found = re.findall(r"number of (\w+) is (\d+)\.", prompt[-self.window :])
            answers.append(f" {found[0][1]}." if found else " unknown")
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    tokenizer_name = "reader"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        turns = [f"<{turn['role']}>\n{turn['content']}\n" for turn in chat_history]
        return "".join(turns) + "<assistant>\n" * add_generation_prompt

    def chat_template(self, chat_template=False):
        return "reader's"


def evaluate(model, metadata=SMALL, **options):
    return simple_evaluate(
        model=model, tasks=["yoco_needle"], task_manager=task_manager(**metadata), **options
    )


def scores(results):
    return {
        name.removesuffix(",none"): value
        for name, value in results["results"]["yoco_needle"].items()
        if name.endswith(",none") and not name.endswith("_stderr,none")
    }


# Settings


def test_defaults():
    settings = read_settings(NeedleSettings, {"pretrained": "x", "batch_size": 1, "version": 1})
    assert settings == NeedleSettings(
        context_lengths=[1024, 2048, 4096, 8192, 16384],
        depths=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        samples=2,
        haystack="synthetic",
        seed=0,
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"depths": [0.5, 1.5]}, "depths: 1.5 is not within 0 and 1"),
        ({"context_lengths": 50}, "context_lengths: 50 is too short"),
        ({"depths": 99999, "samples": 99999}, "5 x 99999 x 99999 context lengths, depths and"),
        ({"context_lengths": ["1m", "2m"]}, "2097152 exceeds the model's 1048576 positions"),
        ({"context_lengths": 2048, "max_length": 1024}, "exceeds the model's 1024 positions"),
        ({"haystack": "nowhere"}, "haystack 'nowhere' is neither 'synthetic'"),
        ({"tokenizer": "no/such/folder"}, "tokenizer: no/such/folder has no"),
    ],
)
def test_bad_settings_are_told_in_one_line_while_the_task_loads(metadata, message):
    with pytest.raises(ValueError) as caught:
        load(**metadata)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_short_context_tells_the_shortest_that_works():
    with pytest.raises(ValueError) as caught:
        load(context_lengths=50)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert load(context_lengths=least, depths=2, samples=1)
    with pytest.raises(ValueError, match="too short"):
        load(context_lengths=least - 1)


def test_user_may_go_beyond_the_trained_length():
    task = load(
        pretrained="demo-64k", context_lengths="65k", max_length="128k", depths=1, samples=1
    )
    assert task.eval_docs[0]["prompt_tokens"] > 65536


def test_short_haystack_file(tmp_path):
    (tmp_path / "notes.txt").write_text("A short note. " * 50)
    assert load(haystack=str(tmp_path), context_lengths=200)
    with pytest.raises(ValueError, match=r"has \d{3} tokens, too few for the context length 8192"):
        load(haystack=str(tmp_path), context_lengths=[200, 8192])
    (tmp_path / "notes.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        load(haystack=str(tmp_path))


# Documents


@pytest.mark.slow
def test_default_grid_fits_its_context_lengths(tokenizers):
    task = load()
    assert len(task.eval_docs) == 5 * 11 * 2
    for doc in task.eval_docs:
        prompt = task.doc_to_text(doc)
        count = len(tokenizers["demo"](prompt, verbose=False).input_ids)
        assert count == doc["prompt_tokens"]
        assert doc["context_length"] - 16 <= count + 16 <= doc["context_length"]
        assert prompt.startswith(INTRODUCTION) and prompt.count(doc["needle"]) == 1
        assert doc["needle"] == f"The special number of {doc['city']} is {doc['number']}."
        assert prompt.endswith(doc["question"]) and doc["city"] in doc["question"]
        assert doc["excerpt"] in prompt and doc["needle"] in doc["excerpt"]
        assert re.fullmatch(r"[1-9]\d{4}", doc["number"]) and task.doc_to_target(doc) in prompt
        assert len(json.dumps(doc)) < 2000


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens"])
def test_the_budget_of_gen_kwargs_is_kept(name):
    """lm-eval sets --gen_kwargs when the task has been loaded already."""
    task = load(context_lengths=[512], depths=3, samples=1)
    settings = {"until": ["\n"], "do_sample": False, name: 100}
    task.set_config(key="generation_kwargs", value=settings)
    task.build_all_requests()
    tokenizer = evaluated_model.load_tokenizer({"pretrained": "demo-1m"})
    for instance in task.instances:
        assert 512 - 16 <= len(tokenizer(instance.args[0]).input_ids) + 100 <= 512


def test_same_prompts_on_every_machine():
    texts = prompts(context_lengths=[256, 700], depths=3, samples=2, seed=5)
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    assert digest == "3c336f811f71ab28cd88426f4affb95dfae53996bce12a7a1bee11b02bfb311e"


def test_cells_do_not_depend_on_the_rest_of_the_grid():
    few = prompts(context_lengths=[300, 700], depths=[0, 0.5], samples=1)
    many = prompts(context_lengths=[300, 500, 700, 5000], depths=5, samples=3)
    assert few.items() <= many.items()
    assert len(set(many.values())) == len(many)
    others = prompts(context_lengths=[300, 700], depths=[0, 0.5], samples=1, seed=1)
    assert not set(few.values()) & set(others.values())


def test_own_haystack(tmp_path):
    text = " ".join(f"Note {i} is about otters." for i in range(2000))
    (tmp_path / "otters.txt").write_text(text)
    texts = prompts(haystack=str(tmp_path / "otters.txt"), context_lengths=600, depths=3)
    assert all("about otters. The special" in text for text in list(texts.values())[1:3])


def test_other_tokenizers_size_the_prompts(tmp_path, tokenizers):
    tokenizers["byte-level"].save_pretrained(tmp_path)
    for add_bos_token in (False, True):
        task = load(context_lengths=1001, tokenizer=str(tmp_path), add_bos_token=add_bos_token)
        for doc in task.eval_docs:
            ids = tokenizers["byte-level"](task.doc_to_text(doc)).input_ids
            assert len(ids) + add_bos_token == doc["prompt_tokens"]
            assert 1001 - 16 <= doc["prompt_tokens"] + 16 <= 1001


# Scores


def test_reader_of_everything_scores_one():
    results = evaluate(Reader())
    assert scores(results) == {
        "acc": 1.0,
        "acc@0000256": 1.0,
        "acc@0000512": 1.0,
        "acc_worst_cell": 1.0,
    }
    assert results["results"]["yoco_needle"]["acc_stderr,none"] == 0
    assert results["n-samples"]["yoco_needle"] == {"original": 12, "effective": 12}


def test_scores_cells_and_table_of_a_partial_reader(caplog):
    with caplog.at_level(logging.WARNING, logger="lm_eval.evaluator_utils"):
        results = evaluate(Reader(window=800))
    assert "same number of documents" not in caplog.text
    assert scores(results) == {
        "acc": 6 / 12,
        "acc@0000256": 4 / 6,
        "acc@0000512": 2 / 6,
        "acc_worst_cell": 0.0,
    }
    cells = results["configs"]["yoco_needle"]["metadata"]["cells"]
    assert [(c["context_length"], c["depth"], c["samples"]) for c in cells] == [
        (length, depth, 2) for length in (256, 512) for depth in (0.0, 0.5, 1.0)
    ]
    assert [cell["correct"] for cell in cells] == [0, 2, 2, 0, 0, 2]
    assert [cell["right"] for cell in cells] == [[], [0, 1], [0, 1], [], [], [0, 1]]
    assert [cell["wrong"] for cell in cells] == [[0, 1], [], [], [0, 1], [0, 1], []]
    rows = [line.split("|")[5].strip() for line in make_table(results).splitlines()[2:]]
    assert rows == ["acc", "acc@0000256", "acc@0000512", "acc_worst_cell"]


def test_results_file(tmp_path):
    results = evaluate(Reader(), {**SMALL, "pretrained": "demo-64k", "depths": 3})
    results.pop("samples")
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args("hf", "pretrained=demo-64k", "", "", False)
    tracker.save_results_aggregated(results, samples=None)
    [file] = tmp_path.rglob("results_*.json")
    assert file.stat().st_size < 20_000
    config = json.loads(file.read_text())["configs"]["yoco_needle"]
    assert "class" not in config
    metadata = config["metadata"]
    assert metadata.pop("config_source").endswith("needle.yaml")
    assert len(metadata.pop("cells")) == 6
    assert metadata == {
        "by_length": ["acc"],
        "version": 2,
        "pretrained": "demo-64k",
        "context_lengths": [256, 512],
        "depths": [0.0, 0.5, 1.0],
        "samples": 2,
        "haystack": "synthetic",
        "seed": 0,
    }
    run = load_needle_run(tmp_path)
    assert (run.accuracy, run.prompts, run.context_lengths) == (1.0, 12, [256, 512])


@pytest.mark.slow
def test_cells_tell_which_prompts_were_answered():
    texts = prompts(**SMALL)

    def of_cells(metadata=SMALL, **options):
        results = evaluate(Reader(window=800), metadata, **options)
        return results["configs"]["yoco_needle"]["metadata"]["cells"]

    cells = of_cells()
    for cell in cells:
        place = cell["context_length"], cell["depth"]
        assert cell["prompts"] == [digest(texts[(*place, sample)]) for sample in (0, 1)]
    assert len({one for cell in cells for one in cell["prompts"]}) == len(texts) == 12
    few = of_cells(samples={"yoco_needle": [1, 2]})
    assert [cell["prompts"] for cell in few] == [cells[1]["prompts"][:1], cells[2]["prompts"][:1]]
    # They are of what the task made, whose end a chat template moves, and a seed changes it all.
    assert of_cells(apply_chat_template=True)[0]["prompts"] != cells[0]["prompts"]
    others = of_cells({**SMALL, "seed": 1})
    assert all(a["prompts"] != b["prompts"] for a, b in zip(cells, others, strict=True))


@pytest.mark.slow
def test_limit_leaves_cells_and_lengths_out():
    results = evaluate(Reader(), limit=4)
    assert scores(results) == {
        "acc": 1.0,
        "acc@0000256": 1.0,
        "acc@0000512": "N/A",
        "acc_worst_cell": 1.0,
    }
    cells = results["configs"]["yoco_needle"]["metadata"]["cells"]
    assert Counter(cell["context_length"] for cell in cells) == {256: 3}
    assert sum(cell["samples"] for cell in cells) == 4
    assert "N/A" in make_table(results)


@pytest.mark.slow
def test_samples_hold_each_prompt_once():
    results = evaluate(Reader(), log_samples=True)
    samples = results["samples"]["yoco_needle"]
    for sample in samples:
        [(prompt, _)] = sample["arguments"]
        assert prompt.startswith(INTRODUCTION)
        assert json.dumps(sample).count(json.dumps(prompt)) == 1
        assert len(json.dumps(sample)) < len(prompt) + 3000
        assert sample["target"] == sample["doc"]["number"]
    assert len({sample["prompt_hash"] for sample in samples}) == len(samples)


@pytest.mark.slow
def test_use_cache_asks_only_once(tmp_path):
    cache = str(tmp_path / "cache")
    first, second = Reader(), Reader()
    before = evaluate(first, use_cache=cache, limit=5)
    after = evaluate(second, use_cache=cache)
    assert len(first.asked) == 5 and len(second.asked) == 7
    assert scores(before)["acc"] == scores(after)["acc"] == 1.0


def test_cached_requests_of_another_grid_are_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    for grid in (SMALL, {**SMALL, "seed": 1}):
        assert scores(evaluate(Reader(), grid, cache_requests=True))["acc"] == 1.0


def test_predict_only():
    results = evaluate(Reader(), predict_only=True, log_samples=True)
    assert "acc,none" not in results["results"]["yoco_needle"]
    assert all(s["resps"][0][0].strip(" .").isdigit() for s in results["samples"]["yoco_needle"])


def test_few_shot_examples_are_never_given():
    reader = Reader()
    evaluate(reader, num_fewshot=3, limit=2)
    assert all(prompt.startswith(INTRODUCTION) for prompt in reader.asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"system_instruction": "You are a careful reader. " * 5},
        {"apply_chat_template": True},
        {"apply_chat_template": True, "system_instruction": "Answer with one number alone."},
    ],
)
def test_system_instruction_and_chat_template_fit_too(tokenizers, options):
    reader = Reader()
    results = evaluate(reader, {**SMALL, "context_lengths": [300, 512]}, **options)
    assert scores(results)["acc"] == 1.0
    docs = [sample["doc"] for sample in results["samples"]["yoco_needle"]]
    for prompt, doc in zip(reader.asked, docs, strict=True):
        assert not prompt.startswith(INTRODUCTION)
        count = len(tokenizers["demo"](prompt).input_ids)
        assert count == doc["prompt_tokens"]
        room = (IN_CHAT if "apply_chat_template" in options else ALONE)["max_gen_toks"]
        assert doc["context_length"] - 16 <= count + room <= doc["context_length"]


# Other backends


@pytest.mark.slow
def test_hugging_face_backend(hf_model, caplog):
    arguments = {"pretrained": hf_model, "dtype": "float32", "device": "cpu"}
    with caplog.at_level(logging.WARNING):
        results = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=["yoco_needle"],
            task_manager=task_manager(**arguments, **SMALL),
            batch_size=4,
            log_samples=True,
        )
    assert "truncat" not in caplog.text.lower()
    assert 0 <= scores(results)["acc"] <= 1
    assert len(results["configs"]["yoco_needle"]["metadata"]["cells"]) == 6
    assert len(results["samples"]["yoco_needle"]) == 12
    assert json.dumps(results["configs"]["yoco_needle"]["metadata"])


def test_context_beyond_the_positions_of_a_hugging_face_model(hf_model):
    with pytest.raises(ValueError, match="1024 exceeds the model's 600 positions"):
        load(pretrained=hf_model, context_lengths=1024)


def test_a_needle_without_its_answer_is_refused():
    with pytest.raises(ValueError, match="city, code; name its right answer `number`"):
        Hidden(0.5, {"city": "Oslo", "code": "x"}, "The code of Oslo is x.", "The code is")
