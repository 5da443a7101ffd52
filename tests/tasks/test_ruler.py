"""yoco_ruler: all 13 tasks on small local texts, their lengths, scores and group."""

import hashlib
import json
import logging
import random
import re
from collections import Counter
from pathlib import Path

import datasets
import lm_eval.tasks
import nltk
import numpy as np
import pytest
import requests
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

import yoco_eval.tasks
from yoco_eval import registration
from yoco_eval.lm import YocoLM
from yoco_eval.tasks.by_length import effective_length
from yoco_eval.tasks.evaluated_model import load_tokenizer
from yoco_eval.tasks.haystack import SyntheticHaystack
from yoco_eval.tasks.prompts import TokenCounter
from yoco_eval.tasks.ruler import RulerGroup, Settings
from yoco_eval.tasks.ruler_prompts import generate
from yoco_eval.tasks.settings import read_settings

pytestmark = pytest.mark.slow  # lm-eval's generators take many seconds to import

TASKS = Path(yoco_eval.tasks.__file__).parent
NIAH = [
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multiquery", "niah_multivalue",
]  # fmt: skip
ALL = [*NIAH, "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Essays, SQuAD and HotpotQA as published, made up; NLTK's sentences without abbreviations."""
    folder = tmp_path_factory.mktemp("data")
    essays = SyntheticHaystack(1).text(0, 60_000)[:60_000]
    (folder / "paul_graham_essays").mkdir()
    (folder / "paul_graham_essays" / "train.jsonl").write_text(json.dumps({"text": essays}))
    texts = SyntheticHaystack(2).text(0, 30_000).splitlines()[:100]
    squad = [
        {"context": text, "qas": [_question(text), {"question": "?", "is_impossible": True}]}
        for text in texts
    ]
    squad = {"data": [{"paragraphs": squad[i : i + 10]} for i in range(0, 100, 10)]}
    (folder / "dev-v2.0.json").write_text(json.dumps(squad))
    hotpot = [
        {
            "question": "Who?",
            "answer": texts[i].split()[0],
            "context": [[f"Title {j}", [texts[j]]] for j in range(i, i + 5)],
        }
        for i in range(0, 100, 5)
    ]
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    punkt = folder / "nltk" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()
    return str(folder)


def _question(text):
    answers = [{"text": text.split()[0]}]
    return {"question": "Who?", "is_impossible": False, "answers": answers}


@pytest.fixture(autouse=True)
def sentences(data, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [f"{data}/nltk"])


def group(*members, **metadata):
    """The group with some of its members."""
    metadata = {"pretrained": "demo-1m", **metadata}
    config = {"task": "yoco_ruler", "folder": "ruler", "members": members, "metadata": metadata}
    return RulerGroup(config)


def make(name, **metadata):
    """A task of the group."""
    [task] = group(name, **metadata)
    return task


def prompts(name, **metadata):
    """Every prompt of a task, as the model gets it, by context length and number."""
    task = make(name, **metadata)
    task.build_all_requests()
    return {
        (instance.doc["context_length"], instance.doc["index"]): instance.args[0]
        for instance in task.instances
    }


def scores(results, name="yoco_ruler"):
    return {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if key.endswith(",none") and not key.endswith("_stderr,none")
    }


@pytest.fixture
def reader(answerer):
    """A model that is given the answers, and forgets them where contexts are longer."""

    class Reader(answerer):
        def __init__(self, longest):
            super().__init__(None)
            self.longest = longest

        def generate_until(self, requests, disable_tqdm=False):
            self.asked += requests
            return [
                " ".join(r.doc["outputs"]) if r.doc["context_length"] <= self.longest else "none"
                for r in requests
            ]

    return Reader


@pytest.fixture
def offline(monkeypatch):
    load_dataset = datasets.load_dataset

    def fail(path, *args, **options):
        if path == "json":
            return load_dataset(path, *args, **options)
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(requests, "get", fail)


# Settings


def test_defaults():
    lengths = [4096, 8192, 16384, 32768, 65536, 131072]
    assert read_settings(Settings, {}) == Settings(lengths, samples=500, seed=42, data=None)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("niah_single_1", {"context_lengths": "2m"}, "2097152 exceeds the model's 1048576"),
        ("niah_single_1", {"context_lengths": 100}, "100 is too short for niah_single_1; give"),
        ("niah_single_2", {"context_lengths": 600}, "600 is too short for niah_single_2; give"),
        ("ruler_vt", {"context_lengths": 1000}, "1000 is too short for ruler_vt; give longer"),
        ("ruler_cwe", {"context_lengths": 700}, "700 is too short for ruler_cwe; give longer ones"),
        ("ruler_fwe", {"context_lengths": 250}, "250 is too short for ruler_fwe; give longer ones"),
        ("ruler_qa_squad", {"context_lengths": 300}, "300 is too short for ruler_qa_squad; give"),
        ("ruler_qa_hotpot", {"samples": 21}, "ruler_qa_hotpot has 20 questions, 21 are asked"),
        ("niah_single_2", {"data": "nowhere"}, "data: nowhere is no folder"),
        ("ruler_qa_squad", {"data": "nowhere"}, "data: nowhere/dev-v2.0.json cannot be read; put"),
        ("niah_single_2", {"data": None}, "with --metadata data=FOLDER (FOLDER/paul_graham_essays"),
        ("ruler_qa_squad", {"data": None}, "could not be downloaded (ConnectionError); give a"),
        ("ruler_cwe", {"samples": 0}, "samples: 0 is below 1"),
    ],
)
def test_bad_settings_are_told_in_one_line(data, offline, name, metadata, message):
    if "data" not in metadata:
        metadata = {"data": data, **metadata}
    with pytest.raises(ValueError) as caught:
        make(name, **{"context_lengths": 2048, "samples": 1, **metadata})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "length"), [("niah_single_1", 300), ("ruler_vt", 1100), ("ruler_cwe", 400)]
)
def test_too_short_context_tells_about_the_shortest_that_works(data, name, length):
    with pytest.raises(ValueError) as caught:
        make(name, context_lengths=length, samples=3, data=data)
    least = int(re.search(r"about (\d+) on", str(caught.value))[1])
    assert length < least < 1500
    assert make(name, context_lengths=int(1.1 * least), samples=3, data=data).eval_docs


def test_missing_sentences(data, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ValueError, match="run python -m nltk.downloader punkt_tab, or set"):
        make("niah_single_2", context_lengths=2048, samples=1, data=data)


# Prompts


@pytest.mark.parametrize("kind", ["demo", "sentencepiece", "tiktoken"])
def test_prompts_fit_their_context_lengths(data, tokenizers, tmp_path, kind):
    tokenizers[kind].save_pretrained(tmp_path)
    counter = TokenCounter(tokenizers[kind])
    # The prompts grow by steps: none is a step shorter than it may be.
    settings = {"context_lengths": [4096, 9000], "samples": 3, "data": data}
    for task in group(*ALL, **settings, tokenizer=str(tmp_path), max_length=9000):
        task.build_all_requests()
        assert len(task.instances) == 6
        for instance in task.instances:
            prompt, options = instance.args
            doc = instance.doc
            tokens = counter.special + counter.count(prompt) + options["max_gen_toks"]
            assert tokens <= doc["length"] <= doc["context_length"]
            least = 0.9 if task.task_name == "ruler_cwe" else 0.45
            assert doc["length"] > least * doc["context_length"]
            assert prompt.endswith(doc["gen_prefix"]) and len(json.dumps(doc)) < 1500
            if task.task_name in [*NIAH, "ruler_vt", "ruler_cwe"]:
                assert doc["outputs"] and all(output in prompt for output in doc["outputs"])


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("niah_multikey_3", "89faf705593b6c84"),
        ("niah_single_2", "cd79a204060a8ceb"),
        ("ruler_vt", "22fafd470add3754"),
        ("ruler_cwe", "25d46c7f42ea5088"),
        ("ruler_fwe", "3d27fa04fb25f12c"),
        ("ruler_qa_hotpot", "beaf61ff5901d643"),
    ],
)
def test_same_prompts_on_every_machine(data, name, digest):
    texts = prompts(name, context_lengths=[2048, 4096], samples=2, seed=5, data=data)
    assert len(set(texts.values())) == 4
    assert hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:16] == digest
    random.seed(1)
    fewer = prompts(name, context_lengths=4096, samples=2, seed=5, data=data)
    assert fewer.items() <= texts.items()
    others = prompts(name, context_lengths=[2048, 4096], samples=2, seed=6, data=data)
    assert not set(others.values()) & set(texts.values())


def test_common_words_are_shown_by_an_example(data, caplog):
    """RULER's authors' prompt: the same question about another list, with its answer.

    With the demo's small vocabulary the smallest list and the example of 4K take more than 4K.
    """
    texts = prompts("ruler_cwe", context_lengths=[2048, 4096, 8192], samples=2, data=data)
    end = " The top 10 words that appear most often in the list are:"
    for (length, _), prompt in texts.items():
        *example, question = prompt.split("Below is a numbered list of words.")[1:]
        assert question.endswith(end) and len(example) == (length != 4096)
        if example:
            words, answer = example[0].partition("\nQuestion:")[0], example[0].split(end)[1]
            counts = Counter(re.split(r"\s*\d+\. ", words)[1:])
            common = re.split(r"\s*\d+\. ", answer.strip())[1:]
            assert sorted(common) == sorted(word for word, _ in counts.most_common(10))
    assert "example takes more tokens than context length 4096" in caplog.text


def test_a_group_takes_what_other_processes_have_made(data, monkeypatch, caplog):
    """Also where all is made again for a budget that --gen_kwargs give."""
    names, settings = ["niah_single_1", "ruler_cwe", "ruler_fwe"], {"samples": 2, "data": data}
    settings["context_lengths"] = [2048, 4096]

    def all_of(tasks):
        texts = {name: [t.doc_to_text(doc) for doc in t.eval_docs] for name, t in tasks.items()}
        documents = {name: list(t.eval_docs) for name, t in tasks.items()}
        warnings = [record.message for record in caplog.records if "example" in record.message]
        caplog.clear()
        return texts, documents, warnings

    class Second:
        """Of two processes."""

        busy, made = False, []

        def build(self, units, make, bar=None):
            self.busy, found, texts = True, [], {}
            for index, unit in enumerate(units):
                name = unit if isinstance(unit, str) else names[unit]
                if index % 2:
                    self.made.append(name)
                everyones, inputs = (
                    make(unit) if index % 2 else (alone[name].made, alone[name].inputs)
                )
                found.append(everyones)
                texts |= inputs
            self.busy = False
            return found, texts

        def collect(self, own):
            return [own]

    model = type("Model", (), {"builders": Second()})()
    alone = {task.task_name: task for task in group(*names, **settings)}
    expected = all_of(alone)
    with monkeypatch.context() as patch:
        patch.setattr(registration, "evaluated", [model])
        shared = {task.task_name: task for task in group(*names, **settings)}
    assert list(shared) == names and Second.made == ["ruler_cwe"]
    assert all_of(shared) == expected and expected[-1]
    for tasks in (alone, shared):
        for task in tasks.values():
            budget = {**task.config.generation_kwargs, "max_gen_toks": 200}
            task.set_config(key="generation_kwargs", value=budget)
    for task in alone.values():
        task.build_all_requests()
    again = all_of(alone)
    monkeypatch.setattr(registration, "evaluated", [model])
    for task in shared.values():
        task.build_all_requests()
    assert all_of(shared) == again and again[0] != expected[0]
    assert Second.made == ["ruler_cwe"] * 2


def test_others_draw_as_before(tokenizers):
    from lm_eval.tasks.ruler.vt_utils import get_vt_dataset

    states = random.getstate(), np.random.get_state()[1].tolist()
    options = {"samples": 1, "seed": 0, "answer": 30, "delimiter": " ", "data": None}
    options["warn"] = print
    assert generate("x", get_vt_dataset, TokenCounter(tokenizers["demo"]), [2048], **options)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_single_2", "ruler_vt", "ruler_cwe"])
def test_searches_make_few_prompts(data, monkeypatch, name):
    made, count = [], TokenCounter.count

    def count_noting(self, text):
        made.append(len(text))
        return count(self, text)

    monkeypatch.setattr(TokenCounter, "count", count_noting)
    task = make(name, context_lengths="64k", samples=1, data=data)
    [doc] = task.eval_docs
    assert doc["length"] > 0.96 * 65536
    assert sum(length > len(task.doc_to_text(doc)) / 4 for length in made) < 15


def test_essays_begin_anew(data):
    [doc] = (task := make("niah_single_2", context_lengths="32k", samples=1, data=data)).eval_docs
    assert doc["length"] > 0.95 * 32768
    sentences = task.doc_to_text(doc).split(". ")
    assert len(sentences) > 1.5 * len(set(sentences))


def test_all_documents(data, caplog):
    """Where all documents are taken, each question's own are among them, and the rest is told."""
    task = make("ruler_qa_hotpot", context_lengths=["8k", "64k"], samples=20, data=data)
    assert "context length 8192" not in caplog.text
    assert "the prompts of context length 65536 have" in caplog.text
    for doc in task.eval_docs:
        assert doc["outputs"][0] in task.doc_to_text(doc)


def test_models_that_think(data, reader, caplog):
    """The user's turn ends with the answer's beginning, and what is thought does not count."""

    class Thinker(reader):
        think_end_token = "</think>"

        def generate_until(self, requests, disable_tqdm=False):
            return [self.way.format(answer) for answer in super().generate_until(requests)]

    def run(model, **options):
        few = make("niah_single_1", context_lengths=2500, samples=2, data=data)
        results = evaluate(model, few, apply_chat_template=True, **options)
        digests = results["configs"]["niah_single_1"]["metadata"]["prompts"]
        return results["results"]["niah_single_1"]["acc,none"], digests

    plain, thinker = reader(2500), Thinker(2500)
    score, digests = run(plain)
    assert score == 1 and "needs room" not in caplog.text
    thinker.way = "<think>Which is it?</think>{}"
    assert run(thinker) == (1, digests)
    assert "niah_single_1: a model that thinks needs room" in caplog.text
    for one, other in zip(plain.asked, thinker.asked, strict=True):
        begun = one.doc["gen_prefix"]
        assert one.args[0].endswith(f"<assistant>\n{begun}\n")
        assert other.args[0].endswith(f"? {begun}\n<assistant>\n")
        assert one.args[0].count(begun) == other.args[0].count(begun) == 1
    for thinker.way in ("<think>{}</think>None.", "<think>It may be {}"):
        assert run(thinker)[0] == 0
    # Contexts have room for the answers.
    caplog.clear()
    counter = TokenCounter(load_tokenizer({"pretrained": "demo-1m"}))
    for name in ("max_gen_toks", "max_new_tokens"):
        thinker.asked = []
        run(thinker, gen_kwargs={name: 800})
        for request in thinker.asked:
            settings = {"do_sample": False, "temperature": 0.0, "until": [], name: 800}
            assert request.args[1] == settings
            prompt = request.args[0].removeprefix("<user>\n").removesuffix("\n<assistant>\n")
            assert 2300 < counter.special + counter.count(prompt) + 800 <= 2500
    assert "needs room" not in caplog.text


# Scores


def evaluate(model, few, **options):
    """With a task manager of no tasks, as making one of lm-eval's takes seconds."""
    nothing = TaskManager(include_defaults=False)
    return simple_evaluate(model, tasks=[few], task_manager=nothing, **options)


def test_whole_group(data, reader, caplog):
    model = reader(longest=4096)
    paths = [TASKS, Path(lm_eval.tasks.__file__).parent / "ruler"]
    settings = {"context_lengths": ["4k", 6000], "samples": 2, "data": data}
    settings["pretrained"] = "demo-1m"
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=settings)
    with caplog.at_level(logging.WARNING, logger="lm_eval"):
        results = simple_evaluate(model, tasks=["yoco_ruler"], task_manager=manager)
    assert "same number of documents" not in caplog.text
    assert len(model.asked) == 13 * 4
    assert {key: round(value, 2) for key, value in scores(results).items()} == {
        "acc": 0.5,
        "acc@0004096": 1.0,
        "acc@0006000": 0.0,
        "effective_length": 4096,
    }
    for name in ALL:
        assert scores(results, name) == {"acc": 0.5, "acc@0004096": 1.0, "acc@0006000": 0.0}
    assert sorted(results["group_subtasks"]["yoco_ruler"]) == sorted(ALL)
    assert "effective_length" in make_table(results, "groups")
    metadata = results["configs"]["ruler_vt"]["metadata"]
    assert metadata["context_lengths"] == [4096, 6000] and metadata["seed"] == 42
    assert max(len(json.dumps(s["doc"])) for s in results["samples"]["niah_single_1"]) < 1000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ruler_qa_squad", {"The Broncos won.": 1, "Carolina": 0, None: 0}),
        ("ruler_qa_hotpot", {"the BRONCOS": 1}),
        ("niah_multivalue", {"Broncos": 1 / 3, None: 0}),
    ],
)
def test_a_question_needs_one_of_its_answers_and_other_tasks_all(data, name, expected):
    task = make(name, context_lengths=4096, samples=1, data=data)
    outputs = ["Denver Broncos", "The Denver Broncos", "Broncos"]
    doc = {**task.eval_docs[0], "outputs": outputs}
    for answer, score in expected.items():
        assert task.process_results(doc, [answer]) == {"acc": score, "acc@0004096": score}


def test_tasks_that_differ_from_lm_evals_have_versions_of_their_own(data):
    settings = {"context_lengths": 4096, "samples": 1, "data": data}
    changed = ["ruler_cwe", "ruler_qa_squad", "ruler_qa_hotpot"]
    versions = {task.task_name: task.VERSION for task in group("ruler_fwe", *changed, **settings)}
    assert versions == {"ruler_fwe": 1.0} | dict.fromkeys(changed, 2.0)


def test_effective_length():
    assert effective_length({4096: 0.9, 8192: 0.856, 16384: 0.8559}) == 8192
    assert effective_length({4096: 0.8, 8192: 0.7}) == 0


def test_limit_leaves_a_length_out(data, reader):
    few = group("niah_single_1", "ruler_vt", context_lengths=[2048, 4096], samples=2, data=data)
    results = evaluate(reader(9999), few, limit=2)
    assert scores(results) == {"acc": 1.0, "acc@0002048": 1.0, "effective_length": 2048}


def test_the_budget_of_gen_kwargs_is_kept(data, tokenizers):
    """lm-eval sets --gen_kwargs when the task has been loaded already."""
    task = make("niah_multikey_2", context_lengths=4096, samples=2, data=str(data))
    task.set_config(key="generation_kwargs", value={"until": [], "max_gen_toks": 1500})
    task.build_all_requests()
    for instance in task.instances:
        assert len(tokenizers["demo"](instance.args[0]).input_ids) + 1500 <= 4096


def test_predict_only(data, reader):
    few = group("niah_single_1", context_lengths=2048, samples=2, data=data)
    results = evaluate(reader(9999), few, predict_only=True)
    assert not {"acc", "effective_length"} & set(scores(results))


def test_models(data, hf_model):
    few = ["niah_single_1", "ruler_qa_squad"]
    yoco = group(*few, context_lengths=3000, samples=1, data=data)
    results = evaluate(YocoLM(device="cpu"), yoco)
    assert set(scores(results)) == {"acc", "acc@0003000", "effective_length"}
    settings = {"pretrained": hf_model, "max_length": 3000}
    hf = group(*few, context_lengths=3000, samples=1, data=data, **settings)
    results = evaluate(HFLM(**settings, device="cpu"), hf)
    assert set(scores(results)) == {"acc", "acc@0003000", "effective_length"}
