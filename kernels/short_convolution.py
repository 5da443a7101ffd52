"""A short convolution: each channel's last W tokens, weighted, through silu.

    y_p = silu(bias + sum over j < W of weight_j x_(p - W + 1 + j))

per channel, in gated DeltaNet without a bias and in Mamba with one. The weights are in the order of
PyTorch's `conv1d`: the last is that of token p. What a text that goes on needs of the tokens before
it is its tail, the last W - 1 inputs. The sums are taken in float32, or in float64 for float64
inputs. On a GPU both functions are Triton kernels (`short_convolution_triton`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import run_triton, use_triton
from .sequences import Sequences


def short_convolution(
    x: Tensor,
    weight: Tensor,
    sequences: Sequences,
    tails: Tensor | None = None,
    keep: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution over packed sequences, each with its own tail.

    Args:
        x: [T, C], a view with any row stride.
        weight: [C, W] of x's dtype, W at least 2; its fastest layout is the transpose of a
            contiguous [W, C].
        sequences: which tokens form a sequence, and which tail it continues.
        tails: [m, W - 1, C] of x's dtype, the inputs before the sequences, of which
            `sequences.sources` picks each sequence's; None stands for zeros. Not changed.
        keep: whether the tails after the sequences are asked for.
        bias: [C] of x's dtype; None: there is none.

    Returns:
        silu(y) [T, C] in x's dtype, contiguous; and the last W - 1 inputs of each of the n
        sequences, [n, W - 1, C], those of its tail before it where it is shorter, or None unless
        `keep`.
    """
    relay, reach = sequences.relay, weight.shape[1] - 1
    if relay is not None:
        past = None if tails is None else tails[0]
        tails = relay.before(x[-reach:], reach, past)[None]
    if use_triton(x, weight):
        from .short_convolution_triton import short_convolution as fast

        out, after = run_triton(fast, x, weight, sequences, tails, keep, bias)
    else:
        out, after = short_convolution_reference(x, weight, sequences, tails, keep, bias)
    return out, after if relay is None or after is None else relay.after(after)


def short_convolution_reference(
    x: Tensor,
    weight: Tensor,
    sequences: Sequences,
    tails: Tensor | None = None,
    keep: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`short_convolution` in PyTorch, on any device and differentiable."""
    count, before = len(sequences.lengths), weight.shape[1] - 1
    if tails is None:
        tails = x.new_zeros(count, before, x.shape[1])
    elif sequences.sources is not None:
        tails = tails[list(sequences.sources)]

    # Each sequence behind its tail, and the outputs at the tails left out.
    parts = zip(tails, x.split(sequences.lengths), strict=True)
    longer = torch.cat([rows for pair in parts for rows in pair])
    ends = torch.tensor(sequences.offsets[1:], device=x.device)
    ends = ends + before * torch.arange(1, count + 1, device=x.device)
    tokens = torch.ones(len(longer), dtype=torch.bool, device=x.device)
    lengths = torch.tensor(sequences.lengths, device=x.device)
    heads = (ends - lengths - before)[:, None] + torch.arange(before, device=x.device)
    tokens[heads] = False

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, taps = longer.to(dtype), weight.T.to(dtype)
    y = sum(tap * wide[j : len(wide) - before + j] for j, tap in enumerate(taps))
    y = y[tokens[before:]] if bias is None else y[tokens[before:]] + bias.to(dtype)
    out = F.silu(y).to(x.dtype)
    if not keep:
        return out, None
    return out, longer[ends[:, None] - before + torch.arange(before, device=x.device)]


def short_convolution_step(
    x: Tensor, weight: Tensor, tail: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The convolution for one token of each of B sequences.

    Args:
        x: [B, C], weight [C, W] and bias [C], as in `short_convolution`.
        tail: [B, W - 1, C] of x's dtype, contiguous, CHANGED IN PLACE to the tails after the
            tokens.

    Returns:
        silu(y) [B, C] in x's dtype, contiguous.
    """
    if use_triton(x, weight):
        from .short_convolution_triton import short_convolution_step as fast

        return run_triton(fast, x, weight, tail, bias)
    return short_convolution_step_reference(x, weight, tail, bias)


def short_convolution_step_reference(
    x: Tensor, weight: Tensor, tail: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`short_convolution_step` in PyTorch."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    window = torch.cat([tail, x[:, None]], dim=1)
    tail.copy_(window[:, 1:])
    y = (window.to(dtype) * weight.T.to(dtype)).sum(1)
    return F.silu(y if bias is None else y + bias.to(dtype)).to(x.dtype)
