"""yoco_babilong: lengths from two data sets, on small local ones, and their scores."""

import json
import re
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import yoco_eval.tasks
from yoco_eval.lm import YocoLM
from yoco_eval.tasks.babilong import NAMES, BabilongGroup, Settings
from yoco_eval.tasks.settings import read_settings

TASKS = Path(yoco_eval.tasks.__file__).parent
ALL = ["babilong_qa1", "babilong_qa2", "babilong_qa3", "babilong_qa4", "babilong_qa5"]
PLACES = ["garden", "kitchen", "office", "hallway"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four documents of each question at three lengths."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("0k", 0), ("1k", 3000), ("1M", 20_000)):
        (folder / "babilong" / name).mkdir(parents=True)
        for question in range(1, 6):
            rows = [
                {
                    "input": f"Mary went to the {place}. " + "It was a dark night. " * (size // 20),
                    "question": "Where is Mary? ",
                    "target": place,
                }
                for place in PLACES
            ]
            file = folder / "babilong" / name / f"qa{question}.jsonl"
            file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


def group(*members, **metadata):
    """The group with some of its members."""
    config = {
        "task": "yoco_babilong", "folder": "babilong", "members": members, "metadata": metadata
    }  # fmt: skip
    return BabilongGroup(config)


def scores(results, name="yoco_babilong"):
    return {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if key.endswith(",none") and not key.endswith("_stderr,none")
    }


def finder(prompt):
    """Finds Mary where the context is short."""
    [*_, place] = re.findall(r"Mary went to the (\w+)", prompt)
    return f"The most recent location of Mary is {place}." if len(prompt) < 10_000 else "?"


# Settings


@pytest.mark.parametrize(
    ("value", "lengths"),
    [
        ("0k", [0]),
        ([0, "128K", "1k", 1024], [0, 1024, 131072]),
        ("[1m,10M]", [1048576, 10485760]),
    ],
)
def test_context_lengths(value, lengths):
    assert read_settings(Settings, {"context_lengths": value}).context_lengths == lengths


def test_defaults():
    settings = read_settings(Settings, {})
    assert [NAMES[length] for length in settings.context_lengths] == (
        ["0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k"]
    )
    assert settings.samples is None and settings.data is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"context_lengths": ["1k", "3k"]}, "BABILong has no 3k; it has 0k, 1k, 2k"),
        ({"context_lengths": "2m"}, "BABILong has no 2m; it has 0k, 1k"),
        ({"context_lengths": "long"}, "context_lengths: 'long' is not a length"),
        ({"context_lengths": "10M", "max_length": "1m"}, "10485760 exceeds the model's 1048576"),
        ({"context_lengths": "2k"}, "babilong/2k holds no data set"),
        ({"context_lengths": "1k", "data": None}, "data=FOLDER (FOLDER/babilong/1k/SPLIT.jsonl)"),
        ({"samples": 0}, "samples: 0 is below 1"),
        ({"sample": 1}, "'sample' is unknown; did you mean 'samples'?"),
    ],
)  # fmt: skip
def test_bad_settings_are_told_in_one_line(data, monkeypatch, metadata, message):
    if metadata.get("data", data) is None:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError) as caught:
        group("babilong_qa1", **{"context_lengths": "0k", "data": data, **metadata})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_field(tmp_path):
    (tmp_path / "babilong" / "0k").mkdir(parents=True)
    (tmp_path / "babilong" / "0k" / "qa1.jsonl").write_text('{"input": "a", "question": "b"}')
    with pytest.raises(ValueError, match="data: babilong/0k, split qa1: has no target"):
        group("babilong_qa1", context_lengths="0k", data=str(tmp_path))


# Documents


def test_data_sets_of_the_hub(data, monkeypatch):
    """What is asked of the hub: by name to 128K; longer ones by file, which saves the others."""
    asked, load_dataset = [], datasets.load_dataset

    def load(path, name=None, **options):
        asked.append((path, name, options))
        local = f"{data}/babilong/1k/qa3.jsonl"
        return load_dataset("json", data_files=local, split="train")

    monkeypatch.setattr(datasets, "load_dataset", load)
    lengths = ["0k", "128k", "256k", "10m"]
    [task] = group("babilong_qa3", context_lengths=lengths, max_length="16m", samples=2)
    assert asked == [
        ("RMT-team/babilong-1k-samples", "0k", {"split": "qa3"}),
        ("RMT-team/babilong-1k-samples", "128k", {"split": "qa3"}),
        (
            "RMT-team/babilong", None,
            {"split": "qa3", "data_files": {"qa3": "data/qa3/256k.json"}},
        ),
        ("RMT-team/babilong", None, {"split": "qa3", "data_files": {"qa3": "data/qa3/10M.json"}}),
    ]  # fmt: skip
    assert len(task.eval_docs) == 8


def test_prompts_are_those_of_lm_eval(data, monkeypatch):
    load_dataset = datasets.load_dataset
    local = f"{data}/babilong/1k/qa2.jsonl"
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *_, **__: load_dataset("json", data_files=local, split="train"),
    )  # fmt: skip
    [ours] = group("babilong_qa2", context_lengths="1k")
    folder = Path(lm_eval.tasks.__file__).parent / "babilong"
    manager = TaskManager(include_path=folder, include_defaults=False)
    theirs = manager.load(["babilong_qa2"])["tasks"]["babilong_qa2"]
    for task in (ours, theirs):
        task.build_all_requests()
    assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]
    assert len(ours.instances) == 4 and "Mary went to the garden" in ours.instances[0].args[0]
    assert all(len(json.dumps(doc)) < 200 for doc in ours.eval_docs)


# Scores


@pytest.mark.slow
def test_whole_group(data, answerer):
    paths = [TASKS, Path(lm_eval.tasks.__file__).parent / "babilong"]
    settings = {"context_lengths": ["0k", "1k", "1M"], "max_length": "1m", "data": data}
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=settings)
    results = simple_evaluate(answerer(finder), tasks=["yoco_babilong"], task_manager=manager)
    expected = {"acc": 2 / 3, "acc@0000000": 1.0, "acc@0001024": 1.0, "acc@1048576": 0.0}
    for name in ("yoco_babilong", *ALL):
        assert scores(results, name) == pytest.approx(expected)
    assert results["results"]["yoco_babilong"]["acc_stderr,none"] > 0
    assert results["n-samples"]["babilong_qa5"] == {"original": 12, "effective": 12}
    for sample in results["samples"]["babilong_qa1"]:
        [(prompt, _)] = sample["arguments"]
        assert len(json.dumps(sample)) < len(prompt) + 2000


@pytest.mark.slow
def test_digests_are_of_the_prompts_that_were_answered(data, answerer):
    def evaluate(**options):
        few = group("babilong_qa1", context_lengths=["0k", "1k"], data=data)
        nothing = TaskManager(include_defaults=False)
        results = simple_evaluate(answerer(finder), tasks=[few], task_manager=nothing, **options)
        metadata = results["configs"]["babilong_qa1"]["metadata"]
        assert metadata["by_length"] == ["acc"]
        return metadata["prompts"]

    known = evaluate()
    assert list(known) == ["0", "1024"] and known["0"] != known["1024"]
    assert evaluate(apply_chat_template=True, system_instruction="Be brief.") == known
    assert evaluate(limit=4) == {"0": known["0"]}
    assert evaluate(limit=3).keys() == {"0"} and evaluate(limit=3) != {"0": known["0"]}
    assert not evaluate(num_fewshot=1).items() & known.items()


def test_limit_leaves_a_length_out(data, answerer):
    few = group("babilong_qa1", "babilong_qa2", context_lengths=["0k", "1k"], data=data)
    nothing = TaskManager(include_defaults=False)
    results = simple_evaluate(answerer(finder), tasks=[few], limit=3, task_manager=nothing)
    assert scores(results) == {"acc": 1.0, "acc@0000000": 1.0}


@pytest.mark.slow
def test_models(data, hf_model):
    nothing = TaskManager(include_defaults=False)
    metrics = {"acc", "acc@0000000", "acc@0001024"}
    few = group("babilong_qa1", context_lengths=["0k", "1k"], samples=1, data=data)
    results = simple_evaluate(YocoLM(device="cpu"), tasks=[few], task_manager=nothing)
    assert set(scores(results)) == metrics
    settings = {"pretrained": hf_model, "max_length": 2048}
    few = group("babilong_qa1", context_lengths=["0k", "1k"], samples=1, data=data, **settings)
    model = HFLM(**settings, device="cpu")
    results = simple_evaluate(model, tasks=[few], task_manager=nothing)
    assert set(scores(results)) == metrics
