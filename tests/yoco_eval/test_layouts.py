"""`yoco-eval plan` for several cards: what each takes, what they tell each other, what to do."""

import re

import pytest
import torch
from rich.console import Console

from yoco_eval import estimate as module
from yoco_eval.cli import main
from yoco_eval.estimate import absent_card
from yoco_eval.layouts import Cluster, lay_out, print_layouts
from yoco_eval.memory import fit
from yoco_eval.model.costs import YocoCosts
from yoco_eval.model.families import check_together
from yoco_eval.model.phi4flash_config import Phi4FlashConfig
from yoco_eval.model.shapes import SHAPES, with_random_weights
from yoco_eval.speeds import Speeds

BF16, GPU = torch.bfloat16, torch.device("cuda")
BLUEPRINT = with_random_weights(SHAPES["3b"])


def laid_out(length, memory=80, nodes=1, gpus=8, chunk=None, speeds=None):
    cluster = Cluster(nodes, gpus, absent_card(memory << 30, speeds))
    return lay_out(BLUEPRINT, BF16, cluster, length, chunk)


def plan(capsys, *argv, code=0):
    """What is printed, and the same in one line."""
    assert main(["plan", *argv]) == code
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    return shown, " ".join(shown.split())


def test_groups_are_of_one_machine_or_of_whole_ones():
    card = absent_card(1, None)
    for nodes, gpus, groups in (
        (1, 8, [1, 2, 4, 8]),
        (1, 6, [1, 2, 3, 6]),
        (6, 4, [1, 2, 4, 8, 12, 24]),
        (3, 1, [1, 3]),
    ):
        assert list(Cluster(nodes, gpus, card).groups()) == groups


def test_each_layout_is_what_its_processes_plan():
    """As the engine does, with the costs of so many processes."""
    layouts = laid_out(10 * 2**20)
    for layout, parts in zip(layouts.every, (1, 2, 4, 8), strict=True):
        costs, free = YocoCosts(SHAPES["3b"], parts), layouts.cluster.card.free
        expected = fit(costs, BF16, GPU, 10 * 2**20, parts=parts, free=free)
        assert layout.together == parts and layout.estimate.fit == expected
        assert layout.feeding == costs.feeding(BF16, expected.chunk)
        assert layout.stepping == costs.stepping(BF16)
        whole = BLUEPRINT.costs.prefill_operations(10 * 2**20)
        assert layout.estimate.prefill_operations == pytest.approx(whole / parts)
    first, *_, last = layouts.every
    assert first.feeding.received == first.stepping.received == 0
    # 13 layers: of each 7 states of 1.5 MiB and one more; an eighth of the keys and values.
    states = 13 * (8 * 24 * 128**2 + 7 * 24) * 4
    assert last.feeding.received == states + 12672 * 4096 * 7 // 8
    logits = SHAPES["3b"].vocab_size // 8 * 2
    assert last.stepping.received == 13 * 7 * 24 * 129 * 4 + 7 * logits


def test_texts_of_fewer_blocks_than_cards_are_fed_by_all():
    whole, *divided, all_alike = laid_out(4 * 64).every
    total = whole.estimate.prefill_operations
    operations = [layout.estimate.prefill_operations for layout in divided]
    assert operations == [total // layout.together for layout in divided]
    assert all_alike.together == 8 and all_alike.estimate.prefill_operations == total
    assert all_alike.feeding.received == 0 < divided[-1].feeding.received


@pytest.mark.parametrize("chunk", [None, 100_000])
def test_the_longest_text_is_the_longest_that_fits(chunk):
    for layout in laid_out(2**20, memory=24, gpus=4, chunk=chunk).every:
        fits = [laid_out(layout.longest + more, 24, gpus=4, chunk=chunk).every for more in (0, 1)]
        there, beyond = (
            next(one for one in every if one.together == layout.together).estimate.fit.fits
            for every in fits
        )
        assert there and not beyond


@pytest.mark.parametrize(
    ("length", "memory", "nodes", "best"),
    [("1m", 80, 1, 1), ("10m", 24, 1, 4), ("30m", 24, 2, 16), ("60m", 24, 2, None)],
)
def test_the_fewest_cards_that_hold_a_text_are_recommended(length, memory, nodes, best, capsys):
    layouts = laid_out(int(length[:-1]) * 2**20, memory, nodes)
    assert (layouts.best and layouts.best.together) == best
    cluster = ["--gpus", "8", "--nodes", str(nodes), "--memory", f"{memory}g"]
    argv = ["--shape", "3b", "--length", length, *cluster]
    shown, text = plan(capsys, *argv, code=0 if best else 1)
    rows = [line.split() for line in shown.splitlines() if re.match(r" +\d+ +\d+ +\d", line)]
    assert [row[:2] for row in rows[: len(layouts.every)]] == [
        [str(layout.together), str(8 * nodes // layout.together)] for layout in layouts.every
    ]
    # Times are of what fits.
    assert len(rows) == len(layouts.every) + sum(one.estimate.fit.fits for one in layouts.every)
    assert {
        1: "each of 8 processes answers prompts of its own, which is quickest for many. For one "
        "that takes too long there is --model_args context_parallel=8.",
        4: "does not hold such a text; 4 do. With --model_args context_parallel=4 there are 2 "
        "groups, which answer different prompts.",
        16: "16, of 2 machines, do. With --model_args context_parallel=16 there is one group.",
        None: f"It does not fit. With context_parallel=16, texts of up to "
        f"{layouts.every[-1].estimate.fit.longest} tokens would.",
    }[best] in text


def test_more_cards_do_not_help_where_the_weights_are_too_large(capsys):
    argv = ["--shape", "13b", "--length", "1k", "--gpus", "8", "--memory", "24g"]
    assert "every card has all weights" in plan(capsys, *argv, code=1)[1]


def test_times_and_where_passing_rules(capsys):
    argv = ["--shape", "3b", "--length", "1m", "--gpus", "2", "--memory", "80g"]
    shown, text = plan(capsys, *argv, "--speeds", "100,2000")
    (row,) = re.findall(r"^ +2 +25344 .*$", shown, re.M)
    chunk, told = 12672 * 2 * 1.6e9 / 1e14, laid_out(2**20, gpus=2).every[1].feeding.received / 1e9
    assert row.split() == ["2", "25344", "16.8", "s", "59", "66.8", "0.165", "0.261", "1212"]
    assert told / chunk == pytest.approx(0.165, rel=0.02)
    assert "in 27 exchanges for each chunk, and 14 for each step of decoding." in text
    assert "at 100 TFLOP/s and 2000 GB/s" in text and "Passing rules" in text
    # Without speeds, what they would be divided by.
    shown, text = plan(capsys, *argv)
    (row,) = re.findall(r"^ +2 +25344 .*$", shown, re.M)
    assert row.split() == ["2", "25344", "1.68", "33.9", "66.8", "0.261"]
    assert "--speeds turns this into times" in text


def test_a_family_that_cannot_is_told_of_by_name(capsys):
    """In the engine's words; several processes help it all the same."""
    blueprint = with_random_weights(Phi4FlashConfig(256, 2048, 4, 8, 4, 100, vocab_size=50))
    with pytest.raises(ValueError) as refusal:
        check_together(blueprint, "context_parallel=8")
    cluster = Cluster(1, 8, absent_card(24 << 30, None))
    layouts = lay_out(blueprint, BF16, cluster, 1024, None)
    assert layouts.best and len(layouts.every) == 1
    print_layouts(layouts, "phi", BF16, Console(width=80))
    text = " ".join(capsys.readouterr().out.split())
    assert f"quickest for many. {refusal.value}" in text and "exchanges" not in text
    layouts = lay_out(blueprint, BF16, cluster, 2**30, None)
    print_layouts(layouts, "phi", BF16, Console(width=80))
    text = " ".join(capsys.readouterr().out.split())
    assert f"It does not fit. Texts of up to {layouts.every[0].longest} tokens would." in text
    assert "chunk or dtype, or cards with more memory may help." in text


def test_cards_like_the_one_that_is_there(monkeypatch, capsys):
    """One that does 1e14 operations and moves 2e12 bytes per second, and has 20 GiB."""
    from yoco_eval import devices

    monkeypatch.setattr(devices, "find_device", lambda name: GPU)
    monkeypatch.setattr(module, "free_bytes", lambda device: 20 << 30)
    monkeypatch.setattr(module, "measured", lambda *args: Speeds(1e14, 2e12))
    argv = ["--shape", "3b", "--length", "10m", "--gpus", "8"]
    shown, text = plan(capsys, *argv)
    assert shown.startswith("3b, 10M tokens on 8 cards like cuda in bfloat16\n")
    assert "which has 19.00 free." in text and "4 do." in text
    assert "as the device is now" in text
