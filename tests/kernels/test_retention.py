"""Gated retention: its three forms against the definition, packed sequences against the recurrence,
and the Triton kernels against the reference in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from arguments import in_float64

from yoco_eval.kernels import retention
from yoco_eval.kernels.norm import rms_norm_reference
from yoco_eval.kernels.retention import (
    gated_retention,
    gated_retention_reference,
    gated_retention_step,
    gated_retention_step_reference,
    retention_chunkwise,
    retention_log_gate,
    retention_parallel,
    retention_recurrent,
)
from yoco_eval.kernels.rotary import rotary_angles, rotate
from yoco_eval.kernels.sequences import Sequences

ON_GPU = torch.cuda.is_available()


def inputs(length, batch=2, heads=3, dk=8, dv=6, dtype=torch.float64):
    torch.manual_seed(length)
    q, k = torch.randn(2, batch, heads, length, dk, dtype=dtype)
    v = torch.randn(batch, heads, length, dv, dtype=dtype)
    log_gate = retention_log_gate(4 * torch.randn(batch, heads, length, dtype=dtype))
    state = torch.randn(batch, heads, dk, dv, dtype=dtype)
    return q, k, v, log_gate, state


def by_definition(q, k, v, log_gate, state):
    """o_p = q_p (e^(a_1 + .. + a_p) S_0 + sum_j e^(a_(j+1) + .. + a_p) k_j^T v_j), term by term."""
    out = torch.empty_like(v)
    for p in range(q.shape[2]):
        s = log_gate[:, :, : p + 1].sum(-1).exp()[..., None, None] * state
        for j in range(p + 1):
            decay = log_gate[:, :, j + 1 : p + 1].sum(-1).exp()
            s = s + decay[..., None, None] * k[:, :, j, :, None] * v[:, :, j, None, :]
        out[:, :, p] = (q[:, :, p, None, :] @ s)[..., 0, :]
    return out, s


@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("form", [retention_parallel, retention_recurrent, retention_chunkwise])
def test_forms_match_the_definition(form, length):
    args = inputs(length)
    for actual, expected in zip(form(*args), by_definition(*args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_any_chunk_size(length, chunk_size):
    args = inputs(length)
    actual = retention_chunkwise(*args, chunk_size=chunk_size)
    for a, e in zip(actual, retention_recurrent(*args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_a_text_may_be_cut_anywhere():
    q, k, v, log_gate, state = inputs(100)
    whole = retention_chunkwise(q, k, v, log_gate, state, chunk_size=16)
    outputs = []
    for cut in (slice(0, 1), slice(1, 38), slice(38, 100)):
        out, state = retention_chunkwise(
            q[:, :, cut], k[:, :, cut], v[:, :, cut], log_gate[:, :, cut], state, chunk_size=16
        )
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, whole[1], rtol=0, atol=1e-12)


def test_no_state_is_a_state_of_zeros():
    q, k, v, log_gate, state = inputs(10)
    for form in (retention_parallel, retention_recurrent, retention_chunkwise):
        for a, e in zip(
            form(q, k, v, log_gate), form(q, k, v, log_gate, torch.zeros_like(state)), strict=True
        ):
            assert torch.equal(a, e)


def test_strong_decay_stays_finite_and_right():
    """Gates so closed that the product over a chunk underflows float32."""
    q, k, v, log_gate, state = (x.float() for x in inputs(200))
    log_gate = torch.full_like(log_gate, -20.0)
    out, last = retention_chunkwise(q, k, v, log_gate, state)
    expected, expected_last = retention_recurrent(*(x.double() for x in (q, k, v, log_gate, state)))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), expected_last, rtol=1e-5, atol=1e-5)


def test_computes_in_float32_whatever_comes_in():
    args = [x.bfloat16() for x in inputs(50)]
    out, state = retention_chunkwise(*args)
    expected, expected_state = retention_recurrent(*(x.double() for x in args))
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5)
    assert (out.double() - expected).norm() / expected.norm() < 4e-3  # bfloat16's own rounding


def test_log_gate():
    gate = torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64)
    expected = torch.log(torch.sigmoid(gate))
    torch.testing.assert_close(retention_log_gate(gate), expected / 16)
    torch.testing.assert_close(retention_log_gate(gate, 3.0), expected / 3)
    assert retention_log_gate(gate.bfloat16()).dtype == torch.float32


def packed(
    lengths, heads=2, dim=8, dtype=torch.float64, device="cpu", sources=None, states=0, pad=0
):
    """All arguments of `gated_retention`: parts of one projection [T, 4 * H * D + H + pad], with as
    many starting states as told."""
    torch.manual_seed(sum(lengths) + dim)
    width, total = heads * dim, sum(lengths)
    y = torch.randn(total, 4 * width + heads + pad).to(device, dtype)
    *parts, gate, _ = y.split((width, width, width, width, heads, pad), dim=1)
    q, k, v, swish = (x.unflatten(1, (heads, dim)) for x in parts)
    starts = tuple(7 * i for i in range(len(lengths)))
    sequences = Sequences(tuple(lengths), starts, torch.device(device), sources)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": q,
        "k": k,
        "v": v,
        "gate": gate,
        "sequences": sequences,
        "states": torch.randn(states, heads, dim, dim).to(device, wide) if states else None,
        "swish": swish,
        "eps": 1e-3,
        "keep": True,
        "temperature": 16.0,
    }


def one_by_one(q, k, v, gate, sequences, states, swish, eps, keep, temperature):
    """Each sequence by itself, through the recurrence."""
    outputs, lasts = [], []
    for i, (start, end) in enumerate(zip(sequences.offsets, sequences.offsets[1:], strict=False)):
        source = i if sequences.sources is None else sequences.sources[i]
        parts = (x[None, start:end].transpose(1, 2) for x in (q, k / k.shape[-1] ** 0.5, v))
        out, last = retention_recurrent(
            *parts,
            retention_log_gate(gate[None, start:end].transpose(1, 2), temperature),
            None if states is None else states[source, None],
        )
        outputs.append(out[0].transpose(0, 1))
        lasts.append(last)
    out = torch.cat(outputs)
    if swish is not None:
        out = F.silu(swish) * rms_norm_reference(out, eps=eps)
    return out, torch.cat(lasts) if keep else None


@pytest.mark.parametrize("lengths", [[1], [70], [9, 9, 9], [1, 1], [66, 1, 5, 66, 1]])
@pytest.mark.parametrize("given", [True, False], ids=["with_states", "from_zero"])
def test_packed_sequences_do_not_see_each_other(lengths, given):
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths)))
    args = packed(lengths, sources=sources if given else None, states=3 if given else 0)
    for a, e in zip(gated_retention(**args), one_by_one(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_each_sequence_continues_its_own_state_by_default():
    args = packed([3, 40, 3], states=3) | {"temperature": 3.0}
    for a, e in zip(gated_retention(**args), one_by_one(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_what_is_not_asked_for_is_left_out():
    args = packed([20, 4]) | {"swish": None, "keep": False}
    out, last = gated_retention(**args)
    assert last is None and out.is_contiguous()
    torch.testing.assert_close(out, one_by_one(**args)[0], rtol=0, atol=1e-11)


def test_gradients_flow_through_a_batch_of_packed_sequences():
    args = packed([33, 33])
    leaves = [args[name].detach().clone().requires_grad_() for name in ("q", "k", "v", "gate")]
    args |= dict(zip(("q", "k", "v", "gate"), leaves, strict=True))
    actual = torch.autograd.grad(gated_retention(**args)[0].square().sum(), leaves)
    expected = torch.autograd.grad(one_by_one(**args)[0].square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


def step_arguments(args):
    """Those of `gated_retention_step`, of sequences of one token."""
    q = args["q"]
    angles = rotary_angles(args["sequences"].positions, q.shape[2], 1e4, q.dtype)
    names = ("q", "k", "v", "gate", "swish", "eps", "temperature")
    return {name: args[name] for name in names} | {"angles": angles}


@pytest.mark.parametrize("temperature", [16.0, 3.0])
def test_step_changes_its_states_in_place(temperature):
    args = packed([1, 1, 1], states=3) | {"temperature": temperature}
    step, state = step_arguments(args), args["states"].clone()
    rotated = {name: rotate(args[name], step["angles"]) for name in ("q", "k")}
    expected, last = one_by_one(**args | rotated)
    out = gated_retention_step(**step, state=state)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


DECAYS = 1 - 2.0 ** (-5 - torch.arange(24, dtype=torch.float64))  # RetNet's, of 24 heads


def constant_gate(decays, tokens, device="cpu"):
    """The gate whose decays these are at each token, in float32: an expanded view."""
    return (decays**16).logit().float().to(device).expand(tokens, -1)


def test_constant_decays_are_right_to_the_slowest():
    log_gate = retention_log_gate(constant_gate(DECAYS, 2)).double()
    assert (log_gate / DECAYS.log() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_constant_gate_is_float32_whatever_the_inputs_are(dtype):
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-12
    for lengths in ([70, 3], [1, 1]):
        args = packed(lengths, 4, dtype=dtype, states=2)
        args["gate"] = constant_gate(DECAYS[::7], sum(lengths))
        expected, expected_last = one_by_one(**in_float64(args))
        out, last = gated_retention(**args)
        assert (out - expected).norm() < limit * expected.norm() and out.dtype == dtype
        assert (last - expected_last).norm() < min(limit, 1e-5) * expected_last.norm()
    step, state = step_arguments(args), args["states"].clone()
    expected = gated_retention_step_reference(**in_float64(step), state=args["states"].double())
    out = gated_retention_step(**step, state=state)
    assert (out - expected).norm() < limit * expected.norm() and out.dtype == dtype


# From here on: the Triton kernels, on the GPU or in the interpreter.


@pytest.fixture
def triton_version(monkeypatch):
    """The kernels' module, cutting sequences into segments wherever they can be cut."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import retention_triton

    if not ON_GPU:
        monkeypatch.setattr(retention_triton, "MIN_SEGMENT", 64)
    return retention_triton


def compare(triton_version, close, args):
    """Runs the kernels and checks all that they return, and that their inputs are not changed."""
    before = {name: x.clone() for name, x in args.items() if isinstance(x, torch.Tensor)}
    expected, expected_last = gated_retention_reference(**in_float64(args))
    out, last = triton_version.gated_retention(**args)
    assert out.dtype == args["q"].dtype and out.is_contiguous()
    close(out, expected)
    if args["keep"]:
        assert last.dtype == torch.float32
        close(last, expected_last)
    else:
        assert last is None
    assert all(torch.equal(x, args[name]) for name, x in before.items())


LENGTHS = [[1], [65], [300, 1, 63, 200]]
DIMS = [32, 48]
if ON_GPU:
    LENGTHS += [[63], [1000], [32769], [8192, 8192], [5000, 1, 700, 64, 65], [170] * 100]
    DIMS += [64, 96, 128, 256]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("given", [True, False], ids=["with_states", "from_zero"])
def test_triton(triton_version, close, dtype, device, dim, lengths, given):
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths))) if given else None
    args = packed(lengths, 2, dim, dtype, device, sources, 3 if given else 0, pad=6)
    if not given:
        args |= {"swish": None}
    compare(triton_version, close, args)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"swish": None}, {"keep": False, "temperature": 3.0}], ids=str)
def test_triton_options(triton_version, close, dtype, device, changes):
    compare(triton_version, close, packed([200, 7], 1, 64, dtype, device) | changes)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [4, 8, 16, 128, 256])
def test_triton_small_and_large_heads(triton_version, close, dtype, device, dim):
    compare(triton_version, close, packed([129], 1, dim, dtype, device, states=1))


def test_triton_takes_rows_at_odd_distances(triton_version, close, dtype, device):
    compare(triton_version, close, packed([150], 2, 32, dtype, device, pad=1))


@pytest.mark.parametrize("gate", [-100.0, 12.0], ids=["closed", "open"])
def test_triton_extreme_gates(triton_version, close, dtype, device, gate):
    """Products that underflow within a chunk, and decays so slow that each counts to the end."""
    args = packed([32769 if ON_GPU else 200], 1, 32, dtype, device, states=1)
    compare(triton_version, close, args | {"gate": torch.full_like(args["gate"], gate)})


@pytest.mark.slow
@pytest.mark.parametrize("reach", [500, 3200, 1e6], ids=lambda reach: f"{reach:g}_tokens")
def test_triton_sums_of_long_segments(triton_version, close, dtype, device, reach, monkeypatch):
    """Gates of which so many in a row let 2^-126 through, in segments of 1200 tokens."""
    monkeypatch.setattr(triton_version, "programs", lambda device: 2)
    args = packed([2401], 1, 16, dtype, device, states=1)
    gate = torch.tensor(2 ** (-126 * 16 / reach), dtype=torch.float64).logit().item()
    compare(triton_version, close, args | {"gate": torch.full_like(args["gate"], gate)})


@pytest.mark.slow
def test_triton_sums_leave_out_what_has_decayed(triton_version, close, dtype, device, monkeypatch):
    monkeypatch.setattr(triton_version, "programs", lambda device: 2)
    args = packed([2401], 1, 16, dtype, device) | {"keep": False}
    args["gate"].fill_(-2.0)  # 2^-126 in 657 tokens
    expected, _ = gated_retention_reference(**in_float64(args))
    args["k"][:64] = float("nan")
    out, _ = triton_version.gated_retention(**args)
    assert out[:1200].isnan().all()  # in its own segment, all outputs see it
    close(out[1216:], expected[1216:])


def test_triton_effect_is_right_to_the_last_segment(triton_version, device):
    """Of segments in a row that let little through, and some at the end that let much."""
    sums = torch.randn(48, 2, 8, 8, device=device)
    decays = -500 * torch.rand(48, 2, device=device)
    decays[-4], decays[-3:] = -5000, decays[-3:] / 500
    decay, added = triton_version._effect(sums, decays)
    expected = torch.zeros(2, 8, 8, dtype=torch.float64, device=device)
    for more, log_decay in zip(sums.double(), decays.double(), strict=True):
        expected = log_decay.exp2()[:, None, None] * expected + more
    torch.testing.assert_close(added.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(decay, (decays.double().sum(0) * math.log(2)).float())


@pytest.mark.slow
def test_triton_constant_gate(triton_version, close, dtype, device):
    args = packed([130], 2, 16, dtype, device, states=1)
    compare(triton_version, close, args | {"gate": constant_gate(DECAYS[::23], 130, device)})


def test_triton_constant_decays_are_right_to_the_slowest(triton_version, device):
    """What a segment of 64 tokens multiplies a state by, as the kernels pass it on."""
    args = packed([64], 24, 16, torch.float32, device)
    k, v, gate = args["k"], args["v"], constant_gate(DECAYS, 64, device)
    segment = torch.tensor([[0, 64, -1, 0]], dtype=torch.int32, device=device)
    sums, decays = k.new_empty(1, 24, 16, 16), k.new_empty(1, 24)
    triton_version._sum_segments[(24,)](
        k, v, gate, segment, sums, decays, k.stride(0), v.stride(0), gate.stride(0),
        HEADS=24, DIM=16, PADDED=16, UNIT=1, CHUNK=64, BLOCK=16, TEMPERATURE=16.0,
    )  # fmt: skip
    assert gate.stride(0) == 0
    assert (decays[0].double().cpu() / (64 * DECAYS.log2()) - 1).abs().max() < 1e-6


def test_triton_step_takes_a_constant_gate(triton_version, device):
    args = packed([1] * 3, 4, 8, torch.bfloat16, device, states=3)
    args["gate"] = constant_gate(DECAYS[::7], 3, device)
    step, state = step_arguments(args), args["states"]
    wide_state = state.double()
    expected = gated_retention_step_reference(**in_float64(step), state=wide_state)
    out = triton_version.gated_retention_step(**step, state=state)
    assert (out - expected).norm() < 1e-2 * expected.norm() and out.dtype == torch.bfloat16
    assert (state - wide_state).norm() < 1e-2 * wide_state.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [4, 8, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize(("batch", "temperature"), [(1, 16.0), (5, 3.0)])
def test_triton_step(triton_version, close, dtype, device, dim, batch, temperature):
    args = packed([1] * batch, 3, dim, dtype, device, states=batch) | {"temperature": temperature}
    step, state = step_arguments(args), args["states"]
    wide, wide_state = in_float64(step), state.double()
    out = triton_version.gated_retention_step(**step, state=state)
    expected = gated_retention_step_reference(**wide, state=wide_state)
    assert out.dtype == dtype and out.is_contiguous()
    close(out, expected)
    close(state, wide_state)


@pytest.mark.slow
def test_triton_takes_any_strides(triton_version, dtype, device, head_by_head):
    args = packed([1] * 5, 3, 32, dtype, device, states=5)
    other = {
        name: head_by_head(x) if name in ("q", "k", "v", "gate", "swish") else x
        for name, x in args.items()
    }
    pairs = zip(*(triton_version.gated_retention(**a) for a in (args, other)), strict=True)
    steps = [
        triton_version.gated_retention_step(**step_arguments(a), state=args["states"].clone())
        for a in (args, other)
    ]
    assert all(torch.equal(a, b) for a, b in (*pairs, steps))


def test_dispatch(monkeypatch):
    """Tensors that the kernels take go to them, by the same arguments; these do not."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import retention_triton

    args = packed([4])
    monkeypatch.setattr(retention, "use_triton", lambda *tensors: True)
    given = []
    monkeypatch.setattr(
        retention_triton, "gated_retention", lambda *a: given.extend(a) or (a[0], None)
    )
    assert gated_retention(**args) == (args["q"], None)
    assert all(a is b for a, b in zip(given, args.values(), strict=True))


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "triton"])
def test_sums_beyond_the_range_of_float16(kernels, device, monkeypatch):
    """Inputs within the range, and outputs, but not what lies between them."""
    if kernels:
        pytest.importorskip("triton")
    monkeypatch.setattr(retention, "use_triton", lambda *tensors: kernels)
    for lengths in ([100, 30], [1, 1]):
        args = packed(lengths, dtype=torch.float16, device=device, states=2)
        args |= {name: 300 * args[name] for name in "qkv"}
        args["states"] = 1e6 * args["states"]
        if lengths == [1, 1]:
            step, last = step_arguments(args), args["states"]
            wide, expected_last = in_float64(step), last.double()
            out = gated_retention_step(**step, state=last)
            expected = gated_retention_step_reference(**wide, state=expected_last)
        else:
            out, last = gated_retention(**args)
            expected, expected_last = gated_retention_reference(**in_float64(args))
        assert out.dtype == torch.float16 and last.dtype == torch.float32
        assert (out - expected).norm() < 1e-2 * expected.norm()
        assert (last - expected_last).norm() < 1e-2 * expected_last.norm()
