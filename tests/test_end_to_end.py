"""Whole commands as users type them: evaluation, heatmap, resumption after a kill, bad input."""

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks._index import TaskIndex
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.utils import collect_env
from transformers import LlamaConfig, LlamaForCausalLM

import yoco_eval.tasks
from yoco_eval.cli import main
from yoco_eval.model import Yoco
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT
from yoco_eval.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow  # each start of lm_eval takes many seconds

GRID = {"context_lengths": [512, "1k"], "depths": 3, "samples": 1}


def command(*arguments, grid=GRID, model="yoco", tasks="yoco_needle"):
    metadata = json.dumps(grid)
    return [
        sys.executable, "-m", "lm_eval", "--model", model, "--tasks", tasks,
        "--metadata", metadata, *map(str, arguments),
    ]  # fmt: skip


def environment():
    quick = {"PYTHONPATH": str(Path(__file__).parent / "yoco_eval" / "launched"), "ALONE": "1"}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **quick}


def run_lm_eval(*arguments, **settings):
    return subprocess.run(
        command(*arguments, **settings), env=environment(), capture_output=True, text=True
    )


def results(folder: Path):
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def cells(folder, tmp_path, capsys):
    assert main(["heatmap", str(folder), "-o", str(tmp_path / "cells.csv")]) == 0
    with open(tmp_path / "cells.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def quick():
    """lm-eval reads two folders of tasks instead of all, and does not ask pip what is installed."""
    ours, theirs = (Path(module.__file__).parent for module in (yoco_eval.tasks, lm_eval.tasks))
    build = TaskIndex.build

    def build_few(paths, **options):
        assert paths == [theirs]
        return build([ours, theirs / "ruler"], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_few))
        patch.setattr(collect_env, "get_pip_packages", lambda *_: ("pip", ""))
        yield


def test_killed_run_resumes(tmp_path, monkeypatch, quick, capfd):
    """Killed in the middle, a run goes on where its cache ends, to the same figures."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", command(*arguments, grid=grid)[2:])
        cli_evaluate()

    grid = {"context_lengths": ["4k"], "depths": 5, "samples": 2}
    cache = tmp_path / "cache" / "needle"
    arguments = ("--use_cache", cache, "--model_args", "prefill_chunk=64")
    killed = subprocess.Popen(
        command(*arguments, grid=grid), env=environment(), stderr=subprocess.DEVNULL
    )
    database, deadline = Path(f"{cache}_rank0.db"), time.monotonic() + 120
    while stored(database) < 2 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = stored(database)
    assert 2 <= kept < 10

    run(*arguments, "--output_path", tmp_path / "resumed")
    assert f"Cached requests: {kept}, Requests remaining: {10 - kept}" in "".join(
        capfd.readouterr()
    )
    run("--output_path", tmp_path / "undisturbed", "--model_args", "prefill_chunk=64")
    a, b = results(tmp_path / "resumed"), results(tmp_path / "undisturbed")
    assert a["results"] == b["results"]
    assert (
        a["configs"]["yoco_needle"]["metadata"]["cells"]
        == b["configs"]["yoco_needle"]["metadata"]["cells"]
    )


def stored(database: Path) -> int:
    """Responses in the cache; its other entries say which model's they are."""
    if not database.exists():
        return 0
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        count = "SELECT count(*) FROM unnamed WHERE key NOT LIKE 'yoco_eval%'"
        return connection.execute(count).fetchone()[0]
    except sqlite3.OperationalError:  # not a table yet
        return 0
    finally:
        connection.close()


def test_hugging_face_model(tmp_path, capsys, monkeypatch, quick):
    """Another backend, on this project's task and on one of lm-eval's own RULER tasks."""
    load_tokenizer(BUNDLED / DEFAULT_CHECKPOINT).save_pretrained(tmp_path / "llama")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8192,
        )
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    results = tmp_path / "results"
    arguments = command(
        "--model_args", f"pretrained={tmp_path / 'llama'}", "--output_path", results,
        "--device", "cpu", "--limit", "6", model="hf", tasks="yoco_needle,niah_single_1",
        grid={"max_seq_lengths": [4096, 8192], "depths": 3, "samples": 1},
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments[2:])
    cli_evaluate()
    capsys.readouterr()
    rows = cells(results, tmp_path, capsys)
    assert len(rows) == 6 and {row["model"] for row in rows} == {"llama"}

    outputs = [str(tmp_path / f"report.{kind}") for kind in ("html", "png", "csv")]
    assert main(["compare", str(results), *(x for path in outputs for x in ("-o", path))]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["4K", "0.00", "0.00–0.56"] in lines  # needles
    assert ["context", "niah_single_1"] in lines and ["4K", "0.000"] in lines
    with open(tmp_path / "report.csv") as file:
        found = {(row["kind"], row["task"]) for row in csv.DictReader(file)}
    assert {("by length", "niah_single_1"), ("cell", "yoco_needle")} <= found


def test_errors_are_the_last_line():
    run = run_lm_eval(grid={**GRID, "colour": "blue"})
    assert run.returncode != 0
    assert "metadata 'colour' is unknown; this task's" in run.stderr.splitlines()[-1]


@pytest.fixture
def bad(tmp_path):
    """Checkpoints with one fault each, and an empty haystack."""
    published = Path(__file__).parent / "data" / "published" / "gated_retention"
    weights = torch.load(published / "checkpoint.pth", weights_only=True)
    for name in ("bomb", "truncated", "vocabulary"):
        shutil.copytree(published, tmp_path / name)
    # Weights are read last: before, there must be a tokenizer that fits.
    letters = {chr(32 + i): i for i in range(94)}
    tokenizer = Tokenizer(BPE({**letters, "<s>": 94, "</s>": 95}, []))
    for name in ("bomb", "truncated"):
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    torch.save({**weights, "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "bomb/checkpoint.pth")
    whole = (published / "checkpoint.pth").read_bytes()
    (tmp_path / "truncated/checkpoint.pth").write_bytes(whole[:-5000])
    (tmp_path / "neither").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    yield tmp_path
    assert not (tmp_path / "exploded").exists()


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    ("arguments", "grid", "message"),
    [
        ("pretrained=/nowhere", {}, "/nowhere: no such checkpoint"),
        ("pretrained={bad}/neither", {}, "neither: holds no checkpoint; expected"),
        ("pretrained={bad}/bomb", {}, "refused, its pickle asks for posix.mkdir"),
        ("pretrained={bad}/truncated", {}, "truncated/checkpoint.pth: damaged or truncated"),
        (
            f"pretrained={{bad}}/vocabulary,tokenizer={BUNDLED / DEFAULT_CHECKPOINT}", {},
            "2048 token ids exceed the model's vocabulary of 96; use the tokenizer",
        ),
        ("pretrain=demo-64k", {}, "unknown model argument pretrain; --model yoco takes"),
        ("", {"context_lengths": ["2m"]}, "2097152 exceeds 1048576 tokens, beyond which the"),
        ("", {"context_lengths": ["long"]}, "'long' is not a length; write 65536, 64k or 1m"),
        ("", {"depths": [0.5, 1.5]}, "depths: 1.5 is not within 0 and 1; give"),
        ("", {"haystack": "{bad}/empty.txt"}, "is empty; give a file or folder with text"),
        ("", {"sample": 3}, "'sample' is unknown; did you mean 'samples'?"),
    ],
)  # fmt: skip
def test_bad_input(bad, quick, monkeypatch, arguments, grid, message):
    """Refused in one line, before anything is computed."""
    grid = {k: v.format(bad=bad) if isinstance(v, str) else v for k, v in {**GRID, **grid}.items()}
    given = ["--model_args", arguments.format(bad=bad)] if arguments else []
    monkeypatch.setattr(sys, "argv", command(*given, grid=grid)[2:])
    monkeypatch.setattr(Yoco, "prefill", None)
    with pytest.raises(ValueError) as caught:
        cli_evaluate()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{bad}/bomb", "{bad}/out"], "refused, its pickle asks for posix.mkdir"),
        (["convert", "{bad}/truncated", "{bad}/out"], "damaged or truncated"),
        (["convert", "{bad}/vocabulary", "{bad}/out"], "no tokenizer in this folder"),
        (["heatmap", "{bad}"], "not a results file of lm-eval); make some with lm_eval"),
    ],
)
def test_bad_input_of_the_command_line(bad, capsys, arguments, message):
    assert main([argument.format(bad=bad) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("yoco-eval: error: ")
