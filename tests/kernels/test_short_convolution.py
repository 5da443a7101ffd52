"""The short convolution against its sum, term by term, and the Triton kernels against the
reference in float64."""

import pytest
import torch
from arguments import in_float64

from yoco_eval.kernels.sequences import Sequences
from yoco_eval.kernels.short_convolution import (
    short_convolution,
    short_convolution_reference,
    short_convolution_step,
    short_convolution_step_reference,
)

ON_GPU = torch.cuda.is_available()


def packed(
    lengths, channels=6, width=4, dtype=torch.float64, device="cpu", sources=None, tails=0, pad=0
):
    """All arguments of `short_convolution`, with as many starting tails as told; with a bias, if
    there are any."""
    torch.manual_seed(sum(lengths) + channels)
    y = torch.randn(sum(lengths), pad + channels + pad).to(device, dtype)
    starts = tuple(7 * i for i in range(len(lengths)))
    return {
        "x": y[:, pad : pad + channels],
        "weight": torch.randn(channels, width).to(device, dtype),
        "sequences": Sequences(tuple(lengths), starts, torch.device(device), sources),
        "tails": torch.randn(tails, width - 1, channels).to(device, dtype) if tails else None,
        "keep": True,
        "bias": torch.randn(channels).to(device, dtype) if tails else None,
    }


def by_definition(x, weight, sequences, tails, keep, bias):
    """Term by term, the inputs before a sequence from its tail."""
    before = weight.shape[1] - 1
    outputs, lasts = [], []
    for i, (start, end) in enumerate(zip(sequences.offsets, sequences.offsets[1:], strict=False)):
        source = i if sequences.sources is None else sequences.sources[i]
        tail = torch.zeros(before, x.shape[1]).to(x) if tails is None else tails[source]
        rows = torch.cat([tail, x[start:end]])
        for p in range(end - start):
            y = sum(weight[:, j] * rows[p + j] for j in range(before + 1))
            y = y if bias is None else y + bias
            outputs.append(y * torch.sigmoid(y))
        lasts.append(rows[len(rows) - before :])
    return torch.stack(outputs), torch.stack(lasts) if keep else None


@pytest.mark.parametrize("lengths", [[1], [2], [20], [1, 1, 2], [5, 1, 30, 3]], ids=str)
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("given", [True, False], ids=["with_tails", "from_zero"])
def test_reference(lengths, width, given):
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths))) if given else None
    args = packed(lengths, width=width, sources=sources, tails=3 if given else 0)
    for a, e in zip(short_convolution(**args), by_definition(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-13)


def test_each_sequence_continues_its_own_tail_by_default():
    args = packed([3, 7], tails=2) | {"keep": False}
    out, last = short_convolution(**args)
    assert last is None
    torch.testing.assert_close(out, by_definition(**args)[0], rtol=0, atol=1e-13)


def test_gradients():
    args = packed([5, 9])
    leaves = [args[name].detach().clone().requires_grad_() for name in ("x", "weight")]
    args |= dict(zip(("x", "weight"), leaves, strict=True))
    actual = torch.autograd.grad(short_convolution(**args)[0].square().sum(), leaves)
    expected = torch.autograd.grad(by_definition(**args)[0].square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [2, 4])
def test_step_changes_its_tails_in_place(width):
    args = packed([1, 1, 1], width=width, tails=3)
    tail = args["tails"].clone()
    out = short_convolution_step(args["x"], args["weight"], tail, args["bias"])
    for a, e in zip((out, tail), by_definition(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-13)


# From here on: the Triton kernels, on the GPU or in the interpreter.


@pytest.fixture
def triton_version():
    pytest.importorskip("triton")
    from yoco_eval.kernels import short_convolution_triton

    return short_convolution_triton


LENGTHS = [[1], [2, 40, 1, 3]]
if ON_GPU:
    LENGTHS += [[5000, 1, 700, 64, 65], [170] * 100]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("given", [True, False], ids=["with_tails", "from_zero"])
def test_triton(triton_version, close, dtype, device, lengths, width, given):
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths))) if given else None
    args = packed(lengths, 200, width, dtype, device, sources, 3 if given else 0, pad=3)
    expected, expected_last = short_convolution_reference(**in_float64(args))
    out, last = triton_version.short_convolution(**args)
    assert out.dtype == last.dtype == dtype and out.is_contiguous()
    close(out, expected)
    assert torch.equal(last.double(), expected_last)
    assert triton_version.short_convolution(**args | {"keep": False})[1] is None


@pytest.mark.parametrize("width", [2, 4, 8])
def test_triton_step(triton_version, close, dtype, device, width):
    args = packed([1] * 3, 200, width, dtype, device, tails=3, pad=1)
    tail, wide_tail = args["tails"], args["tails"].double()
    rest = {name: args[name] for name in ("x", "weight", "bias")}
    out = triton_version.short_convolution_step(tail=tail, **rest)
    close(out, short_convolution_step_reference(tail=wide_tail, **in_float64(rest)))
    assert torch.equal(tail.double(), wide_tail)
