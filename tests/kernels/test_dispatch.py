"""Which version of an operation runs, and on which GPU."""

from contextlib import contextmanager

import pytest
import torch

from yoco_eval.kernels import (
    attention,
    cache_writes,
    dispatch,
    logits,
    matvec,
    norm,
    retention,
    rotary,
    striped_attention,
    swiglu,
)
from yoco_eval.kernels.sequences import Readings, Sequences, Span, Spans


def operands(device):
    """A call of every function that has a Triton version: module, name and arguments."""
    torch.manual_seed(0)
    device = torch.device(device)
    x, gate = torch.randn(1, 32), torch.randn(1, 2)
    weight, norm_weight = torch.randn(32, 32), torch.randn(32)
    heads, buffer, states = torch.randn(1, 2, 16), torch.randn(2, 3, 16), torch.randn(1, 2, 16, 16)
    x, gate, weight, norm_weight, heads, buffer, states = (
        t.to(device) for t in (x, gate, weight, norm_weight, heads, buffer, states)
    )
    angles = rotary.rotary_angles(torch.tensor([5], device=device), 16, 1e4, torch.float32)
    one, last = Sequences((1,), (0,), device), torch.tensor([2], device=device)
    readings = Readings([0], [Span(0, 1, 0, 3, False, start=0)])
    spans = Spans((Span(0, 1, 0, 3, True),))
    qkv = (heads, heads, heads)
    return [
        (attention, "cache_attention", (heads, buffer, buffer, spans)),
        (attention, "batch_attention", (heads, buffer, buffer, last, readings)),
        (attention, "sliding_window_attention", (*qkv, 2, one)),
        (
            cache_writes,
            "store_keys_values",
            (heads, heads, angles, buffer.clone(), buffer.clone(), 0),
        ),
        (logits, "normaliser", (x,)),
        (logits, "soft_cap", (x.clone(), 2.0)),
        (matvec, "norm_linear", (x, norm_weight, weight)),
        (matvec, "norm_swiglu_linear", (x, norm_weight, weight)),
        (matvec, "linear_add", (x, weight, x.clone())),
        (norm, "rms_norm", (x,)),
        (retention, "gated_retention", (*qkv, gate, one)),
        (retention, "gated_retention_step", (*qkv, gate, states, angles, heads)),
        (rotary, "rotate", (heads, angles)),
        (striped_attention, "merged", (x.view(1, 2, 16), 1, torch.float32)),
        (swiglu, "swiglu", (x,)),
    ]


CALLS = range(len(operands("cpu")))


@pytest.mark.parametrize("call", CALLS)
def test_every_triton_version_is_run_by_the_same_rule(call, monkeypatch):
    pytest.importorskip("triton")
    module, name, args = operands("cpu")[call]
    seen = []

    def record(fast, x, *rest):
        seen.append((fast.__name__.rstrip("_"), fast.__module__, x))
        return x, None

    monkeypatch.setattr(module, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(module, "run_triton", record)
    getattr(module, name)(*args)
    assert seen == [(name, f"{module.__name__}_triton", args[0])]


def test_triton_runs_while_the_tensors_gpu_is_the_current_one(monkeypatch):
    log = []

    @contextmanager
    def device_of(x):
        log.append(x)
        yield
        log.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(1)
    assert dispatch.run_triton(lambda *args: log.append("run") or args, x, 2) == (x, 2)
    assert log[0] is x and log[1:] == ["run", "left"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("call", CALLS)
def test_a_gpu_that_is_not_the_current_one(call):
    results = []
    for device in ("cpu", "cuda:1"):
        module, name, args = operands(device)[call]
        out = getattr(module, name)(*args)
        out = args[3] if out is None else out[0] if isinstance(out, tuple) else out
        results.append(out.cpu())
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
