"""Texts that several processes hold together, against one process alone, in float64.

The processes are real ones and talk through gloo; those of one number do all their work in one go.
"""

import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import together
import torch
from torch import multiprocessing as torch_multiprocessing

from yoco_eval.context_parallel import check_alike, check_divides, own_group
from yoco_eval.engine import Engine
from yoco_eval.kernels.group import Group
from yoco_eval.memory import fit
from yoco_eval.model import Span, Spans, Yoco, YocoConfig
from yoco_eval.model.costs import OVERHEAD, YocoCosts
from yoco_eval.model.families import check_together, costs_together
from yoco_eval.model.footprint import footprint
from yoco_eval.model.mixers import GatedDeltaNetSettings
from yoco_eval.model.phi4flash_config import Phi4FlashConfig
from yoco_eval.model.shapes import SHAPES, with_random_weights
from yoco_eval.model.traffic import Traffic

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def alone():
    """What one process finds, by kind."""
    return {kind: together.everything(kind, None) for kind in together.KINDS}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} processes".format)
def found(request, tmp_path_factory):
    """What each of several processes finds, by case."""
    return run(request.param, tmp_path_factory.mktemp("together"), torch.float64, gpus=False)


def run(size, folder, dtype, gpus):
    multiprocessing.set_forkserver_preload(["together"])
    torch_multiprocessing.start_processes(
        together.process, (size, folder, dtype, gpus), size, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def test_what_is_found_is_what_one_process_finds(found, alone):
    compare(found, alone, 1e-9)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gpus_find_what_one_finds(dtype, tmp_path):
    """Over NCCL: the references, and the kernels, in graphs."""
    size, gpu = min(4, torch.cuda.device_count()) & ~1, torch.device("cuda", 0)
    unit = together.GPU_BLOCK
    alone = {kind: together.everything(kind, None, gpu, dtype, unit) for kind in together.KINDS}
    found = run(size, tmp_path, dtype, gpus=True)
    compare(found, alone, 1e-9 if dtype.itemsize == 8 else 1e-3, gpus=True)


def compare(found, alone, tolerance, gpus=False):
    for rank, cases in enumerate(found):
        assert cases.keys() == set(together.cases(len(found), gpus))
        for (kind, block, count), results in cases.items():
            assert results.keys() == alone[kind].keys()
            for name, result in results.items():
                expected, case = alone[kind][name], (rank, kind, block, count, name)
                if isinstance(expected, torch.Tensor):
                    assert result.shape == expected.shape and expected.std() > 0.1, case
                    assert (result - expected).abs().max() < tolerance, case
                else:
                    assert result == expected, case


def test_what_is_compared_says_something(alone):
    for results in alone.values():
        greedy = [result for name, result in results.items() if name.startswith("greedy")]
        lengths = {len(answer) for answer in results["answers"]}
        assert set(greedy[0]) == {True, False} and len(lengths) > 2


def test_numbers_of_processes_that_do_not_go():
    for count, ranks in ((2, None), (3, SimpleNamespace(size=4)), (8, SimpleNamespace(size=4))):
        size = 1 if ranks is None else 4
        with pytest.raises(ValueError, match=f"context_parallel={count} needs .*there .* {size}$"):
            check_divides(count, ranks)
        assert own_group(1, ranks, CPU) is None
    for count, ranks in ((1, None), (1, SimpleNamespace(size=4)), (2, SimpleNamespace(size=4))):
        check_divides(count, ranks)


def test_groups_are_of_cards_of_one_generation():
    """Elsewhere kernels take other memory, and plans would differ."""
    hopper, other, ampere = ("H100", (9, 0)), ("GH200", (9, 0)), ("A100", (8, 0))
    check_alike(2, [hopper, other, ampere, ampere])
    with pytest.raises(ValueError, match="process 2 has H100, process 3 A100; start them on"):
        check_alike(2, [ampere, ampere, hopper, ampere])


def test_families_that_cannot():
    option, other = "context_parallel=2", Phi4FlashConfig(256, 2048, 4, 8, 4, 100, vocab_size=50)
    check_together(with_random_weights(together.model_of("retention").config), option)
    with pytest.raises(ValueError, match=f"^{option} is for YOCO models; of Phi-4-mini-flash, "):
        check_together(with_random_weights(other), option)


class Silent(Group):
    """One of several processes, of which the others say nothing: what it takes, it takes."""

    def __init__(self, rank, size):
        self.rank, self.size, self.block = rank, size, 1

    def gather(self, x):
        return x.new_zeros(self.size, *x.shape)

    def share(self, x, source):
        return x

    def exchange(self, x, sent, received):
        return x.new_zeros(sum(received), *x.shape[1:])

    def hand_over(self, sent, received):
        pass

    def most(self, numbers):
        return list(numbers)


class Counting(Silent):
    """Counts what it takes from the others."""

    def __init__(self, rank, size):
        super().__init__(rank, size)
        self.told = Traffic()

    def _take(self, size):
        self.told += Traffic(size, 1)

    def gather(self, x):
        self._take((self.size - 1) * x.nbytes)
        return super().gather(x)

    def share(self, x, source):
        self._take(x.nbytes)
        return super().share(x, source)

    def exchange(self, x, sent, received):
        self._take((sum(received) - received[self.rank]) * x[:1].nbytes)
        return super().exchange(x, sent, received)

    def hand_over(self, sent, received):
        self._take(sum(part.nbytes for part in received.values()))


@pytest.mark.parametrize("kind", [*together.KINDS, "gated_deltanet without a convolution"])
def test_what_processes_tell_each_other_is_counted(kind):
    settings = together.KINDS | {
        "gated_deltanet without a convolution": GatedDeltaNetSettings(2, 4, 8, 12, convolution=None)
    }
    config = YocoConfig(32, 5, 40, 4, 2, 50, settings[kind], n_self_layers=3)
    for dtype, size, eight_bits in (
        (torch.float64, 3, False),
        (torch.bfloat16, 4, False),
        (torch.bfloat16, 4, kind == together.EIGHT_BITS),
    ):
        model = Yoco(config).to(dtype).requires_grad_(False)
        model.eight_bits = eight_bits
        model.group = group = Counting(1, size)
        costs, chunk = costs_together(model.costs, size), 4 * size**2
        cache = model.new_cache(2 * chunk)
        with torch.inference_mode():
            for _ in range(2):
                group.told = Traffic()
                model.prefill(torch.arange(chunk) % 50, cache, asked=False)
                assert group.told == costs.feeding(dtype, chunk), (dtype, size)
            assert bool(group.told.calls) == settings[kind].relays
            decoder = model.decoder(cache)
            decoder.join([0], cache.state, [0], [1], [np.array([chunk])])
            decoder.read([0], [Span(0, 1, 0, chunk + 1, False, start=0)])
            group.told = Traffic()
            decoder.step()
            assert group.told == costs.stepping(dtype), (dtype, size)
        whole = model.costs_of(config).prefill_operations(chunk)
        assert costs.part_operations(chunk) == whole // (size if settings[kind].relays else 1)


@pytest.mark.parametrize("kind", [*together.KINDS, "wide gated_deltanet", "deep gated_deltanet"])
def test_memory_is_not_more_than_planned(kind, live_bytes):
    """Of a chunk that is fed and predicted, in bytes that the cache and activations take."""
    settings = together.KINDS | {
        "wide gated_deltanet": GatedDeltaNetSettings(2, 2, 128, 256),
        "deep gated_deltanet": GatedDeltaNetSettings(2, 4, 256, 64),
    }
    config = YocoConfig(512, 2, 256, 4, 2, 100, settings[kind])
    # With few tokens it is states that rule.
    for size, rank, chunk in ((3, 1, 1500), (3, 2, 1500), (16, 0, 1500), (16, 3, 160)):
        model = Yoco(config).requires_grad_(False)
        model.group = Silent(rank, size)
        length = 4000
        planned = footprint(model.costs, torch.float32, length, chunk, device=CPU)
        cache = model.new_cache(length)
        held = cache.keys.nbytes + cache.values.nbytes
        slot = 2 * config.n_attn_kv_heads * config.attn_head_dim * 4
        assert held <= planned.cache + 2 * slot
        ids = torch.randint(100, (chunk,))
        with torch.inference_mode():
            model.prefill(ids[:size], cache)
            with live_bytes(besides=[*model.parameters(), cache.keys, cache.values]) as live:
                rows = model.prefill(ids, cache)
            fed, one = live.peak, -(-chunk // size)
            positions = torch.arange(chunk - one, chunk)
            spans = Spans((Span(0, one, 0, chunk, True),))
            with live_bytes(besides=[*model.parameters(), cache.keys, cache.values]) as live:
                model.predict(rows[-one:], positions, cache, spans)
        assert max(fed, live.peak) < planned.activations + planned.states - OVERHEAD


def test_machines_that_more_processes_share_plan_like_others(monkeypatch):
    free = 3 << 30
    monkeypatch.setattr("yoco_eval.engine.free_bytes", lambda device: free)

    class Beside(Silent):
        """Of which the others have told `others`."""

        others = -free

        def most(self, numbers):
            self.own = numbers[0]
            return [max(numbers[0], self.others)]

    groups, plans = [Beside(0, 3), Beside(1, 3)], {}
    for _ in range(2):  # at first they do not know of each other
        for group, sharing in zip(groups, (2, 1), strict=True):
            model = Yoco(YocoConfig(64, 2, 64, 4, 2, 100, together.KINDS["retention"]))
            model.group = group
            plans[sharing] = Engine(model, 1, None, sharing)._fit(10**6)
        first, second = groups
        first.others, second.others = second.own, first.own
    assert plans[1] == plans[2] and plans[1].free < 0.51 * free


def test_memory_falls_with_the_number_of_processes():
    numbers, config = (1, 2, 4, 8), SHAPES["3b"]

    def plan(parts, length):
        costs = YocoCosts(config, parts)
        return fit(costs, torch.bfloat16, CPU, length, loaded=True, parts=parts, free=80 << 30)

    plans = [plan(parts, 10**6) for parts in numbers]
    assert [plan.chunk for plan in plans] == [parts * plans[0].chunk for parts in numbers]
    for parts, one in zip(numbers, plans, strict=True):
        assert one.memory.cache == pytest.approx(plans[0].memory.cache / parts, rel=0.01)
        assert one.longest > 0.9 * parts * plans[0].longest
    # 10M tokens, whose cache alone takes 38 GiB, on cards that have 24.
    assert not replace(plan(1, 10**7), free=24 << 30).fits
    assert replace(plan(4, 10**7), free=24 << 30).fits
