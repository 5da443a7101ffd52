"""Budgets: the fastest chunk that fits, and refusals with the figures that help."""

import re

import pytest
import torch

from yoco_eval import memory
from yoco_eval.engine import Engine, GenerateRequest
from yoco_eval.lm import YocoLM
from yoco_eval.memory import budget, check_weights
from yoco_eval.model.footprint import footprint, state_bytes
from yoco_eval.model.shapes import SHAPES

CONFIG, GPU, BF16 = SHAPES["3b"], torch.device("cuda"), torch.bfloat16
GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory, in bytes."""
    return lambda size: monkeypatch.setattr(memory, "free_bytes", lambda device: size)


def need(length, chunk):
    """Beside the weights, with the share that stays unused."""
    parts = footprint(CONFIG, BF16, length + chunk, chunk, chunk * 4096)
    return (parts.total - parts.weights) / 0.95


def test_the_largest_chunk_that_fits(free):
    free(70 * GIB)
    assert budget(CONFIG, BF16, GPU, 2**20).chunk == 12672
    for chunk in (8448, 264):
        free(int(need(2**20, chunk)) + 1000)
        assert budget(CONFIG, BF16, GPU, 2**20).chunk == chunk
    assert budget(CONFIG, BF16, GPU, 1000, chunk=300).chunk == 300


def test_states_fill_the_memory_that_is_left(free):
    size = state_bytes(CONFIG, BF16)
    free(int(need(1024, 12672) + 100 * 2 * size / 0.95) + 1000)
    assert budget(CONFIG, BF16, GPU, 1024).states == 101


def test_a_refusal_names_what_fits(free):
    free(3 * GIB)
    with pytest.raises(ValueError, match=r"need 4\.\d\d GiB beside the weights on cuda") as error:
        budget(CONFIG, BF16, GPU, 2**20)
    fitting = int(re.search(r"max_length=(\d+)", str(error.value))[1])
    assert 2**19 < fitting < 2**20
    budget(CONFIG, BF16, GPU, fitting - 264)
    free(100)
    with pytest.raises(ValueError, match="no context fits"):
        budget(CONFIG, BF16, GPU, 2**20)


def test_the_engine_refuses_before_it_computes(exact, free):
    free(1000)
    begun = []
    with pytest.raises(ValueError, match="free"):
        list(Engine(exact).generate([GenerateRequest([1, 2, 3], 5)], begun.append, begun.append))
    assert not begun


def test_weights_are_refused_before_they_are_loaded(free):
    free(8 * GIB)
    check_weights(CONFIG, BF16, GPU)
    with pytest.raises(ValueError, match=r"take 12\.83 GiB in float32, and 8\.00 GiB are free"):
        check_weights(CONFIG, torch.float32, GPU)
    free(1000)
    with pytest.raises(ValueError, match="the weights take"):
        YocoLM(device="cpu")


def test_free_memory_of_this_machine():
    assert memory.free_bytes(torch.device("cpu")) > 2**20
