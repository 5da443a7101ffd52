"""RMSNorm against its equation."""

import torch

from yoco_eval.kernels.norm import rms_norm


def test_rms_norm():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.1)
    torch.testing.assert_close(rms_norm(x, None, 0.1), expected)
    torch.testing.assert_close(rms_norm(x, weight, 0.1), expected * weight)


def test_mean_square_is_taken_in_float32():
    x = torch.full((4096,), 300.0, dtype=torch.float16)  # its square overflows float16
    assert torch.equal(rms_norm(x), torch.ones_like(x))
