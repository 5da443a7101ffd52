"""Whole commands as users type them: evaluation, heatmap, resumption after a kill, bad input."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from yoco_eval.cli import main
from yoco_eval.model.checkpoint import BUNDLED, DEFAULT_CHECKPOINT
from yoco_eval.tokenizers import load_tokenizer

GRID = {"context_lengths": [512, "1k"], "depths": 3, "samples": 1}


def command(*arguments, grid=GRID, model="yoco"):
    metadata = json.dumps(grid)
    return [
        sys.executable, "-m", "lm_eval", "--model", model, "--tasks", "yoco_needle",
        "--metadata", metadata, *map(str, arguments),
    ]  # fmt: skip


def environment():
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def lm_eval(*arguments, **settings):
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


def test_demo(tmp_path, capsys):
    run = lm_eval("--output_path", tmp_path / "results", "--log_samples")
    assert run.returncode == 0, run.stderr
    assert "acc@0000512" in run.stdout and "acc@0001024" in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 120
    found = results(tmp_path / "results")
    assert found["results"]["yoco_needle"]["acc,none"] == 1.0
    assert found["config"]["pretrained"] == DEFAULT_CHECKPOINT
    rows = cells(tmp_path / "results", tmp_path, capsys)
    assert [(row["context_length"], row["depth"], row["accuracy"]) for row in rows] == [
        (str(length), str(depth), "1.0") for length in (512, 1024) for depth in (0.0, 0.5, 1.0)
    ]
    assert {row["model"] for row in rows} == {DEFAULT_CHECKPOINT}
    assert main(["heatmap", str(tmp_path / "results"), "-o", str(tmp_path / "needle.png")]) == 0
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_killed_run_resumes(tmp_path):
    """Killed in the middle, a run goes on where its cache ends, to the same figures."""
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

    resumed = lm_eval(*arguments, "--output_path", tmp_path / "resumed", grid=grid)
    assert f"Cached requests: {kept}, Requests remaining: {10 - kept}" in resumed.stderr
    undisturbed = lm_eval(
        "--output_path", tmp_path / "undisturbed", "--model_args", "prefill_chunk=64", grid=grid
    )
    assert resumed.returncode == undisturbed.returncode == 0
    a, b = results(tmp_path / "resumed"), results(tmp_path / "undisturbed")
    assert a["results"] == b["results"]
    assert (
        a["configs"]["yoco_needle"]["metadata"]["cells"]
        == b["configs"]["yoco_needle"]["metadata"]["cells"]
    )


def stored(database: Path) -> int:
    if not database.exists():
        return 0
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        return connection.execute("SELECT count(*) FROM unnamed").fetchone()[0]
    except sqlite3.OperationalError:  # not a table yet
        return 0
    finally:
        connection.close()


def test_hugging_face_model(tmp_path, capsys):
    tokenizer = load_tokenizer(BUNDLED / DEFAULT_CHECKPOINT)
    tokenizer.save_pretrained(tmp_path / "llama")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=2048,
        )
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    run = lm_eval(
        "--model_args", f"pretrained={tmp_path / 'llama'}", "--output_path", tmp_path / "results",
        "--device", "cpu", model="hf",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = cells(tmp_path / "results", tmp_path, capsys)
    assert len(rows) == 6 and {row["model"] for row in rows} == {"llama"}


@pytest.mark.parametrize(
    ("arguments", "grid", "message"),
    [
        (["--model_args", "pretrained=/nowhere"], GRID, "/nowhere: no such checkpoint"),
        ([], {"context_lengths": ["128k"]}, "65536"),
    ],
)
def test_errors_are_the_last_line(arguments, grid, message):
    run = lm_eval(*arguments, grid=grid)
    assert run.returncode != 0
    assert message in run.stderr.splitlines()[-1]
