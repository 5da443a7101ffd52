"""Rotary position embedding on adjacent pairs of channels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .dispatch import run_triton, use_triton

Angles = tuple[Tensor, Tensor]  # cosines and sines of `rotary_angles`


def rotary_angles(
    positions: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    endpoint: bool = True,
    turned: int | None = None,
) -> Angles:
    """Cosines and sines of p * theta^(-e_j) for pair j of position p.

    Args:
        positions: [T], integers.
        head_dim: even.
        theta: base of the frequencies.
        dtype: of the result. Angles are float32 whatever it is, except float64 for float64.
        endpoint: whether the exponents e_j = j / (head_dim / 2 - 1) reach exactly 1 at the last
            pair, as in the published YOCO; or are the usual j / (head_dim / 2) (RoFormer,
            arXiv:2104.09864).
        turned: how many pairs are turned at all, the first ones; None: all are.

    Returns:
        cos, sin: [T, head_dim / 2] each, of `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = _frequencies(head_dim, theta, wide, positions.device, endpoint, turned)
    angles = positions.to(wide)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@cache
def _frequencies(
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
    endpoint: bool,
    turned: int | None,
) -> Tensor:
    """Of each pair, [head_dim / 2]; kept, so that only the first call copies to the device.

    A CUDA graph may hold `rotary_angles`, therefore, once it has been called outside the graph.
    """
    pairs = head_dim // 2
    # In Python floats, so that every device starts from the same frequencies: at position one
    # million, the last bit of a float32 frequency turns a pair by a visible angle.
    last = max(pairs - 1, 1) if endpoint else pairs
    turned = pairs if turned is None else turned
    frequencies = [theta ** (-j / last) if j < turned else 0.0 for j in range(pairs)]
    return torch.tensor(frequencies, dtype=dtype, device=device)


def rotate(x: Tensor, angles: Angles, in_place: bool = False) -> Tensor:
    """Rotates each pair (2j, 2j + 1) of every head of x [T, H, head_dim].

    Args:
        x: any strides.
        angles: cos and sin [T, head_dim / 2] of `rotary_angles`, in x's dtype.
        in_place: whether x may be overwritten; do not use it afterwards, then.

    Returns:
        [T, H, head_dim].
    """
    if use_triton(x, *angles):
        from .rotary_triton import rotate as fast

        return run_triton(fast, x, angles, in_place)
    return rotate_reference(x, angles)


def rotate_reference(x: Tensor, angles: Angles) -> Tensor:
    """`rotate` in PyTorch."""
    cos, sin = (part[:, None] for part in angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
