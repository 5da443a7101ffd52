"""A task is a module and a YAML file, the one in docs/architecture.md: then it is in reports."""

import re
import sys
from pathlib import Path

import pytest
import toy_task
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from yoco_eval.cli import main
from yoco_eval.tasks.evaluated_model import load_tokenizer

RECIPE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates a model on the task, and gives the folder of the results."""
    monkeypatch.setitem(sys.modules, "yoco_eval.tasks.counting", toy_task)
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", RECIPE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "counting.yaml").write_text(yaml)

    def evaluate(model, name, **metadata):
        tracker = EvaluationTracker(output_path=str(tmp_path / name))
        metadata = {"pretrained": "demo-1m", "context_lengths": ["512", "1k"], **metadata}
        manager = TaskManager(
            include_path=tmp_path / "tasks", include_defaults=False, metadata=metadata
        )
        results = simple_evaluate(
            model, tasks=["yoco_counting"], task_manager=manager, evaluation_tracker=tracker
        )
        tracker.save_results_aggregated(results, samples=None)
        return tmp_path / name

    return evaluate


def test_a_task_is_in_reports(evaluate, answerer, capsys):
    tokenizer = load_tokenizer({"pretrained": "demo-1m"})

    def bells(prompt):
        assert prompt.endswith(".\n\nHow many bells are there? There are")
        return f" {prompt.count('The bell of Oslo rings.')} bells"

    right, wrong = answerer(bells), answerer(lambda prompt: " 10 bells")
    folders = [evaluate(model, name) for name, model in {"a": right, "b": wrong}.items()]
    tokens = [len(tokenizer(prompt).input_ids) for prompt in right.asked]
    assert all(400 < n <= 512 - 16 for n in tokens[:4])
    assert all(900 < n <= 1024 - 16 for n in tokens[4:])
    assert right.asked == wrong.asked and len(set(right.asked)) == 8
    assert main(["compare", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert "yoco_counting: accuracy\ncontext      a      b\n512      1.000  0.000\n" in out


def test_settings_that_differ_are_told(evaluate, answerer, capsys):
    model = answerer(lambda prompt: " 3")
    small = {"context_lengths": 512, "samples": 1}
    folders = [evaluate(model, "a", **small), evaluate(model, "b", seed=1, **small)]
    assert main(["compare", *map(str, folders)]) == 0
    assert "- seed (yoco_counting): a 0, b 1\n" in capsys.readouterr().out
