"""Budgets: the fastest chunk that fits, and refusals with the figures that help."""

import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoco_eval import memory
from yoco_eval.engine import Engine, GenerateRequest, ScoreRequest
from yoco_eval.lm import YocoLM
from yoco_eval.memory import CHUNKS, check_weights, fit
from yoco_eval.model import Yoco, YocoConfig
from yoco_eval.model.shapes import SHAPES

CONFIG, GPU, BF16 = SHAPES["3b"], torch.device("cuda"), torch.bfloat16
GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory, in bytes."""
    return lambda size: monkeypatch.setattr(memory, "free_bytes", lambda device: size)


def test_the_largest_chunk_that_fits(free):
    free(70 * GIB)
    whole = fit(CONFIG, BF16, GPU, 2**20, loaded=True)
    assert whole.fits and whole.chunk == CHUNKS["cuda"][0]
    free(round(4.8 * GIB))
    less = fit(CONFIG, BF16, GPU, 2**20, loaded=True)
    assert less.fits and less.chunk in CHUNKS["cuda"][1:]
    assert fit(CONFIG, BF16, GPU, 1000, chunk=300).chunk == 300


def test_no_more_is_set_aside_than_there_are_tokens(free):
    free(70 * GIB)
    small = fit(CONFIG, BF16, GPU, 4096, chunk=2**20, loaded=True, tokens=9000)
    assert small.chunk == 9000 and small.need < GIB


def test_a_refusal_names_what_fits(free):
    free(3 * GIB)
    refused = fit(CONFIG, BF16, GPU, 2**20, loaded=True)
    with pytest.raises(ValueError, match=r"need 4\.\d\d GiB beside the weights on cuda") as error:
        refused.check()
    longest = int(re.search(r"max_length=(\d+)", str(error.value))[1])
    assert 2**19 < longest < 2**20
    fit(CONFIG, BF16, GPU, longest, loaded=True).check()
    assert not fit(CONFIG, BF16, GPU, longest + 1000, loaded=True).fits
    greedy = fit(CONFIG, BF16, GPU, 10000, chunk=2**17, loaded=True, tokens=10**7)
    with pytest.raises(ValueError, match="or lower prefill_chunk=131072"):
        greedy.check()
    free(100)
    with pytest.raises(ValueError, match="none fits"):
        fit(CONFIG, BF16, GPU, 2**20, loaded=True).check()


def test_the_engine_refuses_before_it_computes(exact, free):
    free(1000)
    begun = []
    with pytest.raises(ValueError, match="free"):
        list(Engine(exact).generate([GenerateRequest([1, 2, 3], 5)], begun.append, begun.append))
    assert not begun


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("sliding_window", [None, 1, 256])
def test_packed_batches_stay_within_the_memory(sliding_window, monkeypatch):
    """Many short questions after one long text; each brings a state or a window with it."""
    config = YocoConfig(
        dim=128, n_layers=4, hidden_dim=128, n_self_heads=2, n_attn_heads=2, n_attn_kv_heads=1,
        vocab_size=100, sliding_window=sliding_window,
    )
    torch.manual_seed(0)
    model = Yoco(config).requires_grad_(False)
    stem = torch.randint(100, (300,)).tolist()
    requests = [
        ScoreRequest([*stem, q, p] + [q] * 15, [a])
        for q in range(99) for p in (1, 2) for a in (3, 4)
    ]
    need = fit(config, torch.float32, model.device, 350, loaded=True, tokens=10**6).need
    left = 16 * 2**20
    monkeypatch.setattr(memory, "free_bytes", lambda device: round((need + left) / 0.95))
    results, peaks = [], []
    for batch_size in (1, None):
        with Live() as live:
            scored = Engine(model, batch_size).score(requests, lambda n: None, lambda n: None)
            results.append(dict(scored))
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] + left
    for index, score in results[0].items():
        assert results[1][index].logprob == pytest.approx(score.logprob, abs=1e-3)


def test_weights_are_refused_before_they_are_loaded(free):
    free(8 * GIB)
    check_weights(CONFIG, BF16, GPU)
    with pytest.raises(ValueError, match=r"take 12\.83 GiB in float32, and 8\.00 GiB are free"):
        check_weights(CONFIG, torch.float32, GPU)
    free(1000)
    with pytest.raises(ValueError, match="the weights take"):
        YocoLM(device="cpu")
