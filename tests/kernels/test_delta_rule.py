"""The gated delta rule: its two forms against the definition, packed sequences against the
recurrence, and the Triton kernels against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from arguments import in_float64

from yoco_eval.kernels import delta_rule
from yoco_eval.kernels.delta_rule import (
    delta_rule_chunkwise,
    delta_rule_recurrent,
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
    gated_delta_rule_step_reference,
)
from yoco_eval.kernels.sequences import Sequences

ON_GPU = torch.cuda.is_available()


def inputs(length, batch=2, heads=3, dk=8, dv=6, dtype=torch.float64):
    torch.manual_seed(length)
    q, k = F.normalize(torch.randn(2, batch, heads, length, dk, dtype=dtype), dim=-1)
    v = torch.randn(batch, heads, length, dv, dtype=dtype)
    log_decay = F.logsigmoid(4 * torch.randn(batch, heads, length, dtype=dtype))
    beta = 2 * torch.rand(batch, heads, length, dtype=dtype)
    state = torch.randn(batch, heads, dk, dv, dtype=dtype)
    return q, k, v, log_decay, beta, state


def by_definition(q, k, v, log_decay, beta, state):
    """S = e^g (I - beta k^T k) S + beta k^T v, each transition written out as a matrix."""
    out = torch.empty_like(v)
    identity = torch.eye(k.shape[-1], dtype=k.dtype)
    for p in range(q.shape[2]):
        k_p, v_p, beta_p = k[:, :, p, None], v[:, :, p, None], beta[:, :, p, None, None]
        transition = identity - beta_p * k_p.transpose(-1, -2) @ k_p
        state = log_decay[:, :, p, None, None].exp() * transition @ state
        state = state + beta_p * k_p.transpose(-1, -2) @ v_p
        out[:, :, p] = (q[:, :, p, None] @ state)[:, :, 0]
    return out, state


@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("form", [delta_rule_recurrent, delta_rule_chunkwise])
def test_forms_match_the_definition(form, length):
    args = inputs(length)
    for actual, expected in zip(form(*args), by_definition(*args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_any_chunk_size(length, chunk_size):
    args = inputs(length)
    actual = delta_rule_chunkwise(*args, chunk_size=chunk_size)
    for a, e in zip(actual, delta_rule_recurrent(*args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_a_text_may_be_cut_anywhere():
    *args, state = inputs(100)
    whole = delta_rule_chunkwise(*args, state, chunk_size=16)
    outputs = []
    for cut in (slice(0, 1), slice(1, 38), slice(38, 100)):
        out, state = delta_rule_chunkwise(*(x[:, :, cut] for x in args), state, chunk_size=16)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, whole[1], rtol=0, atol=1e-12)


def test_no_state_is_a_state_of_zeros():
    *args, state = inputs(10)
    for form in (delta_rule_recurrent, delta_rule_chunkwise):
        for a, e in zip(form(*args), form(*args, torch.zeros_like(state)), strict=True):
            assert torch.equal(a, e)


def test_strong_decay_stays_finite_and_right():
    """Decays of which the product over a chunk underflows float32."""
    q, k, v, log_decay, beta, state = (x.float() for x in inputs(200))
    args = (q, k, v, torch.full_like(log_decay, -20.0), beta, state)
    for a, e in zip(
        delta_rule_chunkwise(*args), delta_rule_recurrent(*(x.double() for x in args)), strict=True
    ):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


def test_what_a_key_was_told_last_is_what_it_recalls():
    """The delta rule's point: with beta = 1 and no decay, writing replaces."""
    k = F.one_hot(torch.tensor([0, 1, 0, 1, 1])).double()[None, None]
    v = torch.arange(5.0, dtype=torch.float64)[None, None, :, None]
    ones = torch.ones(1, 1, 5, dtype=torch.float64)
    for form in (delta_rule_recurrent, delta_rule_chunkwise):
        _, state = form(k, k, v, 0 * ones, ones)
        assert state.flatten().tolist() == [2.0, 4.0]


def packed(
    lengths,
    heads=2,
    value_heads=4,
    dk=8,
    dv=12,
    dtype=torch.float64,
    device="cpu",
    sources=None,
    states=0,
    pad=0,
):
    """All arguments of `gated_delta_rule`: parts of one projection's output, with as many starting
    states as told."""
    torch.manual_seed(sum(lengths) + dk)
    widths = [heads * dk] * 2 + [value_heads * dv] * 2 + [value_heads] * 2 + [pad]
    y = torch.randn(sum(lengths), sum(widths)).to(device, dtype)
    q, k, v, gate, a, b, _ = y.split(widths, dim=1)
    starts = tuple(7 * i for i in range(len(lengths)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": q.unflatten(1, (heads, dk)),
        "k": k.unflatten(1, (heads, dk)),
        "v": v.unflatten(1, (value_heads, dv)),
        "a": a,
        "b": b,
        "a_log": torch.linspace(-3, 1, value_heads).to(device, dtype),
        "dt_bias": torch.linspace(-4, 0, value_heads).to(device, dtype),
        "sequences": Sequences(tuple(lengths), starts, torch.device(device), sources),
        "states": torch.randn(states, value_heads, dk, dv).to(device, wide) if states else None,
        "gate": gate.unflatten(1, (value_heads, dv)),
        "weight": (1 + torch.randn(dv) / 4).to(device, dtype),
        "eps": 1e-3,
        "negative": False,
        "keep": True,
    }


def one_by_one(q, k, v, a, b, a_log, dt_bias, sequences, states, gate, weight, eps, negative, keep):
    """Each sequence by itself, through the recurrence."""
    per_head = v.shape[1] // q.shape[1]
    q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q / q.shape[-1] ** 0.5
    of_head = [h // per_head for h in range(v.shape[1])]
    log_decay = -torch.exp(a_log) * torch.log1p(torch.exp(a + dt_bias))
    beta = (2 if negative else 1) / (1 + torch.exp(-b))
    outputs, lasts = [], []
    for i, (start, end) in enumerate(zip(sequences.offsets, sequences.offsets[1:], strict=False)):
        source = i if sequences.sources is None else sequences.sources[i]
        parts = (
            x[None, start:end].transpose(1, 2)
            for x in (q[:, of_head], k[:, of_head], v, log_decay, beta)
        )
        out, last = delta_rule_recurrent(*parts, None if states is None else states[source, None])
        outputs.append(out[0].transpose(0, 1))
        lasts.append(last)
    out = torch.cat(outputs)
    if weight is not None:
        out = out / torch.sqrt((out * out).mean(-1, keepdim=True) + eps) * weight
    if gate is not None:
        out = out * F.silu(gate)
    return out, torch.cat(lasts) if keep else None


@pytest.mark.parametrize("lengths", [[1], [70], [9, 9, 9], [1, 1], [66, 1, 5, 66, 1]])
@pytest.mark.parametrize("given", [True, False], ids=["with_states", "from_zero"])
def test_packed_sequences_do_not_see_each_other(lengths, given):
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths)))
    args = packed(lengths, sources=sources if given else None, states=3 if given else 0)
    for a, e in zip(gated_delta_rule(**args), one_by_one(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_each_sequence_continues_its_own_state_by_default():
    args = packed([3, 40, 3], states=3)
    for a, e in zip(gated_delta_rule(**args), one_by_one(**args), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "changes", [{"negative": True}, {"gate": None}, {"gate": None, "weight": None, "keep": False}]
)
def test_options(changes):
    args = packed([20, 4]) | changes
    out, last = gated_delta_rule(**args)
    expected, expected_last = one_by_one(**args)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    if args["keep"]:
        torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-11)
    else:
        assert last is None


def test_gradients_flow_through_a_batch_of_packed_sequences():
    args = packed([33, 33])
    names = ("q", "k", "v", "a", "b", "a_log", "dt_bias", "gate", "weight")
    leaves = [args[name].detach().clone().requires_grad_() for name in names]
    args |= dict(zip(names, leaves, strict=True))
    actual = torch.autograd.grad(gated_delta_rule(**args)[0].square().sum(), leaves)
    expected = torch.autograd.grad(one_by_one(**args)[0].square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-9)


def test_computes_in_float32_whatever_comes_in():
    args = packed([50], dtype=torch.bfloat16, states=1)
    out, last = gated_delta_rule(**args)
    expected, expected_last = gated_delta_rule(**in_float64(args))
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    torch.testing.assert_close(last.double(), expected_last, rtol=1e-5, atol=1e-5)
    assert (out.double() - expected).norm() / expected.norm() < 4e-3  # bfloat16's own rounding


def step_arguments(args):
    """Those of `gated_delta_rule_step`, of sequences of one token, without the state."""
    return {name: x for name, x in args.items() if name not in ("sequences", "states", "keep")}


def test_step_changes_its_states_in_place():
    args = packed([1, 1, 1], states=3) | {"negative": True}
    state = args["states"].clone()
    expected, last = one_by_one(**args)
    out = gated_delta_rule_step(**step_arguments(args), state=state)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


# From here on: the Triton kernels, on the GPU or in the interpreter.


@pytest.fixture
def triton_version(monkeypatch):
    """The kernels' module, cutting sequences into segments wherever they can be cut."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import delta_rule_triton

    if not ON_GPU:
        monkeypatch.setattr(delta_rule_triton, "MIN_SEGMENT", 32)
    return delta_rule_triton


def compare(triton_version, close, args):
    """Runs the kernels and checks all that they return, and that their inputs are not changed."""
    before = {name: x.clone() for name, x in args.items() if isinstance(x, torch.Tensor)}
    expected, expected_last = gated_delta_rule_reference(**in_float64(args))
    out, last = triton_version.gated_delta_rule(**args)
    assert out.dtype == args["q"].dtype and out.is_contiguous()
    close(out, expected)
    if args["keep"]:
        assert last.dtype == torch.float32
        close(last, expected_last)
    else:
        assert last is None
    assert all(torch.equal(x, args[name]) for name, x in before.items())


LENGTHS = [[1], [70, 1, 33]]
DIMS = [(24, 40)]
if ON_GPU:
    LENGTHS += [[63], [1000], [8193], [5000, 1, 700, 64, 65], [170] * 100]
    DIMS += [(32, 48), (64, 128), (128, 128), (128, 256), (256, 100), (256, 512)]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["with_states", "from_zero"])
def test_triton(triton_version, close, dtype, device, dims, lengths, given):
    sources = tuple((2 * i + 1) % 3 for i in range(len(lengths))) if given else None
    args = packed(lengths, 1, 2, *dims, dtype, device, sources, 3 if given else 0, pad=6)
    if not given:
        args |= {"gate": None, "weight": None}
    compare(triton_version, close, args)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gate": None}, {"keep": False}], ids=str)
def test_triton_options(triton_version, close, dtype, device, changes):
    compare(triton_version, close, packed([70, 7], 1, 1, 136, 20, dtype, device, pad=1) | changes)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [-30.0, 20.0], ids=["open", "closed"])
@pytest.mark.parametrize("beta", [0.001, 1.0, 2.0])
def test_triton_extremes(triton_version, close, dtype, device, beta, decay):
    """Keys that are nearly one, in states that last, are overwritten or reflected, or vanish."""
    # Reflections that nothing fades keep every rounding of bfloat16, from chunk to chunk.
    lasting = dtype == torch.bfloat16 and beta == 2 and decay < 0
    length = 200 if ON_GPU and not lasting else 70
    args = packed([length], 1, 1, 32, 32, dtype, device, states=1)
    args |= {"negative": True, "dt_bias": torch.full_like(args["dt_bias"], decay)}
    args["b"].fill_(torch.tensor(beta / 2).logit().clamp(max=30).item())
    args["k"].add_(3)
    compare(triton_version, close, args)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [-9.0, -2.0, 2.0])
@pytest.mark.parametrize("dims", [(16, 16), *(DIMS[-1:] if ON_GPU else ())], ids=str)
def test_triton_segments(triton_version, close, dtype, device, monkeypatch, dims, decay):
    """With decays over whole segments, over some of their chunks, and over less than one."""
    monkeypatch.setattr(triton_version, "programs", lambda device: 1 << 20)
    lengths = [9000, 2100] if ON_GPU else [100, 70]
    args = packed(lengths, 1, 1, *dims, dtype, device, (1, 0), 2)
    args |= {"a_log": torch.zeros_like(args["a_log"])}
    compare(triton_version, close, args | {"dt_bias": torch.full_like(args["dt_bias"], decay)})


@pytest.mark.slow
def test_triton_sums_leave_out_what_has_decayed(triton_version, close, dtype, device, monkeypatch):
    monkeypatch.setattr(triton_version, "MIN_SEGMENT", 128)
    args = packed([256], 1, 1, 16, 16, dtype, device) | {"keep": False}
    args |= {"a_log": torch.full_like(args["a_log"], 1.5)}
    args |= {"dt_bias": torch.zeros_like(args["dt_bias"])}  # 2^-126 in some 25 tokens
    expected, _ = gated_delta_rule_reference(**in_float64(args))
    args["k"][0] = float("nan")
    out, _ = triton_version.gated_delta_rule(**args)
    assert out[:128].isnan().all()  # in its own segment, all outputs see it
    close(out[128:], expected[128:])


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(8, 20), *(DIMS[1:] if ON_GPU else ())], ids=str)
@pytest.mark.parametrize("changes", [{}, {"negative": True, "gate": None, "weight": None}], ids=str)
def test_triton_step(triton_version, close, dtype, device, dims, changes):
    args = packed([1] * 3, 1, 2, *dims, dtype, device, states=3, pad=1) | changes
    step, state = step_arguments(args), args["states"]
    wide, wide_state = in_float64(step), state.double()
    out = triton_version.gated_delta_rule_step(**step, state=state)
    expected = gated_delta_rule_step_reference(**wide, state=wide_state)
    assert out.dtype == dtype and out.is_contiguous()
    close(out, expected)
    close(state, wide_state)


@pytest.mark.slow
def test_triton_takes_any_strides(triton_version, dtype, device, head_by_head):
    args = packed([1] * 3, 2, 2, 8, 8, dtype, device, states=3)
    other = {
        name: head_by_head(x) if name in ("q", "k", "v", "a", "b", "gate") else x
        for name, x in args.items()
    }
    pairs = zip(*(triton_version.gated_delta_rule(**a) for a in (args, other)), strict=True)
    steps = [
        triton_version.gated_delta_rule_step(**step_arguments(a), state=args["states"].clone())
        for a in (args, other)
    ]
    assert all(torch.equal(a, b) for a, b in (*pairs, steps))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "triton"])
def test_sums_beyond_the_range_of_float16(kernels, device, monkeypatch):
    """Inputs within the range, and outputs, but not what lies between them."""
    if kernels:
        pytest.importorskip("triton")
    monkeypatch.setattr(delta_rule, "use_triton", lambda *tensors: kernels)
    args = packed([30, 20], 1, 1, dtype=torch.float16, device=device, states=2)
    args |= {"v": 3000 * args["v"], "states": 1e6 * args["states"]}
    out, last = gated_delta_rule(**args)
    expected, expected_last = gated_delta_rule_reference(**in_float64(args))
    assert out.dtype == torch.float16 and last.dtype == torch.float32
    assert (out - expected).norm() < 1e-2 * expected.norm()
    assert (last - expected_last).norm() < 1e-2 * expected_last.norm()

    first = {name: args[name][:2] for name in ("q", "k", "v", "a", "b", "gate")}
    step = step_arguments(args) | first
    expected = gated_delta_rule_step_reference(**in_float64(step), state=last.double())
    assert (gated_delta_rule_step(**step, state=last) - expected).norm() < 1e-2 * expected.norm()


def test_dispatch(monkeypatch):
    """Tensors that the kernels take go to them, by the same arguments; these do not."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import delta_rule_triton

    args = packed([4])
    monkeypatch.setattr(delta_rule, "use_triton", lambda *tensors: True)
    given = []
    monkeypatch.setattr(
        delta_rule_triton, "gated_delta_rule", lambda *a: given.extend(a) or (a[0], None)
    )
    assert gated_delta_rule(**args) == (args["q"], None)
    assert all(a is b for a, b in zip(given, args.values(), strict=True))
