"""Blocks for model cards: as the hub's own library reads them, and as people do."""

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from made_results import needle_results, of_cache, results, trained_to, write

from yoco_eval.cli import main
from yoco_eval.reports.comparison import compare
from yoco_eval.reports.model_card import model_card, model_index
from yoco_eval.reports.runs import load_checkpoints

GRID = {"lengths": [4096, 8192], "depths": [0, 0.5, 1], "samples": 15}
HOSTILE = "a: [b]\n---\n# {c} | <script>\x1b[31m'\""


def write_model(folder, limit=4096):
    write(folder, needle_results(trained_to(limit), **GRID))
    scores = {
        "arc_easy": {"acc,none": 2 / 3, "acc_stderr,none": 0.0123},
        "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01},
        "yoco_ruler": {"acc@0004096,none": 0.9, "acc@0008192,none": 0.8},
    }
    data = results(scores, shots=5)
    data["configs"]["arc_easy"] |= {
        "dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy", "test_split": "test",
    }  # fmt: skip
    write(folder, data, "results_2.json")
    return folder


def read(text):
    """The index, and its entries as the library reads them, by model."""
    _, front, _ = text.split("---\n", 2)
    index = yaml.safe_load(front)["model-index"]
    return index, dict(model_index_to_eval_results([entry]) for entry in index)


def test_results_are_in_the_index(tmp_path):
    folder = write_model(tmp_path / "small")
    assert main(["compare", str(folder), "-o", str(tmp_path / "card.md")]) == 0
    text = (tmp_path / "card.md").read_text()
    index, found = read(text)
    by_task = {}
    for one in found["small"]:
        by_task.setdefault(one.dataset_name, []).append(one)
        assert one.task_type == "text-generation"
        assert one.source_name == "lm-evaluation-harness 0.4.13"
    assert list(by_task) == ["yoco_needle", "gsm8k", "arc_easy", "yoco_ruler"]
    needle = {one.metric_name: one.metric_value for one in by_task["yoco_needle"]}
    assert needle["accuracy at 4K tokens"] == 1.0 and 0 < needle["accuracy at 8K tokens"] < 0.9
    name = "effective context length in tokens, above 0.9 with 95 % confidence"
    assert needle[name] == 4096
    settings = by_task["yoco_needle"][0].dataset_args
    assert settings == {"haystack": "synthetic", "depths": "0, 50, 100 %", "samples": 15, "seed": 0}
    (arc,) = by_task["arc_easy"]
    assert (arc.dataset_type, arc.dataset_config, arc.dataset_split, arc.dataset_args) == (
        "allenai/ai2_arc", "ARC-Easy", "test", {"num_few_shot": 5},
    )  # fmt: skip
    assert (arc.metric_type, arc.metric_name, arc.metric_value) == ("acc", "accuracy", 0.666667)
    (gsm8k,) = by_task["gsm8k"]
    assert (gsm8k.metric_type, gsm8k.metric_name) == ("exact_match", "exact_match,strict-match")
    ruler = {one.metric_name: one.metric_value for one in by_task["yoco_ruler"]}
    assert ruler["accuracy at 8K tokens"] == 0.8
    assert ruler["effective context length in tokens, by RULER's rule"] == 4096
    # A task is a result with several metrics, not several results.
    assert [len(result["metrics"]) for result in index[0]["results"]] == [4, 1, 1, 3]


def test_an_effective_length_that_nothing_tells_is_left_out(tmp_path):
    """Two prompts of a depth, all right, are too few for any; two that are wrong are enough."""
    for name, right, told in (("right", 1.0, None), ("wrong", 0.0, 0)):
        write(tmp_path / name, needle_results(lambda *_, right=right: right, samples=2))
        [entry] = model_index(compare(load_checkpoints([tmp_path / name])))
        values = {m["type"]: m["value"] for one in entry["results"] for m in one["metrics"]}
        assert values.get("effective_context_length") == told and values["acc"] == right
    cut = results({"yoco_ruler": {"acc@0008192,none": 0.1}}) | {"max_length": 4096}
    write(tmp_path / "cut", cut)
    text = model_card(compare(load_checkpoints([tmp_path / "cut"])))
    assert "accuracy at 8K tokens" in text and "type: effective_context_length" not in text


def test_what_is_read_of_a_cache_is_told_with_every_score(tmp_path):
    for name, settings in (("a", {"sparse": 64, "cache_dtype": "fp8"}), ("b", {})):
        write(tmp_path / name, of_cache(needle_results(trained_to(4096), **GRID), **settings))
        arc = results({"arc_easy": {"acc,none": 0.5}})
        write(tmp_path / name, of_cache(arc, **settings), "results_2.json")
    alone = model_card(compare(load_checkpoints([tmp_path / "a"])))
    assert "- sparse: 64\n- cache\\_dtype: fp8\n- dtype: float32" in alone
    both = model_card(compare(load_checkpoints([tmp_path / "a", tmp_path / "b"])))
    assert "- a: lm_eval --model yoco, sparse=64, cache\\_dtype=fp8, 20" in both
    assert "- b: lm_eval --model yoco, 20" in both
    _, found = read(both)
    assert {(one.dataset_args.get("sparse"), one.dataset_args.get("cache_dtype"))
            for one in found["a"]} == {(64, "fp8")}  # fmt: skip
    assert not any({"sparse", "cache_dtype"} & one.dataset_args.keys() for one in found["b"])


def test_the_library_takes_it_for_a_card(tmp_path):
    card = ModelCard(model_card(compare(load_checkpoints([write_model(tmp_path / "small")]))))
    assert card.data.model_name == "small" and len(card.data.eval_results) == 9
    assert "| effective | 4K |" in card.text
    assert "| arc\\_easy, 5-shot acc | 0.667 ±0.012 |" in card.text
    assert "- seed: 0 (yoco\\_needle)" in card.text


def test_every_model_has_an_entry(tmp_path):
    folders = [write_model(tmp_path / name, limit) for name, limit in (("a", 0), ("b", 8192))]
    text = model_card(compare(load_checkpoints(folders)))
    _, found = read(text)
    assert list(found) == ["a", "b"]
    effective = {
        name: [one.metric_value for one in ones if one.metric_type == "effective_context_length"]
        for name, ones in found.items()
    }
    assert effective == {"a": [0, 4096], "b": [8192, 4096]}
    assert "| effective | none | 8K |" in text


def test_hostile_names(tmp_path):
    data = needle_results(trained_to(4096), task=HOSTILE, **GRID)
    data["results"][f"t{HOSTILE}"] = {f"m{HOSTILE},none": 0.5}
    data["configs"][HOSTILE] |= {"dataset_path": HOSTILE, "dataset_name": [HOSTILE]}
    data["lm_eval_version"] = HOSTILE
    write(tmp_path / "a", data)
    text = model_card(compare(load_checkpoints([tmp_path / "a"], [HOSTILE])))
    _, (name, *_) = read(text)
    assert "\n" not in name and "\x1b" not in text and "<script" not in text.split("---\n", 2)[2]


@pytest.mark.parametrize(("name", "card"), [("card.md", True), ("Model-Card.MD", True),
                                            ("report.md", False), ("cards.md", False)])  # fmt: skip
def test_the_name_of_the_file_decides(tmp_path, name, card, capsys):
    folder = write_model(tmp_path / "small")
    assert main(["compare", str(folder), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_text().startswith("---\nmodel-index:" if card else "# small\n")
