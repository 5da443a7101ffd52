"""Attention over a sliding window, and of few queries over a long shared cache.

Scores are scaled by head_dim^(-1/2); grouped queries are supported throughout: query head h reads
key-value head h // (Hq / Hkv).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK_ELEMENTS = 1 << 25  # queries are taken in blocks so that no mask is larger than this


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, past: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Each token attends to itself and the `window` - 1 tokens before it.

    Args:
        q, k, v: [B, H, T, D], rotated already.
        window: number of visible tokens, own position included.
        past: keys and values [B, H, P, D], P <= window - 1, of the tokens just before.

    Returns:
        The output [B, H, T, D] and the keys and values to pass as `past` for the next tokens.
    """
    if past is not None:
        k, v = torch.cat((past[0], k), -2), torch.cat((past[1], v), -2)
    length, total = q.shape[-2], k.shape[-2]
    keep = min(window - 1, total)
    following = (k[..., total - keep :, :], v[..., total - keep :, :])

    # Each block of queries meets the keys in reach of any of them: T * (block + window) scores in
    # place of T^2.
    offset = total - length
    block = max(128, min(window, 512))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        reach = slice(max(0, start + offset - window + 1), end + offset)
        i = torch.arange(start + offset, end + offset, device=q.device)[:, None]
        j = torch.arange(reach.start, reach.stop, device=q.device)
        visible = (j <= i) & (j > i - window)
        outputs.append(
            F.scaled_dot_product_attention(
                q[..., start:end, :], k[..., reach, :], v[..., reach, :], attn_mask=visible
            )
        )
    return torch.cat(outputs, dim=-2), following


def cache_attention(q: Tensor, k: Tensor, v: Tensor, tail: Tensor) -> Tensor:
    """Few queries over a long cache whose last keys need a mask and whose others do not.

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, N, D]; B may be 1 for a cache that all sequences share.
        tail: bool [T, M], M <= N: whether query t sees key N - M + m. The N - M keys before are
            visible to every query.

    Returns:
        [B, Hq, T, D].
    """
    batch, query_heads, length, dim = q.shape
    heads, keys = k.shape[1], k.shape[2]
    group = query_heads // heads
    k, v = k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
    outputs = []
    block = max(1, _MASK_ELEMENTS // (keys * group))
    for rows in torch.arange(length, device=q.device).split(block):
        # A group's query heads read the same keys, so they are queries of one head.
        grouped = q[:, :, rows].reshape(batch, heads, group * len(rows), dim)
        visible = F.pad(tail[rows], (keys - tail.shape[1], 0), value=True).repeat(group, 1)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible)
        outputs.append(out.reshape(batch, query_heads, len(rows), dim))
    return torch.cat(outputs, dim=-2)
