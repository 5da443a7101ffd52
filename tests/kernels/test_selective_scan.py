"""The selective scan against its recurrence, sequence by sequence, and the Triton kernels against
the reference in float64."""

import math

import pytest
import torch
from arguments import in_float64

from yoco_eval.kernels.selective_scan import (
    selective_scan,
    selective_scan_reference,
    selective_scan_step,
    selective_scan_step_reference,
)
from yoco_eval.kernels.sequences import Sequences

ON_GPU = torch.cuda.is_available()


def packed(
    lengths,
    channels=6,
    count=3,
    dtype=torch.float64,
    device="cpu",
    sources=None,
    states=0,
    gated=True,
    pad=0,
):
    """All arguments of `selective_scan`: parts of two projections' outputs, with as many starting
    states as told, and decays from next to nothing to almost all."""
    torch.manual_seed(sum(lengths) + channels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = sum(lengths)
    y = torch.randn(tokens, 3 * channels + pad).to(device, dtype)
    z = torch.randn(tokens, pad + 2 * count).to(device, dtype)
    starts = tuple(7 * i for i in range(len(lengths)))
    rates = -torch.exp(torch.linspace(-3, 3, count)[:, None] + torch.randn(count, channels) / 2)
    return {
        "x": y[:, :channels],
        "dt": y[:, channels : 2 * channels],
        "a": rates.to(device, wide),
        "b": z[:, pad : pad + count],
        "c": z[:, pad + count :],
        "d": torch.randn(channels).to(device, wide),
        "dt_bias": torch.linspace(-5, 1, channels).to(device, wide),
        "sequences": Sequences(tuple(lengths), starts, torch.device(device), sources),
        "states": torch.randn(states, count, channels).to(device, wide) if states else None,
        "gate": y[:, 2 * channels : 3 * channels] if gated else None,
        "keep": True,
    }


def by_definition(x, dt, a, b, c, d, dt_bias, sequences, states, gate, keep):
    """Channel by channel and state by state, each sequence by itself."""
    outputs, lasts = [], []
    for i, (start, end) in enumerate(zip(sequences.offsets, sequences.offsets[1:], strict=False)):
        source = i if sequences.sources is None else sequences.sources[i]
        state = torch.zeros_like(a) if states is None else states[source]
        for p in range(start, end):
            step = torch.log(1 + torch.exp(dt[p] + dt_bias))
            state = torch.stack(
                [
                    torch.exp(step * rates) * row + step * weight * x[p]
                    for rates, row, weight in zip(a, state, b[p], strict=True)
                ]
            )
            y = sum(weight * row for weight, row in zip(c[p], state, strict=True)) + d * x[p]
            outputs.append(y if gate is None else y * gate[p] * torch.sigmoid(gate[p]))
        lasts.append(state)
    return torch.stack(outputs), torch.stack(lasts) if keep else None


@pytest.mark.parametrize("lengths", [[1], [20], [1, 1, 2], [5, 1, 30, 5]], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["with_states", "from_zero"])
def test_reference(lengths, given):
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths))) if given else None
    args = packed(lengths, sources=sources, states=3 if given else 0, gated=given)
    for a, e in zip(selective_scan(**args), by_definition(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


def test_each_sequence_continues_its_own_state_by_default():
    args = packed([3, 7], states=2) | {"keep": False}
    out, last = selective_scan(**args)
    assert last is None
    torch.testing.assert_close(out, by_definition(**args)[0], rtol=0, atol=1e-12)


def test_a_text_may_be_cut_anywhere():
    args = packed([50])
    whole, end = selective_scan(**args)
    outputs, state = [], None
    for first, stop in ((0, 1), (1, 38), (38, 50)):
        part = {name: args[name][first:stop] for name in ("x", "dt", "b", "c", "gate")}
        part |= {"sequences": Sequences((stop - first,), (first,), torch.device("cpu"))}
        before = None if state is None else state.clone()
        out, after = selective_scan(**args | part | {"states": state})
        assert before is None or torch.equal(state, before)
        outputs, state = [*outputs, out], after
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


def test_gradients():
    args = packed([5, 9], states=2)
    names = [name for name, value in args.items() if isinstance(value, torch.Tensor)]
    leaves = [args[name].detach().clone().requires_grad_() for name in names]
    args |= dict(zip(names, leaves, strict=True))
    actual = torch.autograd.grad(selective_scan(**args)[0].square().sum(), leaves)
    expected = torch.autograd.grad(by_definition(**args)[0].square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_time_steps_keep_their_precision():
    """Far from zero a logit is the step itself, or its exponential; nothing is infinite."""
    args = packed([1], channels=4, count=1, gated=False) | {"dt_bias": torch.zeros(4).double()}
    args |= {"dt": torch.tensor([[-40.0, -20.0, 25.0, 800.0]]).double(), "b": torch.ones(1, 1)}
    args |= {"x": torch.ones(1, 4).double()}
    _, state = selective_scan(**args)
    expected = [math.exp(-40), math.log1p(math.exp(-20)), math.log1p(math.exp(25)), 800.0]
    expected = torch.tensor([[expected]], dtype=torch.float64)
    torch.testing.assert_close(state, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("gated", [True, False])
def test_step_changes_its_states_in_place(gated):
    args = packed([1, 1, 1], states=3, gated=gated)
    state = args["states"].clone()
    rest = {name: args[name] for name in args.keys() - {"sequences", "states", "keep"}}
    out = selective_scan_step(**rest, state=state)
    for a, e in zip((out, state), by_definition(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


# From here on: the Triton kernels, on the GPU or in the interpreter.


@pytest.fixture
def triton_version(monkeypatch):
    """With segments of a few tokens where there is no GPU: the interpreter takes long for each."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import selective_scan_triton

    if not ON_GPU:
        monkeypatch.setattr(selective_scan_triton, "MIN_SEGMENT", 8)
    return selective_scan_triton


SHAPES = [([1], 40, 16), ([21, 1, 10], 130, 16), ([3, 33], 24, 5)]  # lengths, channels, states
if ON_GPU:
    SHAPES += [([5000, 1, 700, 64, 65], 520, 16), ([170] * 100, 5120, 16), ([4000], 5120, 16)]
    SHAPES += [([1500], 200, 64), ([300], 100, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["with_states", "from_zero"])
def test_triton(triton_version, close, dtype, device, shape, given):
    lengths, channels, count = shape
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths))) if given else None
    args = packed(lengths, channels, count, dtype, device, sources, 3 * given, given, pad=3)
    before = args["states"].clone() if given else None
    expected = selective_scan_reference(**in_float64(args))
    out, last = triton_version.selective_scan(**args)
    assert out.dtype == dtype and out.is_contiguous() and last.dtype == torch.float32
    close(out, expected[0])
    assert (last.double() - expected[1]).norm() < 1e-5 * expected[1].norm()
    assert triton_version.selective_scan(**args | {"keep": False})[1] is None
    assert before is None or torch.equal(args["states"], before)


def test_triton_of_segments(triton_version, device, monkeypatch):
    """However a text is cut, the same."""
    args = packed([61], 24, 4, torch.float32, device, states=1)
    results = []
    for shortest in (1000, 20, 7):
        monkeypatch.setattr(triton_version, "MIN_SEGMENT", shortest)
        args["sequences"] = Sequences((61,), (0,), torch.device(device))
        results.append(triton_version.selective_scan(**args))
        inner, *_ = args["sequences"].table(("selective_scan", 1), None)
        assert inner == round(61 / max(shortest, 61 / 64)) - 1 or shortest == 1000
    for out, last in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, results[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("channels", "count"), [(200, 16), (24, 5)])
def test_triton_step(triton_version, close, dtype, device, gated, channels, count):
    args = packed([1] * 3, channels, count, dtype, device, states=3, gated=gated, pad=1)
    state, wide_state = args["states"], args["states"].double()
    rest = {name: args[name] for name in args.keys() - {"sequences", "states", "keep"}}
    out = triton_version.selective_scan_step(**rest, state=state)
    close(out, selective_scan_step_reference(**in_float64(rest), state=wide_state))
    torch.testing.assert_close(state.double(), wide_state, rtol=1e-5, atol=1e-5)
