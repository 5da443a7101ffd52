"""The published rows: their schema, their averages, the names they are filed under."""

from pathlib import Path
from statistics import mean

import lm_eval.tasks
import pytest
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

import yoco_eval.tasks
from yoco_eval.tasks.published import published_rows

TASKS = Path(yoco_eval.tasks.__file__).parent
ZERO_SHOT = load_yaml(TASKS / "zero_shot.yaml", resolve_func=False)
ROWS = published_rows()


def label(row):
    return f"{row['model']} {row.get('training_tokens', '')}".strip()


def of(task):
    return {label(row): row["scores"][task] for row in ROWS if task in row["scores"]}


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_schema(row):
    assert {"model", "source", "scores"} <= set(row)
    optional = {"training_tokens", "context_length", "differs"}
    assert set(row) <= {"model", "source", "scores", *optional}
    for key in ("training_tokens", "context_length"):
        assert isinstance(row.get(key, 0), int)
    sources = ("arXiv:2405.05254, Table ", "README.md", "model card")
    assert any(source in row["source"] for source in sources)
    for metrics in row["scores"].values():
        for metric, value in metrics.items():
            assert isinstance(metric, str) and isinstance(value, float) and 0 <= value <= 1


def test_models_of_each_table():
    assert set(of("arc_easy")) == {
        "OpenLLaMA-3B-v2 1000000000000",
        "StableLM-base-alpha-3B-v2 1000000000000",
        "StableLM-3B-4E1T 1000000000000",
        "StableLM-3B-4E1T 1600000000000",
        "YOCO-3B 1000000000000",
        "YOCO-3B 1600000000000",
        "YOCO-3B-1M",
    }
    for needles in (1, 2, 4, 8):
        assert set(of(f"yoco_multi_needle_{needles}")) == {
            "GPT-4-128K",
            "MiniCPM-128K",
            "ChatGLM3-128K",
            "YaRN-Mistral-128K",
            "LWM-1M-text",
            "YOCO-3B-1M",
        }


@pytest.mark.parametrize("row", [row for row in ROWS if "yoco_zero_shot" in row["scores"]])
def test_average_agrees_with_its_row(row):
    """To the rounding of the average."""
    members = {member["name"]: member["score"].split(",")[0] for member in ZERO_SHOT["members"]}
    average = mean(row["scores"][task][metric] for task, metric in members.items())
    assert row["scores"]["yoco_zero_shot"]["score"] == pytest.approx(average, abs=0.000501)


def test_figures_of_another_benchmark_say_so():
    assert of("yoco_mrcr_8")["Gemma 4 E2B"] == {"acc": 0.191}
    rows = [row for row in ROWS if "yoco_mrcr_8" in row["scores"]]
    assert len(rows) == 4 and all("Google's" in row["differs"] for row in rows)
    assert [row["differs"] for row in ROWS if "differs" in row] == [rows[0]["differs"]] * 4


def test_tasks_are_in_lm_evals_index():
    built_in = Path(lm_eval.tasks.__file__).parent
    index = TaskIndex.build([TASKS, *(built_in / folder for folder in ZERO_SHOT["folders"])])
    assert {task for row in ROWS for task in row["scores"]} <= set(index)


def test_long_context_rows_say_their_length():
    rows = [row for row in ROWS if any("needle" in task for task in row["scores"])]
    assert {row["context_length"] for row in rows} == {131072}
