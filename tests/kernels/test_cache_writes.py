"""Writing into the cache: rotated keys, values as they are, at the right slots and no others."""

import pytest
import torch

from yoco_eval.kernels.cache_writes import store_keys_values_reference
from yoco_eval.kernels.rotary import rotary_angles, rotate

LENGTHS = [1, 63, 65, 1000, 32769] if torch.cuda.is_available() else [1, 65]
HEAD_SIZES = [4, 8, 32, 48, 64, 96, 128, 256] if torch.cuda.is_available() else [8, 48]
FIRST = 7


def projections(length, heads, dim, dtype, device):
    """k and v [T, Hkv, D] as one product of both projections makes them, and angles."""
    torch.manual_seed(0)
    both = torch.randn(length, 2 * heads * dim, dtype=dtype, device=device)
    k, v = both.view(length, 2, heads, dim).unbind(1)
    angles = rotary_angles(torch.arange(length, device=device), dim, 1e4, dtype)
    return k, v, angles


def empty_cache(length, heads, dim, dtype, device):
    shape = (2, heads, FIRST + length + 3, dim)
    return torch.full(shape, -7.0, dtype=dtype, device=device)


def expected_cache(k, v, angles):
    """By definition, in float64."""
    length, heads, dim = k.shape
    cache = empty_cache(length, heads, dim, torch.float64, k.device)
    wide = rotate(k.double(), tuple(x.double() for x in angles))
    for t in range(length):
        cache[0, :, FIRST + t] = wide[t]
        cache[1, :, FIRST + t] = v[t]
    return cache


@pytest.mark.parametrize("on_device", [False, True])
def test_store_keys_values(on_device):
    k, v, angles = projections(5, 2, 8, torch.float64, "cpu")
    cache = empty_cache(5, 2, 8, torch.float64, "cpu")
    slots = FIRST + torch.arange(5) if on_device else FIRST
    store_keys_values_reference(k, v, angles, *cache, slots)
    torch.testing.assert_close(cache, expected_cache(k, v, angles))


def check_triton(length, dim, slots, dtype, device, close):
    pytest.importorskip("triton")
    from yoco_eval.kernels.cache_writes_triton import store_keys_values

    k, v, angles = projections(length, 3, dim, dtype, device)
    cache = empty_cache(length, 3, dim, dtype, device)
    store_keys_values(k, v, angles, *cache, slots)
    expected = empty_cache(length, 3, dim, torch.float64, device)
    wide = tuple(x.double() for x in angles)
    store_keys_values_reference(k.double(), v.double(), wide, *expected, FIRST)
    close(cache[0], expected[0])
    assert torch.equal(cache[1].double(), expected[1])  # untouched slots, too


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("on_device", [False, True])
def test_triton_store_keys_values(length, on_device, dtype, device, close):
    slots = FIRST + torch.arange(length, device=device) if on_device else FIRST
    check_triton(length, 64, slots, dtype, device, close)


def test_triton_stores_at_any_slots(dtype, device):
    pytest.importorskip("triton")
    from yoco_eval.kernels.cache_writes_triton import store_keys_values

    k, v, angles = projections(20, 3, 32, dtype, device)
    here, there = (empty_cache(20, 3, 32, dtype, device) for _ in range(2))
    store_keys_values(k, v, angles, *here, FIRST)
    order = torch.randperm(20, device=device)
    store_keys_values(k, v, angles, *there, FIRST + order)
    assert torch.equal(here[:, :, FIRST : FIRST + 20], there[:, :, FIRST + order])


def test_triton_stores_from_any_strides(dtype, device, head_by_head):
    pytest.importorskip("triton")
    from yoco_eval.kernels.cache_writes_triton import store_keys_values

    k, v, angles = projections(20, 3, 32, dtype, device)
    rows, heads = (empty_cache(20, 3, 32, dtype, device) for _ in range(2))
    store_keys_values(k, v, angles, *rows, FIRST)
    store_keys_values(head_by_head(k), head_by_head(v), angles, *heads, FIRST)
    assert torch.equal(rows, heads)


@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_triton_store_head_sizes(dim, dtype, device, close):
    check_triton(20, dim, FIRST, dtype, device, close)
