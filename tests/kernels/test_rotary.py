"""Rotary embedding: the frequencies, the pairs, and that only distances matter."""

import math

import pytest
import torch

from yoco_eval.kernels.rotary import rotary_angles, rotate, rotate_reference


def test_frequencies_reach_one_over_theta_at_the_last_pair():
    cos, sin = rotary_angles(torch.tensor([0, 3]), head_dim=8, theta=100.0, dtype=torch.float64)
    for j in range(4):
        angle = 3 * 100.0 ** (-j / 3)
        assert cos[1, j] == pytest.approx(math.cos(angle)) and cos[0, j] == 1
        assert sin[1, j] == pytest.approx(math.sin(angle)) and sin[0, j] == 0


def test_each_theta_and_dtype_has_its_own_frequencies():
    position = torch.tensor([3])
    for theta in (10.0, 1e4, 10.0):
        for dtype in (torch.float64, torch.float32):
            cos, _ = rotary_angles(position, 4, theta, dtype)
            assert cos.dtype == dtype
            assert cos[0, 1].item() == pytest.approx(math.cos(3 / theta), abs=1e-6)


def test_pairs_that_are_not_turned():
    """The first ones have the frequencies that they have where all are turned."""
    positions = torch.tensor([0, 3])
    every = rotary_angles(positions, 12, 100.0, torch.float64, endpoint=False)
    some = rotary_angles(positions, 12, 100.0, torch.float64, endpoint=False, turned=2)
    for part, whole, still in zip(some, every, (1.0, 0.0), strict=True):
        assert torch.equal(part[:, :2], whole[:, :2]) and (part[:, 2:] == still).all()


def test_adjacent_channels_are_pairs():
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    cos, sin = rotary_angles(torch.tensor([2]), head_dim=4, theta=10.0, dtype=torch.float64)
    expected = [cos[0, 0], sin[0, 0], -sin[0, 1], cos[0, 1]]
    torch.testing.assert_close(rotate(x, (cos, sin))[0, 0], torch.stack(expected))


def test_each_token_has_its_angles_and_all_its_heads_the_same():
    torch.manual_seed(0)
    angles = rotary_angles(torch.tensor([0, 2, 9]), 6, 10.0, torch.float64)
    packed = torch.randn(3, 5 * 6, dtype=torch.float64)
    x = packed[:, 6:].unflatten(-1, (4, 6))  # as it comes from one product of several
    out = rotate(x, angles)
    assert out.shape == x.shape
    for t in range(3):
        for h in range(4):
            alone = rotate(x[t : t + 1, h : h + 1], tuple(part[t : t + 1] for part in angles))
            assert torch.equal(out[t, h], alone[0, 0])
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])


def test_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    products = []
    for p in (0, 5, 1000):
        angles = rotary_angles(torch.tensor([p, p + 7]), 16, 1e4, torch.float64)
        rotated = rotate(torch.cat((k, q)), angles)
        products.append(rotated[0, 0] @ rotated[1, 0])
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])


def test_angles_are_computed_in_float32_at_least():
    cos, _ = rotary_angles(torch.tensor([100_001]), 8, 1e4, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert abs(cos[0, 0].item() - math.cos(100_001)) < 4e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_may_hold_the_angles():
    positions = torch.tensor([5], device="cuda")
    rotary_angles(positions, 32, 123.0, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cos, _ = rotary_angles(positions, 32, 123.0, torch.float32)
    positions.fill_(7)
    graph.replay()
    assert cos[0, 0].item() == pytest.approx(math.cos(7), abs=1e-5)


SHAPES = [(1, 2), (9, 4), (9, 8), (33, 32), (70, 48), (5, 128), (3, 256)]  # tokens, channels
if torch.cuda.is_available():
    SHAPES += [(600_000, 2)]  # more blocks than the second axis of a launch takes


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("heads", [3, 24])
@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
def test_triton_version(tokens, dim, heads, in_place, dtype, device, close):
    triton_version = pytest.importorskip("yoco_eval.kernels.rotary_triton")
    torch.manual_seed(0)
    whole = torch.randn(tokens, (heads + 1) * dim + 8, device=device).to(dtype)
    x = whole[:, dim:-8].unflatten(1, (heads, dim))  # rows and heads apart as in a projection
    angles = rotary_angles(torch.arange(tokens, device=device) + 1000, dim, 1e4, dtype)
    expected = rotate_reference(x.double(), tuple(part.double() for part in angles))
    rest = torch.cat((whole[:, :dim], whole[:, -8:]), 1)
    out = triton_version.rotate(x, angles, in_place)
    close(out, expected)
    assert (out.data_ptr() == x.data_ptr()) == in_place
    assert torch.equal(torch.cat((whole[:, :dim], whole[:, -8:]), 1), rest)
