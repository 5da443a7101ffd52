"""Rotary embedding: the frequencies, the pairs, and that only distances matter."""

import math

import pytest
import torch

from yoco_eval.kernels.rotary import rotary_angles, rotate


def test_frequencies_reach_one_over_theta_at_the_last_pair():
    cos, sin = rotary_angles(torch.tensor([0, 3]), head_dim=8, theta=100.0, dtype=torch.float64)
    for j in range(4):
        angle = 3 * 100.0 ** (-j / 3)
        assert cos[1, j] == pytest.approx(math.cos(angle)) and cos[0, j] == 1
        assert sin[1, j] == pytest.approx(math.sin(angle)) and sin[0, j] == 0


def test_adjacent_channels_are_pairs():
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    cos, sin = rotary_angles(torch.tensor([2]), head_dim=4, theta=10.0, dtype=torch.float64)
    expected = [cos[0, 0], sin[0, 0], -sin[0, 1], cos[0, 1]]
    torch.testing.assert_close(rotate(x, (cos, sin))[0], torch.stack(expected))


def test_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    products = []
    for p in (0, 5, 1000):
        angles = rotary_angles(torch.tensor([p, p + 7]), 16, 1e4, torch.float64)
        rotated = rotate(torch.cat((k, q)), angles)
        products.append(rotated[0] @ rotated[1])
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])


def test_angles_are_computed_in_float32_at_least():
    cos, _ = rotary_angles(torch.tensor([100_001]), 8, 1e4, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert abs(cos[0, 0].item() - math.cos(100_001)) < 4e-3
