"""The fused products against their parts, and the Triton kernels against them in float64."""

import pytest
import torch
import torch.nn.functional as F

from yoco_eval.kernels.matvec import linear_add, norm_linear, norm_swiglu_linear
from yoco_eval.kernels.norm import rms_norm_reference
from yoco_eval.kernels.swiglu import swiglu_reference

SHAPES = [(2, 32), (12, 96), (66, 301), (10, 1024), (6, 8200)]  # rows, columns
if torch.cuda.is_available():
    SHAPES += [(2050, 64), (12312, 3072), (16384, 3072), (3072, 8192), (3072, 3072), (100288, 3072)]


def inputs(rows, columns, device, dtype, tokens=1):
    torch.manual_seed(0)
    x = 3 * torch.randn(tokens, columns, device=device)
    norm_weight = torch.randn(columns, device=device)
    weight = torch.randn(rows, columns, device=device) / columns**0.5
    residual = torch.randn(tokens, rows, device=device)
    return tuple(t.to(dtype) for t in (x, norm_weight, weight, residual))


@pytest.mark.parametrize("tokens", [1, 5])
def test_parts(tokens):
    x, norm_weight, weight, residual = inputs(12, 16, "cpu", torch.float64, tokens)
    product = rms_norm_reference(x, norm_weight, 0.1) @ weight.T
    torch.testing.assert_close(norm_linear(x, norm_weight, weight, 0.1), product)
    torch.testing.assert_close(
        norm_swiglu_linear(x, norm_weight, weight, 0.1), F.silu(product[:, :6]) * product[:, 6:]
    )
    expected = residual + x @ weight.T
    torch.testing.assert_close(linear_add(x, weight, residual), expected)


@pytest.mark.parametrize("tokens", [1, 5])
def test_linear_add_overwrites_the_residual_without_gradients_only(tokens, device):
    x, _, weight, residual = inputs(12, 16, device, torch.float32, tokens)
    expected = residual + x @ weight.T

    weight.requires_grad_()
    out = linear_add(x, weight, residual)
    torch.testing.assert_close(out, expected)
    assert not torch.equal(residual, expected)
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(12, 16))

    with torch.no_grad():
        assert linear_add(x, weight, residual).data_ptr() == residual.data_ptr()
    torch.testing.assert_close(residual, expected)


def test_gradients(device):
    x, norm_weight, weight, _ = inputs(12, 16, device, torch.float32)
    x.requires_grad_()
    norm_linear(x, norm_weight, weight).sum().backward()
    first = x.grad.clone()
    norm_swiglu_linear(x, norm_weight, weight).sum().backward()
    assert first.any() and not torch.equal(first, x.grad)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape, device, dtype, close):
    pytest.importorskip("triton")
    check(shape, device, dtype, close)


@pytest.mark.parametrize("tile", [(128, 4, 1), (128, 8, 4), (256, 1, 2)], ids=str)
def test_triton_any_tile(tile, device, dtype, close, monkeypatch):
    """Tiles that the rows do, and do not, divide into."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import matvec_triton

    monkeypatch.setattr(matvec_triton, "_config", lambda *_: tile)
    check((18, 96), device, dtype, close)


def check(shape, device, dtype, close):
    from yoco_eval.kernels import matvec_triton as fast

    x, norm_weight, weight, residual = inputs(*shape, device, dtype)
    wide_x, wide_norm_weight, wide_weight = x.double(), norm_weight.double(), weight.double()
    normed = rms_norm_reference(wide_x, wide_norm_weight, 0.1)

    out = fast.norm_linear(x, norm_weight, weight, 0.1)
    close(out, normed @ wide_weight.T)
    assert out.dtype == dtype

    out = fast.norm_swiglu_linear(x, norm_weight, weight, 0.1)
    close(out, swiglu_reference(normed @ wide_weight.T))
    assert out.dtype == dtype

    expected = residual.double() + wide_x @ wide_weight.T
    out = fast.linear_add_(x, weight, residual)
    assert out is residual
    close(out, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dispatch(device, dtype):
    """One row is the kernels', several rows are not."""
    pytest.importorskip("triton")
    from yoco_eval.kernels import matvec_triton as fast

    x, norm_weight, weight, residual = inputs(32, 96, device, dtype)
    one = norm_linear(x, norm_weight, weight)
    assert torch.equal(one, fast.norm_linear(x, norm_weight, weight, 1e-5))
    gated = norm_swiglu_linear(x, norm_weight, weight)
    assert torch.equal(gated, fast.norm_swiglu_linear(x, norm_weight, weight, 1e-5))
    added = linear_add(x, weight, residual.clone())
    assert torch.equal(added, fast.linear_add_(x, weight, residual.clone()))

    several = norm_linear(x.expand(3, -1).contiguous(), norm_weight, weight)
    torch.testing.assert_close(several, one.expand(3, -1), rtol=2e-2, atol=2e-2)
