"""`yoco-eval plan`: what would be needed, whether it fits, and no run."""

import shutil

import pytest
import torch
from rich.console import Console

from yoco_eval import estimate as module
from yoco_eval import speeds
from yoco_eval.cli import main
from yoco_eval.estimate import absent_card, estimate, present_card, print_estimate, three_digits
from yoco_eval.model.checkpoint import BUNDLED
from yoco_eval.model.costs import YocoCosts
from yoco_eval.model.shapes import SHAPES

CPU = torch.device("cpu")
COSTS = YocoCosts(SHAPES["3b"])


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """A device that does 1e12 operations and moves 1e10 bytes per second."""
    monkeypatch.setattr(speeds, "_product_rate", lambda *args: 1e12)
    monkeypatch.setattr(speeds, "_copy_rate", lambda *args: 1e10)


@pytest.fixture
def free(monkeypatch):
    return lambda size: monkeypatch.setattr(module, "free_bytes", lambda device: size)


def one_line(text):
    return " ".join(text.split())


def on_the_cpu(length, chunk=None):
    card = present_card(COSTS, torch.bfloat16, CPU, 1)
    return estimate(COSTS, torch.bfloat16, card, length, chunk)


def test_figures_follow_from_the_shape(free):
    free(10**12)
    result = on_the_cpu(2**20)
    assert result.fit.fits
    # 1.6e9 weights multiply every token; 2 operations each.
    assert result.prefill_seconds == pytest.approx(2 * 1.6e9 * 2**20 / 1e12, rel=0.01)
    # 3.1e9 weights, and 4 KiB for each token and cross-decoder layer.
    moved = 2 * 3.14e9 + 13 * 4096 * 2**20
    assert result.decode_tokens_per_second == pytest.approx(1e10 / moved, rel=0.01)


def test_what_fits_is_said(free, capsys):
    free(9 * 2**30)
    result = on_the_cpu(2**20)
    longest = result.fit.longest
    assert not result.fit.fits and 2**17 < longest < 2**19
    assert on_the_cpu(longest).fit.fits
    print_estimate(result, "3b", torch.bfloat16, Console(width=80))
    shown = capsys.readouterr().out
    assert f"texts of up to {longest} tokens would" in one_line(shown)
    assert "weights" in shown


def test_what_fits_with_a_chunk_of_the_users(free):
    """Shorter texts are fed in smaller chunks, too."""
    free(12 * 2**30)
    refused = on_the_cpu(2**22, 2**16).fit
    assert not refused.fits and 0 < refused.longest < 2**22
    assert on_the_cpu(refused.longest, 2**16).fit.fits
    assert not on_the_cpu(refused.longest + 1, 2**16).fit.fits


def test_three_digits():
    numbers = (0.01234, 99.96, 999.4, 999.6, 12345.6)
    assert [three_digits(x) for x in numbers] == ["0.0123", "100", "999", "1000", "12346"]


@pytest.mark.parametrize(("length", "told"), [("4k", False), ("8k", True)])
def test_texts_beyond_the_models_positions_are_told(length, told, capsys):
    assert main(["plan", "--pretrained", "demo-4k", "--length", length, "--device", "cpu"]) == 0
    shown = one_line(capsys.readouterr().out)
    assert "It fits" in shown and ("states 4096 positions" in shown) == told
    assert ("only with --model_args max_length=8192." in shown) == told


def test_exit_code_says_whether_it_fits(free, capsys):
    free(100)
    assert main(["plan", "--shape", "3b", "--length", "1m", "--device", "cpu"]) == 1
    assert "no text would" in one_line(capsys.readouterr().out)


def test_a_full_device_leaves_the_times_out(monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speeds, "_product_rate", full)
    assert main(["plan", "--shape", "3b", "--length", "64k", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "activations" in shown and "0.21 PFLOP of prefill" in shown and " s of" not in shown


def test_a_card_that_is_not_there(capsys):
    """Of 80 GiB a process gets what it does on an H100, 78.6, but for what allocators lose."""
    argv = ["plan", "--shape", "3b", "--length", "1m", "--memory", "80g"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3b, 1M tokens on a card of 80 GiB in bfloat16\n")
    assert absent_card(80 << 30, None).free == 78.5 * 2**30
    assert "available 74.57" in one_line(shown)
    assert "are 3.36 PFLOP of prefill, and a decoded token moves 62.1 GB." in one_line(shown)
    assert main([*argv, "--speeds", "100,2000"]) == 0
    told = "about 33.6 s of prefill, and memory bandwidth allows about 32.2 decoded tokens/s, at "
    assert f"{told}100 TFLOP/s and 2000 GB/s." in one_line(capsys.readouterr().out)
    assert main([*argv, "--memory", "8g", "--dtype", "float32"]) == 1
    assert "It does not fit." in capsys.readouterr().out


@pytest.mark.parametrize(
    "what",
    [["--shape", "3b"], ["--shape", str(BUNDLED / "demo-64k")], ["--pretrained", "demo-64k"]],
)
def test_command(what, capsys):
    assert main(["plan", *what, "--length", "64k", "--device", "cpu"]) == 0
    shown = one_line(capsys.readouterr().out)  # a folder's path may be as long as a line
    assert "64K tokens on cpu in float32" in shown and "of prefill" in shown


def test_a_name_on_the_hub_needs_no_weights(hub_cache, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    shutil.copy(BUNDLED / "demo-64k" / "config.json", tmp_path / "model")
    hub_cache("org/model", tmp_path / "model", "1" * 40, branch="v1")
    argv = ["--pretrained", "org/model", "--length", "64k", "--device", "cpu"]
    assert main(["plan", *argv, "--revision", "v1"]) == 0
    assert capsys.readouterr().out.startswith("org/model revision=v1, 64K tokens on cpu")
    assert main(["plan", *argv]) == 2
    assert "org/model: no such path, and not in the hub's cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--shape", "4b"], "shape '4b' is unknown; choose from 1.6b, 3b"),
        (["--pretrained", "nowhere"], "nowhere: no such checkpoint"),
        (["--shape", "3b", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--shape", "3b", "--device", "cpu", "--gpus", "2"], "cpu is none; say how much memory"),
        (["--shape", "3b", "--device", "cpu", "--nodes", "2"], "cpu is none; say how much memory"),
        (["--shape", "3b", "--device", "cpu", "--memory", "80g"], "leave one of them out"),
        (["--shape", "3b", "--speeds", "100,2000"], "say their --memory, too"),
    ],
)
def test_errors(arguments, culprit, capsys):
    assert main(["plan", "--length", "64k", *arguments]) == 2
    error = capsys.readouterr().err
    assert culprit in error and error.count("\n") == 1
