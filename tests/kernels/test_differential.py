"""Differences of pairs of heads against their equation, and the Triton kernel against the reference
in float64."""

import pytest
import torch

from yoco_eval.kernels.differential import differential_norm, differential_norm_reference


def arguments(tokens, heads, dim, dtype=torch.float64, device="cpu"):
    torch.manual_seed(tokens)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(tokens, heads, dim).to(device, dtype)
    factor, weight = torch.tensor([0.7]).to(device, wide), torch.randn(dim).to(device, wide)
    return x, factor, weight, 1e-3


def test_equation():
    x, factor, weight, eps = args = arguments(5, 6, 4)
    out = differential_norm(*args)
    for pair in range(3):
        difference = x[:, 2 * pair] - factor * x[:, 2 * pair + 1]
        size = (difference.square().sum(-1, keepdim=True) / 4 + eps).sqrt()
        torch.testing.assert_close(out[:, pair], difference / size * weight)


@pytest.mark.parametrize("shape", [(1, 2, 6), (13, 4, 128), (5, 6, 400), (0, 2, 8)], ids=str)
def test_triton(shape, device, dtype, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.differential_triton import differential_norm as fast

    x, factor, weight, eps = arguments(*shape, dtype, device)
    spread = torch.cat((x, x), 1)[:, : x.shape[1]]  # rows that are further apart
    for out in (fast(x, factor, weight, eps), fast(spread, factor, weight, eps)):
        assert out.dtype == dtype and out.is_contiguous()
        expected = differential_norm_reference(x.double(), factor.double(), weight.double(), eps)
        assert out.shape == expected.shape
        if len(x):
            close(out, expected)
