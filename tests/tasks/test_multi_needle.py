"""yoco_multi_needle_*: several numbers hidden in a text, one or all of them asked for."""

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.api_models import JsonChatStr
from lm_eval.tasks import TaskManager

import yoco_eval.tasks
from yoco_eval.lm import YocoLM
from yoco_eval.reports.heatmap import save_heatmap
from yoco_eval.reports.runs import load_needle_run
from yoco_eval.tasks.multi_needle import MultiSettings, scatter
from yoco_eval.tasks.wording import CITIES, INTRODUCTION

TASKS = Path(yoco_eval.tasks.__file__).parent
SMALL = {"context_lengths": [512, 700], "depths": [0, 0.5, 1], "samples": 1}
ANSWER, ANSWER_IN_CHAT = 16, 128  # tokens of one


def task_manager(**metadata):
    named = {"pretrained": "demo-1m", **metadata}  # unless a test names another
    return TaskManager(include_path=TASKS, include_defaults=False, metadata=named)


def load(name="yoco_multi_needle_4", **metadata):
    return task_manager(**metadata).load([name])["tasks"][name]


def requests(task):
    """The prompts of each document, in the order of its answers."""
    task.build_all_requests()
    prompts = {}
    for instance in sorted(task.instances, key=lambda instance: instance.idx):
        prompts.setdefault(instance.doc_id, []).append(instance.args[0])
    return prompts


def evaluate(model, task="yoco_multi_needle_4", metadata=SMALL, **options):
    return simple_evaluate(
        model=model, tasks=[task], task_manager=task_manager(**metadata), **options
    )


def number_asked(prompt):
    """What a reader of the whole prompt answers."""
    city = re.search(r"number of (\w+) is\W*$", prompt.removesuffix("<assistant>\n"))[1]
    return re.search(rf"number of {city} is (\d+)\.", prompt)[1]


# Settings


def test_defaults_are_the_papers():
    settings = MultiSettings()
    assert (settings.context_lengths, settings.samples) == ([131072], 5)
    assert settings.depths == [i / 11 for i in range(1, 11)]
    tasks = task_manager(**SMALL).load(["yoco_multi_needle"])["tasks"]
    names = [f"yoco_multi_needle_{n}" for n in (1, 2, 4, 8)]
    assert list(tasks) == names
    assert [task.config.metadata["needles"] for task in tasks.values()] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"needles": 65}, "needles: 65 exceeds the 64 cities there are"),
        ({"needles": 3}, "needles: yoco_multi_needle_4 has 4, not 3; evaluate yoco_multi_needle_n"),
        ({"needles": 0}, "needles: 0 is below 1"),
        ({"ask_all": "some"}, "ask_all: 'some' is neither true nor false"),
        ({"protocol": "papers"}, "protocol: 'papers' is unknown; give one of default, paper"),
        ({"protocol": "paper"}, "depths: with protocol=paper, needles stand before and behind"),
        ({"context_lengths": 128}, "128 is too short for introduction, 4 needles, question and"),
        ({"max_length": "64k", "context_lengths": None}, "131072 exceeds the model's 65536"),
    ],
)
def test_bad_settings(metadata, message):
    with pytest.raises(ValueError) as caught:
        load(**{**SMALL, **metadata})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_too_short_context_tells_the_shortest_that_works():
    metadata = {**SMALL, "needles": len(CITIES)}
    with pytest.raises(ValueError) as caught:
        load("yoco_multi_needle_n", **metadata)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    task = load("yoco_multi_needle_n", **{**metadata, "context_lengths": least})
    assert all(doc["prompt_tokens"] + ANSWER <= least for doc in task.eval_docs)


# Documents and prompts


@pytest.mark.parametrize("kind", ["demo", "byte-level", "unigram", "sentencepiece", "tiktoken"])
@pytest.mark.parametrize("task", ["yoco_multi_needle_8", "yoco_passkey"])
def test_no_prompt_exceeds_its_context_length(tmp_path, tokenizers, kind, task):
    tokenizer = tokenizers[kind]
    tokenizer.save_pretrained(tmp_path)
    task = load(task, tokenizer=str(tmp_path), context_lengths=[800, 3000], depths=3, samples=1)
    for doc_id, prompts in requests(task).items():
        doc = task.eval_docs[doc_id]
        counts = [len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
        assert counts[0] == doc["prompt_tokens"]
        assert doc["context_length"] - 16 <= max(counts) + ANSWER <= doc["context_length"]


def test_needles_are_scattered():
    task = load("yoco_multi_needle_8", context_lengths=2048, depths=4, samples=2)
    for doc in task.eval_docs:
        prompt = task.doc_to_text(doc)
        needles = [doc, *doc["others"]]
        assert len(needles) == 8
        assert len({needle["city"] for needle in needles}) == 8
        assert len({needle["number"] for needle in needles}) == 8
        assert len(re.findall(r"The special number of \w+ is \d{5}\. ", prompt)) == 8
        body = prompt[len(INTRODUCTION) : prompt.index("\n\nQuestion")]
        for needle in needles:
            sentence = f"The special number of {needle['city']} is {needle['number']}."
            assert abs(body.index(sentence) / len(body) - needle["depth"]) < 0.1
        assert doc["needle"] in doc["excerpt"] and doc["excerpt"] in prompt
        assert prompt.endswith(doc["question"]) and doc["city"] in doc["question"]
        assert len(json.dumps(doc)) < 3000


def test_one_needle_is_yoco_needle():
    one, needle = (load(name, **SMALL) for name in ("yoco_multi_needle_1", "yoco_needle"))
    for a, b in zip(one.eval_docs, needle.eval_docs, strict=True):
        assert one.doc_to_text(a) == needle.doc_to_text(b)
        assert a == {**b, "others": []}


def test_more_needles_are_added_to_the_same():
    two, four = (load(f"yoco_multi_needle_{n}", **SMALL).eval_docs for n in (2, 4))
    for a, b in zip(two, four, strict=True):
        assert (a["city"], a["number"]) == (b["city"], b["number"])
        assert a["others"] == b["others"][:1]


def test_same_prompts_on_every_machine():
    def prompts(**metadata):
        return sum(requests(load("yoco_multi_needle_n", **metadata)).values(), [])

    grid = {"context_lengths": [512, 700], "depths": 3, "samples": 2, "needles": 5}
    texts = prompts(**grid, seed=5)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert digest == "c0e65a0e48a5cad6fd0522ccad8619f32937b4714b163b5a3885901365324edb"
    assert not set(texts) & set(prompts(**grid, seed=6))


def test_questions_about_one_text():
    task = load(**SMALL)
    for doc_id, prompts in requests(task).items():
        doc = task.eval_docs[doc_id]
        assert len(prompts) == 4
        assert [number_asked(prompt) for prompt in prompts] == [
            doc["number"], *(other["number"] for other in doc["others"])
        ]  # fmt: skip
        [text] = {prompt.partition("\n\nQuestion:")[0] for prompt in prompts}
        assert text == task.doc_to_text(doc).partition("\n\nQuestion:")[0]
    alone = requests(load(**SMALL, ask_all=False))
    assert alone == {doc_id: prompts[:1] for doc_id, prompts in requests(task).items()}


@pytest.mark.parametrize(
    "options",
    [
        {"system_instruction": "You are a careful reader. " * 5},
        {"apply_chat_template": True, "system_instruction": "Answer with one number alone."},
        {"gen_kwargs": {"max_gen_toks": 100}},
    ],
)
def test_system_instruction_chat_template_and_budget_fit_too(tokenizers, answerer, options):
    reader = answerer(number_asked)
    results = evaluate(reader, **options)["results"]["yoco_multi_needle_4"]
    assert results["acc,none"] == results["acc_all,none"] == 1
    budget = ANSWER_IN_CHAT if "apply_chat_template" in options else ANSWER
    budget = options.get("gen_kwargs", {}).get("max_gen_toks", budget)
    counts = [len(tokenizers["demo"](prompt).input_ids) for prompt in reader.asked]
    assert len(counts) == 6 * 4
    assert max(counts[: 3 * 4]) <= 512 - budget < 700 - budget - 16 <= max(counts) <= 700 - budget


# The paper's protocol


def test_papers_needles_stand_on_lines_of_their_own_before_and_behind_the_asked_one(tokenizers):
    grid = {"context_lengths": [1024], "depths": [0.01, 0.5, 0.99], "samples": 3}
    task = load("yoco_multi_needle_8", **grid, protocol="paper", ask_all=False)
    for doc in task.eval_docs:
        prompt = task.doc_to_text(doc)
        cities = re.findall(r"^The special number of (\w+) is \d+\.$", prompt, re.MULTILINE)
        assert len(set(cities)) == 8
        before = sum(other["depth"] < doc["depth"] for other in doc["others"])
        assert cities.index(doc["city"]) == before < 7
        assert 1024 - 150 - 16 <= doc["prompt_tokens"] <= 1024 - 150
        assert doc["prompt_tokens"] == len(tokenizers["demo"](prompt).input_ids)
    numbers = {int(one["number"]) for doc in task.eval_docs for one in (doc, *doc["others"])}
    assert 0 < min(numbers) < 10_000 < max(numbers) <= 50_000
    assert load("yoco_multi_needle_1", **{**grid, "depths": [0, 1]}, protocol="paper").eval_docs


@pytest.mark.parametrize("depth", [0.1, 0.9])
def test_how_many_needles_precede_the_asked_one_does_not_depend_on_its_depth(depth):
    draw = random.Random(0).random
    drawn = [scatter(draw, depth, 4) for _ in range(4000)]
    counts = Counter(sum(other < depth for other in others) for others in drawn)
    assert sorted(counts) == [0, 1, 2, 3] and all(abs(n - 1000) < 100 for n in counts.values())


def test_papers_answers_are_right_wherever_they_hold_the_number(answerer):
    class Model(answerer):
        def generate_until(self, requests, disable_tqdm=False):
            assert requests[0].args[1] == {"do_sample": False, "max_gen_toks": 20, "until": []}
            return super().generate_until(requests)

    grid = {"context_lengths": 700, "depths": [0.5], "samples": 2, "protocol": "paper"}
    model = Model(lambda prompt: f"\n1 or 2, no: x{number_asked(prompt)}0")
    scores = evaluate(model, metadata=grid)["results"]["yoco_multi_needle_4"]
    assert scores["acc,none"] == scores["acc_all,none"] == 1
    model = answerer(lambda prompt: None)
    assert evaluate(model, metadata=grid)["results"]["yoco_multi_needle_4"]["acc,none"] == 0


# Scores


def test_scores_cells_and_heatmap_of_a_partial_reader(tmp_path, answerer):
    """It reads no further than the middle."""

    def answer(prompt):
        number = number_asked(prompt)
        return number if prompt.index(number) < len(prompt) / 2 else "unknown"

    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = evaluate(answerer(answer), log_samples=True, evaluation_tracker=tracker)
    tracker.save_results_aggregated(results, samples=None)
    scores = results["results"]["yoco_multi_needle_4"]
    assert scores["acc_worst_cell,none"] == 0 and 0.3 < scores["acc,none"] < 0.7
    samples = results["samples"]["yoco_multi_needle_4"]
    expected = [
        sum(answer(arguments[0]) != "unknown" for arguments in sample["arguments"]) / 4
        for sample in samples
    ]
    assert [sample["acc_all"] for sample in samples] == expected
    assert scores["acc_all,none"] == pytest.approx(sum(expected) / 6)
    assert 0 < scores["acc_all,none"] != scores["acc,none"]

    run = load_needle_run(tmp_path)
    assert run.task == "yoco_multi_needle_4" and run.accuracy == scores["acc,none"]
    assert run.depths == [0, 0.5, 1] and run.context_lengths == [512, 700]
    save_heatmap(run, tmp_path / "needles.png")
    assert (tmp_path / "needles.png").stat().st_size > 1000


def test_the_group_has_the_means_of_its_tasks(tmp_path, answerer):
    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = evaluate(
        answerer(lambda prompt: number_asked(prompt) if prompt.count("special") < 9 else ""),
        "yoco_multi_needle",
        evaluation_tracker=tracker,
    )
    group = results["groups"]["yoco_multi_needle"]
    assert (group["acc,none"], group["acc_all,none"]) == (0.75, 0.75)
    tracker.save_results_aggregated(results, samples=None)
    assert load_needle_run(tmp_path, "yoco_multi_needle_8").accuracy == 0
    assert load_needle_run(tmp_path, "yoco_multi_needle_2").accuracy == 1


def test_without_ask_all_there_is_one_score(answerer):
    reader = answerer(number_asked)
    results = evaluate(reader, metadata={**SMALL, "ask_all": False})
    scores = results["results"]["yoco_multi_needle_4"]
    assert scores["acc,none"] == 1 and not any("acc_all" in name for name in scores)
    assert len(reader.asked) == 6


def test_predict_only(answerer):
    results = evaluate(answerer(number_asked), predict_only=True, log_samples=True)
    assert "acc,none" not in results["results"]["yoco_multi_needle_4"]
    for sample in results["samples"]["yoco_multi_needle_4"]:
        others = [other["number"] for other in sample["doc"]["others"]]
        assert [r[0] for r in sample["resps"]] == [sample["doc"]["number"], *others]


# Backends


@pytest.mark.slow
def test_demo_checkpoint():
    grid = {**SMALL, "context_lengths": 512, "depths": 2}
    results = evaluate(YocoLM(device="cpu"), "yoco_multi_needle", grid)
    for n in (1, 2, 4, 8):
        scores = results["results"][f"yoco_multi_needle_{n}"]
        assert scores["acc,none"] >= 0.9 and scores["acc_all,none"] >= 0.9


@pytest.mark.slow
def test_demo_checkpoint_at_16k():
    grid = {"context_lengths": "16k", "depths": [1 / 11, 10 / 11], "samples": 1}
    results = evaluate(YocoLM(device="cpu"), "yoco_multi_needle_8", grid)
    scores = results["results"]["yoco_multi_needle_8"]
    assert scores["acc,none"] >= 0.9 and scores["acc_all,none"] >= 0.9


@pytest.mark.parametrize("task", ["yoco_needle", "yoco_multi_needle_2"])
def test_servers_get_chats_as_json(tokenizers, answerer, task):
    class Server(answerer):
        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return JsonChatStr(json.dumps(chat_history))

    server = Server(lambda chat: number_asked(json.loads(chat.prompt)[0]["content"]))
    results = evaluate(server, task, apply_chat_template=True)
    assert results["results"][task]["acc,none"] == 1
    for chat in server.asked:
        [turn] = json.loads(chat.prompt)
        tokens = len(tokenizers["demo"](turn["content"]).input_ids)
        tokens += ANSWER_IN_CHAT
        assert tokens in range(470, 512) or tokens in range(658, 700)


@pytest.mark.parametrize("task", ["yoco_multi_needle_2", "yoco_passkey"])
def test_hugging_face_backend(hf_model, task):
    arguments = {"pretrained": hf_model, "dtype": "float32", "device": "cpu"}
    grid = {**SMALL, "context_lengths": 256}
    results = evaluate("hf", task, {**arguments, **grid}, model_args=arguments, batch_size=2)
    assert 0 <= results["results"][task]["acc,none"] <= 1
    assert len(results["configs"][task]["metadata"]["cells"]) == 3
