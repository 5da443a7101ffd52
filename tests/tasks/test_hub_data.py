"""Data sets from the hub or from local files, and one of lm-eval's tasks on them."""

import json
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from yoco_eval import registration
from yoco_eval.tasks.hub_data import HubTask, load

ARC = Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"
ROW = {
    "question": "What is it?",
    "choices": {"text": ["this", "that"], "label": ["A", "B"]},
    "answerKey": "B",
}


def write(folder, name="arc_easy", rows=(ROW,) * 3, **splits):
    (folder / name).mkdir(exist_ok=True)
    for split, count in splits.items():
        lines = [json.dumps(row) for row in rows[:count]]
        (folder / name / f"{split}.jsonl").write_text("\n".join(lines))


def task(metadata, **options):
    return HubTask({**load_yaml(ARC), "class": HubTask, "metadata": metadata, **options})


# Data sets


def test_local_splits_of_any_kind(tmp_path):
    write(tmp_path, "set", rows=({"a": 1}, {"a": 2}), train=2)
    (tmp_path / "set" / "validation.json").write_text('{"a": 3}')
    datasets.Dataset.from_list([{"a": 4}]).to_parquet(tmp_path / "set" / "test.parquet")
    (tmp_path / "set" / "books.txt").write_text("one\ntwo\n")  # other fields than the rest
    (tmp_path / "set" / "README.md").write_text("not data")
    found = load("owner/set", None, "set", str(tmp_path))
    assert {split: rows.to_list() for split, rows in found.items()} == {
        "train": [{"a": 1}, {"a": 2}],
        "validation": [{"a": 3}],
        "test": [{"a": 4}],
        "books": [{"text": "one"}, {"text": "two"}],
    }
    assert load("owner/set", None, "set", str(tmp_path), split="test").to_list() == [{"a": 4}]


def test_local_files_that_changed_are_read_again(tmp_path):
    for rows in (({"a": 1},), ({"a": 1}, {"a": 2})):
        write(tmp_path, "set", rows=rows, test=2)
        assert load("owner/set", None, "set", str(tmp_path), split="test").to_list() == list(rows)


def test_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or "found")
    assert load("owner/set", "one", "set", None, split="test", streaming=True) == "found"
    assert asked == [(("owner/set", "one"), {"split": "test", "streaming": True})]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'owner/set' on the Hub"), "Couldn't reach 'owner/set'"),
        (ValueError('Unknown split "tset". Should be one of\n["test"]'), 'Unknown split "tset"'),
        (OSError(), "OSError"),
    ],
)
def test_what_the_hub_cannot_give(monkeypatch, error, reason):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError) as caught:
        load("owner/set", None, "set", None)
    message = str(caught.value)
    assert message.startswith("owner/set could not be loaded from the Hugging Face hub")
    assert reason in message and "\n" not in message
    assert "--metadata data=FOLDER (FOLDER/set/SPLIT.jsonl)" in message


@pytest.mark.parametrize(
    ("folder", "split", "message"),
    [
        ("nowhere", None, "nowhere is no folder"),
        ("", "dev", "set has no split 'dev' (it has broken, empty, test)"),
        ("", "broken", "broken.jsonl is empty or not valid json (JSON parse error"),
        ("", "empty", "empty.jsonl is empty or not valid json ("),
    ],
)
def test_bad_local_data(tmp_path, folder, split, message):
    write(tmp_path, "set", rows=({"a": 1},), test=1)
    (tmp_path / "set" / "empty.jsonl").touch()
    (tmp_path / "set" / "broken.jsonl").write_text('{"a": 1\n{')
    with pytest.raises(ValueError) as caught:
        load("owner/set", None, "set", str(tmp_path / folder), split=split)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Tasks


def test_task_without_examples_needs_no_split_but_its_own(tmp_path):
    write(tmp_path, test=3)
    found = task({"data": str(tmp_path)}, num_fewshot=0)
    assert len(found.eval_docs) == 3 and found.fewshot_docs() is None
    assert found.fewshot_context(ROW, 0) == "Question: What is it?\nAnswer:"


def test_task_with_examples(tmp_path):
    write(tmp_path, train=3, test=1)
    found = task({"data": str(tmp_path)}, num_fewshot=2)
    found.set_fewshot_seed(0)
    assert found.fewshot_context(ROW, 2).count("Answer: that\n\n") == 2


def test_options_of_the_data_set_are_handed_on(monkeypatch, tmp_path):
    write(tmp_path, test=1)
    local, asked = load("owner/set", None, "arc_easy", str(tmp_path)), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or local)
    task({}, num_fewshot=0, dataset_kwargs={"revision": "x", "trust_remote_code": True})
    assert asked == [(("allenai/ai2_arc", "ARC-Easy"), {"revision": "x"})]


@pytest.mark.parametrize(
    ("splits", "num_fewshot", "message"),
    [
        ({"train": 3}, 0, "arc_easy has no split 'test' (it has train)"),
        ({"test": 3}, 2, "arc_easy has no split 'train' (it has test)"),
        # With none said here, --num_fewshot may still ask for examples.
        ({"test": 3}, None, "arc_easy has no split 'train' (it has test)"),
        ({"train": 3, "test": 3}, 5, "5 examples are to be shown, but its split 'train' has 3"),
    ],
)
def test_task_on_bad_local_data(tmp_path, splits, num_fewshot, message):
    write(tmp_path, **splits)
    with pytest.raises(ValueError) as caught:
        task({"data": str(tmp_path)}, num_fewshot=num_fewshot)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "mend"), [("dta", "did you mean 'data'?"), ("colour", "this task's settings are data")]
)
def test_unknown_metadata(monkeypatch, tmp_path, key, mend):
    monkeypatch.setattr(registration, "given_metadata", frozenset([key]))
    write(tmp_path, test=1)
    with pytest.raises(ValueError, match=f"metadata '{key}' is unknown") as caught:
        task({"data": str(tmp_path), key: 1}, num_fewshot=0)
    assert mend in str(caught.value)
