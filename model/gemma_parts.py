"""Equations that Gemma 3n and 4 have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_eval.kernels.norm import rms_norm


def layer_inputs(
    ids: Tensor,
    x: Tensor,
    layers: range,
    table: Tensor,
    projection: Tensor,
    norm: Tensor,
    eps: float,
    scales: tuple[float, float, float],
) -> Tensor:
    """Inputs of their own that some layers have of tokens: what is looked up for each token, plus
    what is made of its embedding and normed, scaled.

    Args:
        ids: int64 [T], rows of the table.
        x: [T, dim], the tokens' embeddings.
        layers: the layers, one behind the other.
        table: [rows, all layers * channels].
        projection: [all layers * channels, dim].
        norm: [channels], the norm's weight.
        scales: of what is looked up; of what is made, before its norm; of the sum.

    Returns:
        [T, len(layers), channels].
    """
    channels = len(norm)
    part = slice(layers.start * channels, layers.stop * channels)
    found, made, both = scales
    inputs = F.linear(x, projection[part]).mul_(made).unflatten(-1, (-1, channels))
    inputs = rms_norm(inputs, norm, eps)
    inputs.add_(table[:, part].index_select(0, ids).mul_(found).view_as(inputs))
    return inputs.mul_(both)


def rounded(constant: float, dtype: torch.dtype) -> float:
    """A constant as near as a dtype has it: models were trained with constants in bfloat16, which
    may be up to 0.4 % off."""
    return torch.tensor(constant, dtype=dtype).item()


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
