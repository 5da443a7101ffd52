"""Matrix products and what follows them: against their parts, and the kernels in float64."""

import pytest
import torch
import torch.nn.functional as F

from yoco_eval.kernels import fused_linear
from yoco_eval.kernels.fused_linear import fuses_swiglu, rotary_linear, swiglu_linear
from yoco_eval.kernels.rotary import rotary_angles, rotate_reference
from yoco_eval.kernels.swiglu import swiglu_reference

SWIGLU = [(1, 16, 8), (63, 72, 40), (300, 128, 136), (129, 200, 264)]  # tokens, K, F
ROTARY = [(1, 16, 1, 16), (130, 72, 5, 128), (63, 128, 3, 256), (129, 200, 9, 32)]  # .., H, D
if torch.cuda.is_available():
    SWIGLU += [(1000, 3072, 8192), (32769, 3072, 8192), (5000, 1000, 2816), (140_000, 64, 8200)]
    ROTARY += [(1000, 3072, 48, 128), (32769, 3072, 48, 128), (5000, 1000, 33, 64)]
NO_HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request, device):
    """The kernels are for these two."""
    if device == "cpu" and request.param == "bfloat16":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    return getattr(torch, request.param)


@pytest.fixture
def kernels():
    pytest.importorskip("triton.tools.tensor_descriptor")
    if torch.cuda.is_available() and NO_HOPPER:
        pytest.skip("the kernels are for Hopper")
    from yoco_eval.kernels import fused_linear_triton

    return fused_linear_triton


def inputs(tokens, width, columns, device, dtype):
    torch.manual_seed(0)
    x = 3 * torch.randn(tokens, width, device=device)
    weight = torch.randn(columns, width, device=device) / width**0.5
    return x.to(dtype), weight.to(dtype)


def angles_of(tokens, dim, device, dtype):
    return rotary_angles(torch.arange(7, 7 + tokens, device=device), dim, 1e4, dtype)


def test_swiglu_of_a_product():
    x, weight = inputs(5, 16, 12, "cpu", torch.float64)
    product = x @ weight.T
    torch.testing.assert_close(swiglu_linear(x, weight), F.silu(product[:, :6]) * product[:, 6:])


@pytest.mark.parametrize("gradients", [False, True])
def test_rotated_columns_of_a_product(gradients):
    x, weight = inputs(5, 16, 21, "cpu", torch.float64)
    weight.requires_grad_(gradients)
    angles = angles_of(5, 6, "cpu", torch.float64)
    heads, rest = rotary_linear(x, weight, angles, 18)
    product = x @ weight.T
    expected = rotate_reference(product[:, :18].unflatten(1, (3, 6)), angles)
    torch.testing.assert_close(heads, expected)
    torch.testing.assert_close(rest, product[:, 18:])
    if gradients:
        (gradient,) = torch.autograd.grad(heads.square().sum() + rest.sum(), weight)
        (same,) = torch.autograd.grad(expected.square().sum() + product[:, 18:].sum(), weight)
        torch.testing.assert_close(gradient, same)


@pytest.mark.parametrize("shape", SWIGLU, ids=str)
def test_triton_swiglu(shape, device, dtype, close, kernels):
    tokens, width, hidden = shape
    x, weight = inputs(tokens, width, 2 * hidden, device, dtype)
    out = kernels.swiglu_linear(x, weight)
    assert out.dtype == dtype
    # From both ends, since float64 of everything would not fit beside the largest.
    for part in (slice(20_000), slice(-20_000, None)):
        close(out[part], swiglu_reference(x[part].double() @ weight.double().T))


def test_triton_swiglu_far_from_zero(device, kernels):
    """A half beyond float16's range: silu of it is 0, not NaN."""
    x = torch.full((3, 16), 100.0, device=device, dtype=torch.float16)
    weight = torch.ones(16, 16, device=device, dtype=torch.float16)
    weight[:8] = -100.0
    assert torch.equal(kernels.swiglu_linear(x, weight), torch.zeros_like(x[:, :8]))


@pytest.mark.parametrize("shape", ROTARY, ids=str)
def test_triton_rotary(shape, device, dtype, close, kernels):
    tokens, width, heads, dim = shape
    x, weight = inputs(tokens, width, heads * dim, device, dtype)
    angles = angles_of(tokens, dim, device, dtype)
    out = kernels.rotary_linear(x, weight, angles)
    assert out.dtype == dtype
    product = (x.double() @ weight.double().T).unflatten(1, (heads, dim))
    close(out, rotate_reference(product, tuple(part.double() for part in angles)))


def test_triton_more_tiles_than_programs(device, dtype, close, kernels, monkeypatch):
    """In groups, of which the last is smaller; the programs take several tiles each."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(kernels, "_GROUP", 2)
    x, weight = inputs(600, 32, 528, device, dtype)
    product = x.double() @ weight.double().T
    close(kernels.swiglu_linear(x, weight), swiglu_reference(product))
    angles = angles_of(600, 16, device, dtype)
    expected = rotate_reference(
        product.unflatten(1, (33, 16)), tuple(part.double() for part in angles)
    )
    close(kernels.rotary_linear(x, weight, angles), expected)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(fused_linear, "triton_takes", lambda device, dtype: True)
    monkeypatch.setattr(fused_linear, "on_hopper", lambda device: True)
    monkeypatch.setattr(fused_linear, "_has_descriptors", lambda: True)


def test_kernels_where_they_pay(on_hopper, monkeypatch):
    rules = {
        fuses_swiglu: (2048, 3072, 8192, torch.bfloat16, torch.device("cuda")),
        fused_linear._fuses_rotation: (2048, 3072, 128, torch.bfloat16, torch.device("cuda")),
    }
    for rule, case in rules.items():
        assert rule(*case)
        for i, other in ((0, 2047), (1, 3076), (2, 100), (3, torch.float32)):
            assert not rule(*case[:i], other, *case[i + 1 :])
    for reason in ("triton_takes", "on_hopper", "_has_descriptors"):
        with monkeypatch.context() as patch:
            patch.setattr(fused_linear, reason, lambda *_: False)
            assert not any(rule(*case) for rule, case in rules.items())


@pytest.fixture
def calls(on_hopper, monkeypatch):
    """What runs: "apart", or a kernel with its arguments."""
    calls = []
    monkeypatch.setattr(fused_linear, "MIN_TOKENS", 5)
    monkeypatch.setattr(fused_linear, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(fused_linear, "swiglu", lambda product: calls.append("apart"))
    monkeypatch.setattr(fused_linear, "rotate", lambda *_, in_place: calls.append("apart"))
    monkeypatch.setattr(fused_linear, "run_triton", lambda *call: calls.append(call))
    return calls


def test_dispatch(calls, kernels):
    """The kernels get what they take, and the library the rest."""
    x, weight = inputs(5, 16, 24, "cpu", torch.float16)
    angles = angles_of(5, 16, "cpu", torch.float16)
    swiglu_linear(x, weight[:16])
    _, rest = rotary_linear(x, weight, angles, 16)
    torch.testing.assert_close(rest, x @ weight[16:].T)
    (fast, *given), (fast_rotary, *given_rotary) = calls
    assert fast is kernels.swiglu_linear and fast_rotary is kernels.rotary_linear
    torch.testing.assert_close(given, [x, weight[:16]], rtol=0, atol=0)
    torch.testing.assert_close(given_rotary, [x, weight[:16], angles], rtol=0, atol=0)


def test_what_descriptors_do_not_take_is_left_to_the_library(calls):
    x, weight = inputs(5, 16, 32, "cpu", torch.float16)
    angles = angles_of(5, 16, "cpu", torch.float16)
    unaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(5, 16)
    operands = [(x[:4], weight), (x.T.contiguous().T, weight), (unaligned, weight)]
    operands.append((x, weight.T.contiguous().T))
    for pair in operands:
        swiglu_linear(*pair)
        rotary_linear(*pair, tuple(part[: len(pair[0])] for part in angles), 16)
    rotary_linear(x, weight, angles, 0)
    assert calls == ["apart"] * 9
    for wrong in (weight[:, :8].contiguous(), torch.cat((weight, weight), 1)):
        with pytest.raises(RuntimeError):
            swiglu_linear(x, wrong)


def test_angles_of_other_tokens_are_refused(on_hopper):
    x, weight = inputs(5000, 16, 16, "cpu", torch.float16)
    with pytest.raises(RuntimeError):
        rotary_linear(x, weight, angles_of(4999, 16, "cpu", torch.float16), 16)


@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
def test_many_tokens_take_the_kernels_and_gradients_do_not(kernels):
    x, weight = inputs(4224, 256, 1024, "cuda", torch.bfloat16)
    angles = angles_of(4224, 64, "cuda", torch.bfloat16)
    assert torch.equal(swiglu_linear(x, weight), kernels.swiglu_linear(x, weight))
    heads, _ = rotary_linear(x, weight, angles, 512)
    assert torch.equal(heads, kernels.rotary_linear(x, weight[:512], angles))

    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu_linear(x, weight).sum(), weight)
    (expected,) = torch.autograd.grad(swiglu_reference(x @ weight.T).sum(), weight)
    torch.testing.assert_close(gradient, expected)
    (gradient,) = torch.autograd.grad(rotary_linear(x, weight, angles, 1024)[0].sum(), weight)
    heads = (x @ weight.T).unflatten(1, (-1, 64))
    (expected,) = torch.autograd.grad(rotate_reference(heads, angles).sum(), weight)
    torch.testing.assert_close(gradient, expected)
