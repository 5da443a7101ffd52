"""SwiGLU and GeGLU against their equations, their Triton kernel against references in float64."""

import math

import pytest
import torch

from yoco_eval.kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference

SHAPES = [(1, 64), (63, 96), (65, 513), (3, 5000), (0, 64)]  # tokens, F
if torch.cuda.is_available():
    SHAPES += [(1000, 8192), (32769, 8192), (140_000, 8192)]


def test_swiglu(device):
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, dtype=torch.float64, device=device)
    out = swiglu(torch.cat((a, b), dim=1))
    torch.testing.assert_close(out, a / (1 + (-a).exp()) * b)


def test_geglu(device):
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, dtype=torch.float64, device=device)
    out = geglu(torch.cat((a, b), dim=1))
    tanh = ((2 / math.pi) ** 0.5 * (a + 0.044715 * a**3)).tanh()
    torch.testing.assert_close(out, a / 2 * (1 + tanh) * b)


def test_gradients(device):
    h = torch.randn(3, 16, device=device, requires_grad=True)
    swiglu(h).sum().backward()
    assert h.grad is not None


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(name, shape, device, dtype, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels import swiglu_triton

    fast = getattr(swiglu_triton, name)
    reference = {"swiglu": swiglu_reference, "geglu": geglu_reference}[name]
    tokens, width = shape
    if tokens > 100_000 and dtype == torch.float32:
        pytest.skip("offsets beyond 2^31 are tried in 16 bits")
    torch.manual_seed(0)
    h = torch.randn(tokens, 2 * width, device=device, dtype=dtype).mul_(4)
    out = fast(h)
    assert out.dtype == dtype and out.shape == shape
    ends = slice(-40_000, None)  # float64 of all would not fit beside the largest
    if tokens:
        close(out[ends], reference(h[ends].double()))


def test_triton_on_a_part_of_the_columns(device, dtype, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.swiglu_triton import swiglu as fast

    torch.manual_seed(0)
    h = torch.randn(65, 200, device=device).to(dtype)[:, 8:138]
    close(fast(h), swiglu_reference(h.double()))


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_triton_far_from_zero(name, device, dtype):
    """silu(-large) is 0 and silu(large) the number itself: no NaN from infinite exponentials."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import swiglu_triton

    fast = getattr(swiglu_triton, name)
    a = torch.tensor([-1e4, -200.0, 200.0, 1e4], device=device)
    h = torch.cat((a, torch.ones_like(a))).to(dtype)[None]
    assert torch.equal(fast(h)[0], a.relu().to(dtype))
