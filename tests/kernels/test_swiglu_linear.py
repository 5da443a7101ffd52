"""SwiGLU of a matrix product against its parts, and the fused kernel against them in float64."""

import pytest
import torch
import torch.nn.functional as F

from yoco_eval.kernels import swiglu_linear as module
from yoco_eval.kernels.swiglu import swiglu_reference
from yoco_eval.kernels.swiglu_linear import fused, swiglu_linear

SHAPES = [(1, 16, 8), (63, 72, 40), (300, 128, 136), (129, 200, 264)]  # tokens, K, F
if torch.cuda.is_available():
    SHAPES += [(1000, 3072, 8192), (32769, 3072, 8192), (5000, 1000, 2816), (140_000, 64, 8200)]
NO_HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request, device):
    """The kernel is for these two."""
    if device == "cpu" and request.param == "bfloat16":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    return getattr(torch, request.param)


@pytest.fixture
def fast():
    pytest.importorskip("triton.tools.tensor_descriptor")
    if torch.cuda.is_available() and NO_HOPPER:
        pytest.skip("the kernel is for Hopper")
    from yoco_eval.kernels.swiglu_linear_triton import swiglu_linear as fast

    return fast


def inputs(tokens, width, hidden, device, dtype):
    torch.manual_seed(0)
    x = 3 * torch.randn(tokens, width, device=device)
    weight = torch.randn(2 * hidden, width, device=device) / width**0.5
    return x.to(dtype), weight.to(dtype)


def test_parts():
    x, weight = inputs(5, 16, 6, "cpu", torch.float64)
    product = x @ weight.T
    torch.testing.assert_close(swiglu_linear(x, weight), F.silu(product[:, :6]) * product[:, 6:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape, device, dtype, close, fast):
    x, weight = inputs(*shape, device, dtype)
    out = fast(x, weight)
    assert out.dtype == dtype
    # From both ends, since float64 of everything would not fit beside the largest.
    for part in (slice(20_000), slice(-20_000, None)):
        close(out[part], swiglu_reference(x[part].double() @ weight.double().T))


def test_triton_far_from_zero(device, fast):
    """A half beyond float16's range: silu of it is 0, not NaN."""
    x = torch.full((3, 16), 100.0, device=device, dtype=torch.float16)
    weight = torch.ones(16, 16, device=device, dtype=torch.float16)
    weight[:8] = -100.0
    assert torch.equal(fast(x, weight), torch.zeros_like(x[:, :8]))


def test_one_kernel_where_it_pays(monkeypatch):
    monkeypatch.setattr(module, "triton_takes", lambda device, dtype: dtype != torch.float64)
    monkeypatch.setattr(module, "_on_hopper", lambda device: True)
    rule = (12672, 3072, 8192, torch.bfloat16, torch.device("cuda"))
    assert fused(*rule)
    for i, other in ((0, 100), (1, 3076), (2, 8190), (3, torch.float32), (3, torch.float64)):
        assert not fused(*rule[:i], other, *rule[i + 1 :])
    monkeypatch.setattr(module, "_on_hopper", lambda device: False)
    assert not fused(*rule)


def test_dispatch(monkeypatch, fast):
    x, weight = inputs(5, 16, 8, "cpu", torch.float32)
    seen = []
    monkeypatch.setattr(module, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(module, "run_triton", lambda *call: seen.append(call))
    for answer in (True, False):
        monkeypatch.setattr(module, "fused", lambda *rule, answer=answer: answer)
        monkeypatch.setattr(module, "swiglu", lambda product: seen.append("apart"))
        swiglu_linear(x, weight)
    assert seen == [(fast, x, weight), "apart"]


@pytest.mark.skipif(NO_HOPPER, reason="needs a Hopper GPU")
def test_a_chunk_takes_the_fused_kernel_and_gradients_do_not(fast):
    x, weight = inputs(4224, 256, 512, "cuda", torch.bfloat16)
    assert torch.equal(swiglu_linear(x, weight), fast(x, weight))
    weight.requires_grad_()
    swiglu_linear(x, weight).sum().backward()
    assert weight.grad.any()
