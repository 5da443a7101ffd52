"""yoco_mrcr and yoco_mrcr_synthetic: the published grade, bins and lengths, chats, backends."""

import hashlib
import json
import random
import re
from difflib import SequenceMatcher
from pathlib import Path

import datasets
import pytest
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.api_models import JsonChatStr
from lm_eval.tasks import TaskManager

import yoco_eval.tasks
from yoco_eval.lm import YocoLM
from yoco_eval.reports.comparison import compare
from yoco_eval.reports.runs import load_checkpoints
from yoco_eval.tasks import mrcr
from yoco_eval.tasks.conversations import grade, transcript
from yoco_eval.tasks.mrcr_synthetic import Conversation
from yoco_eval.tasks.prompts import SLACK

TASKS = Path(yoco_eval.tasks.__file__).parent
KINDS = ["demo", "byte-level", "unigram", "sentencepiece", "tiktoken"]
SIZES = [0, 2, 5, 9, 14, 20, 28, 40]  # turns that are no needles, of the samples of the data
BINS = [1024, 2048, 4096]
EXAMPLES = "Here are some examples:\n\n======EXAMPLE======\nUser: write a poem about ink\n"
ALTERNATING = (  # as some of Gemma's
    "{% for turn in messages %}"
    "{% if loop.index0 and turn.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def row(needles, size):
    """A sample as the data set has them."""
    asked = 1 + size % needles
    made = Conversation(f"{needles}/{size}", needles, asked, sentences=4)
    messages = [{"role": "user", "content": EXAMPLES}, *made.messages(size, made.elastic)]
    contents = [message["content"] for message in messages]
    return {
        "prompt": json.dumps(messages),
        "answer": made.answer,
        "random_string_to_prepend": made.string,
        "n_needles": needles,
        "desired_msg_index": contents.index(made.answer.removeprefix(made.string)) - 1,
        "total_messages": len(messages),
        "n_chars": sum(map(len, contents)),
    }


@pytest.fixture(scope="module")
def rows():
    return {needles: [row(needles, size) for size in SIZES] for needles in (2, 4, 8)}


@pytest.fixture(scope="module")
def data(tmp_path_factory, rows):
    """A folder of the data set's shape: parquet files as on the hub, and one of JSON lines."""
    folder = tmp_path_factory.mktemp("data") / "mrcr"
    for needles in (2, 4):
        (folder / f"{needles}needle").mkdir(parents=True)
        for part, some in enumerate((rows[needles][:5], rows[needles][5:])):
            path = folder / f"{needles}needle" / f"{needles}needle_{part}.parquet"
            datasets.Dataset.from_list(some).to_parquet(path)
    (folder / "8needle.jsonl").write_text("\n".join(map(json.dumps, rows[8])))
    return str(folder.parent)


def task_manager(**metadata):
    named = {"pretrained": "demo-1m", **metadata}  # unless a test names another
    return TaskManager(include_path=TASKS, include_defaults=False, metadata=named)


def load(name, **metadata):
    return task_manager(**metadata).load([name])["tasks"][name]


def evaluate(model, name, metadata, **options):
    return simple_evaluate(model, tasks=[name], task_manager=task_manager(**metadata), **options)


def asked_text(prompt):
    """What a reader of the whole transcript answers."""
    turns = re.split(r"\n\n(?=User: write)|\n\nUser: (?=Prepend)", f"\n\n{prompt}")
    string, index, what = re.search(
        r"^Prepend (\w+) to the (\d)\w\w \(1 indexed\) (.+?)\. Do not include any other text in "
        r"your response\.\n\nAssistant:$",
        turns.pop(),
    ).groups()
    begin = f"User: write a {what}\n\nAssistant: "
    texts = [turn.removeprefix(begin) for turn in turns if turn.startswith(begin)]
    return string, int(index), texts


def right(prompt):
    string, index, texts = asked_text(prompt)
    return string + texts[index - 1]


# The grade


def published_grade(response, answer, random_string_to_prepend):
    """As the data set's card has it."""
    if not response.startswith(random_string_to_prepend):
        return 0
    response = response.removeprefix(random_string_to_prepend)
    answer = answer.removeprefix(random_string_to_prepend)
    return float(SequenceMatcher(None, response, answer).ratio())


def made_answers():
    """Two hundred answers in the ways of models, each with the right one and its string."""
    draw = random.Random(0)
    for number in range(20):
        made = Conversation(f"answers/{number}", needles=4, asked=2, sentences=1 + number)
        string, text = made.string, made.needles[1].answer
        words = text.split(" ")
        draw.shuffle(words)
        ways = [
            string + text,
            text,
            f" {string}{text}",
            f"{string} {text}\n",
            string + text[: len(text) // 3],
            string + made.needles[0].answer,
            string + " ".join(words),
            string + string + text,
            string.lower() + text,
            string if number % 2 else "",
        ]
        yield from ((way, string + text, string) for way in ways)


def test_the_grade_is_the_published_one():
    answers = list(made_answers())
    assert len(answers) == 200
    grades = [grade(*one) for one in answers]
    assert grades == [published_grade(*one) for one in answers]
    assert grades[:3] == [1, 0, 0] and all(0 < one < 1 for one in grades[3:8])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("{}", 1),
        ("\n {}", 1),
        ("<think>Which? aYooSG8CQg</think>\n\n{}", 1),
        ("<think>{}", 0),
        ("Here it is: {}", 0),
        (None, 0),
    ],
)
def test_what_counts_as_the_answer(data, answer, score):
    task = load("yoco_mrcr_2", data=data, context_lengths=BINS, samples=1)
    doc = task.eval_docs[0]
    said = answer and answer.format(doc["answer"])
    found = task.process_results(doc, [said])
    assert found["acc"] == score
    length = doc["context_length"]
    assert found == {"acc": score} | {f"acc@{n:07d}": score if n == length else None for n in BINS}


# The data set, in bins


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_in_the_bin_of_its_tokens(tmp_path, tokenizers, data, rows, kind):
    tokenizer = tokenizers[kind]
    tokenizer.save_pretrained(tmp_path)

    def count(text, **options):
        return len(tokenizer(text, verbose=False, **options).input_ids)

    for needles in (2, 8):
        settings = {"tokenizer": str(tmp_path), "context_lengths": BINS, "data": data}
        task = load(f"yoco_mrcr_{needles}", **settings)
        found = {doc["index"]: doc["context_length"] for doc in task.eval_docs}
        expected = {}
        for index, one in enumerate(rows[needles]):
            prompt = count(transcript(json.loads(one["prompt"])))
            tokens = prompt + count(one["answer"], add_special_tokens=False)
            for length in BINS:
                if length / 2 < tokens <= length:
                    expected[index] = length
        assert found == expected and len(set(found.values())) > 1
        for doc in task.eval_docs:
            prompt = task.doc_to_text(doc)
            assert doc["prompt_tokens"] == count(prompt)
            assert right(prompt.removeprefix(f"User: {EXAMPLES}\n\n")) == doc["answer"]


def test_samples_are_the_first_ones_and_missing_ones_are_told_once(data, caplog, answerer):
    settings = {"data": data, "context_lengths": [*BINS, 16384], "samples": 2, "needles": [2, 8]}
    results = evaluate(answerer(lambda prompt: ""), "yoco_mrcr", settings, apply_chat_template=True)
    all_docs = load("yoco_mrcr_8", data=data, context_lengths=[*BINS, 16384]).eval_docs
    for length in BINS:
        first = [doc["index"] for doc in all_docs if doc["context_length"] == length][:2]
        samples = [one["doc"] for one in results["samples"]["yoco_mrcr_8"]]
        assert [d["index"] for d in samples if d["context_length"] == length] == first
    told = [record.message for record in caplog.records if "fewer samples" in record.message]
    assert len(told) == 2 and told[1].startswith("yoco_mrcr_8: fewer samples than asked for (2)")
    assert "0 up to 16384" in told[1] and "up to 4096" not in told[1]
    # lm-eval gives no mean of none; the others' are the group's.
    assert results["results"]["yoco_mrcr"]["acc@0004096,none"] == 0
    assert "acc@0016384,none" not in results["results"]["yoco_mrcr"]


@pytest.mark.parametrize("processes", [1, 2])
def test_samples_are_the_same_however_many_processes_count(tmp_path, rows, processes, monkeypatch):
    """Though several count a sample, beside the last one of a bin, that one would leave out."""
    string, text = rows[2][0]["random_string_to_prepend"], "the " * 1024  # a token for each word
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "\N{OWL}" * 1200), ("assistant", text), ("user", "Repeat."))
    ]
    other = {"prompt": json.dumps(messages), "answer": string, "random_string_to_prepend": string}
    (tmp_path / "mrcr").mkdir()
    made = rows[2][0], {**rows[2][0], **other}, row(2, 80)
    (tmp_path / "mrcr" / "own.jsonl").write_text("\n".join(map(json.dumps, made)))
    monkeypatch.setattr(mrcr, "count_builders", lambda: processes)
    settings = {"data": str(tmp_path), "context_lengths": [1024, 8192], "samples": 1}
    assert [doc["index"] for doc in load("yoco_mrcr_2", **settings).eval_docs] == [0, 2]


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("yoco_mrcr", {"needles": 3}, "needles: MRCR has no 3; it has 2, 4, 8"),
        ("yoco_mrcr_4", {"needles": "2,8"}, "needles: yoco_mrcr_4 has 4, not 2, 8; evaluate the"),
        ("yoco_mrcr", {"context_lengths": 64}, "no sample with 2 needles has more than half of 64"),
        ("yoco_mrcr", {"context_lengths": "4m"}, "4194304 exceeds the model's 1048576"),
        ("yoco_mrcr", {"data": "nowhere"}, "nowhere/mrcr holds no data set; put .parquet or"),
        ("yoco_mrcr", {"data": None}, "openai/mrcr could not be loaded from the Hugging Face hub"),
        ("yoco_mrcr_synthetic_2", {"data": None, "context_lengths": 100}, "100 is too short for 2"),
        ("yoco_mrcr_synthetic", {"data": None, "samples": 0}, "samples: 0 is below 1"),
    ],
)
def test_bad_settings_are_told_in_one_line(data, monkeypatch, name, metadata, message):
    if metadata.get("data", data) is None:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError) as caught:
        load(name, **{"context_lengths": BINS, "data": data, **metadata})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "User: hello"}, "the prompt of sample 0 with 2 needles is no JSON list"),
        ({"prompt": '[{"role": "tool", "content": ""}]'}, "the prompt of sample 0 with 2 needles"),
        ({"answer": "a poem"}, "sample 0 with 2 needles has an answer that does not begin with"),
        ({"n_needles": 4}, "no sample has 2 needles"),
        ({"answer": ...}, "a file has no answer"),
    ],
)
def test_damaged_data_is_told_in_one_line(tmp_path, rows, change, message):
    damaged = {k: v for k, v in {**rows[2][3], **change}.items() if v is not ...}
    (tmp_path / "mrcr").mkdir()
    (tmp_path / "mrcr" / "any.jsonl").write_text(json.dumps(damaged))
    with pytest.raises(ValueError) as caught:
        load("yoco_mrcr_2", data=str(tmp_path), context_lengths=BINS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_asked_of_the_hub(data, monkeypatch):
    asked, load_dataset = [], datasets.load_dataset

    def load_locally(path, name=None, **options):
        asked.append((path, name, options))
        file = f"{data}/mrcr/4needle/4needle_0.parquet"
        return load_dataset("parquet", data_files=file, split="train")

    monkeypatch.setattr(datasets, "load_dataset", load_locally)
    assert load("yoco_mrcr_4", context_lengths=BINS).eval_docs
    files = ["4needle/4needle_*.parquet"]
    assert asked == [("openai/mrcr", None, {"split": "train", "data_files": files})]


# Made conversations


@pytest.mark.parametrize("kind", KINDS)
def test_made_prompts_fill_their_context_lengths(tmp_path, tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokenizer.save_pretrained(tmp_path)
    settings = {"tokenizer": str(tmp_path), "context_lengths": [1500, 6000], "samples": 2}
    for needles in (2, 8):
        task = load(f"yoco_mrcr_synthetic_{needles}", **settings)
        assert len(task.eval_docs) == 4
        for doc in task.eval_docs:
            prompt, length = task.doc_to_text(doc), doc["context_length"]
            assert doc["prompt_tokens"] == len(tokenizer(prompt, verbose=False).input_ids)
            assert length - SLACK <= doc["prompt_tokens"] + doc["max_gen_toks"] <= length
            assert doc["answer_tokens"] <= doc["max_gen_toks"] // 2
            string, index, texts = asked_text(prompt)
            assert len(set(texts)) == needles and index == 1 + doc["sample"]
            assert string + texts[index - 1] == doc["answer"]


def test_made_conversations():
    task = load("yoco_mrcr_synthetic_8", context_lengths="32k", samples=3)
    for doc in task.eval_docs:
        messages = task.messages(doc)
        assert [one["role"] for one in messages] == ["user", "assistant"] * (len(messages) // 2) + [
            "user"
        ]
        requests = [message["content"] for message in messages[:-1:2]]
        form, topic = re.search(r"indexed\) (.+) about (\w+)\.", doc["question"]).groups()
        near = [one for one in requests if (f"a {form} " in one) != one.endswith(f" {topic}")]
        assert requests.count(f"write a {form} about {topic}") == 8
        assert 0.4 < len(near) / (len(requests) - 8) < 0.75
        places = [i for i, one in enumerate(requests) if one == f"write a {form} about {topic}"]
        assert places[-1] - places[0] > len(requests) / 4
        assert doc["question"] not in requests
        assert len(json.dumps(doc)) < 5000


def test_same_conversations_on_every_machine():
    def prompts(**metadata):
        task = load("yoco_mrcr_synthetic_4", context_lengths=[1024, 2048], samples=2, **metadata)
        return [task.doc_to_text(doc) for doc in task.eval_docs]

    texts = prompts(seed=5)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert digest == "a67c587c192fb659acfd660adebe1ff4b8dfbae3a97fab1c97fa75d7e367dba9"
    assert not set(texts) & set(prompts(seed=6))


# Chats, and what --gen_kwargs say


@pytest.mark.parametrize("name", ["yoco_mrcr_2", "yoco_mrcr_synthetic_2"])
@pytest.mark.parametrize("template", ["model", "server", "alternating"])
def test_messages_are_turns_and_their_marks_count(tokenizers, data, answerer, name, template):
    class Chat(answerer):
        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            if template == "server":
                return JsonChatStr(json.dumps(chat_history))
            if template == "alternating":
                return tokenizers["demo"].apply_chat_template(
                    chat_history, chat_template=ALTERNATING, tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )  # fmt: skip
            return super().apply_chat_template(chat_history, add_generation_prompt)

    model = Chat(lambda context: "")
    settings = {"data": data} if name == "yoco_mrcr_2" else {"samples": 2}
    results = evaluate(
        model, name, {"context_lengths": BINS, **settings}, apply_chat_template=True,
        system_instruction="Be exact.", log_samples=template != "server",
    )  # fmt: skip
    docs = list(load(name, context_lengths=BINS, **settings).eval_docs)
    assert len(model.asked) > 3 and results["configs"][name]["generation_kwargs"]["until"] == []
    if template == "server":
        turns = json.loads(model.asked[-1].prompt)
        assert turns[0] == {"role": "system", "content": "Be exact."}
        assert [turn["role"] for turn in turns[-3:]] == ["user", "assistant", "user"]
        return
    for sample, context in zip(results["samples"][name], model.asked, strict=True):
        doc, settings = sample["doc"], sample["arguments"][0][1]
        tokens = len(tokenizers["demo"](context).input_ids)
        assert doc["prompt_tokens"] == tokens
        length, answer = doc["context_length"], doc["answer_tokens"]
        assert length / 2 < tokens + answer <= length
        assert settings["max_gen_toks"] == doc["max_gen_toks"] >= answer
        assert "Be exact." in context[:40] and "Assistant:" not in context
        if name == "yoco_mrcr_2":
            between = "\n\n" if template == "alternating" else "\n<user>\n"
            assert f"{EXAMPLES}{between}write a " in context
        else:
            assert tokens + doc["max_gen_toks"] >= length - SLACK
    assert len(docs) >= len(model.asked)


def test_room_for_thoughts(data, answerer):
    class Settings(answerer):
        def generate_until(self, requests, disable_tqdm=False):
            self.settings = [request.args[1] for request in requests]
            return super().generate_until(requests)

    model = Settings(lambda prompt: "")
    given = {"gen_kwargs": {"max_new_tokens": 700, "until": ["."]}}
    settings = {"context_lengths": BINS[1:], "max_length": 4096}
    results = evaluate(model, "yoco_mrcr_synthetic_2", {**settings, "samples": 1}, **given)
    assert model.settings == 2 * [{"do_sample": False, "max_new_tokens": 700, "until": ["."]}]
    for sample in results["samples"]["yoco_mrcr_synthetic_2"]:
        left = sample["doc"]["context_length"] - sample["doc"]["prompt_tokens"]
        assert 700 <= left <= 700 + SLACK
    # Bins stay as they are, and no prompt is cut: what the model's positions leave is the room.
    results = evaluate(model, "yoco_mrcr_8", {**settings, "data": data}, **given)
    docs = [sample["doc"] for sample in results["samples"]["yoco_mrcr_8"]]
    plain = load("yoco_mrcr_8", data=data, **settings).eval_docs
    assert [doc["index"] for doc in docs] == [doc["index"] for doc in plain]
    rooms = [one.get("max_gen_toks", one.get("max_new_tokens")) for one in model.settings]
    assert rooms == [min(700, 4096 - doc["prompt_tokens"]) for doc in docs]
    assert min(rooms) < 700 == max(rooms)


# Scores of the groups, and reports


@pytest.mark.parametrize("name", ["yoco_mrcr", "yoco_mrcr_synthetic"])
def test_scores_by_length_and_needles(tmp_path, data, answerer, name):
    """Of a model that reads everything, and of one that takes the last of the texts."""

    def last(prompt):
        string, _, texts = asked_text(prompt.removeprefix(f"User: {EXAMPLES}\n\n"))
        return string + texts[-1]

    settings = {"context_lengths": BINS[1:], "samples": 2}
    settings |= {"data": data} if name == "yoco_mrcr" else {"seed": 3}
    answers = {
        "reader": lambda prompt: right(prompt.removeprefix(f"User: {EXAMPLES}\n\n")), "last": last
    }  # fmt: skip
    for label, answer in answers.items():
        tracker = EvaluationTracker(output_path=str(tmp_path / label))
        results = evaluate(answerer(answer), name, settings, evaluation_tracker=tracker)
        tracker.save_results_aggregated(results, samples=None)
        scores = [results["results"][f"{name}_{n}"]["acc@0004096,none"] for n in (2, 4, 8)]
        group = results["results"][name]["acc@0004096,none"]
        assert group == pytest.approx(sum(scores) / 3)
        assert scores == [1, 1, 1] if label == "reader" else 0 < group < 1
    comparison = compare(load_checkpoints([tmp_path / "reader", tmp_path / "last"]))
    curves = {(one.task, one.member): one.values for one in comparison.curves}
    assert [task for task, _ in curves] == [name, *(f"{name}_{n}" for n in (2, 4, 8))]
    reader, other = curves[name, False]
    assert reader == {2048: 1, 4096: 1} and other[4096] == group
    assert not comparison.setup_differences

    tracker = EvaluationTracker(output_path=str(tmp_path / "fewer"))
    results = evaluate(
        answerer(answers["reader"]), name, {**settings, "needles": 2}, evaluation_tracker=tracker
    )
    tracker.save_results_aggregated(results, samples=None)
    comparison = compare(load_checkpoints([tmp_path / "reader", tmp_path / "fewer"]))
    [told] = [one for one in comparison.setup_differences if one.setting == "needles"]
    assert (told.tasks, told.values, told.effect) == ((name,), ("2, 4, 8", "2"), "refused")


@pytest.mark.parametrize("name", ["yoco_mrcr", "yoco_mrcr_synthetic"])
def test_both_backends(data, hf_model, name):
    settings = {"context_lengths": 1024, "needles": 2, "samples": 1}
    settings |= {"data": data} if name == "yoco_mrcr" else {}
    options = {"gen_kwargs": {"max_gen_toks": 8}}
    results = evaluate(YocoLM(device="cpu"), name, settings, **options)
    assert results["results"][name].keys() >= {"acc,none", "acc@0001024,none"}
    arguments = {"pretrained": hf_model, "dtype": "float32", "device": "cpu", "max_length": 1024}
    results = evaluate("hf", name, {**arguments, **settings}, model_args=arguments)
    assert 0 <= results["results"][name]["acc@0001024,none"] <= 1
    assert results["configs"][f"{name}_2"]["metadata"]["needles"] == 2
