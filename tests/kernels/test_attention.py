"""Sliding-window and cache attention against attention written out position by position."""

import pytest
import torch

from yoco_eval.kernels import attention
from yoco_eval.kernels.attention import cache_attention, sliding_window_attention


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def attend(q, keys, values):
    """One query [D] over keys [n, D] and values [n, D]."""
    return ((keys @ q) / q.shape[0] ** 0.5).softmax(0) @ values


def window_by_definition(q, k, v, window):
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for p in range(q.shape[2]):
                seen = slice(max(0, p - window + 1), p + 1)
                out[b, h, p] = attend(q[b, h, p], k[b, h, seen], v[b, h, seen])
    return out


@pytest.mark.parametrize("window", [1, 2, 8, 100])
@pytest.mark.parametrize("cuts", [[40], [1] * 40, [7, 7, 26], [39, 1], [8, 8, 8, 8, 8]])
def test_sliding_window(window, cuts):
    torch.manual_seed(0)
    q, k, v = (randn(2, 3, 40, 6) for _ in range(3))
    expected = window_by_definition(q, k, v, window)
    past, outputs, start = None, [], 0
    for length in cuts:
        part = slice(start, start := start + length)
        out, past = sliding_window_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], window, past
        )
        outputs.append(out)
        assert past[0].shape[2] == min(start, window - 1)
    torch.testing.assert_close(torch.cat(outputs, 2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("mask_elements", [1, 300, 1 << 25])
def test_cache_attention(heads, mask_elements, monkeypatch):
    """Grouped queries, one cache for several sequences, and any size of query blocks."""
    monkeypatch.setattr(attention, "_MASK_ELEMENTS", mask_elements)
    torch.manual_seed(1)
    query_heads, kv_heads = heads
    q = randn(2, query_heads, 5, 8)
    k, v = randn(1, kv_heads, 30, 8), randn(1, kv_heads, 30, 8)
    tail = torch.rand(5, 7) < 0.5
    out = cache_attention(q, k, v, tail)
    for b in range(2):
        for h in range(query_heads):
            for t in range(5):
                seen = torch.cat((torch.ones(23, dtype=torch.bool), tail[t]))
                kv = h // (query_heads // kv_heads)
                expected = attend(q[b, h, t], k[0, kv, seen], v[0, kv, seen])
                torch.testing.assert_close(out[b, h, t], expected, rtol=0, atol=1e-12)
