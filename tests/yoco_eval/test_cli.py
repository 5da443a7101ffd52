"""The command line: what it prints, what it returns, and how it refuses."""

import json
import subprocess
import sys
import types

import pytest

from yoco_eval import __version__
from yoco_eval.cli import main
from yoco_eval.model.checkpoint import CheckpointError
from yoco_eval.tokenizers import TokenizerError


@pytest.fixture
def results(tmp_path):
    """A folder with one run's results."""
    cells = [
        {"context_length": n, "depth": depth, "samples": 5, "correct": 4}
        for n in (4096, 65536)
        for depth in (0.0, 1.0)
    ]
    folder = tmp_path / "results"
    write_results(folder / "org__small", cells)
    return folder


def write_results(folder, cells, date=1.7e9, name="results_1.json"):
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "config": {"model": "hf", "model_args": {"pretrained": "org/small"}},
        "configs": {"yoco_needle": {"metadata": {"cells": cells}}},
        "date": date,
    }
    (folder / name).write_text(json.dumps(data))


@pytest.fixture
def convert(monkeypatch):
    """Stands in for the conversion, and records its calls."""
    calls = []

    def record(src, dst, tokenizer=None, max_length=None, dtype=None):
        calls.append((src, dst, tokenizer, max_length, dtype))
        if isinstance(src, str) and src in errors:
            raise errors[src]

    errors = {
        "bad": CheckpointError("bad: tensors missing:\na\nb"),
        "words": TokenizerError("words: too many"),
        "full": OSError(28, "No space left on device", "out/config.json"),
        "stop": KeyboardInterrupt(),
    }
    module = types.ModuleType("yoco_eval.convert")
    module.convert = record
    monkeypatch.setitem(sys.modules, "yoco_eval.convert", module)
    return calls


def refused(capsys, *argv):
    """The one line with which `argv` is refused."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("yoco-eval: error: ") and err.count("\n") == 1
    return err.removeprefix("yoco-eval: error: ").strip()


def test_heatmap_in_the_terminal(results, capsys):
    assert main(["heatmap", str(results)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[3:] == [
        "depth    4K   64K ",
        "  0 %   0.8   0.8 ",
        "100 %   0.8   0.8 ",
    ]
    assert not err


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("csv", b"m")]
)
def test_heatmap_to_a_file(results, tmp_path, capsys, suffix, magic):
    file = tmp_path / f"needle.{suffix}"
    assert main(["heatmap", str(results), "-o", str(file), "--title", "Mine"]) == 0
    assert file.read_bytes().startswith(magic)
    out, err = capsys.readouterr()
    assert out.startswith("wrote ") and out.endswith(f"{suffix}\n") and err == ""


def test_notes_go_to_stderr(results, capsys):
    write_results(results / "org__small", [], date=1, name="results_0.json")
    (results / "results_2.json").write_text("{")
    assert main(["heatmap", str(results)]) == 0
    skipped, newest = capsys.readouterr().err.splitlines()
    assert skipped.startswith(f"yoco-eval: skipped {results / 'results_2.json'}: not readable")
    assert newest.startswith(f"yoco-eval: reading {results / 'org__small' / 'results_1.json'}")


def test_heatmap_refusals(results, tmp_path, capsys):
    assert "no such file or folder" in refused(capsys, "heatmap", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    message = refused(capsys, "heatmap", tmp_path / "empty")
    assert message.startswith(f"{tmp_path / 'empty'}: no needle results")
    assert "--tasks yoco_needle --output_path" in message
    assert "unknown suffix '.gif'" in refused(capsys, "heatmap", results, "-o", "a.gif")
    # The output is looked at first: reading the results may take long.
    assert "no such folder" in refused(capsys, "heatmap", tmp_path, "-o", tmp_path / "no" / "a.png")
    assert "no needle task 'x'" in refused(capsys, "heatmap", results, "--task", "x")


def test_convert(convert, capsys):
    assert main(["convert", "a", "b"]) == 0
    assert capsys.readouterr().out == "wrote b\n"
    argv = "convert a b --tokenizer t.model --max-length 64k --dtype bfloat16".split()
    assert main(argv) == 0
    assert convert == [
        ("a", "b", None, None, None),
        ("a", "b", "t.model", 65536, "bfloat16"),
    ]


def test_convert_refusals(convert, capsys):
    assert refused(capsys, "convert", "bad", "b") == "bad: tensors missing:; a; b"
    assert refused(capsys, "convert", "words", "b") == "words: too many"
    assert "No space left on device: 'out/config.json'" in refused(capsys, "convert", "full", "b")


def test_interrupted(convert):
    assert main(["convert", "stop", "b"]) == 130


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["convert", "a", "b", "--max-length", "many"], "'many' is not a length"),
        (["convert", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert", "a"], "DST"),
        ([], "COMMAND"),
    ],
)
def test_usage_errors(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_help_and_version(capsys):
    for argv, said in [
        (["--version"], f"yoco-eval {__version__}\n"),
        (["--help"], "lm_eval --model yoco --tasks yoco_needle"),
        (["heatmap", "--help"], "yoco-eval heatmap results/ -o needle.png"),
        (["convert", "--help"], "yoco-eval convert YOCO-3B-1M/ yoco-3b-1m/"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and said in out
        assert max(map(len, out.splitlines())) <= 80


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from yoco_eval.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'matplotlib', 'rich', 'lm_eval', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
