"""yoco_zero_shot and yoco_few_shot: their figures, on data of the hub's fields made up here."""

import json
import math
import shutil
from pathlib import Path
from random import Random
from statistics import mean, variance

import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

import yoco_eval.tasks
from yoco_eval.lm import YocoLM
from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig, load, save
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT
from yoco_eval.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow  # whole benchmarks are run

TASKS = Path(yoco_eval.tasks.__file__).parent
SUBJECTS = sorted(
    path.stem for path in Path(lm_eval.tasks.__file__).parent.glob("mmlu/default/mmlu_*.yaml")
)
ZERO_SHOT = {
    "arc_challenge": "acc",
    "arc_easy": "acc",
    "boolq": "acc",
    "hellaswag": "acc_norm",
    "openbookqa": "acc",
    "piqa": "acc",
    "winogrande": "acc",
    "sciq": "acc",
}
FEW_SHOT = {
    "arc_challenge": "acc_norm,none",
    "hellaswag": "acc_norm,none",
    "truthfulqa_mc2": "acc,none",
    "winogrande": "acc,none",
    "gsm8k": "exact_match,strict-match",
}
WORDS = """Lima Oslo the river a city old notes number special found every evening baker garden
lantern carried towards mill bread letter about clay honey stood beside heavy door""".split()


# Data sets with the fields of those on the hub


def words(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def choices(rng, count):
    return [words(rng, 1, 6) for _ in range(count)]


def lettered(rng, count=4):
    options = {"text": choices(rng, count), "label": list("ABCD"[:count])}
    return {"choices": options, "answerKey": rng.choice("ABCD"[:count])}


def gold_first(rng):
    labels = [1, *(rng.randint(0, 1) for _ in range(3)), 0]
    return {"choices": choices(rng, 5), "labels": labels}


def arc(rng):
    return {"id": "x", "question": words(rng, 5, 15) + "?", **lettered(rng)}


def boolq(rng):
    return {"question": words(rng, 4, 8), "passage": words(rng, 20, 40), "label": rng.randint(0, 1)}


def hellaswag(rng):
    return {
        "activity_label": words(rng, 1, 2),
        "ctx_a": words(rng, 5, 12) + ".",
        "ctx_b": words(rng, 1, 3),
        "endings": [f"{ending} [title] {ending}" for ending in choices(rng, 4)],
        "label": str(rng.randrange(4)),
    }


def openbookqa(rng):
    return {"question_stem": words(rng, 4, 10), **lettered(rng)}


def piqa(rng):
    first, second = choices(rng, 2)
    return {"goal": words(rng, 4, 9), "sol1": first, "sol2": second, "label": rng.randint(0, 1)}


def winogrande(rng):
    first, second = choices(rng, 2)
    sentence = f"{words(rng, 3, 6)} _ {words(rng, 3, 6)}."
    answer = str(rng.randint(1, 2))
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def sciq(rng):
    names = ["distractor1", "distractor2", "distractor3", "correct_answer"]
    answers = dict(zip(names, choices(rng, 4), strict=True))
    return {"support": words(rng, 10, 20), "question": words(rng, 5, 9), **answers}


def mmlu(rng):
    return {
        "question": words(rng, 3, 6),
        "subject": "x",
        "choices": choices(rng, 4),
        "answer": rng.randrange(4),
    }


def truthfulqa(rng):
    question = words(rng, 4, 8)
    return {"question": question, "mc1_targets": gold_first(rng), "mc2_targets": gold_first(rng)}


def gsm8k(rng):
    number = rng.randrange(100)
    return {"question": words(rng, 8, 15), "answer": f"{words(rng, 5, 9)}\n#### {number}"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of all data sets; sets that are evaluated on their test split have no other labels."""
    folder = tmp_path_factory.mktemp("data")

    def write(name, row, **splits):
        (folder / name).mkdir()
        for split, count in splits.items():
            rng = Random(f"{name}/{split}")
            rows = [json.dumps(row(rng)) for _ in range(count)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows))

    write("arc_easy", arc, test=12)
    write("arc_challenge", arc, train=30, test=12)
    write("boolq", boolq, validation=12)
    write("hellaswag", hellaswag, train=12, validation=12)
    write("openbookqa", openbookqa, test=12)
    write("piqa", piqa, validation=12)
    write("winogrande", winogrande, train=12, validation=12)
    write("sciq", sciq, test=12)
    write("truthfulqa_mc2", truthfulqa, validation=12)
    write("gsm8k", gsm8k, train=12, test=3)
    for index, subject in enumerate(SUBJECTS):  # of unequal sizes
        write(subject, mmlu, dev=5, test=2 + 2 * (index % 3 == 0))
    return folder


# Models


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    """lm-eval's Hugging Face backend with a small random Llama and the demo's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(BUNDLED / DEFAULT_CHECKPOINT).save_pretrained(folder)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def small_yoco(tmp_path_factory):
    """This project's backend with a small random YOCO and the demo's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("yoco")
    config = YocoConfig(
        dim=32,
        n_layers=2,
        hidden_dim=48,
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=2048,
        self_decoder=GatedRetentionSettings(2),
        max_position_embeddings=4096,
    )
    save(Yoco(config), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / DEFAULT_CHECKPOINT / name, folder)
    return YocoLM(pretrained=str(folder), device="cpu", batch_size=8)


class HuggingFaceYoco(PreTrainedModel):
    """A YOCO model as one of transformers': a full pass over each text, nothing shared."""

    config_class = PretrainedConfig

    def __init__(self, model):
        super().__init__(PretrainedConfig(vocab_size=model.config.vocab_size))
        self.model = model

    def forward(self, input_ids, **options):
        return CausalLMOutput(logits=self.model(input_ids))


def evaluate(task, model, data, limit=None, **options):
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data": str(data)})
    return simple_evaluate(
        model=model, tasks=[task], task_manager=manager, limit=limit, log_samples=True, **options
    )


# yoco_zero_shot


@pytest.fixture(scope="module")
def zero_shot(data):
    """What this project's backend and lm-eval's give of the demo's weights, in float64."""
    ours = YocoLM(device="cpu", dtype="float64", batch_size=8)
    model = HuggingFaceYoco(load(DEFAULT_CHECKPOINT, "cpu", torch.float64))
    tokenizer = load_tokenizer(BUNDLED / DEFAULT_CHECKPOINT)
    theirs = HFLM(model, "causal", tokenizer=tokenizer, max_length=4096, batch_size=4)
    return evaluate("yoco_zero_shot", ours, data), evaluate("yoco_zero_shot", theirs, data)


@pytest.mark.parametrize("task", ZERO_SHOT)
def test_predictions_are_those_of_the_hugging_face_backend(zero_shot, task):
    ours, theirs = (results["samples"][task] for results in zero_shot)
    assert len(ours) == len(theirs) == 12
    for sample, other in zip(ours, theirs, strict=True):
        assert sample["arguments"] == other["arguments"]
        assert [greedy for _, greedy in sample["filtered_resps"]] == [
            greedy for _, greedy in other["filtered_resps"]
        ]
        for (logprob, _), (expected, _) in zip(
            sample["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert logprob == pytest.approx(expected, rel=1e-9)
        for metric in sample["metrics"]:
            assert sample[metric] == other[metric]


def test_zero_shot_figures_are_those_of_the_hugging_face_backend(zero_shot):
    ours, theirs = (results["results"] for results in zero_shot)
    assert ours == theirs
    # Neither all wrong nor all right, so that equality says something.
    assert {ours[task]["acc,none"] for task in ZERO_SHOT} - {0.0, 1.0}


def test_zero_shot_score_is_the_mean_of_the_eight(zero_shot):
    results = zero_shot[0]
    answers = [
        [sample[metric] for sample in results["samples"][task]]
        for task, metric in ZERO_SHOT.items()
    ]
    group = results["results"]["yoco_zero_shot"]
    assert group["score,none"] == pytest.approx(mean(map(mean, answers)), rel=1e-12)
    # Of independent means: their variances add up.
    error = math.sqrt(sum(variance(of_task) / len(of_task) for of_task in answers)) / 8
    assert group["score_stderr,none"] == pytest.approx(error, rel=1e-9)
    assert results["groups"] == {"yoco_zero_shot": group}
    assert results["group_subtasks"] == {"yoco_zero_shot": list(ZERO_SHOT)}


def test_members_stay_lm_evals_own(zero_shot):
    results = zero_shot[0]
    assert results["versions"]["boolq"] == 2.0 and results["versions"]["yoco_zero_shot"] == "1"
    assert set(results["n-shot"].values()) == {0}
    for metric in ("acc,none", "acc_norm,none"):
        assert metric in results["results"]["arc_easy"]
    assert "|yoco_zero_shot|" in make_table(results, "groups")


def test_requests_of_local_data_are_not_cached(data, small_yoco, tmp_path, monkeypatch):
    """lm-eval would ask another folder's, or the hub's, questions with them."""
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    evaluate("yoco_zero_shot", small_yoco, data, limit=1, cache_requests=True)
    assert not list(tmp_path.iterdir())


def test_one_document_has_no_standard_error(data, small_yoco):
    results = evaluate("yoco_zero_shot", small_yoco, data, limit=1)
    group = results["results"]["yoco_zero_shot"]
    assert group["score_stderr,none"] == "N/A" and 0 <= group["score,none"] <= 1


def test_predict_only_has_no_score(data, small_yoco):
    results = evaluate("yoco_zero_shot", small_yoco, data, limit=1, predict_only=True)
    assert "score,none" not in results["results"]["yoco_zero_shot"]


# yoco_few_shot


@pytest.mark.parametrize("backend", ["small_yoco", "small_llama"])
def test_few_shot_score_gives_each_of_the_six_one_share(request, data, backend):
    model = request.getfixturevalue(backend)
    results = evaluate("yoco_few_shot", model, data, gen_kwargs={"max_gen_toks": 4})
    found = results["results"]
    subjects = [found[subject] for subject in SUBJECTS]
    assert len(subjects) == 57 and len({subject["sample_len"] for subject in subjects}) == 2
    scores = [found[task][metric] for task, metric in FEW_SHOT.items()]
    scores.append(mean(subject["acc,none"] for subject in subjects))
    assert found["yoco_few_shot"]["score,none"] == pytest.approx(mean(scores), rel=1e-12)
    assert scores[-1] != pytest.approx(found["mmlu"]["acc,none"])  # which larger subjects outweigh

    errors = [found[task][metric.replace(",", "_stderr,")] for task, metric in FEW_SHOT.items()]
    errors.append(math.hypot(*(subject["acc_stderr,none"] for subject in subjects)) / 57)
    assert found["yoco_few_shot"]["score_stderr,none"] == pytest.approx(math.hypot(*errors) / 6)
    assert results["group_subtasks"]["yoco_few_shot"] == [
        "arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "mark", "examples"),
    [
        ("arc_challenge", "Question:", 25),
        ("hellaswag", "\n\n", 10),
        ("mmlu_anatomy", "Answer:", 5),
        ("truthfulqa_mc2", "Q:", 6),  # part of its prompt
        ("winogrande", "\n\n", 5),
        ("gsm8k", "Question:", 5),
    ],
)
def test_prompts_show_as_many_examples_as_the_leaderboard(few_shot_prompts, task, mark, examples):
    prompt = few_shot_prompts[task].removeprefix(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
    )
    separators = mark == "\n\n"  # one fewer than what they separate
    assert prompt.count(mark) == examples + (not separators)


@pytest.fixture(scope="module")
def few_shot_prompts(data):
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data": str(data)})
    prompts = {}
    for name, task in manager.load(["yoco_few_shot"])["tasks"].items():
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=1, rank=0, world_size=1)
        prompts[name] = task.instances[0].args[0]
    return prompts
