"""The command line: what it prints, what it returns, and how it refuses."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from yoco_eval import __version__
from yoco_eval.cli import main
from yoco_eval.model.checkpoint import CheckpointError
from yoco_eval.model.shapes import SHAPES
from yoco_eval.reports.profile import Profile, ProfileRow, load_profile
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

    def record(src, dst, tokenizer=None, max_length=None, dtype=None, revision=None):
        calls.append((src, dst, tokenizer, max_length, dtype, revision))
        if isinstance(src, str) and src in errors:
            raise errors[src]

    errors = {
        "bad": CheckpointError("bad: tensors missing: a, b"),
        "words": TokenizerError("words:\ntoo\nmany"),
        "full": OSError(28, "No space left on device", "out/config.json"),
        "stop": KeyboardInterrupt(),
    }
    module = types.ModuleType("yoco_eval.convert")
    module.convert = record
    monkeypatch.setitem(sys.modules, "yoco_eval.convert", module)
    return calls


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the measurement, and records its calls."""
    calls = []

    def record(lengths, report, **settings):
        calls.append((lengths, settings))
        if settings["shape"] == "7b":
            raise module.ProfileError("shape '7b' is unknown")
        if settings["pretrained"] == "bad":
            raise CheckpointError("bad: damaged")
        row = ProfileRow("YOCO", lengths[0], "measured", 2**30, 2**20, 2**31, 1.5, 20.0)
        profile = Profile(
            "tiny", {"YOCO": {}}, "float32", "CPU", None, {"torch": "2"}, 64, 16, 120.0, 0, (row,)
        )
        if str(settings["pretrained"]).endswith("removed meanwhile"):
            Path(settings["pretrained"]).rmdir()
        if settings["shape"] == "stop at once":
            raise KeyboardInterrupt
        report(profile)
        if settings["shape"] == "stop":
            raise KeyboardInterrupt
        if settings["shape"] == "break":
            raise RuntimeError
        return profile

    module = types.ModuleType("yoco_eval.profiling")
    module.run_profile, module.ProfileError = record, type("ProfileError", (ValueError,), {})
    monkeypatch.setitem(sys.modules, "yoco_eval.profiling", module)
    return calls


def refused(capsys, *argv):
    """The one line with which `argv` is refused."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("yoco-eval: error: ") and err.count("\n") == 1
    return err.removeprefix("yoco-eval: error: ").strip()


def test_compare(results, tmp_path, capsys):
    cells = [
        {"context_length": n, "depth": 0.0, "samples": 40, "correct": 40} for n in (4096, 65536)
    ]
    write_results(tmp_path / "better", cells)
    files = [tmp_path / f"c.{suffix}" for suffix in ("md", "csv", "json", "tex")]
    argv = ["compare", str(results), str(tmp_path / "better"), "--names", "old, new"]
    assert main([*argv, "--published", "--threshold", "0.8", *(f"-o{file}" for file in files)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("DIFFERENCES\n")
    assert err == "yoco-eval: nothing was published of these tasks\n"
    assert ["context", "old", "new"] in [line.split() for line in out.splitlines()]
    assert ["effective", "none", "64K"] in [line.split() for line in out.splitlines()]
    assert out.endswith("".join(f"wrote {file}\n" for file in files))
    assert all(file.stat().st_size > 100 for file in files)


@pytest.mark.parametrize("stream", ["ascii", "full", "closed"])
def test_compare_writes_its_files_where_it_cannot_print(results, tmp_path, stream, monkeypatch):
    files = [tmp_path / "c.md", tmp_path / "c.json"]
    if stream == "ascii":
        raw = io.BytesIO()
    elif stream == "full":
        raw = open("/dev/full", "wb")  # noqa: SIM115
    else:
        end, other = os.pipe()
        os.close(end)
        raw = os.fdopen(other, "wb")
    out = io.TextIOWrapper(raw, "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    code = main(["compare", str(results), "--names", "Größe", *(f"-o{file}" for file in files)])
    assert code == {"ascii": 0, "full": 2, "closed": 141}[stream]
    assert all(file.stat().st_size > 100 for file in files)
    if stream == "ascii":
        text = raw.getvalue().decode()
        assert "Gr??e" in text and "0.80 0.49-0.94" in text and out.errors == "strict"
    out.close()


def test_a_file_that_cannot_be_written_keeps_no_other_from_it(results, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_results(tmp_path / "bench", [])
    data = json.loads((tmp_path / "bench" / "results_1.json").read_text())
    data |= {"configs": {"arc": {}}, "results": {"arc": {"acc,none": 0.5}}}
    (tmp_path / "bench" / "results_1.json").write_text(json.dumps(data))
    files = [tmp_path / "c.png", tmp_path / "c.md"]
    assert main(["compare", str(tmp_path / "bench"), *(f"-o{file}" for file in files)]) == 2
    out, err = capsys.readouterr()
    assert "BENCHMARKS" in out and out.endswith(f"wrote {files[1]}\n")
    assert "c.png: nothing to draw" in err and not files[0].exists() and files[1].exists()


def test_odd_names_are_shown_harmlessly(results, tmp_path, capsys):
    odd = "a\x1b[2J\n\udcff\u202e"
    (tmp_path / odd).mkdir()
    (tmp_path / odd / "results_2.json").write_text("{")
    for argv in (
        ["heatmap", tmp_path / odd],
        ["heatmap", tmp_path / f"{odd}.none"],
        ["heatmap", results, "-o", tmp_path / f"{odd}.csv"],
        ["heatmap", results, "--title", odd],
        ["heatmap", results, "--task", odd],
        ["compare", tmp_path / odd],
        ["compare", results, "--names", odd, "-o", tmp_path / f"{odd}.md"],
        ["plan", "--pretrained", tmp_path / odd, "--length", "1k"],
        ["profile", "--read", tmp_path / odd],
    ):
        main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert "\N{REPLACEMENT CHARACTER}" in out + err or "\\x1b" in out + err
        assert (out + err).replace("\n", "").isprintable()
        assert (out + err).encode()


@pytest.mark.parametrize(
    "argv", [["heatmap", "a", "\x1b[2J\n"], ["compare", "a", "-o\x1b", "--x\x1b"], ["\x1b"]]
)
def test_usage_errors_are_shown_harmlessly(argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert capsys.readouterr().err.replace("\n", "").isprintable()


def test_no_line_is_longer_than_a_screenful(results, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["heatmap", "a", "x" * 10**6])
    assert max(map(len, capsys.readouterr().err.splitlines())) <= 24 * 80
    write_results(tmp_path / "odd", [{"context_length": list(range(10**5)), "depth": 0}])
    message = refused(capsys, "heatmap", tmp_path / "odd")
    assert len(message) < 600 and message.endswith("run the evaluation again")


def test_compare_refusals(results, tmp_path, capsys):
    assert "none: no such file or folder" in refused(capsys, "compare", results, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "empty: no results in it; make" in refused(capsys, "compare", tmp_path / "empty")
    assert "2 given for 1 results" in refused(capsys, "compare", results, "--names", "a,b")
    assert "given twice" in refused(capsys, "compare", results, results)
    # The output is looked at first: reading the results may take long.
    message = refused(capsys, "compare", tmp_path / "none", "-o", "a.md", "-o", "a.doc")
    assert "unknown suffix '.doc'; use .html, .png, .svg, .pdf, .md, .csv, .json or .tex" in message


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
    skipped, older = capsys.readouterr().err.splitlines()
    assert skipped.startswith(f"yoco-eval: skipped {results / 'results_2.json'}: not readable")
    damaged = results / "org__small" / "results_0.json"
    assert older == f"yoco-eval: skipped {damaged}: task yoco_needle: its list of cells is empty"


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
    argv = "convert a b --tokenizer t.model --max-length 64k --dtype bfloat16 --revision c".split()
    assert main(argv) == 0
    assert convert == [
        ("a", "b", None, None, None, None),
        ("a", "b", "t.model", 65536, "bfloat16", "c"),
    ]


def test_convert_refusals(convert, capsys):
    assert refused(capsys, "convert", "bad", "b") == "bad: tensors missing: a, b"
    assert refused(capsys, "convert", "words", "b") == "words:; too; many"
    assert "No space left on device: 'out/config.json'" in refused(capsys, "convert", "full", "b")


@pytest.mark.slow
def test_profile(measured, tmp_path, capsys):
    argv = "profile --shape 3b --lengths 1k,...,4k --against transformer --patience 7".split()
    files = [tmp_path / f"p.{suffix}" for suffix in ("json", "png", "svg")]
    assert main([*argv, *(f"-o{file}" for file in files)]) == 0
    out, err = capsys.readouterr()
    assert err == "yoco-eval: YOCO, 1K tokens: prefill 1.50 s, decode 20.0 tokens/s\n"
    assert out.startswith("tiny\nCPU, float32, torch 2")
    assert out.endswith("".join(f"wrote {file}\n" for file in files))
    assert measured == [
        (
            [1024, 2048, 4096],
            {
                "shape": "3b",
                "pretrained": None,
                "revision": None,
                "sparse": None,
                "cache_dtype": None,
                "against": "transformer",
                "patience": 7.0,
                "dtype": "auto",
                "device": "auto",
            },
        )
    ]
    # The same again from the file, without measuring.
    files[1].unlink()
    assert main(["profile", "--read", str(files[0]), "-o", str(files[1])]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == out.splitlines()[:-3]
    assert files[1].exists() and len(measured) == 1


def test_profile_by_default(measured):
    argv = "profile --pretrained a --revision b --sparse 8 --dtype bfloat16 --device cuda:1"
    argv += " --cache-dtype fp8"
    assert main(argv.split()) == 0
    ((lengths, settings),) = measured
    assert lengths == [2**n for n in range(15, 21)]
    assert settings == {
        "shape": None,
        "pretrained": "a",
        "revision": "b",
        "sparse": 8,
        "cache_dtype": "fp8",
        "against": None,
        "patience": 120.0,
        "dtype": "bfloat16",
        "device": "cuda:1",
    }


@pytest.mark.parametrize("name", ["auto", "bfloat16", "float16", "float32", "float64"])
def test_every_dtype_can_be_asked_for(measured, name):
    assert main(["profile", "--shape", "3b", "--lengths", "1k", "--dtype", name]) == 0
    assert measured[0][1]["dtype"] == name


def test_profile_refusals(measured, tmp_path, capsys):
    assert refused(capsys, "profile", "--shape", "7b") == "shape '7b' is unknown"
    assert refused(capsys, "profile", "--pretrained", "bad") == "bad: damaged"
    message = refused(capsys, "profile", "--shape", "3b", "--revision", "v1")
    assert message == "--revision is of a checkpoint on the hub; name it with --pretrained"
    assert "cannot be read" in refused(capsys, "profile", "--read", tmp_path / "none.json")
    options = "--revision", "v1", "--sparse", "8", "--lengths", "1k"
    message = refused(capsys, "profile", "--read", tmp_path / "none.json", *options)
    assert message == "--read measures nothing; leave out --revision, --lengths, --sparse"
    # The output is looked at first: measuring may take long.
    del measured[:]
    message = refused(capsys, "profile", "--shape", "3b", "-o", "a.json", "-o", "a.gif")
    assert "unknown suffix '.gif'" in message and not measured
    message = refused(capsys, "profile", "--shape", "3b", "-o", "/proc/a.json")  # nor can root
    assert message.startswith("/proc/a.json: cannot be written (") and not measured


def test_an_interrupted_profile_keeps_what_was_measured(measured, tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "a.svg"]
    argv = ["profile", "--lengths", "1k,2k", *(f"-o{file}" for file in files)]
    assert main([*argv, "--shape", "stop at once"]) == 130
    assert not any(tmp_path.iterdir()) and not capsys.readouterr().out
    assert main([*argv, "--shape", "stop"]) == 130
    out = capsys.readouterr().out
    assert out.startswith("tiny\n") and out.endswith(f"wrote {files[0]}\nwrote {files[1]}\n")
    assert [row.length for row in load_profile(files[0]).rows] == [1024]


def test_a_profile_is_saved_row_by_row(measured, tmp_path):
    with pytest.raises(RuntimeError):
        main(["profile", "--shape", "break", "-o", str(tmp_path / "a.json")])
    assert load_profile(tmp_path / "a.json").rows


def test_a_profile_is_shown_though_it_cannot_be_written(measured, tmp_path, capsys):
    folder = tmp_path / "removed meanwhile"
    folder.mkdir()
    argv = ["profile", "--pretrained", str(folder), "-o", str(folder / "a.json")]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out.startswith("tiny\n") and "wrote" not in out
    assert err.count("no such folder") == 2  # once when there was a row, once at the end


def test_interrupted(convert):
    assert main(["convert", "stop", "b"]) == 130


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["convert", "a", "b", "--max-length", "many"], "'many' is not a length"),
        (["plan", "--shape", "3b", "--length", "9" * 400], "is not a length"),
        (["convert", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert", "a"], "DST"),
        (["profile"], "one of the arguments --shape --pretrained --read is required"),
        (["profile", "--shape", "3b", "--read", "a.json"], "not allowed with"),
        (["profile", "--shape", "3b", "--lengths", "2k,1k"], "ascending"),
        (["compare"], "RESULTS"),
        (["compare", "a", "--threshold", "1"], "'1' is no share below 1"),
        (["profile", "--shape", "3b", "--patience", "0"], "'0' is no number of seconds"),
        (["profile", "--shape", "3b", "--against", "mamba"], "invalid choice: 'mamba'"),
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
        (["compare", "--help"], "yoco-eval compare results/4k results/64k"),
        (["convert", "--help"], "yoco-eval convert YOCO-3B-1M/ yoco-3b-1m/"),
        (["profile", "--help"], "yoco-eval profile --read profile.json -o profile.svg"),
        (["plan", "--help"], "yoco-eval plan --shape 3b --length 1m"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and said in out
        assert max(map(len, out.splitlines())) <= 80
        if "--shape" in out:
            assert all(name in " ".join(out.split()) for name in (*SHAPES, "config.json"))


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from yoco_eval.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'matplotlib', 'rich', 'lm_eval', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
