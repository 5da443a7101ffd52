"""Commands in the documents: all are understood, and those that are quick print what is shown."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from doctest import ELLIPSIS, DocTestParser, DocTestRunner, OutputChecker
from inspect import signature
from pathlib import Path
from shutil import copytree

import lm_eval.tasks
import pytest
from lm_eval._cli.harness import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from made_results import needle_results, write
from tokenizers import Tokenizer
from tokenizers.models import BPE

from yoco_eval import cli, registration
from yoco_eval.lm import YocoLM
from yoco_eval.model.checkpoint import DEFAULT_CHECKPOINT
from yoco_eval.tasks.settings import NAMES

ROOT = Path(__file__).parent.parent
PAGES = sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
TASKS = {
    name
    for path in ROOT.glob("tasks/*.yaml")
    for name in re.findall(r"^(?:task|group): (\w+)$", path.read_text(), re.MULTILINE)
}
LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent


@dataclass
class Command:
    """A command of one program, whose words are those after the program's name."""

    document: str
    words: list[str]
    output: str

    def __str__(self):
        return f"{self.document}: {' '.join(self.words)}"


def fences(language, document):
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(program, documents=DOCUMENTS):
    """Those of a program, also where another one starts it, in the order of the documents."""
    for document in documents:
        for block in fences("console", document):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, output = _split(part)
                words = shlex.split(command.replace("\\\n", " "), comments=True)
                if program in words:
                    own = words[words.index(program) + 1 :]
                    yield Command(document, [word for word in own if word != "..."], output)


def _split(part):
    """A command and what it prints; of a loop, the command of its first turn."""
    if loop := re.match(r"for (\w+) in (\S+).*?; do\n(.*?)\n *done\n", part, re.DOTALL):
        name, first, body = loop.groups()
        return body.replace(f"${name}", first), part[loop.end() :]
    line = re.match(r"(?:.*\\\n)*.*\n", part)
    return line[0], part[line.end() :]


def check_output(want, got):
    """Lines without what is at their ends; "..." stands for any text."""
    want, got = ("\n".join(map(str.rstrip, text.splitlines())) + "\n" for text in (want, got))
    assert OutputChecker().check_output(want, got, ELLIPSIS), got


@pytest.mark.parametrize("command", list(commands("yoco-eval")), ids=str)
def test_yoco_eval_takes_arguments(command):
    assert cli._parser().parse_args(command.words).run


@pytest.mark.parametrize("command", list(commands("lm_eval")), ids=str)
def test_lm_eval_takes_arguments(command, monkeypatch):
    monkeypatch.setattr(registration, "given_metadata", frozenset())  # set by what follows
    monkeypatch.setattr(registration, "given_model_args", frozenset())
    given = HarnessCLI()._parser.parse_args(["run", *command.words])
    given.tasks = given.tasks or ["yoco_needle"]  # where they are left to the reader
    config = EvaluatorConfig.from_cli(given)
    for task in config.tasks:
        assert task in TASKS or next(LM_EVAL_TASKS.rglob(f"{task}.yaml"), None), task
    assert registration.given_metadata <= NAMES
    if config.model == "yoco":
        assert registration.given_model_args <= signature(YocoLM).parameters.keys()


def test_tasks_have_rows():
    """Each in the list of docs/tasks.md and README's, or the group or family that it belongs to."""
    for document in ("README.md", "docs/tasks.md"):
        rows = re.findall(r"^\| \[?(`yoco_.*?)\|", (ROOT / document).read_text(), re.MULTILINE)
        named = {name for row in rows for name in re.findall(r"`(yoco_\w+)`", row)}
        named.add("yoco_needle")  # README's paragraph above its list is about it
        members = {name for name in TASKS if re.sub(r"_(\d+|n)$", "", name) in named}
        assert TASKS == named | members, document


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Results and a checkpoint as README's commands find them."""

    def demo_4k(length, depth):
        beyond = {0.7: 0.75, 0.8: 1.0, 0.9: 1.0, 1.0: 1.0}
        return 1.0 if length < 16384 else beyond.get(depth, 0.0)

    for name, accuracy in {"demo-4k": demo_4k, "demo-1m": lambda length, depth: 1.0}.items():
        date = datetime(2026, 11, 29, 12).timestamp()
        grid = {"lengths": [1024, 4096, 16384], "samples": 4, "draws": 2, "date": date}
        write(tmp_path / "results" / "demo" / name, needle_results(accuracy, name, **grid))
    copytree(ROOT / "tests/data/published/gated_retention", tmp_path / "YOCO-3B-1M")
    letters = {chr(32 + i): i for i in range(94)}
    tokenizer = Tokenizer(BPE({**letters, "<s>": 94, "</s>": 95}, []))
    tokenizer.save(str(tmp_path / "YOCO-3B-1M" / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)


RUN = "results/yoco"  # what README's evaluation of needles leaves
SHOWN = [
    each
    for each in commands("yoco-eval", ["README.md", "docs/scaling.md"])
    if each.output and RUN not in each.words
]


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_yoco_eval_prints_what_is_shown(command, folders, capsys):
    assert cli.main(command.words) == 0
    check_output(command.output, capsys.readouterr().out)


@pytest.mark.slow
def test_needles(tmp_path, monkeypatch, capsys):
    """The evaluation and its heatmaps, as whoever reads README first runs them."""
    monkeypatch.chdir(tmp_path)
    (evaluation,) = (each for each in commands("lm_eval", ["README.md"]) if RUN in each.words)
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", *evaluation.words, "--log_samples"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert evaluation.output in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 120
    (file,) = Path(RUN).rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["pretrained"] == DEFAULT_CHECKPOINT
    for command in (each for each in commands("yoco-eval", ["README.md"]) if RUN in each.words):
        assert cli.main(command.words) == 0
        check_output(command.output, capsys.readouterr().out)
    assert Path("results/needle.png").read_bytes().startswith(b"\x89PNG")


def test_python():
    text = "\n".join(fences("pycon", "README.md"))
    example = DocTestParser().get_doctest(text, {}, "README.md", None, None)
    assert DocTestRunner().run(example).failed == 0
