"""Needle tasks under --apply_chat_template: what chat models are asked, and how they may answer."""

import json
import re
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.api_models import JsonChatStr
from lm_eval.tasks import TaskManager

import yoco_eval.tasks
from yoco_eval.lm import YocoLM
from yoco_eval.tasks.evaluated_model import load_tokenizer

TASKS = Path(yoco_eval.tasks.__file__).parent
GRID = {"pretrained": "demo-1m", "context_lengths": [512], "depths": [0, 0.5, 1], "samples": 2}
ROOM = 128  # tokens of an answer in a chat
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ANSWERS = [
    "{}",
    "\n\n **{}**",
    "<think>\n\n</think>\n\n{}.",
    "<think>Of 3 notes, one\n\nsays 7.</think>\n{}",
    "The special number of Johannesburg is {}.",
    "I have read every note.\n\nAnswer: {}",
]


def evaluate(model, task="yoco_needle", **options):
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=GRID)
    results = simple_evaluate(
        model, tasks=[task], task_manager=manager, apply_chat_template=True, **options
    )
    return results["results"][task]["acc,none"], results


@pytest.fixture
def chat(answerer):
    """A model that answers in these ways in turn, with a template as tokenizers have it."""

    class Chat(answerer):
        def __init__(self, *answers, template=TEMPLATE):
            super().__init__(None)
            self.tokenizer = load_tokenizer({"pretrained": "demo-1m"})
            self.tokenizer.chat_template = template
            self.answers = answers
            self.settings = None

        def generate_until(self, requests, disable_tqdm=False):
            self.asked += [request.args[0] for request in requests]
            self.settings = requests[0].args[1]
            return [
                way and way.format(request.doc["number"])
                for request, way in zip(requests, self.answers * len(requests), strict=False)
            ]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

    return Chat


@pytest.mark.slow
@pytest.mark.parametrize("task", ["yoco_needle", "yoco_multi_needle_1", "yoco_passkey"])
def test_right_answers_in_the_ways_of_chat_models(chat, task):
    model = chat(*ANSWERS)
    assert evaluate(model, task)[0] == 1
    assert model.settings == {"do_sample": False, "max_gen_toks": ROOM, "until": []}
    assert evaluate(chat(None, "", "<think>{}", "I do not know."), task)[0] == 0


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        (
            "yoco_multi_needle_2",
            r"\n\nQuestion: What is the special number of (\w+)\?",
            r"Answer: The special number of (\w+) is",
        ),
        ("yoco_passkey", r"(\.)\nWhat is the pass key\?", "The pass key is()"),
    ],
)
def test_the_assistants_turn_begins_with_the_answers_beginning(chat, task, question, answer):
    model = chat("")
    _, results = evaluate(model, task, system_instruction="Answer in one word.")
    system = r"<\|system\|>\nAnswer in one word.<\|end\|>\n"
    whole = rf"{system}<\|user\|>\n.*{question}<\|end\|>\n<\|assistant\|>\n{answer}"
    for context in model.asked:
        asked, begun = re.fullmatch(whole, context, re.DOTALL).groups()
        assert begun in ("", asked)
    counts = [len(model.tokenizer(context).input_ids) for context in model.asked]
    assert 512 - 16 <= max(counts) + ROOM <= 512
    docs = [sample["doc"] for sample in results["samples"][task]]
    assert counts[:: len(counts) // len(docs)] == [doc["prompt_tokens"] for doc in docs]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["template", "server", "turns", "thinking"])
def test_a_turn_that_cannot_stay_open_is_left_to_the_model(chat, caplog, case):
    template = "{{ messages[0].content }}<|end|>" if case == "template" else TEMPLATE
    model = chat("{}", template=template)
    if case == "server":  # it has a template of its own
        model.apply_chat_template = lambda turns, **_: JsonChatStr(json.dumps(turns))
    if case == "turns":  # handed over as they are
        model.apply_chat_template = lambda turns, **_: turns
    if case == "thinking":
        model.think_end_token = "</think>"
    # lm-eval hashes what it logs, which has to be text.
    assert evaluate(model, log_samples=case != "turns")[0] == 1
    for context in model.asked:
        text = context.prompt if case == "server" else context
        text = json.dumps(context) if case == "turns" else text
        assert text.count("Answer: The special number of") == 1
        assert re.search(r"number of \w+ is(\"}]|<\|end\|>(\n<\|assistant\|>\n)?)$", text)
    told = "a model that thinks needs room for it; give --gen_kwargs max_gen_toks" in caplog.text
    assert told == (case == "thinking")


def test_settings_of_generation_are_the_users(chat, caplog):
    model = chat("{}")
    model.think_end_token = "</think>"
    evaluate(model, gen_kwargs={"max_new_tokens": 60, "until": ["."]})
    assert model.settings == {"do_sample": False, "max_new_tokens": 60, "until": ["."]}
    counts = [len(model.tokenizer(context).input_ids) for context in model.asked]
    assert 512 - 16 <= max(counts) + 60 <= 512
    assert "needs room" not in caplog.text


def test_demo_checkpoint_in_a_chat():
    model = YocoLM(device="cpu")
    model.tokenizer.chat_template = TEMPLATE
    assert evaluate(model, limit=1, gen_kwargs={"max_gen_toks": 8})[0] == 1
