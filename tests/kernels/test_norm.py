"""RMSNorm against its equation, and the Triton kernel against the reference in float64."""

import pytest
import torch

from yoco_eval.kernels.norm import rms_norm, rms_norm_add, rms_norm_reference

SHAPES = [(1, 96), (63, 128), (65, 32), (7, 3, 48), (5, 1000), (3, 5000), (0, 64)]
if torch.cuda.is_available():
    SHAPES += [(32769, 3072), (1000, 24, 128), (65, 16384), (750_000, 3072)]


def test_rms_norm():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.1)
    torch.testing.assert_close(rms_norm(x, None, 0.1), expected)
    torch.testing.assert_close(rms_norm(x, weight, 0.1), expected * weight)


def test_added_to_a_residual(device, dtype, close):
    torch.manual_seed(0)
    x, residual = (torch.randn(5, 48, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(48, device=device).to(dtype)
    expected = residual.double() + rms_norm(x.double(), weight.double(), 0.1)
    close(rms_norm_add(x, weight, 0.1, residual), expected)
    pytest.importorskip("triton")
    from yoco_eval.kernels.norm_triton import rms_norm as fast

    close(fast(x, weight, 0.1, residual), expected)


def test_mean_square_is_taken_in_float32():
    x = torch.full((4096,), 300.0, dtype=torch.float16)  # its square overflows float16
    assert torch.equal(rms_norm(x), torch.ones_like(x))


def test_gradients(device):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    rms_norm(x, torch.ones(16, device=device)).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_triton(shape, weighted, device, dtype, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.norm_triton import rms_norm as fast

    if shape[0] > 100_000 and (dtype == torch.float32 or weighted):
        pytest.skip("offsets beyond 2^31 are tried once")
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype) if weighted else None
    out = fast(x, weight, 0.1)
    assert out.dtype == dtype and out.shape == shape
    if not len(x):
        return
    ends = slice(-100_000, None)  # float64 of all would not fit beside the largest
    wide = None if weight is None else weight.double()
    close(out[ends], rms_norm_reference(x[ends].double(), wide, 0.1))


@pytest.mark.parametrize("columns", [slice(0, 48), slice(16, 64), slice(5, 101)], ids=str)
def test_triton_on_a_part_of_the_columns(columns, device, dtype, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.norm_triton import rms_norm as fast

    torch.manual_seed(0)
    x = torch.randn(65, 144, device=device).to(dtype)[:, columns]
    close(fast(x, None, 1e-5), rms_norm_reference(x.double(), None, 1e-5))
    heads = torch.randn(20, 144, device=device).to(dtype)[:, 48:].unflatten(-1, (2, 48))
    close(fast(heads, None, 1e-5), rms_norm_reference(heads.double(), None, 1e-5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dispatch(device, dtype):
    pytest.importorskip("triton")
    from yoco_eval.kernels.norm_triton import rms_norm as fast

    x = torch.randn(9, 96, device=device).to(dtype)
    assert torch.equal(rms_norm(x), fast(x, None, 1e-5))
    assert torch.equal(rms_norm(x.double()), rms_norm_reference(x.double()))
