"""Capped logits, and what makes probabilities of them."""

import pytest
import torch

from yoco_eval.kernels.logits import normaliser_reference, soft_cap_reference


@pytest.fixture
def triton_logits():
    pytest.importorskip("triton")
    from yoco_eval.kernels import logits_triton

    return logits_triton


def test_references():
    logits = 40 * torch.randn(7, 50, dtype=torch.float64)
    norms, likeliest = normaliser_reference(logits)
    probabilities = (logits - norms[:, None]).exp()
    assert torch.allclose(probabilities.sum(1), norms.new_ones(7))
    assert torch.equal(probabilities.max(1).indices, likeliest)
    assert torch.allclose(soft_cap_reference(logits.clone(), 30.0), 30 * (logits / 30).tanh())


@pytest.mark.parametrize("columns", [100, 4096, 10001])
def test_triton_normaliser(columns, device, dtype, close, triton_logits):
    logits = (9 * torch.randn(5, columns, device=device)).to(dtype)
    logits[1, 3:] = float("-inf")
    logits[2] = logits[2, 0]  # all as likely
    logits[3, columns - 1] = logits[3, 17] = 60.0
    norms, likeliest = triton_logits.normaliser(logits)
    expected, _ = normaliser_reference(logits.double())
    assert norms.dtype == torch.float32 and likeliest.dtype == torch.int64
    close(norms, expected)
    assert likeliest[2] == 0 and likeliest[3] == 17
    assert torch.equal(logits.gather(1, likeliest[:, None])[:, 0], logits.amax(1))


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_no_number_stays_none(wrong, device, triton_logits):
    logits = torch.randn(3, 5000, device=device)
    logits[0, 4500], logits[1] = wrong, float("-inf")
    norms, _ = triton_logits.normaliser(logits)
    assert norms.isfinite().tolist() == [False, False, True]


def test_triton_soft_cap(device, dtype, close, triton_logits):
    logits = (50 * torch.randn(3, 5001, device=device)).to(dtype)
    logits[0, :2] = torch.tensor([float("inf"), float("-inf")])
    expected = soft_cap_reference(logits.double(), 30.0)
    out = triton_logits.soft_cap(logits, 30.0)
    assert out.data_ptr() == logits.data_ptr()
    close(out, expected)
